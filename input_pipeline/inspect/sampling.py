"""Sample the first rows of an epoch from the pipeline, and describe the data that they come from."""

from __future__ import annotations

import dataclasses
import itertools

from input_pipeline.batching.load import RowLoader
from input_pipeline.batching.pipeline import Rows, batches
from input_pipeline.batching.report import PackingReport
from input_pipeline.config import DataConfig
from input_pipeline.index.index import Index
from input_pipeline.inspect.views import RowView, row_view
from input_pipeline.sources import tokenizer_of

SETTINGS = "preprocess intensity fit storage terms mixture seed share_scans max_scans crop index".split()


@dataclasses.dataclass(frozen=True)
class Source:
    """A table of the split."""

    name: str
    family: str
    rows: int  # good ones
    quarantined: int  # rows that the table or `prepare` dropped
    samples: int  # samples that an epoch draws from it
    share: float  # its share of the samples of the epoch


@dataclasses.dataclass(frozen=True)
class Overview:
    """The content of the page's header: data, settings and statistics of the rows shown."""

    config: str
    split: str
    epoch: int
    training: bool
    asked: int  # rows requested; the epoch may have fewer
    settings: dict[str, str]  # the fields of `data` that decide what a row contains
    sources: tuple[Source, ...]
    packing: dict[str, float]  # PackingReport.as_dict of the rows shown
    trained: float  # share of the real tokens that are targets with a weight
    terms: float  # share of the real tokens that are targets with the weight of a term


def first_rows(config: DataConfig, split: str, count: int, epoch: int, name: str) -> tuple[Overview, list[RowView]]:
    """Return the first `count` rows of an epoch, from the pipeline that training uses. `name` is that of the config.

    Raises ValueError and WorkerError as pipeline.Rows does.
    """
    tokenizer, report, views = tokenizer_of(config), PackingReport(config.text_length), []
    index = Index(config.index)
    with Rows(config, split, batch=1, epochs=epoch + 1) as rows:
        bad_lines = rows.pool.submit("counting rows", _bad_lines).result()
        stream = iter(batches(rows))
        stream.set_state(stream.get_state() | {"epoch": epoch})
        for batch in itertools.islice(stream, count):
            report.add(batch.rows)
            arrays, info = {key: value[0] for key, value in batch.arrays.items()}, batch.rows[0]
            notices = index.notices(scan.key for scan in info.slots)
            views.append(row_view(arrays, info, tokenizer, config.num_latents, notices, config.patches))
    fields, sources = config.sources_with_rows(split), []
    described = zip(rows.description["sources"].items(), rows.mixture.counts.tolist(), strict=True)
    for (source, table), samples in described:
        counts = table["rows"], table["left_out"] + bad_lines[source], samples, samples / len(rows.mixture)
        sources.append(Source(source, fields[source]["family"], *counts))
    tokens = max(sum(row.tokens for row in views), 1)
    samples = [sample for row in views for sample in row.samples]
    overview = Overview(
        config=name,
        split=split,
        epoch=epoch,
        training=rows.identity["training"],
        asked=count,
        settings={setting: str(getattr(config, setting)) for setting in SETTINGS},
        sources=tuple(sources),
        packing=report.as_dict(),
        trained=sum(sample.trained for sample in samples) / tokens,
        terms=sum(sample.terms for sample in samples) / tokens,
    )
    return overview, views


def _bad_lines(loader: RowLoader) -> dict[str, int]:
    """Count the lines of each table that are not samples and are therefore absent from the opened data set."""
    return {name: len(dataset.problems) for name, dataset in loader.datasets.items()}
