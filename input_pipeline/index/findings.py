"""What `prepare` found, and what follows from it: which rows are good, what is in quarantine, what leaks."""

from __future__ import annotations

import functools
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.config import SPLITS, DataConfig
from input_pipeline.images.planes import Sizes, patch_count, plane_count, released_shape
from input_pipeline.images.scans.base import printable
from input_pipeline.index import database
from input_pipeline.index.checks import Key, RowCheck, ScanCheck, SourceCheck

GOOD = "good"
_ROWS = (
    "source row row_id number task study tokens trained terms instruction cut_context cut_instruction cut_response "
    "cut_scans scans state file remedy".split()
)


class Findings:
    """Everything that was found; what there is of each scan and row lies in the database.

    Attributes:
      tables: source -> what its table says. checksums: source -> index.table_checksum.
      names: the sources by their number in the database. split: source -> its split.
    """

    def __init__(
        self, config: DataConfig, tables: dict[str, SourceCheck], checksums: dict[str, str], db: sqlite3.Connection
    ):
        self.config, self.tables, self.checksums, self.db = config, tables, checksums, db
        self.names = list(tables)
        self.split = {name: split for split in SPLITS for name in config.sources(split)}
        db.executemany(
            "INSERT INTO sources VALUES (?, ?, ?, ?)",
            [(i, name, self.split[name], tables[name].root) for i, name in enumerate(self.names)],
        )
        self._numbers = {name: i for i, name in enumerate(self.names)}

    def count(self, of: str, *values) -> int:
        """Lines of a table, with a condition perhaps: `count("facts WHERE fault != ''")`."""
        return self.db.execute(f"SELECT COUNT(*) FROM {of}", values).fetchone()[0]

    # --- what is put in ---

    def list_scans(self, rows: Sequence[tuple[str, int]], keys: Sequence[tuple[Key, ...]]) -> None:
        """The scans that these rows can use."""
        mentions = []
        for (name, row), of_row in zip(rows, keys, strict=True):
            for place, key in enumerate(of_row):
                mentions.append((self._numbers[name], row, place, *key))
        self.db.executemany(
            f"INSERT OR IGNORE INTO keys VALUES (NULL, ?, {database.marks(len(database.KEY))})",
            [(source, *key) for source, _, _, *key in mentions],
        )
        same = " AND ".join(f"{column} = ?" for column in database.KEY)
        self.db.executemany(f"INSERT INTO mentions SELECT ?, ?, ?, scan FROM keys WHERE {same}", mentions)

    def add_scans(self, facts: Iterable[ScanCheck]) -> None:
        """What the next scans are, in the order of their numbers."""
        skipped = len(database.KEY)
        self.db.executemany(
            f"INSERT INTO facts VALUES (NULL, {database.marks(len(database.FACTS))})",
            [database.values(f)[skipped:] for f in facts],
        )

    def add_rows(self, rows: Sequence[tuple[str, int]], facts: Sequence[RowCheck]) -> None:
        """What these rows are, which follow each other; what their scans are must be known."""
        lines, studies, scans = [], [], self._scans_of(rows)
        for (name, number), row in zip(rows, facts, strict=True):
            source, shown = self._numbers[name], scans.get((name, number), [])
            state, file, remedy = self._state(name, row, shown)
            lines.append(
                (source, number, row.row_id, row.number, row.task, row.study, row.tokens, row.trained, row.terms)
                + (row.instruction, *row.cut, len(shown), state, file, remedy)
            )
            studies += [(source, number, study) for study in row.studies]
        self.db.executemany(f"INSERT INTO rows VALUES ({database.marks(len(_ROWS))})", lines)
        self.db.executemany("INSERT INTO studies VALUES (NULL, ?, ?, ?)", studies)

    def _scans_of(self, rows: Sequence[tuple[str, int]]) -> dict[tuple[str, int], list[ScanCheck]]:
        """The scans that each of these rows can use."""
        scans: dict[tuple[str, int], list[ScanCheck]] = {}
        for name, of_source in itertools.groupby(rows, lambda row: row[0]):
            numbers = [row for _, row in of_source]
            found = self.db.execute(
                f"SELECT row, {database.SCAN} FROM mentions JOIN scans USING (scan) "
                "WHERE mentions.source = ? AND row BETWEEN ? AND ? ORDER BY row, place",
                (self._numbers[name], numbers[0], numbers[-1]),
            )
            for row, *scan in found:
                scans.setdefault((name, row), []).append(database.scan_facts(scan))
        return scans

    def _state(self, name: str, row: RowCheck, scans: list[ScanCheck]) -> tuple[str, str, str]:
        """GOOD or why a row is left out; and then the file at fault and what to do."""
        if row.problem is not None:
            return row.problem.reason, row.problem.file, row.problem.remedy
        file = self.tables[name].file
        bad = [scan for scan in scans if scan.fault]
        if bad:
            more = f"; and {len(bad) - 1} more of its scans" if len(bad) > 1 else ""
            remedy = "repair the scan; or take it out of the table, and the row can do with its other scans"
            if len(scans) == 1:
                remedy = "repair the scan, or remove the row"
            return f"scan {printable(bad[0].path)}: {bad[0].reason}{more}", file, remedy
        problem = self._overflow(row.tokens, [scans[i] for i in row.used])
        if problem:
            return f"does not fit a row: {problem}", file, "allow for more in a row (data.scans, data.planes, ...)"
        return GOOD, "", ""

    def _overflow(self, tokens: int, used: list[ScanCheck]) -> str | None:
        config = self.config
        if config.preprocess == "released":
            final = released_shape([scan.depth for scan in used]) if used else None
            sizes = [
                (
                    patch_count((s.height, s.width, s.depth), "released", final),
                    plane_count((s.height, s.width, s.depth), s.channels, "released", final),
                )
                for s in used
            ]
        else:
            sizes = [self.sizes(scan) for scan in used]
        return config.limits.overflow(tokens, [n for n, _ in sizes], sum(m for _, m in sizes))

    def sizes(self, scan: ScanCheck) -> tuple[int, int]:
        """Patches and planes of a good scan in `paper` mode."""
        return _sizes((scan.height, scan.width, scan.depth), scan.channels, self.config.sizes)

    # --- what is read ---

    def scans(self, condition: str = "TRUE") -> Iterator[tuple[str, ScanCheck]]:
        """(the source that names it first, facts) of every scan, in the order of their numbers."""
        found = self.db.execute(f"SELECT source, {database.SCAN} FROM scans WHERE {condition} ORDER BY scan")
        for source, *scan in found:
            yield self.names[source], database.scan_facts(scan)

    def rows(self, condition: str = "TRUE") -> Iterator[tuple[str, dict]]:
        """(source, columns) of every row, in their order."""
        for values in self.db.execute(f"SELECT * FROM rows WHERE {condition} ORDER BY source, row"):
            yield self.names[values[0]], dict(zip(_ROWS, values, strict=True))


@functools.lru_cache(maxsize=4096)
def _sizes(shape: tuple[int, int, int], channels: int, sizes: Sizes) -> tuple[int, int]:
    return patch_count(shape, sizes=sizes), plane_count(shape, channels, sizes=sizes)


# --- reports ----------------------------------------------------------------------------------------------------------


def quarantine(found: Findings) -> Iterator[dict]:
    """A line for each row of a table that is no sample, each bad scan, and each row that is left out.

    `row` is its number in the table, `id` what it is called elsewhere, if that is something else.
    """
    for name, table in found.tables.items():
        for problem in table.problems:
            yield {"source": name, "kind": "row", **problem._asdict()}
    for owner, scan in found.scans("fault != ''"):
        yield {
            "source": owner,
            "kind": "scan",
            "file": printable(Path(scan.root) / scan.path),
            "scan": printable(scan.path),
            **({"volume": scan.volume} if scan.volume >= 0 else {}),
            **({"window": scan.window} if scan.window else {}),
            "fault": scan.fault,
            "reason": scan.reason,
            "remedy": scan.remedy,
        }
    for name, row in found.rows(f"state != '{GOOD}'"):
        yield {
            "source": name, "kind": "row", "file": row["file"], **_named(row), "reason": row["state"],
            "remedy": row["remedy"],
        }  # fmt: skip


def cut(found: Findings) -> Iterator[dict]:
    """A line for each good row whose texts are longer, or whose scans are more, than a sample takes (in epoch 0)."""
    for name, row in found.rows(f"state = '{GOOD}' AND cut_context + cut_instruction + cut_response + cut_scans > 0"):
        yield {
            "source": name, "file": found.tables[name].file, **_named(row),
            "tokens_cut": {part: row[f"cut_{part}"] for part in ("context", "instruction", "response")},
            "scans_left_out": row["cut_scans"],
        }  # fmt: skip


def _named(row: dict) -> dict[str, str]:
    at = {"row": str(row["number"])} if row["number"] >= 0 else {}
    return at if row["row_id"] == at.get("row") else at | {"id": row["row_id"]}


def duplicates(found: Findings) -> Iterator[dict]:
    """Rows with equal content, and files with equal bytes under several paths."""
    for name, table in found.tables.items():
        for row, earlier in table.duplicates:
            yield {"kind": "row", "source": name, "file": table.file, "row": row, "same_as": earlier}
    found.db.execute("CREATE INDEX IF NOT EXISTS by_content ON facts (sha256)")
    same = found.db.execute(
        "SELECT sha256, root, path FROM scans JOIN (SELECT sha256, MIN(scan) AS first FROM scans WHERE sha256 != '' "
        "GROUP BY sha256 HAVING COUNT(DISTINCT root || '/' || path) > 1) USING (sha256) ORDER BY first, scan"
    )
    for sha256, files in itertools.groupby(same, lambda line: line[0]):
        yield {"kind": "scan", "sha256": sha256, "paths": list(_paths(files))}


def _paths(files: Iterable[tuple]) -> dict[str, None]:
    return {printable(Path(root) / path): None for *_, root, path in files}


def leaks(found: Findings) -> Iterator[dict]:
    """Studies and scans that stand in train and in test, bad rows included: with the rows, or the paths, of both."""
    if not all(found.config.sources(split) for split in SPLITS):
        return
    found.db.execute("CREATE INDEX IF NOT EXISTS by_study ON studies (study)")
    both = f"HAVING COUNT(DISTINCT split) = {len(SPLITS)}"
    rows = found.db.execute(
        "WITH members AS "
        "(SELECT root, study, split, name, source, row, place FROM studies JOIN sources USING (source)), "
        f"shared AS (SELECT root, study, MIN(place) AS first FROM members GROUP BY root, study {both}) "
        "SELECT root, study, split, name, row_id FROM shared JOIN members USING (root, study) "
        "JOIN (SELECT source, row, row_id FROM rows) USING (source, row) ORDER BY first, place"
    )
    for (root, study), members in itertools.groupby(rows, lambda line: line[:2]):
        line: dict = {"kind": "study", "study": study, "root": root, **{split: [] for split in SPLITS}}
        for *_, split, name, row_id in members:
            line[split].append({"source": name, "row": row_id})
        yield line
    found.db.execute("CREATE INDEX IF NOT EXISTS by_content ON facts (sha256)")
    files = found.db.execute(
        "WITH sides AS (SELECT DISTINCT scan, split FROM mentions JOIN sources USING (source)), "
        "shared AS (SELECT sha256, MIN(scan) AS first FROM sides JOIN facts USING (scan) WHERE sha256 != '' "
        f"GROUP BY sha256 {both}) "
        "SELECT sha256, split, root, path FROM shared JOIN scans USING (sha256) JOIN sides USING (scan) "
        "ORDER BY first, scan"
    )
    for sha256, members in itertools.groupby(files, lambda line: line[0]):
        by_split = {split: [] for split in SPLITS}
        for member in members:
            by_split[member[1]].append(member)
        yield {"kind": "scan", "sha256": sha256, **{split: list(_paths(by_split[split])) for split in SPLITS}}
