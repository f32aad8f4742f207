"""What was read, and what follows from it: states of rows, quarantine, duplicates, leaks between the splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from input_pipeline.config import SPLITS, DataConfig
from input_pipeline.planes import patch_count, plane_count, released_shape
from input_pipeline.prepare.checking import Key, RowFacts, ScanFacts, SourceFacts
from input_pipeline.scans.base import printable

GOOD = "good"


@dataclasses.dataclass
class Findings:
    """Everything that was found.

    Attributes:
      tables: source -> what its table says. checksums: source -> index.table_checksum.
      keys: every distinct scan, in the order in which rows name them; owners: the source that names each first.
      row_scans: source -> for each row, the numbers of the scans it can use.
      scans: facts of each scan. rows: source -> facts of each row.
      states: source -> for each row, GOOD or why it is left out.
    """

    config: DataConfig
    tables: dict[str, SourceFacts]
    checksums: dict[str, str]
    keys: list[Key] = dataclasses.field(default_factory=list)
    owners: list[str] = dataclasses.field(default_factory=list)
    row_scans: dict[str, list[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    scans: list[ScanFacts] = dataclasses.field(default_factory=list)
    rows: dict[str, list[RowFacts]] = dataclasses.field(default_factory=dict)
    states: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.split = {name: split for split in SPLITS for name in self.config.sources(split)}

    def each_row(self) -> Iterator[tuple[str, int, RowFacts, tuple[int, ...]]]:
        """(source, number, facts, scans) of every row."""
        for name, facts in self.rows.items():
            for i, (fact, scans) in enumerate(zip(facts, self.row_scans[name], strict=True)):
                yield name, i, fact, scans

    def sizes(self, scan: ScanFacts) -> tuple[int, int]:
        """Patches and planes of a good scan in `paper` mode."""
        shape, sizes = (scan.height, scan.width, scan.depth), self.config.sizes
        return patch_count(shape, sizes=sizes), plane_count(shape, scan.channels, sizes=sizes)


def judge(found: Findings) -> None:
    """Fills `states`."""
    for name in found.tables:
        found.states[name] = []
    for name, _, row, numbers in found.each_row():
        found.states[name].append(_state(found, row, [found.scans[i] for i in numbers]))


def _state(found: Findings, row: RowFacts, scans: list[ScanFacts]) -> str:
    if row.problem is not None:
        return row.problem.reason
    bad = [scan for scan in scans if scan.fault]
    if bad:
        more = f"; and {len(bad) - 1} more of its scans" if len(bad) > 1 else ""
        return f"scan {printable(bad[0].path)}: {bad[0].reason}{more}"
    config, used = found.config, [scans[i] for i in row.used]
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
        sizes = [found.sizes(scan) for scan in used]
    problem = config.limits.overflow(row.tokens, [n for n, _ in sizes], sum(m for _, m in sizes))
    return f"does not fit a row: {problem}" if problem else GOOD


def quarantine(found: Findings) -> Iterator[dict]:
    """A line for each row of a table that is no sample, each bad scan, and each row that is left out.

    `row` is its number in the table, `id` what it is called elsewhere, if that is something else.
    """
    for name, table in found.tables.items():
        for problem in table.problems:
            yield {"source": name, "kind": "row", **problem._asdict()}
    for owner, scan in zip(found.owners, found.scans, strict=True):
        if scan.fault:
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
    for name, i, row, numbers in found.each_row():
        state = found.states[name][i]
        if state == GOOD:
            continue
        problem = row.problem
        if problem is not None:
            file, remedy = problem.file, problem.remedy
        else:
            file, remedy = found.tables[name].file, "allow for more in a row (data.scans, data.planes, ...)"
            if any(found.scans[k].fault for k in numbers):
                remedy = "repair the scan; or take it out of the table, and the row can do with its other scans"
                if len(numbers) == 1:
                    remedy = "repair the scan, or remove the row"
        yield {"source": name, "kind": "row", "file": file, **_named(row), "reason": state, "remedy": remedy}


def cut(found: Findings) -> Iterator[dict]:
    """A line for each good row whose texts are longer, or whose scans are more, than a sample takes (in epoch 0)."""
    for name, i, row, _ in found.each_row():
        if any(row.cut) and found.states[name][i] == GOOD:
            context, instruction, response, scans = row.cut
            yield {
                "source": name, "file": found.tables[name].file, **_named(row),
                "tokens_cut": {"context": context, "instruction": instruction, "response": response},
                "scans_left_out": scans,
            }  # fmt: skip


def _named(row: RowFacts) -> dict[str, str]:
    at = {"row": str(row.number)} if row.number >= 0 else {}
    return at if row.row_id == at.get("row") else at | {"id": row.row_id}


def duplicates(found: Findings) -> Iterator[dict]:
    """Rows with equal content, and files with equal bytes under several paths."""
    for name, table in found.tables.items():
        for row, earlier in table.duplicates:
            yield {"kind": "row", "source": name, "file": table.file, "row": row, "same_as": earlier}
    first: dict[str, ScanFacts] = {}
    paths: dict[str, dict[str, None]] = {}
    for scan in found.scans:
        if scan.sha256 and (before := first.setdefault(scan.sha256, scan))[:2] != scan[:2]:
            same = paths.setdefault(scan.sha256, {printable(Path(before.root) / before.path): None})
            same[printable(Path(scan.root) / scan.path)] = None
    for sha256, same in paths.items():
        yield {"kind": "scan", "sha256": sha256, "paths": list(same)}


def leaks(found: Findings) -> Iterator[dict]:
    """Studies and scans that stand in train and in test, bad rows included: with the rows, or the paths, of both."""
    if not all(found.config.sources(split) for split in SPLITS):
        return
    # A bit for each split: sets of names would take most of the memory of a run over millions of scans.
    bits = {name: 1 << SPLITS.index(split) for name, split in found.split.items()}
    both = (1 << len(SPLITS)) - 1
    studies: dict[tuple[str, str], int] = {}
    of_scan = [0] * len(found.keys)
    for name, _, row, numbers in found.each_row():
        for study in row.studies:
            key = found.tables[name].root, study
            studies[key] = studies.get(key, 0) | bits[name]
        for k in numbers:
            of_scan[k] |= bits[name]
    listed = {key: {split: [] for split in SPLITS} for key, mask in studies.items() if mask == both}
    for name, _, row, _ in found.each_row() if listed else ():
        for study in row.studies:
            if rows := listed.get((found.tables[name].root, study)):
                rows[found.split[name]].append({"source": name, "row": row.row_id})
    for (root, study), rows in listed.items():
        yield {"kind": "study", "study": study, "root": root, **rows}
    files: dict[str, int] = {}
    for scan, mask in zip(found.scans, of_scan, strict=True):
        if scan.sha256:
            files[scan.sha256] = files.get(scan.sha256, 0) | mask
    shared = {sha256: {split: {} for split in SPLITS} for sha256, mask in files.items() if mask == both}
    for scan, mask in zip(found.scans, of_scan, strict=True):
        if paths := shared.get(scan.sha256):
            for i, split in enumerate(SPLITS):
                if mask >> i & 1:
                    paths[split][printable(Path(scan.root) / scan.path)] = None
    for sha256, paths in shared.items():
        yield {"kind": "scan", "sha256": sha256, **{split: list(paths[split]) for split in SPLITS}}
