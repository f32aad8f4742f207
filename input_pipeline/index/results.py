"""Results of the checks of a `prepare` run: the scans and rows in its database, and the state of each row."""

from __future__ import annotations

import functools
import itertools
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence

from input_pipeline.config import SPLITS, DataConfig
from input_pipeline.datasets.base import study_pattern
from input_pipeline.images.planes import Sizes, patch_count, plane_count, released_shape
from input_pipeline.images.scans.base import printable
from input_pipeline.index import database, study_groups
from input_pipeline.index.row_checks import Row, RowCheck, SourceCheck
from input_pipeline.index.scan_checks import Key, ScanCheck

GOOD = "good"


class Results:
    """The checked scans and rows of all sources, stored in the database. `checksums` are from index.table_checksum."""

    def __init__(
        self, config: DataConfig, tables: dict[str, SourceCheck], checksums: dict[str, str], db: sqlite3.Connection
    ):
        self.config, self.tables, self.checksums, self.db = config, tables, checksums, db
        self.names = list(tables)  # the index is the number in the database
        self.row_count = sum(table.rows for table in tables.values())
        self.split = {name: split for split in SPLITS for name in config.sources(split)}
        db.executemany(
            "INSERT INTO sources VALUES (?, ?, ?, ?)",
            [(i, name, self.split[name], tables[name].root) for i, name in enumerate(self.names)],
        )
        self._numbers = {name: i for i, name in enumerate(self.names)}

    def count(self, table: str, *values) -> int:
        """Count the lines of a table, optionally with a condition: `count("facts WHERE fault != ''")`."""
        return self.db.execute(f"SELECT COUNT(*) FROM {table}", values).fetchone()[0]

    def add_mentions(self, rows: Sequence[Row], keys: Sequence[tuple[Key, ...]]) -> None:
        """Add the scans that these rows can use."""
        mentions = [
            (self._numbers[name], row, position, *key)
            for (name, row), row_keys in zip(rows, keys, strict=True)
            for position, key in enumerate(row_keys)
        ]
        self.db.executemany(
            f"INSERT OR IGNORE INTO keys VALUES (NULL, ?, {database.placeholders(len(database.KEY))})",
            [(source, *key) for source, _, _, *key in mentions],
        )
        self.db.executemany(f"INSERT INTO mentions SELECT ?, ?, ?, scan FROM keys WHERE {database.SAME_KEY}", mentions)

    def add_scans(self, checks: Iterable[ScanCheck]) -> None:
        """Add the checks of the next scans, in the order of their numbers."""
        facts = [database.to_facts(check) for check in checks]
        self.db.executemany(f"INSERT INTO facts VALUES (NULL, {database.placeholders(len(database.FACTS))})", facts)

    def add_rows(self, rows: Sequence[Row], checks: Sequence[RowCheck]) -> None:
        """Add the checks of consecutive rows. Their scans must have been added."""
        lines, studies, scans = [], [], self._scans_of(rows)
        for (name, number), row in zip(rows, checks, strict=True):
            source, row_scans = self._numbers[name], scans.get((name, number), [])
            state, file, remedy = self._state(name, row, row_scans)
            lines.append(
                (source, number, row.row_id, row.number, row.task, row.study, row.tokens, row.trained, row.terms)
                + (row.instruction, *row.cut, len(row_scans), state, file, remedy, row.side, row.windows, None, False)
            )
            studies += [(source, number, *study) for study in row.studies]
        self.db.executemany(f"INSERT INTO rows VALUES ({database.placeholders(len(database.ROW))})", lines)
        self.db.executemany("INSERT INTO studies VALUES (NULL, ?, ?, ?, ?)", studies)

    def assign_study_groups(self) -> None:
        """Store the study group of each row of the training sources, and whether it is held out for validation."""
        keys, config = array("q"), self.config
        groups = study_groups.study_groups(self._names_of_rows(keys))
        held = study_groups.held_out(groups, config.validation_share, config.validation_seed)
        lines = zip(groups.tolist(), held.tolist(), keys[0::2], keys[1::2], strict=True)
        self.db.executemany("UPDATE rows SET study_group = ?, held = ? WHERE source = ? AND row = ?", lines)

    def _names_of_rows(self, keys: array) -> Iterator[list[int]]:
        """Yield the names of each row of the training sources, and append its (source, row) to `keys`."""
        lines = self.db.execute(
            "SELECT rows.source, rows.row, row_id, study, keys.root, path, sha256 FROM rows "
            "JOIN sources ON sources.source = rows.source AND split = 'train' "
            "LEFT JOIN mentions ON mentions.source = rows.source AND mentions.row = rows.row "
            "LEFT JOIN keys ON keys.scan = mentions.scan LEFT JOIN facts ON facts.scan = mentions.scan "
            "ORDER BY rows.source, rows.row"
        )
        patterns = {name: study_pattern(fields.get("study")) for name, fields in self.config.sources("train").items()}
        for (source, row, row_id, study), scans in itertools.groupby(lines, lambda line: line[:4]):
            keys.extend((source, row))
            name = self.names[source]
            files = [(root, path, sha256 or "") for *_, root, path, sha256 in scans if path is not None]
            yield study_groups.names_of_row(name, row_id, study, files, patterns[name])

    def _scans_of(self, rows: Sequence[Row]) -> dict[Row, list[ScanCheck]]:
        """Return the scans that each of these rows can use."""
        scans: dict[Row, list[ScanCheck]] = {}
        for name, source_rows in itertools.groupby(rows, lambda row: row[0]):
            numbers = [row for _, row in source_rows]
            lines = self.db.execute(
                f"SELECT row, {database.SCAN} FROM mentions JOIN scans USING (scan) "
                "WHERE mentions.source = ? AND row BETWEEN ? AND ? ORDER BY row, position",
                (self._numbers[name], numbers[0], numbers[-1]),
            )
            for row, *scan in lines:
                scans.setdefault((name, row), []).append(database.from_columns(scan))
        return scans

    def _state(self, name: str, row: RowCheck, scans: list[ScanCheck]) -> tuple[str, str, str]:
        """Return GOOD, or why the row cannot be used, the file at fault, and the remedy."""
        if row.problem is not None:
            return row.problem.reason, row.problem.file, row.problem.remedy
        file = self.tables[name].file
        bad = [scan for scan in scans if scan.fault]
        if bad:
            more = f"; and {len(bad) - 1} more of its scans" if len(bad) > 1 else ""
            remedy = "repair the scan, or remove it from the table; the row can use its other scans"
            if len(scans) == 1:
                remedy = "repair the scan, or remove the row"
            return f"scan {printable(bad[0].path)}: {bad[0].reason}{more}", file, remedy
        problem = self._overflow(row.tokens, [scans[i] for i in row.used])
        if problem:
            return f"does not fit a row: {problem}", file, "increase the limits of a row (data.scans, data.planes, ...)"
        return GOOD, "", ""

    def _overflow(self, tokens: int, used: list[ScanCheck]) -> str | None:
        sizes = [self.sizes(scan) for scan in used]
        if used and self.config.preprocess == "released":
            final = released_shape([scan.depth for scan in used])
            shapes = [((s.height, s.width, s.depth), s.channels) for s in used]
            sizes = [(patch_count(s, "released", final), plane_count(s, c, "released", final)) for s, c in shapes]
        return self.config.limits.overflow(tokens, [n for n, _ in sizes], sum(m for _, m in sizes))

    def sizes(self, scan: ScanCheck) -> tuple[int, int]:
        """Return the patches and planes of a good scan in `paper` mode."""
        return _sizes((scan.height, scan.width, scan.depth), scan.channels, self.config.sizes)

    def scans(self, condition: str = "TRUE") -> Iterator[tuple[str, ScanCheck]]:
        """Yield (source, check) for each scan, in the order of their numbers; the source is the first that names it."""
        lines = self.db.execute(f"SELECT source, {database.SCAN} FROM scans WHERE {condition} ORDER BY scan")
        for source, *scan in lines:
            yield self.names[source], database.from_columns(scan)

    def rows(self, condition: str = "TRUE") -> Iterator[tuple[str, dict]]:
        """Yield (source, columns) for each row, in order."""
        for values in self.db.execute(f"SELECT * FROM rows WHERE {condition} ORDER BY source, row"):
            yield self.names[values[0]], dict(zip(database.ROW, values, strict=True))


@functools.lru_cache(maxsize=4096)
def _sizes(shape: tuple[int, int, int], channels: int, sizes: Sizes) -> tuple[int, int]:
    return patch_count(shape, sizes=sizes), plane_count(shape, channels, sizes=sizes)
