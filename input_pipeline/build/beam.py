"""The same parts, made by Apache Beam: `--runner direct` here; Dataflow, Flink or Spark elsewhere.

    pip install apache-beam

Workers read the items and write the parts by path: --out and the packages must lie on a file system that all of them
mount under the same path. A part that is there is never made again, so a job that was ended is submitted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from input_pipeline.build import jobs

RUNNERS = {
    "direct": "DirectRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "prism": "PrismRunner",
}


def make_parts(
    directory: Path,
    function: jobs.RowFunction,
    options: dict,
    items: jobs.Items,
    missing: Sequence[int],
    runner: str,
    runner_options: Sequence[str] = (),
) -> None:
    """Makes the parts of the chunks `missing`.

    Raises:
      ValueError: Beam is not installed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"--runner {runner} needs Apache Beam: pip install apache-beam ({error})") from error
    given = PipelineOptions([*runner_options], runner=RUNNERS.get(runner, runner), save_main_session=False)
    make = _MakePart(str(directory), function, options, str(items.file))
    with apache_beam.Pipeline(options=given) as pipeline:
        _ = (
            pipeline
            | "chunks" >> apache_beam.Create([int(k) for k in missing])
            | "spread" >> apache_beam.Reshuffle()
            | "parts" >> apache_beam.Map(make)
        )


class _MakePart:
    """One chunk of items -> its part. An object rather than a closure, so that it travels to workers by name."""

    def __init__(self, directory: str, function: jobs.RowFunction, options: dict, items: str):
        self.directory, self.function, self.options, self.file = directory, function, options, items
        self._items: jobs.Items | None = None

    def __getstate__(self):
        return self.__dict__ | {"_items": None}

    def __call__(self, chunk: int) -> int:
        if self._items is None:
            self._items = jobs.Items(Path(self.file))
        items = self._items[chunk * jobs.CHUNK : (chunk + 1) * jobs.CHUNK]
        lines = jobs.make_results(None, items, self.function, self.options)
        jobs.write_part(Path(self.directory), chunk, lines)
        return chunk
