"""Write the parts of a job (chunk_files.py) on Apache Beam: `--runner direct`, Dataflow, Flink or Spark.

    pip install apache-beam

Workers read the items and write the parts by path, so --out and the data must be on a file system that all of them
mount under the same path. Each Beam worker runs the work in a separate process, so a damaged file can crash only that.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from input_pipeline.parallel import chunk_files
from input_pipeline.parallel.resilient_pool import ResilientPool, no_state
from input_pipeline.parallel.workers import WorkerError

LOCAL = "local"
RUNNERS = ("direct", "dataflow", "flink", "spark", "prism")  # short for DirectRunner, ...
POLL_SECONDS = 2.0  # interval at which finished parts are counted

# work(pool, chunk) writes the part of a chunk; `pool` is the process that may crash. Beam pickles it for its workers.
Work = Callable[[ResilientPool, int], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --runner and --runner-option."""
    parser.add_argument(
        "--runner",
        default=LOCAL,
        metavar="NAME",
        help="local (default): the cores of this machine; or an Apache Beam runner: direct, dataflow, flink, spark, "
        "prism, or a class name",
    )
    parser.add_argument(
        "--runner-option",
        action="append",
        default=[],
        metavar="--NAME=VALUE",
        help="option for Beam, for example --runner-option=--flink_master=host:8081; repeatable",
    )


def runner_arguments(args: argparse.Namespace) -> dict:
    """Return `runner` and `runner_options` from the parsed arguments. Raises ValueError for a wrong combination."""
    if args.runner == LOCAL and args.runner_option:
        raise ValueError(f"--runner-option {args.runner_option[0]} needs a --runner of Apache Beam")
    if args.runner != LOCAL and args.workers is not None:
        raise ValueError(
            "--workers is for --runner local; Beam runners have their own options, for example "
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
    progress: Callable[[int], None] = lambda count: None,
    log: Callable[[str], None] = lambda message: None,
) -> None:
    """Write the part of every chunk on Beam, and wait until all exist.

    Args:
      chunks: numbers of the chunks to process.
      timeout: seconds that one item may take.
      progress: called with the number of newly finished items.
      log: called with a message for each option that Beam does not know.
    Raises:
      ValueError: Beam is not installed, or the runner does not exist.
      WorkerError: the job failed, or its parts are not visible from here.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"--runner {runner} needs Apache Beam: pip install apache-beam ({error})") from error
    class_name = f"{runner.capitalize()}Runner" if runner in RUNNERS else runner
    options = PipelineOptions([*runner_options], runner=class_name, save_main_session=False)
    known = options.get_all_options()
    for name in sorted(set(options.get_all_options(drop_default=True, retain_unknown_options=True)) - set(known)):
        log(f"Apache Beam does not know the option --{name}; it is passed to {runner} unchanged")
    pipeline = apache_beam.Pipeline(options=options)  # raises ValueError for an unknown runner
    numbers = apache_beam.Create([int(k) for k in chunks])
    _ = pipeline | "chunks" >> numbers | "spread" >> apache_beam.Reshuffle() | "parts" >> apache_beam.Map(
        _ChunkWorker(work, timeout)
    )  # fmt: skip
    with _count_parts(directory, items, chunks, progress):
        try:
            pipeline.run().wait_until_finish()
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            last_line = lines[-1] if lines else type(error).__name__
            raise WorkerError(f"the job on {runner} failed: {last_line[:300]} (finished parts are kept)") from error
    missing = [k for k in chunks if not chunk_files.part_file(directory, k).is_file()]
    if missing:
        raise WorkerError(
            f"the job on {runner} ended, but {len(missing)} of {len(chunks)} parts are not in {directory / 'parts'}: "
            "its workers must see --out under the same path"
        )


class _ChunkWorker:
    """Runs the work in one Beam worker, in a process that starts with the first chunk."""

    def __init__(self, work: Work, timeout: float):
        self.work, self.timeout = work, timeout
        self._pool: ResilientPool | None = None

    def __getstate__(self):
        return self.__dict__ | {"_pool": None}

    def __call__(self, chunk: int) -> int:
        if self._pool is None:
            self._pool = ResilientPool(no_state, 1, self.timeout)
        self.work(self._pool, chunk)
        return chunk


@contextlib.contextmanager
def _count_parts(
    directory: Path, items: chunk_files.Items, chunks: Sequence[int], progress: Callable[[int], None]
) -> Iterator[None]:
    """Report finished parts to `progress` while the block runs. Beam runners report no progress."""
    stop, counted = threading.Event(), set()

    def count() -> None:
        new = {k for k in chunks if k not in counted and chunk_files.part_file(directory, k).is_file()}
        counted.update(new)
        progress(sum(min(chunk_files.CHUNK, len(items) - k * chunk_files.CHUNK) for k in new))

    def poll() -> None:
        while not stop.wait(POLL_SECONDS):
            count()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        count()
