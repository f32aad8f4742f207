"""The mixture: the samples of an epoch, their order, and the balance of yes and no or normal and abnormal.

Grain's `MapDataset.mix` does not fit: it ends with its smallest source and draws by ratio, but an epoch takes an exact
number of samples from each source, and the next epoch continues where it stopped. Grain's `.shuffle` gives a
different order from the one that data positions in checkpoints refer to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class _Part(NamedTuple):
    """All samples of a source, or those of one side of a balanced source. An epoch takes `count` of them."""

    start: int  # the number of its first sample
    size: int
    count: int  # samples per epoch
    key: tuple[int, ...]  # seed of its random generator; the number of the pass is appended


def by_side(sides: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return the row order that makes each side of `Dataset.sides` consecutive, and the size of each side."""
    pairs = int(sides.max()) // 2 + 1
    return np.argsort(sides, kind="stable"), np.bincount(sides, minlength=2 * pairs).tolist()


class Mixture:
    """The samples of each epoch. Samples are numbered consecutively over all sources."""

    def __init__(self, sources: dict[str, dict], *, seed: int, weights: bool, samples: int = 0):
        """Compute `counts`, int64[sources]: the number of samples per epoch from each source.

        Args:
          sources: name -> `rows`, `fraction`, `weight` and `sides`, as RowLoader.describe returns them.
          weights: divide `samples` (0: the number of rows) by weight, instead of taking each source's fraction.
        """
        self.seed = seed
        self.sizes = np.array([s["rows"] for s in sources.values()], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])  # the number of each source's first sample
        if weights:
            shares = np.array([s["weight"] for s in sources.values()])
            totals = _divide(samples or int(self.sizes.sum()), shares)
        self.parts: list[_Part] = []
        self.counts = np.zeros(len(sources), np.int64)
        for k, (name, source) in enumerate(sources.items()):
            sizes, quotas = _quotas(name, source)
            if weights:
                counts = _divide(int(totals[k]), quotas)
            else:
                counts = np.maximum(np.round(quotas * source["fraction"]).astype(np.int64), quotas > 0)
            starts = self.starts[k] + np.cumsum([0, *sizes[:-1]])
            for part, (start, size, count) in enumerate(zip(starts.tolist(), sizes, counts.tolist(), strict=True)):
                self.parts.append(_Part(start, size, count, (0, k) if source.get("sides") is None else (2, k, part)))
            self.counts[k] = counts.sum()

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return int(self.counts.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the shuffled samples of an epoch, int64[len(self)].

        Each part is an endless sequence of passes over its rows, each pass in its own order. An epoch takes the next
        `count` rows of that sequence, so with a fraction of 0.2 five epochs show each row once. For a balanced table
        with 10 normal and 2 abnormal rows, an epoch has 2 of each, and five epochs show each normal row once.
        """
        drawn = []
        for start, size, count, key in self.parts:
            position, end = epoch * count, (epoch + 1) * count
            while position < end:
                part_pass, first = divmod(position, size)
                last = min(size, first + end - position)
                order = self._rng(*key, part_pass).permutation(size)
                drawn.append(start + order[first:last])
                position += last - first
        return self._rng(1, epoch, 0).permutation(np.concatenate(drawn))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64((self.seed, *key)))


def _quotas(name: str, source: Mapping) -> tuple[list[int], np.ndarray]:
    """Return the sizes of a source's parts, and the number of samples of each part in an epoch of fraction 1.

    `sides` are the sizes of consecutive pairs of sides. An epoch has as many samples of one side as of the other.
    """
    if source.get("sides") is None:
        return [source["rows"]], np.array([source["rows"]])
    sizes = np.reshape(source["sides"], (-1, 2))
    quotas = np.repeat(sizes.min(axis=1), 2)
    if not quotas.any():
        raise ValueError(f"source {name} has rows of one side only, so it cannot be balanced: set balance=False")
    return sizes.reshape(-1).tolist(), quotas


def _divide(total: int, shares: np.ndarray) -> np.ndarray:
    """Divide a number of samples in proportion to shares, by the largest remainder method."""
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(-(exact - counts), kind="stable")
    counts[largest_remainders[: round(exact.sum()) - int(counts.sum())]] += 1
    return counts
