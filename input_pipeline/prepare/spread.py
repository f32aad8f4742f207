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

from input_pipeline import beam, parts, scans
from input_pipeline.prepare import checking
from input_pipeline.prepare.checking import Conversion, Key, ScanFacts
from input_pipeline.tasks import Team
from input_pipeline.workers import WorkerError

RECORDS = ".records"
Known = tuple[Key, str]  # a scan, and the stamp its files had when they were read before
Checked = tuple[ScanFacts | None, bytes | None]


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
        assert function is checking.check_scans and label is checking.item_label and failed is checking.ended
        items = parts.Items.write(self.directory, map(json.dumps, known))
        parts.sweep(self.directory)
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
                f"{parts.part(self.directory, chunk)} is of an earlier run, and the workers on {self.runner} have not "
                "replaced it: they must see --out under the same path"
            )
        for death in head["deaths"]:
            self.deaths.append(death)
            self.said(death)
        file = parts.part(self.directory, chunk, RECORDS) if conversion.records else "/dev/null"
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
        self._items: parts.Items | None = None

    def __getstate__(self):
        return self.__dict__ | {"_items": None}

    def __call__(self, team: Team, chunk: int) -> None:
        if self._items is None:
            self._items = parts.Items(self.file)
        known, conversion = _items(self._items, chunk), self.conversion
        if _is_good(self.directory, chunk, known, conversion):
            return
        lines, deaths = [], len(team.deaths)
        with parts.whole(parts.part(self.directory, chunk, RECORDS)) as partial, open(partial, "wb") as records:
            made = team.map(
                checking.check_scans, known, conversion.chunk, conversion,
                label=checking.item_label, failed=checking.ended,
            )  # fmt: skip
            for _, results in made:
                for facts, record in results:
                    lines.append({"facts": facts, "bytes": -1 if record is None else len(record)})
                    records.write(record or b"")
        head = {"of": _identity(known, conversion), "deaths": team.deaths[deaths:]}
        parts.write(self.directory, chunk, map(json.dumps, [head, *lines]))


def _items(items: parts.Items, chunk: int) -> list[Known]:
    return [(tuple(key), stamp) for key, stamp in map(json.loads, items.chunk(chunk))]


def _identity(known: Sequence[Known], conversion: Conversion) -> str:
    """What a part is of: its scans, and what is made of them."""
    said = json.dumps([[key for key, _ in known], repr(conversion)])
    return hashlib.sha256(said.encode()).hexdigest()


def _read(directory: Path, chunk: int) -> tuple[dict, list[tuple[ScanFacts | None, int]]]:
    with open(parts.part(directory, chunk), encoding="utf-8") as lines:
        head, *rest = map(json.loads, lines)
    return head, [(ScanFacts(*line["facts"]) if line["facts"] else None, line["bytes"]) for line in rest]


def _is_good(directory: Path, chunk: int, known: list[Known], conversion: Conversion) -> bool:
    if not parts.part(directory, chunk).is_file():
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
        return checking.stamp_of(scans.resolve(key[0], key[1]))[0] == stamp
    except (scans.ScanError, OSError):
        return False
