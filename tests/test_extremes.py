"""The least and the greatest voxel, in whatever order and of whatever type the voxels lie."""

from __future__ import annotations

import numpy as np
import pytest
from voxels import draw

from input_pipeline.images import extremes as module
from input_pipeline.images.extremes import extremes

ORDERS = [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 2, 1, 0), (1, 2, 0, 3)]


@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_every_voxel_is_looked_at(dtype, order, place, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)  # 120 voxels are four blocks, the last one smaller
    voxels = np.ascontiguousarray(draw((4, 5, 6, 1), dtype, 50, 99).transpose(order)).transpose(np.argsort(order))
    voxels.flat[place] = 3
    for view in (voxels, voxels[::-1, ::-1], voxels[:, :, ::-1], voxels[::-1]):
        assert extremes(view) == (3, float(voxels.max()))
    voxels.flat[place] = 120
    assert extremes(voxels) == (float(voxels.min()), 120)


def test_views_that_skip_voxels():
    voxels = np.arange(4 * 5 * 6 * 4).reshape(4, 5, 6, 4)
    assert extremes(voxels[..., :3]) == (0, 478)
    assert extremes(voxels[1:3, ::2, ::-2, 1:]) == (voxels[1:3, ::2, ::-2, 1:].min(), voxels[1:3, ::2, ::-2, 1:].max())
    assert extremes(voxels[2:3, 3:4, 1:2, :1]) == (316, 316)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    for place in (0, 50, 119):
        voxels = draw((4, 5, 6, 1), np.float32)
        voxels.flat[place] = bad
        assert not np.isfinite(extremes(voxels)).all()
