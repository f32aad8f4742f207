"""Opens what a config names: the tables of its sources, its tokenizer, its finder of medical terms."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from input_pipeline.config import DataConfig, open_fields
from input_pipeline.datasets import Dataset, open_dataset, sample_rng
from input_pipeline.datasets.json_tables import json_lines_cache
from input_pipeline.samples import Sample, Scan
from input_pipeline.text.terms import TermFinder
from input_pipeline.text.tokenizer import Tokenizer
from input_pipeline.text.tokens import Encoded, encode
from input_pipeline.text.vocabularies import open_terms, scispacy_terms, umls_terms


def open_sources(config: DataConfig, split: str | None = None) -> dict[str, Dataset]:
    """name -> data set. Bad rows stay in its `problems`: `prepare` has reported them, and they are in no index.

    Raises:
      ValueError: a table that cannot be read, an unknown family or field, with the source's name.
    """
    opened = {}
    with json_lines_cache():
        for name, fields in config.sources(split).items():
            try:
                opened[name] = open_dataset(fields["family"], **open_fields(fields) | {"quarantine": True})
            except ValueError as error:
                error.add_note(f"source {name}")
                raise
    return opened


@functools.lru_cache(maxsize=4)
def terms_of(choice: str) -> TermFinder:
    """The finder that `data.terms` names; ValueError for one it does not know."""
    kind, _, argument = choice.partition(":")
    if kind == "umls" and argument:
        return umls_terms(Path(argument) / "MRCONSO.RRF", Path(argument) / "MRSTY.RRF")
    if kind == "scispacy" and argument:
        return scispacy_terms(argument)
    if choice == "open":
        return open_terms()
    if choice == "none":
        return NoTerms()
    raise ValueError(f"data.terms is {choice!r}; known: open, umls:DIR, scispacy:MODEL, none")


def encode_row(
    config: DataConfig,
    name: str,
    dataset: Dataset,
    row: int,
    epoch: int,
    tokenizer: Tokenizer,
    terms: TermFinder,
    shown: int | None = None,
) -> tuple[Sample, Encoded]:
    """Row `row` of a source as `prepare` counts it and as training sees it: one generator makes all its choices.

    shown: the row whose scans stand in the sample instead of its own, as many of them.

    Raises RowError.
    """
    rng = sample_rng(config.seed, epoch, name, dataset.row_id(row))
    sample = dataset.sample(row, rng)
    if shown is not None:
        scans = dict(zip(dict.fromkeys(dataset.scans(row)), dict.fromkeys(dataset.scans(shown)), strict=True))
        parts = tuple(scans[part] if isinstance(part, Scan) else part for part in sample.parts)
        sample = dataclasses.replace(sample, parts=parts)
    encoded = encode(
        sample,
        tokenizer,
        terms,
        max_scans=config.max_scans,
        num_latents=config.num_latents,
        max_tokens=config.text_length,
        mode=config.preprocess,
        rng=rng,
    )
    return sample, encoded


def rows_shown(name: str, dataset: Dataset, rows: np.ndarray, seed: int) -> dict[int, int]:
    """row -> another one of `rows` with as many distinct scans, each being the other of one row.

    Raises ValueError: a row with scans that is the only one with so many.
    """
    by_count: dict[int, list[int]] = {}
    for row in rows.tolist():
        by_count.setdefault(len(set(dataset.scans(row))), []).append(row)
    rng, shown = np.random.default_rng(seed), {}
    for count, same in by_count.items():
        if count and len(same) == 1:
            raise ValueError(f"data.shuffle_scans: {dataset.row_id(same[0])} of {name} alone has {count} scans")
        order = rng.permutation(same)
        shown |= dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return shown


class NoTerms:
    """Every trained token weighs 1."""

    def find(self, text: str) -> list[tuple[int, int]]:
        return []


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names."""
    if not config.tokenizer:
        raise ValueError("data.tokenizer is empty: name a SentencePiece model, --config.data.tokenizer=tokenizer.model")
    try:
        return Tokenizer(config.tokenizer)
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}") from None
