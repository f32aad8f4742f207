"""Chunks of work on Apache Beam: `--runner direct` here; Dataflow, Flink or Spark elsewhere.

    pip install apache-beam

Workers read the items and write the parts (parts.py) by path: --out and what is read must lie on a file system that all
of them mount under the same path. Each worker keeps a process of its own for the work, which a damaged file may crash
without harm to anything else, as on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from input_pipeline.parallel import chunk_files
from input_pipeline.parallel.team import Team, nothing
from input_pipeline.parallel.workers import WorkerError

LOCAL = "local"
RUNNERS = {
    "direct": "DirectRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "prism": "PrismRunner",
}
LOOK = 2.0  # seconds between two looks at how many parts there are

# work(team, chunk) makes the part of a chunk; `team` has the process that may crash. It travels to workers by pickle.
Work = Callable[[Team, int], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runner",
        default=LOCAL,
        metavar="NAME",
        help="local (default): the cores of this machine; or a runner of Apache Beam: direct, dataflow, flink, spark, "
        "prism or a class name",
    )
    parser.add_argument(
        "--runner-option",
        action="append",
        default=[],
        metavar="--NAME=VALUE",
        help="handed on to Beam, as --runner-option=--flink_master=host:8081; repeatable",
    )


def chosen(args: argparse.Namespace) -> dict:
    """`runner` and `runner_options`, from `add_options`. Raises ValueError."""
    if args.runner == LOCAL and args.runner_option:
        raise ValueError(f"--runner-option {args.runner_option[0]} needs a --runner of Apache Beam")
    if args.runner != LOCAL and args.workers is not None:
        raise ValueError(
            "--workers is for --runner local; Beam's runners have options of their own, as "
            "--runner-option=--direct_num_workers=4"
        )
    return {"runner": args.runner, "runner_options": tuple(args.runner_option)}


def make_parts(
    directory: Path,
    items: chunk_files.Items,
    chunks: Sequence[int],
    work: Work,
    timeout: float,
    runner: str,
    runner_options: Sequence[str] = (),
    done: Callable[[int], None] = lambda more: None,
    said: Callable[[str], None] = lambda what: None,
) -> None:
    """Has every chunk's part made; returns when all are there.

    Args:
      chunks: of the items, whose parts are to be made. timeout: seconds that one item may take.
      done: is told of how many more items are done; said: of options that Beam does not know.
    Raises:
      ValueError: Beam is not installed, or has no such runner.
      WorkerError: the job failed, or its parts are not to be seen from here.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"--runner {runner} needs Apache Beam: pip install apache-beam ({error})") from error
    given = PipelineOptions([*runner_options], runner=RUNNERS.get(runner, runner), save_main_session=False)
    known = given.get_all_options()
    for name in sorted(set(given.get_all_options(drop_default=True, retain_unknown_options=True)) - set(known)):
        said(f"Apache Beam does not know the option --{name}; it is handed on to {runner} as it stands")
    pipeline = apache_beam.Pipeline(options=given)  # raises ValueError for a runner that is none
    numbers = apache_beam.Create([int(k) for k in chunks])
    _ = pipeline | "chunks" >> numbers | "spread" >> apache_beam.Reshuffle() | "parts" >> apache_beam.Map(
        _Worker(work, timeout)
    )  # fmt: skip
    with _watched(directory, items, chunks, done):
        try:
            pipeline.run().wait_until_finish()
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said_last = lines[-1] if lines else type(error).__name__
            raise WorkerError(f"the job on {runner} failed: {said_last[:300]} (what is done is kept)") from error
    lost = [k for k in chunks if not chunk_files.part(directory, k).is_file()]
    if lost:
        raise WorkerError(
            f"the job on {runner} ended, but {len(lost)} of {len(chunks)} parts are not in {directory / 'parts'}: its "
            "workers must see --out under the same path"
        )


class _Worker:
    """Of one Beam worker: the work, and the process for it, which is started with its first chunk."""

    def __init__(self, work: Work, timeout: float):
        self.work, self.timeout = work, timeout
        self._team: Team | None = None

    def __getstate__(self):
        return self.__dict__ | {"_team": None}

    def __call__(self, chunk: int) -> int:
        if self._team is None:
            self._team = Team(nothing, 1, self.timeout)
        self.work(self._team, chunk)
        return chunk


@contextlib.contextmanager
def _watched(
    directory: Path, items: chunk_files.Items, chunks: Sequence[int], done: Callable[[int], None]
) -> Iterator[None]:
    """Tells `done` of parts as they come; no runner says so itself."""
    ended, seen = threading.Event(), set()

    def look() -> None:
        there = {k for k in chunks if k not in seen and chunk_files.part(directory, k).is_file()}
        seen.update(there)
        done(sum(min(chunk_files.CHUNK, len(items) - k * chunk_files.CHUNK) for k in there))

    def watch() -> None:
        while not ended.wait(LOOK):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()
