"""Many items, one row function, one ordered result: on all cores of a machine, or on Apache Beam.

    items      PMC1.tar.gz  PMC2.tar.gz | PMC3.tar.gz  PMC4.tar.gz | PMC5.tar.gz
    chunks     0                        | 1                        | 2
    parts      parts/00000000.jsonl       parts/00000001.jsonl       parts/00000002.jsonl

A row function maps (options, item) to a Result and knows no other item. A chunk's results become one part, renamed into
place when it is whole, so a run that is ended goes on with the parts that are missing, and the parts are the same
whoever makes them. Merging reads one part at a time: nothing here grows with the number of items but a list of offsets,
8 bytes a chunk.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline import workers
from input_pipeline.prepare.checking import nothing
from input_pipeline.prepare.tasks import Team
from input_pipeline.prepare.writing import replacing, write_text

VERSION = 1  # raise it when a row function makes something else of the same item
CHUNK = 64
TIMEOUT = 300.0  # seconds that one item may take before its worker counts as hung


@dataclasses.dataclass
class Result:
    """What one item became; plain values only, as it travels between processes and through JSON.

    Attributes:
      tables: name of a table -> its rows.
      problems: {file, row, reason, remedy} of what could not be used.
      counts: what was counted -> how many.
    """

    tables: dict[str, list] = dataclasses.field(default_factory=dict)
    problems: list[dict] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, table: str, row) -> None:
        self.tables.setdefault(table, []).append(row)

    def count(self, what: str, more: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + more

    def problem(self, file, row, reason: str, remedy: str = "") -> None:
        self.problems.append({"file": str(file), "row": str(row), "reason": reason, "remedy": remedy})


RowFunction = Callable[[dict, str], Result]
# (what is done, unit, how many) -> a function that is told how many more are done, and how many of them were bad
Progress = Callable[[str, str, int | None], Callable[[int, int], None]]


def silent(*_) -> Callable[[int, int], None]:
    return lambda more, bad: None


class Items(Sequence):
    """The items of a job, in a file, one a line; a slice is read when it is asked for."""

    def __init__(self, file: Path):
        self.file, self._starts, self._length = file, array.array("Q"), 0
        digest = hashlib.sha256()
        with open(file, "rb") as lines:
            at = 0
            for line in lines:
                if self._length % CHUNK == 0:
                    self._starts.append(at)
                self._length += 1
                at += len(line)
                digest.update(line)
        self.checksum = digest.hexdigest()

    @classmethod
    def write(cls, file: Path, items: Iterable[str]) -> Items:
        """The items of an iterable, which may be longer than memory."""
        with replacing(file) as partial, open(partial, "w", encoding="utf-8", errors="surrogateescape") as out:
            for item in items:
                if "\n" in item:
                    raise ValueError(f"{item!r}: a name must not hold a line end; rename it")
                out.write(item + "\n")
        return cls(file)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k):
        if isinstance(k, int):
            return self[k : k + 1][0] if k < self._length else _out_of_range(k)
        low, high, step = k.indices(self._length)
        assert step == 1, step
        if low >= high:
            return []
        first = low // CHUNK
        with open(self.file, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            lines.seek(self._starts[first])
            for _ in range(low - first * CHUNK):
                lines.readline()
            return [lines.readline().rstrip("\n") for _ in range(high - low)]


def _out_of_range(k):
    raise IndexError(k)


class _Missing(Sequence):
    """The items of the chunks that have no part yet, as one sequence whose every CHUNK items are one chunk."""

    def __init__(self, items: Items, chunks: Sequence[int]):
        self.items, self.chunks = items, chunks
        short = len(items) % CHUNK
        last = bool(chunks) and short and chunks[-1] == len(items) // CHUNK
        self._length = len(chunks) * CHUNK - (CHUNK - short if last else 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: slice):
        chunk = self.chunks[k.start // CHUNK]
        return self.items[chunk * CHUNK : (chunk + 1) * CHUNK]


def make_results(_, items: Sequence[str], function: RowFunction, options: dict) -> list[str]:
    """In a worker: the results of some items, as lines of JSON. What a row function raises is its own fault: it stops
    the run with the item's name."""
    lines = []
    for item in items:
        workers.at(item)
        try:
            lines.append(as_line(function(options, item)))
        except Exception as error:
            error.add_note(f"at {item}")
            raise
    return lines


def as_line(result: Result) -> str:
    return json.dumps(dataclasses.asdict(result), ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _died(item: str, reason: str) -> str:
    result = Result()
    result.problem(item, 0, reason, "look at the file, or run again with fewer --workers")
    return as_line(result)


def part_file(directory: Path, chunk: int) -> Path:
    return directory / "parts" / f"{chunk:08d}.jsonl"


def write_part(directory: Path, chunk: int, lines: Sequence[str]) -> None:
    write_text(part_file(directory, chunk), "".join(line + "\n" for line in lines))


def run(
    directory: Path,
    tool: str,
    function: RowFunction,
    options: dict,
    items: Iterable[str],
    *,
    runner: str = "local",
    workers: int | None = None,
    restart: bool = False,
    runner_options: Sequence[str] = (),
    progress: Progress = silent,
    said: Callable[[str], None] = lambda _: None,
) -> Items:
    """Makes every part that is missing. Afterwards `results` has them all.

    Args:
      function: of a module, so that other processes find it by its name.
      options: plain values; with the items they decide what comes out.
      runner: `local`, or a runner of Apache Beam (`direct`, `dataflow`, `flink`, `spark`, or a Beam class name).
      workers: processes of the local runner; None: the cores that this process may use; 0: none beside this one.
      restart: throw earlier parts away.
    Raises:
      ValueError: the parts there are of another tool, other options or other items; no items at all.
    """
    listed = Items.write(directory / "items.txt", items)
    if not len(listed):
        raise ValueError("there is nothing to read: check the path")
    job = {"version": VERSION, "tool": tool, "options": options, "items": listed.checksum, "chunk": CHUNK}
    file, parts = directory / "job.json", directory / "parts"
    if restart and parts.exists():
        shutil.rmtree(parts)
    if file.is_file() and parts.exists() and any(parts.iterdir()):
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != job:
            changed = [key for key in job if before.get(key) != job[key]]
            raise ValueError(
                f"{directory} holds a part of a run with other {', '.join(changed)}: add --restart to begin anew, or "
                "choose another --out"
            )
    write_text(file, json.dumps(job, indent=1, ensure_ascii=False) + "\n")
    parts.mkdir(exist_ok=True)
    for stale in parts.glob("*.partial"):
        stale.unlink()
    chunks = (len(listed) + CHUNK - 1) // CHUNK
    missing = array.array("Q", (k for k in range(chunks) if not part_file(directory, k).is_file()))
    done = progress(tool, "items", len(listed))
    todo = _Missing(listed, missing)
    done(len(listed) - len(todo), 0)
    if runner != "local":
        # Imported late: Beam is an optional extra, and takes seconds to import.
        from input_pipeline.build import beam

        beam.make_parts(directory, function, options, listed, missing, runner, runner_options)
        done(len(todo), 0)
        return listed
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with Team(nothing, workers, TIMEOUT, said) as team:
        results = team.map(make_results, todo, CHUNK, function, options, label=str, failed=_died)
        for chunk, (_, lines) in zip(missing, results, strict=True):
            write_part(directory, chunk, lines)
            done(len(lines), sum('"problems":[]' not in line for line in lines))
    return listed


def results(directory: Path, items: Items) -> Iterator[tuple[str, Result]]:
    """Every item with its result, in order."""
    for chunk in range((len(items) + CHUNK - 1) // CHUNK):
        names = items[chunk * CHUNK : (chunk + 1) * CHUNK]
        with open(part_file(directory, chunk), encoding="utf-8") as lines:
            for name, line in zip(names, lines, strict=True):
                yield name, Result(**json.loads(line))


def clean(directory: Path) -> None:
    """After the tables are written: what only a resumed run needs."""
    shutil.rmtree(directory / "parts")
    (directory / "items.txt").unlink()
    (directory / "job.json").unlink()


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps other builders out of it; the operating system ends that with the process."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another build is writing {directory}: wait for it, or end it first") from None
        yield


class Report:
    """What a tool says in the end: report.json, problems.jsonl, and the same as text.

    Attributes:
      counts: in the order in which they were first counted.
    """

    def __init__(self, directory: Path, tool: str, options: dict):
        self.directory, self.tool, self.options = directory, tool, options
        self.counts: dict[str, int] = {}
        self.reasons: collections.Counter[str] = collections.Counter()
        self.more: dict = {}
        self._started = time.monotonic()
        self._file = directory / "problems.jsonl.partial"
        self._file.write_text("", encoding="utf-8")
        self.problems = 0

    def add(self, result: Result) -> None:
        for what, more in result.counts.items():
            self.counts[what] = self.counts.get(what, 0) + more
        self.problems += len(result.problems)
        self.reasons.update(_kind(problem["reason"]) for problem in result.problems)
        if result.problems:
            with open(self._file, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(problem, ensure_ascii=False) + "\n" for problem in result.problems)

    def write(self) -> dict:
        """Puts the files into place; returns report.json."""
        os.replace(self._file, self.directory / "problems.jsonl")
        report = {
            "tool": self.tool,
            "options": self.options,
            "counts": self.counts,
            "problems": self.problems,
            "reasons": dict(self.reasons.most_common(50)),
            **self.more,
        }
        write_text(self.directory / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        return report


def _kind(reason: str) -> str:
    """A reason without its particulars, to count by: what stands before a colon or a quotation."""
    for mark in (": ", " '", ' "', " ("):
        reason = reason.split(mark, 1)[0]
    return reason[:80]
