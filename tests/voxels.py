"""Seeded random voxels for the tests of volumes."""

from __future__ import annotations

import numpy as np


def draw(shape, dtype=np.float32, low=0, high=1, seed=0):
    x = np.random.default_rng(seed).random(shape) * (high - low) + low
    return (np.rint(x) if np.issubdtype(dtype, np.integer) else x).astype(dtype)


def with_values(*values, shape=(6, 5, 4, 1)):
    x = draw(shape, np.float32)
    x.flat[: len(values)] = values
    return x
