"""Open the sources, the tokenizer and the medical terms that a config names."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import cast

import numpy as np

from input_pipeline.config import DataConfig, open_fields
from input_pipeline.datasets import Dataset, open_dataset, sample_rng
from input_pipeline.datasets.json_tables import json_lines_cache
from input_pipeline.samples import Sample, Scan
from input_pipeline.text.alternatives import Form
from input_pipeline.text.terms import TermFinder
from input_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from input_pipeline.text.tokens import Encoded, Mode, Template, encode
from input_pipeline.text.vocabularies import SEMANTIC_TYPES, open_terms, scispacy_terms, umls_terms


def open_sources(config: DataConfig, split: str | None = None) -> dict[str, Dataset]:
    """Return source name -> data set. Bad rows are in the data set's `problems`, which `prepare` reports.

    Raises:
      ValueError: a table cannot be read, or a family or field is unknown; a note names the source.
    """
    opened = {}
    with json_lines_cache():
        for name, fields in (config.sources_with_rows(split) if split else config.sources()).items():
            try:
                opened[name] = open_dataset(fields["family"], **open_fields(fields) | {"quarantine": True})
            except ValueError as error:
                error.add_note(f"source {name}")
                raise
    return opened


@functools.lru_cache(maxsize=4)
def terms_of(choice: str, umls_types: tuple[str, ...] = SEMANTIC_TYPES) -> TermFinder:
    """Open the term finder that `data.terms` names. Raises ValueError if it is unknown.

    A UMLS directory without MRSTY.RRF gives terms of every semantic type. This is an error if `umls_types` is set.
    """
    kind, _, argument = choice.partition(":")
    if kind == "umls" and argument:
        mrsty = Path(argument) / "MRSTY.RRF"
        if mrsty.is_file():
            return umls_terms(Path(argument) / "MRCONSO.RRF", mrsty, umls_types)
        if umls_types not in (SEMANTIC_TYPES, ()):
            raise ValueError(f"data.umls_types needs {mrsty}: add the file, or leave data.umls_types at its default")
        return umls_terms(Path(argument) / "MRCONSO.RRF")
    if kind == "scispacy" and argument:
        return scispacy_terms(argument)
    if choice == "open":
        return open_terms()
    if choice == "none":
        return NoTerms()
    raise ValueError(f"data.terms is {choice!r}; use open, umls:DIR, scispacy:MODEL or none")


def describe_terms(choice: str, umls_types: tuple[str, ...] = SEMANTIC_TYPES) -> str:
    """Return a line for the log: the source of the medical terms, and whether it is that of the paper."""
    kind, _, argument = choice.partition(":")
    if kind == "umls":
        every = not umls_types or not (Path(argument) / "MRSTY.RRF").is_file()
        types = "every semantic type" if every else f"{len(umls_types)} semantic types"
        return f"medical terms: UMLS of {argument}, {types}"
    known = {"open": "open terms (HPO, ICD-10-CM, radiology list)", "none": "none", "scispacy": f"scispaCy {argument}"}
    return f"medical terms: {known.get(kind, choice)}, NOT UMLS as in the paper (data.terms=umls:DIR)"


def encode_row(
    config: DataConfig,
    name: str,
    dataset: Dataset,
    row: int,
    epoch: int,
    tokenizer: Tokenizer,
    terms: TermFinder,
    *,
    shown: int | None = None,
    window: int | None = None,
    form: Form | None = None,
) -> tuple[Sample, Encoded]:
    """Return the sample of a row and its tokens. `prepare` and training make the same random choices.

    Args:
      shown: another row with as many scans, which replace the scans of this row.
      window: as for Dataset.sample.
      form: the segments of the sample; None: one, with its response.
    Raises:
      RowError: the row cannot become a sample, or does not fit `text_length`.
    """
    rng = sample_rng(config.seed, epoch, name, dataset.sample_id(row, window))
    sample = dataset.sample(row, rng, window)
    if shown is not None:
        scans = dict(zip(dict.fromkeys(dataset.scans(row)), dict.fromkeys(dataset.scans(shown)), strict=True))
        parts = tuple(scans[part] if isinstance(part, Scan) else part for part in sample.parts)
        sample = dataclasses.replace(sample, parts=parts)
    encode_one = functools.partial(
        encode, tokenizer=tokenizer, terms=terms, max_scans=config.max_scans, num_latents=config.num_latents,
        mode=cast(Mode, config.preprocess), template=cast(Template, config.template),
    )  # fmt: skip
    if form is not None:
        return sample, form.encode(sample, encode_one, config.text_length, rng)
    return sample, encode_one(sample, max_tokens=config.text_length, rng=rng)


def rows_shown(name: str, dataset: Dataset, rows: np.ndarray, seed: int) -> dict[int, int]:
    """Return {row: another row, whose scans it shows}. Both rows have the same number of distinct scans.

    Raises ValueError if a row has no such partner.
    """
    by_count: dict[int, list[int]] = {}
    for row in rows.tolist():
        by_count.setdefault(len(set(dataset.scans(row))), []).append(row)
    rng = np.random.default_rng(seed)
    shown: dict[int, int] = {}
    for count, same in by_count.items():
        if count and len(same) == 1:
            row_id = dataset.row_id(same[0])
            raise ValueError(f"data.shuffle_scans: no row of {name} other than {row_id} has {count} scans to swap with")
        order = rng.permutation(same)
        shown |= dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return shown


class NoTerms:
    """A term finder that finds none, so every trained token has weight 1."""

    def find(self, text: str) -> list[tuple[int, int]]:
        """Return no spans."""
        return []


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """Open the tokenizer that `data.tokenizer` names. Raises ValueError if it does not fit `data.template`."""
    if not config.tokenizer:
        raise ValueError(
            "data.tokenizer is empty: pass a SentencePiece model or a folder with a tokenizer.json, "
            "--config.data.tokenizer=tokenizer.model"
        )
    try:
        tokenizer = load_tokenizer(config.tokenizer, vocab_size=config.vocab_size or None)
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}") from None
    if config.template == "chat":
        try:
            _ = tokenizer.chat.end_id
        except ValueError as error:
            raise ValueError(f"data.template='chat': {error}") from None
    return tokenizer
