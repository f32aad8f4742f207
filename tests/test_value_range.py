"""Minimum and maximum of voxels of any dtype and memory order."""

from __future__ import annotations

import numpy as np
import pytest
from voxels import draw

from input_pipeline.images import value_range as module
from input_pipeline.images.value_range import value_range

ORDERS = [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 2, 1, 0), (1, 2, 0, 3)]


@pytest.mark.parametrize("index", [0, 17, -1])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_every_voxel_is_read(dtype, order, index, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)  # 120 voxels are four blocks, the last one smaller
    voxels = np.ascontiguousarray(draw((4, 5, 6, 1), dtype, 50, 99).transpose(order)).transpose(np.argsort(order))
    voxels.flat[index] = 3
    for view in (voxels, voxels[::-1, ::-1], voxels[:, :, ::-1], voxels[::-1]):
        assert value_range(view) == (3, float(voxels.max()))
    voxels.flat[index] = 120
    assert value_range(voxels) == (float(voxels.min()), 120)


def test_views_that_skip_voxels():
    voxels = np.arange(4 * 5 * 6 * 4).reshape(4, 5, 6, 4)
    assert value_range(voxels[..., :3]) == (0, 478)
    assert value_range(voxels[1:3, ::2, ::-2, 1:]) == (
        voxels[1:3, ::2, ::-2, 1:].min(),
        voxels[1:3, ::2, ::-2, 1:].max(),
    )
    assert value_range(voxels[2:3, 3:4, 1:2, :1]) == (316, 316)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels_are_reported(bad, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    for index in (0, 50, 119):
        voxels = draw((4, 5, 6, 1), np.float32)
        voxels.flat[index] = bad
        assert not np.isfinite(value_range(voxels)).all()
