"""The mixture: which samples an epoch has, and in which order.

Grain's `MapDataset.mix` does not fit: it ends with its smallest source and draws by ratio, but an epoch takes an exact
number of samples from each source, and the next epoch continues where it stopped. Grain's `.shuffle` gives a
different order from the one that data positions in checkpoints refer to.
"""

from __future__ import annotations

import numpy as np


class Mixture:
    """The samples of each epoch. A sample's number is its row number, counted through all sources."""

    def __init__(self, sources: dict[str, dict], *, seed: int, weights: bool, samples: int = 0):
        """Compute `counts`, int64[sources]: the number of samples per epoch from each source.

        Args:
          sources: name -> `rows`, `fraction` and `weight`, as RowLoader.describe returns them.
          weights: divide `samples` (0: the number of rows) by weight, instead of taking each source's fraction.
        """
        self.seed = seed
        self.sizes = np.array([s["rows"] for s in sources.values()], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])  # the number of each source's first sample
        if weights:
            shares = np.array([s["weight"] for s in sources.values()])
            exact = shares / shares.sum() * (samples or int(self.sizes.sum()))
            self.counts = np.floor(exact).astype(np.int64)
            largest_remainders = np.argsort(-(exact - self.counts), kind="stable")
            self.counts[largest_remainders[: round(exact.sum()) - int(self.counts.sum())]] += 1
        else:
            fractions = [s["fraction"] for s in sources.values()]
            self.counts = np.array([max(round(n * f), 1) for n, f in zip(self.sizes, fractions, strict=True)])

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return int(self.counts.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the shuffled samples of an epoch, int64[len(self)].

        Each source is an endless sequence of passes over its rows, each pass in its own order. An epoch takes the
        next `counts` rows of that sequence, so with a fraction of 0.2 five epochs show each row once.
        """
        parts = []
        for source, (size, count) in enumerate(zip(self.sizes.tolist(), self.counts.tolist(), strict=True)):
            position, end = epoch * count, (epoch + 1) * count
            while position < end:
                source_pass, first = divmod(position, size)
                last = min(size, first + end - position)
                order = self._rng(0, source, source_pass).permutation(size)
                parts.append(self.starts[source] + order[first:last])
                position += last - first
        return self._rng(1, epoch, 0).permutation(np.concatenate(parts))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64((self.seed, *key)))
