"""Lines of the report files: quarantine.jsonl, cut.jsonl, duplicates.jsonl and leaks.jsonl."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from input_pipeline.config import SPLITS
from input_pipeline.images.scans.base import printable
from input_pipeline.index.results import GOOD, Results
from input_pipeline.index.scan_checks import ScanCheck


def quarantine(results: Results) -> Iterator[dict]:
    """Yield a line for each table row that could not be opened, each bad scan, and each row that cannot be used.

    `row` is the row number in the table. `id` is the identifier of the row, if that is not the number.
    """
    for name, table in results.tables.items():
        for problem in table.problems:
            yield {"source": name, "kind": "row", **problem._asdict()}
    for name, scan in results.scans("fault != ''"):
        yield {
            "source": name,
            "kind": "scan",
            "file": printable(Path(scan.root) / scan.path),
            "scan": printable(scan.path),
            **_choice(scan),
            **({"window": scan.window} if scan.window else {}),
            "fault": scan.fault,
            "reason": scan.reason,
            "remedy": scan.remedy,
        }
    for name, row in results.rows(f"state != '{GOOD}'"):
        yield {
            "source": name, "kind": "row", "file": row["file"], **_row_names(row), "reason": row["state"],
            "remedy": row["remedy"],
        }  # fmt: skip


def notices(results: Results) -> Iterator[dict]:
    """Yield a line for each notice about a usable scan."""
    for name, scan in results.scans("fault = '' AND notices != '[]'"):
        place = {"source": name, "file": printable(Path(scan.root) / scan.path), "scan": printable(scan.path)}
        place |= _choice(scan)
        place |= {"window": scan.window} if scan.window else {}
        yield from (place | {"notice": notice} for notice in scan.notices)


def cut(results: Results) -> Iterator[dict]:
    """Yield a line for each good row whose texts or scans exceed the limits of a sample at epoch 0."""
    condition = f"state = '{GOOD}' AND cut_context + cut_instruction + cut_response + cut_scans > 0"
    for name, row in results.rows(condition):
        yield {
            "source": name, "file": results.tables[name].file, **_row_names(row),
            "tokens_cut": {part: row[f"cut_{part}"] for part in ("context", "instruction", "response")},
            "scans_left_out": row["cut_scans"],
        }  # fmt: skip


def _row_names(row: dict) -> dict[str, str]:
    number = {"row": str(row["number"])} if row["number"] >= 0 else {}
    return number if row["row_id"] == number.get("row") else number | {"id": row["row_id"]}


def _choice(scan: ScanCheck) -> dict:
    """Return the volume and the series that a row selects, where it does."""
    volume = {"volume": scan.volume} if scan.volume >= 0 else {}
    return volume | ({"series": scan.series} if scan.series else {})


def duplicates(results: Results) -> Iterator[dict]:
    """Yield the rows with equal content, and the groups of paths with equal bytes."""
    for name, table in results.tables.items():
        for row, earlier in table.duplicates:
            yield {"kind": "row", "source": name, "file": table.file, "row": row, "same_as": earlier}
    results.db.execute("CREATE INDEX IF NOT EXISTS by_content ON facts (sha256)")
    lines = results.db.execute(
        "SELECT sha256, root, path FROM scans JOIN (SELECT sha256, MIN(scan) AS first FROM scans WHERE sha256 != '' "
        "GROUP BY sha256 HAVING COUNT(DISTINCT root || '/' || path) > 1) USING (sha256) ORDER BY first, scan"
    )
    for sha256, files in itertools.groupby(lines, lambda line: line[0]):
        yield {"kind": "scan", "sha256": sha256, "paths": _paths(files)}


def _paths(files: Iterable[tuple]) -> list[str]:
    return list(dict.fromkeys(printable(Path(root) / path) for *_, root, path in files))


def leaks(results: Results) -> Iterator[dict]:
    """Yield each study and each scan content that is in several splits, with its rows or paths. Bad rows count too."""
    splits = [split for split in SPLITS if results.config.sources(split)]
    if len(splits) < 2:
        return
    results.db.execute("CREATE INDEX IF NOT EXISTS by_study ON studies (key)")
    both = "HAVING COUNT(DISTINCT split) > 1"
    rows = results.db.execute(
        "WITH members AS "
        "(SELECT root, key, study, split, name, source, row, position FROM studies JOIN sources USING (source)), "
        f"shared AS (SELECT key, MIN(position) AS first FROM members GROUP BY key {both}) "
        "SELECT first, root, study, split, name, row_id FROM shared JOIN members USING (key) "
        "JOIN (SELECT source, row, row_id FROM rows) USING (source, row) ORDER BY first, position"
    )
    for _, members in itertools.groupby(rows, lambda line: line[0]):
        members = list(members)
        roots = list(dict.fromkeys(root for _, root, *_ in members))
        line: dict = {"kind": "study", "study": members[0][2], "roots": roots, **{split: [] for split in splits}}
        for *_, split, name, row_id in members:
            line[split].append({"source": name, "row": row_id})
        yield line
    results.db.execute("CREATE INDEX IF NOT EXISTS by_content ON facts (sha256)")
    files = results.db.execute(
        "WITH sides AS (SELECT DISTINCT scan, split FROM mentions JOIN sources USING (source)), "
        "shared AS (SELECT sha256, MIN(scan) AS first FROM sides JOIN facts USING (scan) WHERE sha256 != '' "
        f"GROUP BY sha256 {both}) "
        "SELECT sha256, split, root, path FROM shared JOIN scans USING (sha256) JOIN sides USING (scan) "
        "ORDER BY first, scan"
    )
    for sha256, members in itertools.groupby(files, lambda line: line[0]):
        members = list(members)
        sides = {split: _paths(member for member in members if member[1] == split) for split in splits}
        yield {"kind": "scan", "sha256": sha256, **sides}
