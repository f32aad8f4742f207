"""The reading of scans on Apache Beam: what `Team.map(check_scans, ...)` does on one machine.

    parts/00000000.jsonl      {"of": ..., "deaths": 0}, then for each scan {"facts": [...] or null, "bytes": 4194304}
    parts/00000000.records    with --records: the records of these scans, one after another

Workers write the parts, and one process, here, goes through them in order and numbers the records: the index and the
records are those of one machine. Until then the records stand in the parts as well: the disk must hold them twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from input_pipeline.images import scans
from input_pipeline.index import checks
from input_pipeline.index.checks import Conversion, Key, ScanCheck
from input_pipeline.parallel import beam, chunk_files
from input_pipeline.parallel.team import Team
from input_pipeline.parallel.workers import WorkerError

RECORDS = ".records"
Known = tuple[Key, str]  # a scan, and the stamp its files had when they were read before
Checked = tuple[ScanCheck | None, bytes | None]


class Readers:
    """In the place of a Team whose workers read scans.

    Attributes:
      deaths: a line for each scan that ended the process that read it.
    """

    def __init__(self, directory: Path, timeout: float, runner: str, options: Sequence[str], said):
        self.directory, self.timeout, self.runner, self.options = directory, timeout, runner, options
        self.said: Callable[[str], None] = said
        self.deaths: list[str] = []

    def map(
        self, function, known: Sequence[Known], size: int, conversion: Conversion, *, label, failed
    ) -> Iterator[tuple[list[Known], list[Checked]]]:
        """As Team.map. Raises WorkerError as beam.make_parts does, ValueError without Beam."""
        assert function is checks.check_scans and label is checks.item_label and failed is checks.ended
        items = chunk_files.Items.write(self.directory, map(json.dumps, known))
        chunk_files.sweep(self.directory)
        work = _Work(self.directory, items.file, conversion)
        # Every chunk is looked at, as files may have changed since an earlier run made its part: the worker sees that.
        beam.make_parts(
            self.directory, items, range(items.chunks), work, self.timeout, self.runner, self.options, said=self.said
        )
        for chunk in range(items.chunks):
            there = _items(items, chunk)
            results = self._results(chunk, there, conversion)
            for at in range(0, len(there), size):
                yield there[at : at + size], [next(results) for _ in there[at : at + size]]

    def _results(self, chunk: int, known: list[Known], conversion: Conversion) -> Iterator[Checked]:
        head, lines = _read(self.directory, chunk)
        if head["of"] != _identity(known, conversion):
            raise WorkerError(
                f"{chunk_files.part(self.directory, chunk)} is of an earlier run, and the workers on {self.runner} "
                "have not replaced it: they must see --out under the same path"
            )
        for death in head["deaths"]:
            self.deaths.append(death)
            self.said(death)
        file = chunk_files.part(self.directory, chunk, RECORDS) if conversion.records else "/dev/null"
        with open(file, "rb") as records:
            for (_, stamp), (facts, length) in zip(known, lines, strict=True):
                record = records.read(length) if length >= 0 else None
                if record is not None and len(record) != length:
                    raise WorkerError(f"{file} was cut: delete it and run again")
                # Made by an earlier run, whose journal has it already.
                same = facts is not None and stamp and facts.stamp == stamp
                yield (None, None) if same else (facts, record)


class _Work:
    """beam.Work: a chunk of scans -> its part, unless an earlier run made it of the same files."""

    def __init__(self, directory: Path, items: Path, conversion: Conversion):
        self.directory, self.file, self.conversion = directory, items, conversion
        self._items: chunk_files.Items | None = None

    def __getstate__(self):
        return self.__dict__ | {"_items": None}

    def __call__(self, team: Team, chunk: int) -> None:
        if self._items is None:
            self._items = chunk_files.Items(self.file)
        known, conversion = _items(self._items, chunk), self.conversion
        if _is_good(self.directory, chunk, known, conversion):
            return
        lines, deaths = [], len(team.deaths)
        with (
            chunk_files.whole(chunk_files.part(self.directory, chunk, RECORDS)) as partial,
            open(partial, "wb") as records,
        ):
            made = team.map(
                checks.check_scans, known, conversion.chunk, conversion,
                label=checks.item_label, failed=checks.ended,
            )  # fmt: skip
            for _, results in made:
                for facts, record in results:
                    lines.append({"facts": facts, "bytes": -1 if record is None else len(record)})
                    records.write(record or b"")
        head = {"of": _identity(known, conversion), "deaths": team.deaths[deaths:]}
        chunk_files.write(self.directory, chunk, map(json.dumps, [head, *lines]))


def _items(items: chunk_files.Items, chunk: int) -> list[Known]:
    return [(tuple(key), stamp) for key, stamp in map(json.loads, items.chunk(chunk))]


def _identity(known: Sequence[Known], conversion: Conversion) -> str:
    """What a part is of: its scans, and what is made of them."""
    said = json.dumps([[key for key, _ in known], repr(conversion)])
    return hashlib.sha256(said.encode()).hexdigest()


def _read(directory: Path, chunk: int) -> tuple[dict, list[tuple[ScanCheck | None, int]]]:
    with open(chunk_files.part(directory, chunk), encoding="utf-8") as lines:
        head, *rest = map(json.loads, lines)
    return head, [(ScanCheck(*line["facts"]) if line["facts"] else None, line["bytes"]) for line in rest]


def _is_good(directory: Path, chunk: int, known: list[Known], conversion: Conversion) -> bool:
    if not chunk_files.part(directory, chunk).is_file():
        return False
    head, lines = _read(directory, chunk)
    if head["of"] != _identity(known, conversion) or len(lines) != len(known):
        return False
    return all(
        _holds(key, stamp if facts is None else facts.stamp)
        for (key, stamp), (facts, _) in zip(known, lines, strict=True)
    )


def _holds(key: Key, stamp: str) -> bool:
    """Whether the files of a scan are those of this stamp."""
    if not stamp:
        return False
    try:
        return checks.stamp_of(scans.resolve(key[0], key[1]))[0] == stamp
    except (scans.ScanError, OSError):
        return False
