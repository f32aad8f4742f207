"""Reads scans on Apache Beam: a replacement for the pool of scan_reader.ScanReader.

    parts/00000000.jsonl      {"of": ..., "deaths": []}, then per scan {"facts": [...] or null, "bytes": 4194304}
    parts/00000000.records    with --records: the records of these scans, concatenated

Workers write the parts. This process reads them in order and numbers the records, so the result equals that of one
machine. Until the run ends, the records are on disk twice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.files import atomic_write, parse_json
from input_pipeline.images import scans
from input_pipeline.index import scan_checks
from input_pipeline.index.scan_checks import Conversion, Key, ScanCheck, ScanTask
from input_pipeline.parallel import beam, chunk_files
from input_pipeline.parallel.resilient_pool import ResilientPool
from input_pipeline.parallel.workers import WorkerError

RECORDS = ".records"
Checked = tuple[ScanCheck | None, bytes | None]


class BeamScanPool(contextlib.AbstractContextManager):
    """Runs `check_scans` on Beam, with the interface of ResilientPool."""

    def __init__(self, directory: Path, timeout: float, runner: str, options: Sequence[str], log):
        self.directory, self.timeout, self.runner, self.options = directory, timeout, runner, options
        self.log: Callable[[str], None] = log
        self.deaths: list[str] = []  # a message for each scan that killed or hung its worker

    def __exit__(self, *_) -> None:
        """No-op: the Beam job ends inside `map`."""

    def map(
        self, function, tasks: Iterable[ScanTask], size: int, conversion: Conversion, *, label, failed
    ) -> Iterator[tuple[list[ScanTask], list[Checked]]]:
        """Yield chunks of tasks and their results, in order. Errors are those of `beam.make_parts`."""
        functions = function, label, failed
        assert functions == (scan_checks.check_scans, scan_checks.task_label, scan_checks.failed_check)
        items = chunk_files.Items.write(self.directory, map(json.dumps, tasks))
        chunk_files.remove_partial_files(self.directory)
        work = functools.partial(_write_part, self.directory, items, conversion)
        # All chunks are submitted: only the worker can see whether files changed after an earlier run wrote a part.
        beam.make_parts(
            self.directory, items, range(items.chunks), work, self.timeout, self.runner, self.options, log=self.log
        )
        for chunk in range(items.chunks):
            chunk_tasks = _tasks(items, chunk)
            results = self._results(chunk, chunk_tasks, conversion)
            for start in range(0, len(chunk_tasks), size):
                part = chunk_tasks[start : start + size]
                yield part, [next(results) for _ in part]

    def _results(self, chunk: int, tasks: list[ScanTask], conversion: Conversion) -> Iterator[Checked]:
        head, lines = _read_part(self.directory, chunk)
        if head["of"] != _identity(tasks, conversion):
            raise WorkerError(
                f"{chunk_files.part_file(self.directory, chunk)} is from an earlier run, and the workers on "
                f"{self.runner} did not replace it: they must see --out under the same path"
            )
        for death in head["deaths"]:
            self.deaths.append(death)
            self.log(death)
        file = chunk_files.part_file(self.directory, chunk, RECORDS) if conversion.records else "/dev/null"
        with open(file, "rb") as records:
            for (_, stamp), (check, length) in zip(tasks, lines, strict=True):
                record = records.read(length) if length >= 0 else None
                if record is not None and len(record) != length:
                    raise WorkerError(f"{file} is truncated: delete it and run again")
                # An unchanged stamp means that an earlier run made this part and saved the check.
                unchanged = check is not None and stamp and check.stamp == stamp
                yield (None, None) if unchanged else (check, record)


def _write_part(
    directory: Path, items: chunk_files.Items, conversion: Conversion, pool: ResilientPool, chunk: int
) -> None:
    """Write the part of a chunk, unless an earlier run wrote it from the same files."""
    tasks = _tasks(items, chunk)
    if _is_current(directory, chunk, tasks, conversion):
        return
    lines, earlier_deaths = [], len(pool.deaths)
    file = chunk_files.part_file(directory, chunk, RECORDS)
    with atomic_write(file, unique=True) as partial, open(partial, "wb") as records:
        for _, results in scan_checks.map_checks(pool, tasks, conversion):
            for check, record in results:
                lines.append({"facts": check, "bytes": -1 if record is None else len(record)})
                records.write(record or b"")
    head = {"of": _identity(tasks, conversion), "deaths": pool.deaths[earlier_deaths:]}
    chunk_files.write_part(directory, chunk, map(json.dumps, [head, *lines]))


def _tasks(items: chunk_files.Items, chunk: int) -> list[ScanTask]:
    return [(tuple(key), stamp) for key, stamp in map(parse_json, items.chunk(chunk))]


def _identity(tasks: Sequence[ScanTask], conversion: Conversion) -> str:
    """Return a checksum of the scans of a part and of their conversion."""
    return hashlib.sha256(json.dumps([[key for key, _ in tasks], repr(conversion)]).encode()).hexdigest()


def _read_part(directory: Path, chunk: int) -> tuple[dict, list[tuple[ScanCheck | None, int]]]:
    with open(chunk_files.part_file(directory, chunk), encoding="utf-8") as lines:
        head, *rest = map(parse_json, lines)
    return head, [(ScanCheck(*line["facts"]) if line["facts"] else None, line["bytes"]) for line in rest]


def _is_current(directory: Path, chunk: int, tasks: list[ScanTask], conversion: Conversion) -> bool:
    """Return whether a part exists, and was made from the scans' current files."""
    if not chunk_files.part_file(directory, chunk).is_file():
        return False
    head, lines = _read_part(directory, chunk)
    if head["of"] != _identity(tasks, conversion) or len(lines) != len(tasks):
        return False
    return all(
        _has_stamp(key, stamp if check is None else check.stamp)
        for (key, stamp), (check, _) in zip(tasks, lines, strict=True)
    )


def _has_stamp(key: Key, stamp: str) -> bool:
    try:
        return bool(stamp) and scan_checks.stamp_of(scans.resolve(key[0], key[1]))[0] == stamp
    except (scans.ScanError, OSError):
        return False
