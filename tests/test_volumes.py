"""Patches of a volume: how many, where, and in which order."""

import numpy as np
import pytest

from input_pipeline.volumes import patch_grid, patch_positions, to_planes


@pytest.mark.parametrize(
    "shape, grid",
    [
        ((512, 512, 4), (16, 16, 1)),
        ((256, 256, 64), (8, 8, 16)),
        ((32, 64, 512), (1, 2, 128)),
    ],
)
def test_patch_grid(shape, grid):
    assert patch_grid(shape) == grid


def test_patch_grid_of_other_sizes():
    assert patch_grid((8, 4, 4), patch=(4, 4, 2), tables=(4, 4, 8)) == (2, 1, 2)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((544, 512, 4), "volume of 544 x 512 x 4 voxels: height 544 is 17 patches, but there are 16 learned positions"),
        ((256, 256, 6), "volume of 256 x 256 x 6 voxels: depth 6 is not a multiple of 4"),
        ((256, 256, 0), "volume of 256 x 256 x 0 voxels: depth 0 is not"),
        ((0, 32, 4), "volume of 0 x 32 x 4 voxels: height 0 is not"),
        ((32, 32, 516), "depth 516 is 129 patches, but there are 128 learned positions"),
        ((16, 32, 4), "height 16 is not a multiple of 32"),
        ((33, 1024, 2), "height 33 is not a multiple of 32; width 1024 is 32 pat.*; depth 2 is not a multiple of 4"),
    ],
)
def test_patch_grid_of_a_volume_that_does_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        patch_grid(shape)


@pytest.mark.parametrize(
    "axis, patches, entries",
    [
        (0, 8, [1, 3, 5, 7, 9, 11, 13, 15]),  # of 16 rows
        (0, 16, list(range(16))),
        (1, 3, [4, 9, 14]),  # 16 // 3 = 5: the last column is not used
        (1, 1, [15]),
        (2, 2, [63, 127]),  # of 128 depths
        (2, 16, list(range(7, 128, 8))),
        (2, 6, [20, 41, 62, 83, 104, 125]),
    ],
)
def test_positions_are_spread_over_the_table(axis, patches, entries):
    grid = [1, 1, 1]
    grid[axis] = patches
    positions = patch_positions(grid)
    assert positions.dtype == np.int32 and positions.shape == (patches, 3)
    np.testing.assert_array_equal(positions[:, axis], entries)
    others = [a for a in range(3) if a != axis]
    np.testing.assert_array_equal(positions[:, others], np.broadcast_to(np.array([15, 15, 127])[others], (patches, 2)))


def test_depth_runs_fastest():
    np.testing.assert_array_equal(
        patch_positions((2, 1, 3), tables=(4, 4, 8)),
        [
            [1, 3, 1],
            [1, 3, 3],
            [1, 3, 5],
            [3, 3, 1],
            [3, 3, 3],
            [3, 3, 5],
        ],
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_planes_stand_patch_by_patch_slice_by_slice_channel_by_channel(dtype):
    (h, w, d), (i_max, j_max, k_max), channels = (4, 3, 2), (2, 3, 2), 3
    volume = np.random.default_rng(0).integers(0, 200, (channels, i_max * h, j_max * w, k_max * d)).astype(dtype)
    expected = []
    for i in range(i_max):
        for j in range(j_max):
            for k in range(k_max):
                for p in range(d):
                    for c in range(channels):
                        expected.append(volume[c, i * h : (i + 1) * h, j * w : (j + 1) * w, k * d + p])
    planes = to_planes(volume, (h, w, d))
    assert planes.dtype == dtype
    np.testing.assert_array_equal(planes, expected)
    np.testing.assert_array_equal(to_planes(np.stack([volume, volume + 1])[None], (h, w, d))[0, 1], planes + 1)


def test_planes_and_positions_speak_of_the_same_patch():
    """A volume whose voxels say where they are."""
    grid, (h, w, d) = (2, 3, 2), (4, 4, 2)
    place = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"))  # [axis, i, j, k]
    volume = place.repeat(h, 1).repeat(w, 2).repeat(d, 3)  # channels: the patch along height, width, depth
    planes = to_planes(volume, (h, w, d)).reshape(-1, d, 3, h, w)
    assert (planes == planes[:, :1, :, :1, :1]).all()
    np.testing.assert_array_equal(patch_positions(grid, tables=grid), planes[:, 0, :, 0, 0])
