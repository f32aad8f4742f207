"""Many items, one row function, one ordered result: on all cores of a machine, or on Apache Beam.

A row function maps (options, item) to a Result and knows no other item. The results of a chunk of items are one part
(parts.py): a run that is ended goes on with the parts that are missing. Merging reads one part at a time.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.files import write_text
from input_pipeline.parallel import beam, chunk_files, workers
from input_pipeline.parallel.chunk_files import Items
from input_pipeline.parallel.resilient_pool import ResilientPool, no_state

VERSION = 1  # raise it when a row function makes something else of the same item
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
        said = {"file": str(file), "row": str(row), "reason": reason, "remedy": remedy}
        # Names of files may hold bytes that are not UTF-8: problems.jsonl shows those as escapes.
        self.problems.append({k: v.encode("utf-8", "backslashreplace").decode() for k, v in said.items()})


RowFunction = Callable[[dict, str], Result]
# (what is done, unit, how many) -> a function that is told how many more are done, and how many of them were bad
Progress = Callable[[str, str, int | None], Callable[[int, int], None]]


def silent(*_) -> Callable[[int, int], None]:
    return lambda more, bad: None


class _Missing(Sequence):
    """The items of the chunks that have no part yet, as one sequence whose every parts.CHUNK items are one chunk."""

    def __init__(self, items: Items, chunks: Sequence[int]):
        self.items, self.chunks = items, chunks
        short = len(items) % chunk_files.CHUNK
        last = bool(chunks) and short and chunks[-1] == items.chunks - 1
        self._length = len(chunks) * chunk_files.CHUNK - (chunk_files.CHUNK - short if last else 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: slice):
        return self.items.chunk(self.chunks[k.start // chunk_files.CHUNK])


def make_results(_, items: Sequence[str], function: RowFunction, options: dict) -> list[str]:
    """In a worker: the results of some items, as lines of JSON. What a row function raises is its own fault: it stops
    the run with the item's name."""
    lines = []
    for item in items:
        workers.heartbeat(item)
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
    if restart:
        chunk_files.remove_parts(directory)
    listed = Items.write(directory, items)
    if not len(listed):
        chunk_files.remove_parts(directory)
        raise ValueError("there is nothing to read: check the path")
    job = {"version": VERSION, "tool": tool, "options": options, "items": listed.checksum, "chunk": chunk_files.CHUNK}
    file = directory / "parts" / "job.json"
    if file.is_file() and any(file.parent.glob("*.jsonl")):
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != job:
            changed = [key for key in job if before.get(key) != job[key]]
            raise ValueError(
                f"{directory} holds a part of a run with other {', '.join(changed)}: add --restart to begin anew, or "
                "choose another --out"
            )
    write_text(file, json.dumps(job, indent=1, ensure_ascii=False) + "\n")
    chunk_files.remove_partial_files(directory, "*")
    missing = array.array("Q", (k for k in range(listed.chunks) if not chunk_files.part_file(directory, k).is_file()))
    done = progress(tool, "items", len(listed))
    todo = _Missing(listed, missing)
    done(len(listed) - len(todo), 0)
    if runner != beam.LOCAL:
        work = _Work(directory, listed.file, function, options)
        beam.make_parts(
            directory, listed, missing, work, TIMEOUT, runner, runner_options, lambda more: done(more, 0), said
        )
        return listed
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ResilientPool(no_state, workers, TIMEOUT, said) as team:
        results = _made(team, itertools.chain.from_iterable(map(listed.chunk, missing)), function, options)
        for chunk, (_, lines) in zip(missing, results, strict=True):
            chunk_files.write_part(directory, chunk, lines)
            done(len(lines), sum('"problems":[]' not in line for line in lines))
    return listed


def _made(
    team: ResilientPool, items: Iterable[str], function: RowFunction, options: dict
) -> Iterator[tuple[list, list]]:
    return team.map(make_results, items, chunk_files.CHUNK, function, options, label=str, failed=_died)


class _Work:
    """beam.Work: a chunk of items -> its part."""

    def __init__(self, directory: Path, items: Path, function: RowFunction, options: dict):
        self.directory, self.file, self.function, self.options = directory, items, function, options
        self._items: Items | None = None

    def __getstate__(self):
        return self.__dict__ | {"_items": None}

    def __call__(self, team: ResilientPool, chunk: int) -> None:
        if self._items is None:
            self._items = Items(self.file)
        for _, lines in _made(team, self._items.chunk(chunk), self.function, self.options):
            chunk_files.write_part(self.directory, chunk, lines)


def results(directory: Path, items: Items) -> Iterator[tuple[str, Result]]:
    """Every item with its result, in order."""
    for chunk in range(items.chunks):
        with open(chunk_files.part_file(directory, chunk), encoding="utf-8") as lines:
            for name, line in zip(items.chunk(chunk), lines, strict=True):
                yield name, Result(**json.loads(line))


class Report:
    """What a tool says in the end: report.json, problems.jsonl, and the same as text.

    Where report.json is another tool's, as in a folder that two tools write to, that one stays with its problems, and
    these are report-TOOL.json and problems-TOOL.jsonl.

    Args:
      trial: nothing was made, only tried: report-TOOL-dry-run.json, so that no report of what was made is lost.
    Attributes:
      counts: in the order in which they were first counted.
      file, listed: the report and the list of problems.
    """

    def __init__(self, directory: Path, tool: str, options: dict, trial: bool = False):
        self.directory, self.tool, self.options = directory, tool, options
        end = f"-{tool}-dry-run" if trial else f"-{tool}" if _is_of_another(directory / "report.json", tool) else ""
        self.file, self.listed = directory / f"report{end}.json", directory / f"problems{end}.jsonl"
        self.counts: dict[str, int] = {}
        self.reasons: collections.Counter[str] = collections.Counter()
        self.more: dict = {}
        self._started = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)
        self._file = self.listed.with_name(self.listed.name + ".partial")
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
        """Puts the files into place; returns the report, with their names as `files`."""
        os.replace(self._file, self.listed)
        report = {
            "tool": self.tool,
            "options": self.options,
            "counts": self.counts,
            "problems": self.problems,
            "reasons": dict(self.reasons.most_common(50)),
            **self.more,
        }
        write_text(self.file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        return report | {"files": [self.file.name, self.listed.name]}


def _is_of_another(file: Path, tool: str) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("tool") not in (None, tool)


def _kind(reason: str) -> str:
    """A reason without its particulars, to count by: what stands before a colon or a quotation, numbers as N."""
    for mark in (": ", " '", ' "', " (", ", to "):
        reason = reason.split(mark, 1)[0]
    return re.sub(r"(?<![\w-])\d[\d,]*(?![\w-])", "N", reason)[:80]
