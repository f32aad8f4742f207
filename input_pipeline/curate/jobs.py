"""Jobs over many items: results in item order, on all cores of a machine or on Apache Beam.

A row function maps (options, item) to a Result, independent of other items. The results of a chunk of items are one
part file (chunk_files.py). A resumed run makes only the missing parts. Merging reads one part at a time.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.files import PARTIAL, parse_json, read_json, write_json
from input_pipeline.parallel import beam, chunk_files, workers
from input_pipeline.parallel.chunk_files import Items
from input_pipeline.parallel.resilient_pool import ResilientPool, no_state
from input_pipeline.reasons import Reasons

VERSION = 3  # increase it when a row function's result for the same item changes
TIMEOUT = 300.0  # seconds for one item, after which its worker counts as hung


@dataclasses.dataclass
class Result:
    """The result of one item. It has plain values only, because it is sent between processes and stored as JSON."""

    tables: dict[str, list] = dataclasses.field(default_factory=dict)  # name of a table -> its rows
    problems: list[dict] = dataclasses.field(default_factory=list)  # {file, row, reason, remedy} of unusable input
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # label -> count

    def add(self, table: str, row) -> None:
        self.tables.setdefault(table, []).append(row)

    def count(self, label: str, more: int = 1) -> None:
        self.counts[label] = self.counts.get(label, 0) + more

    def problem(self, file, row, reason: str, remedy: str = "") -> None:
        problem = {"file": str(file), "row": str(row), "reason": reason, "remedy": remedy}
        # File names may have bytes that are not UTF-8; problems.jsonl shows them as escapes.
        self.problems.append({k: v.encode("utf-8", "backslashreplace").decode() for k, v in problem.items()})

    def error(self, error) -> None:
        """Add a RowError (or another error with the same attributes) as a problem."""
        self.problem(error.file, error.row, error.reason, error.remedy)


RowFunction = Callable[[dict, str], Result]
# progress(task, unit, total) -> done(items, bad items)
Progress = Callable[[str, str, int | None], Callable[[int, int], None]]


def no_progress(*_) -> Callable[[int, int], None]:
    return lambda more, bad: None


def no_log(text: str) -> None:
    pass


def make_results(_, items: Sequence[str], function: RowFunction, options: dict) -> list[str]:
    """Return the results of some items as lines of JSON. Runs in a worker.

    An exception of a row function is a bug of the function: it stops the run, with the item's name.
    """
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
    result.problem(item, 0, reason, "check the file, or run again with fewer --workers")
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
    progress: Progress = no_progress,
    log: Callable[[str], None] = no_log,
) -> Items:
    """Make every part that is missing. `results` then reads them all.

    Args:
      function: a module-level function, so that other processes can import it.
      options: plain values; together with the items they determine the results.
      runner: `local`, or a runner of Apache Beam (beam.py).
      workers: processes of the local runner; None: one per available core; 0: run in this process.
      restart: delete the parts of an earlier run first.
    Raises:
      ValueError: existing parts belong to another tool, other options or other items; or there are no items.
    """
    if restart:
        chunk_files.remove_parts(directory)
    listed = Items.write(directory, items)
    if not len(listed):
        chunk_files.remove_parts(directory)
        raise ValueError("no input found: check the path")
    job = {"version": VERSION, "tool": tool, "options": options, "items": listed.checksum, "chunk": chunk_files.CHUNK}
    file = directory / "parts" / "job.json"
    if file.is_file() and any(file.parent.glob("*.jsonl")):
        before = read_json(file, kind=dict)
        if before != job:
            changed = [key for key in job if before.get(key) != job[key]]
            reason = f"{directory} has results of an interrupted run with other {', '.join(changed)}"
            raise ValueError(f"{reason}: add --restart to discard them, or choose another --out")
    write_json(file, job)
    chunk_files.remove_partial_files(directory, "*")
    missing = array.array("Q", (k for k in range(listed.chunks) if not chunk_files.part_file(directory, k).is_file()))
    done = progress(tool, "items", len(listed))
    done(len(listed) - sum(min(chunk_files.CHUNK, len(listed) - k * chunk_files.CHUNK) for k in missing), 0)
    if runner != beam.LOCAL:
        work = functools.partial(_make_part, directory, listed, function, options)
        count = lambda more: done(more, 0)  # noqa: E731
        beam.make_parts(directory, listed, missing, work, TIMEOUT, runner, runner_options, count, log)
        return listed
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    todo = itertools.chain.from_iterable(map(listed.chunk, missing))
    with ResilientPool(no_state, workers, TIMEOUT, log) as team:
        results = _map(team, todo, function, options)
        for chunk, (_, lines) in zip(missing, results, strict=True):
            chunk_files.write_part(directory, chunk, lines)
            done(len(lines), sum('"problems":[]' not in line for line in lines))
    return listed


def _map(team: ResilientPool, items: Iterable[str], function: RowFunction, options: dict):
    """Yield chunks of items and their results as lines of JSON, in order."""
    return team.map(make_results, items, chunk_files.CHUNK, function, options, label=str, failed=_died)


def _make_part(
    directory: Path, items: Items, function: RowFunction, options: dict, team: ResilientPool, chunk: int
) -> None:
    """Make the part of a chunk. With its first arguments bound, this function is a `beam.Work`."""
    for _, lines in _map(team, items.chunk(chunk), function, options):
        chunk_files.write_part(directory, chunk, lines)


def results(directory: Path, items: Items) -> Iterator[tuple[str, Result]]:
    """Yield every item with its result, in order."""
    for chunk in range(items.chunks):
        with open(chunk_files.part_file(directory, chunk), encoding="utf-8") as lines:
            for name, line in zip(items.chunk(chunk), lines, strict=True):
                yield name, Result(**parse_json(line))


class Report:
    """The final report of a tool: report.json and problems.jsonl.

    If report.json belongs to another tool that writes to the same folder, it is kept, and these files become
    report-TOOL.json and problems-TOOL.jsonl. `dry_run` writes report-TOOL-dry-run.json, so that the report of an actual
    run is kept.
    """

    def __init__(self, directory: Path, tool: str, options: dict, dry_run: bool = False):
        self.directory, self.tool, self.options = directory, tool, options
        suffix = f"-{tool}" if dry_run or _of_other_tool(directory / "report.json", tool) else ""
        suffix += "-dry-run" if dry_run else ""
        self.file, self.problems_file = directory / f"report{suffix}.json", directory / f"problems{suffix}.jsonl"
        self.counts: dict[str, int] = {}  # in the order in which they were first counted
        self.reasons = Reasons(_kind)
        self.more: dict = {}  # additional keys of the report
        directory.mkdir(parents=True, exist_ok=True)
        self._partial = self.problems_file.with_name(self.problems_file.name + PARTIAL)
        self._partial.write_text("", encoding="utf-8")
        self.problems = 0

    def add(self, result: Result) -> None:
        for label, more in result.counts.items():
            self.counts[label] = self.counts.get(label, 0) + more
        self.problems += len(result.problems)
        for problem in result.problems:
            where = "/".join(Path(problem["file"]).parts[-2:])
            self.reasons.add(problem["reason"], f"{where}, row {problem['row']}")
        if result.problems:
            with open(self._partial, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(problem, ensure_ascii=False) + "\n" for problem in result.problems)

    def write(self) -> dict:
        """Write both files. Returns the report, with their names as `files`."""
        os.replace(self._partial, self.problems_file)
        report = {"tool": self.tool, "options": self.options, "counts": self.counts, "problems": self.problems}
        report |= {"reasons": self.reasons.counts(50)} | self.more
        write_json(self.file, report)
        return report | {"files": [self.file.name, self.problems_file.name]}


def _of_other_tool(file: Path, tool: str) -> bool:
    try:
        report = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("tool") not in (None, tool)


def _kind(reason: str) -> str:
    """Return a reason without details, for counting: the text before a colon or a quotation, with N for numbers.

    Unknown keys are kept.
    """
    if reason.startswith("unknown keys: "):
        return reason
    for mark in (": ", " '", ' "', " (", ", to "):
        reason = reason.split(mark, 1)[0]
    return re.sub(r"(?<![\w-])\d[\d,]*(?![\w-])", "N", reason)[:80]
