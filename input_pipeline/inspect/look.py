"""Takes the first rows of an epoch out of the pipeline, and says what they were drawn from."""

from __future__ import annotations

import dataclasses

from input_pipeline.batching.pipeline import PackingReport, Rows, batches
from input_pipeline.batching.rows import RowMaker
from input_pipeline.config import DataConfig
from input_pipeline.inspect.facts import RowView, row_facts
from input_pipeline.sources import tokenizer_of

SETTINGS = ("preprocess", "storage", "terms", "mixture", "seed", "share_scans", "max_scans", "crop", "index")


@dataclasses.dataclass(frozen=True)
class Source:
    """A table of the split.

    Attributes:
      rows: good ones. quarantined: rows left out, of the table and by `prepare`.
      samples: that an epoch draws from it; share: of all samples of the epoch.
    """

    name: str
    family: str
    rows: int
    quarantined: int
    samples: int
    share: float


@dataclasses.dataclass(frozen=True)
class Head:
    """What the page is about.

    Attributes:
      asked: rows asked for; the epoch may have fewer.
      settings: those fields of `data` that decide what is seen.
      packing: PackingReport.as_dict of the rows shown.
      trained, terms: shares of the real tokens that are targets with a weight, and with the weight of a term.
    """

    config: str
    split: str
    epoch: int
    training: bool
    asked: int
    settings: dict[str, str]
    sources: tuple[Source, ...]
    packing: dict[str, float]
    trained: float
    terms: float


def look(config: DataConfig, split: str, count: int, epoch: int, name: str) -> tuple[Head, list[RowView]]:
    """The first `count` rows of an epoch, through the pipeline that training uses.

    Args:
      name: of the config, for the head.
    Raises:
      ValueError, WorkerError: as pipeline.Rows.
    """
    tokenizer, report, found = tokenizer_of(config), PackingReport(config.text_length), []
    with Rows(config, split, batch=1, epochs=epoch + 1) as rows:
        unreadable = rows.pool.submit("counting rows", _unreadable).result()
        stream = iter(batches(rows))
        stream.set_state(stream.get_state() | {"epoch": epoch})
        for _ in range(count):
            batch = next(stream, None)
            if batch is None:
                break
            report.add(batch.rows)
            arrays = {key: value[0] for key, value in batch.arrays.items()}
            found.append(row_facts(arrays, batch.rows[0], tokenizer, config.num_latents))
    fields, described = config.sources(split), rows.description["sources"]
    sources = tuple(
        Source(
            source,
            fields[source]["family"],
            facts["rows"],
            facts["left_out"] + unreadable[source],
            samples,
            samples / len(rows.mixture),
        )
        for (source, facts), samples in zip(described.items(), rows.mixture.counts.tolist(), strict=True)
    )
    tokens = max(sum(row.tokens for row in found), 1)
    trained, terms = (sum(getattr(s, of) for row in found for s in row.samples) / tokens for of in ("trained", "terms"))
    settings = {setting: str(getattr(config, setting)) for setting in SETTINGS}
    training = rows.identity["training"]
    return Head(name, split, epoch, training, count, settings, sources, report.as_dict(), trained, terms), found


def _unreadable(maker: RowMaker) -> dict[str, int]:
    """Rows of each table that are no samples at all, and so not in the opened data set."""
    return {name: len(dataset.problems) for name, dataset in maker.datasets.items()}
