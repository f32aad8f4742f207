"""Splits: which rows of a source belong to training, and which are held out for validation.

A study group (index/study_groups.py) is held out by a hash of its name and `data.validation_seed` alone, so the same
studies are held out on every host, in every stage, after a resume, and when rows or sources are added.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from input_pipeline.config import DataConfig
from input_pipeline.datasets import Dataset
from input_pipeline.index import study_groups
from input_pipeline.index.index import Index


class SplitRows(NamedTuple):
    """The rows of a source that belong to a split."""

    rows: np.ndarray  # int64, ascending
    quarantined: int  # rows that cannot be used
    elsewhere: int  # usable rows of the other split (training or validation)


def rows_of_split(config: DataConfig, split: str, index: Index, datasets: dict[str, Dataset]) -> dict[str, SplitRows]:
    """Return {source: its usable rows in a split}, for sources with such rows.

    Args:
      datasets: the sources of `config.sources_with_rows(split)`, opened.
    Raises:
      ValueError: a source differs from the index or has no usable row, or no row is held out.
    """
    good = {name: _good_rows(index, name, dataset) for name, dataset in datasets.items()}
    shared = [name for name in datasets if name in config.train]
    if not config.validation_share or not shared:
        return good
    groups = study_groups.of_sources(index, {name: datasets[name] for name in shared})
    for name in shared:
        held = study_groups.held_out(groups[name], config.validation_share, config.validation_seed)
        rows, quarantined, _ = good[name]
        here = rows[held[rows] == (split == "validation")]
        good[name] = SplitRows(here, quarantined, len(rows) - len(here))
    if split == "validation" and not any(len(good[name].rows) for name in shared):
        studies = len(np.unique(np.concatenate(list(groups.values()))))
        raise ValueError(
            f"data.validation_share {config.validation_share:g} holds out none of {studies:,} studies: increase it, or "
            "change data.validation_seed"
        )
    if split == "train" and (empty := [name for name in shared if not len(good[name].rows)]):
        raise ValueError(
            f"data.validation_share {config.validation_share:g} holds out every row of {', '.join(empty)}: decrease "
            "it, or remove the source"
        )
    return {name: split_rows for name, split_rows in good.items() if len(split_rows.rows)}


def _good_rows(index: Index, name: str, dataset: Dataset) -> SplitRows:
    """Return the rows of a source that are not in quarantine."""
    rows, bad = len(dataset), index.bad_rows(name)
    if len(bad) != rows:
        raise ValueError(
            f"source {name} has {rows} rows, but {len(bad)} in the index {index.directory}: run prepare again"
        )
    good = np.flatnonzero(~bad)
    if not len(good):
        raise ValueError(f"source {name}: all {rows} rows are in quarantine, see quarantine.jsonl of the index")
    return SplitRows(good, rows - len(good), 0)
