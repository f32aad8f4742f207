"""Patch grids, positions and order; sizes from headers; volumes cut into planes."""

import numpy as np
import pytest

from input_pipeline.images.planes import (
    Volume,
    patch_count,
    patch_grid,
    patch_positions,
    plane_count,
    planes,
    released_shape,
    target_shape,
    to_planes,
)
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.volumes import prepare_volume


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


def test_depth_varies_fastest():
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
def test_order_of_planes_is_patch_slice_channel(dtype):
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


def test_planes_and_positions_have_the_same_patch_order():
    """The voxels of the volume are their own patch coordinates."""
    grid, (h, w, d) = (2, 3, 2), (4, 4, 2)
    coordinates = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"))  # [axis, i, j, k]
    volume = coordinates.repeat(h, 1).repeat(w, 2).repeat(d, 3)  # channels: the patch along height, width, depth
    planes = to_planes(volume, (h, w, d)).reshape(-1, d, 3, h, w)
    assert (planes == planes[:, :1, :, :1, :1]).all()
    np.testing.assert_array_equal(patch_positions(grid, tables=grid), planes[:, 0, :, 0, 0])


def draw(h, w, k, c, dtype=np.uint8, depth=None, seed=0):
    """A volume whose stored voxels are distinct if the dtype allows it."""
    rng = np.random.default_rng(seed)
    return Volume(rng.permutation(h * w * k * c).reshape(h, w, k, c).astype(dtype), 0.5, 2.0, depth)


def expanded(volume):
    """[3, H, W, D] of the stored values, with slices and channels repeated."""
    return np.broadcast_to(volume.voxels, (*volume.shape, 3)).transpose(3, 0, 1, 2)


@pytest.mark.parametrize(
    ("h", "w", "k", "c", "depth", "count"),
    [
        (64, 96, 1, 1, None, 6),  # gray 2D: n
        (64, 96, 1, 3, None, 18),  # colour 2D: 3 n
        (64, 96, 8, 1, None, 48),  # gray 3D: 4 n
        (64, 96, 8, 3, None, 144),  # colour 3D: 12 n
        (64, 96, 1, 1, 20, 6),  # one slice with a depth of 20 (released): still one plane per column of patches
        (32, 32, 4, 1, None, 4),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_planes_rebuild_the_volume_and_are_stored_once(h, w, k, c, depth, count, dtype):
    volume = draw(h, w, k, c, dtype, depth)
    unique, index = planes(volume)
    n = (h // 32) * (w // 32) * (volume.depth // 4)
    assert unique.shape == (count, 32, 32) and unique.dtype == dtype and unique.flags.c_contiguous
    assert index.shape == (n, 4, 3) and index.dtype == np.int32
    assert sorted(set(index.ravel().tolist())) == list(range(count))
    want = to_planes(expanded(volume)).reshape(n, 4, 3, 32, 32)
    np.testing.assert_array_equal(unique[index], want)


def test_plane_index_of_the_drawn_scans():
    """The two scans drawn in the docstring of `planes`."""
    _, index = planes(draw(64, 64, 1, 1))
    assert index.reshape(4, 12).tolist() == [[n] * 12 for n in range(4)]
    _, index = planes(draw(32, 64, 8, 1))
    assert index[..., 0].tolist() == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert (index == index[..., :1]).all()


def test_values_equal_the_network_input():
    volume = draw(32, 64, 1, 1)
    unique, index = planes(volume)
    read = unique[index].astype(np.float32) * np.float32(volume.scale) + np.float32(volume.offset)
    want = to_planes(volume.values().transpose(3, 0, 1, 2)).reshape(read.shape)
    np.testing.assert_array_equal(read, want)


def test_volume_from_the_bytes_of_its_slices():
    volume = draw(64, 32, 8, 3, np.int16)
    back = Volume.from_slices(np.frombuffer(volume.slices.tobytes(), np.int16).reshape(8, 3, 64, 32), 0.5, 2.0)
    np.testing.assert_array_equal(back.voxels, volume.voxels)
    assert np.shares_memory(back.slices, back.voxels), "reading a record must not copy it"


def test_paper_sizes_of_every_depth():
    for depth in range(1, 130):
        side, other, target = target_shape((100, 70, depth))
        assert (side, other) == ((512, 512) if depth == 1 else (256, 256))
        # The nearest multiple of 4 between 4 and 64; ties go up.
        assert target == min(range(4, 65, 4), key=lambda t: (abs(t - depth), -t))
    table = {2: 4, 5: 4, 6: 8, 7: 8, 9: 8, 10: 12, 11: 12, 33: 32, 62: 64, 63: 64, 100: 64}
    assert {d: target_shape((9, 9, d))[2] for d in table} == table


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [1, 3, 6, 9])
def test_counts_from_the_header_equal_those_of_the_voxels(mode, channels, depth):
    shape = (20, 30, depth)
    voxels = np.random.default_rng(depth).integers(0, 256, (*shape, channels), np.uint8)
    volume = prepare_volume(voxels, mode=mode)
    unique, index = planes(volume)
    assert volume.shape == target_shape(shape, mode)
    assert len(unique) == plane_count(shape, channels, mode)
    assert len(index) == patch_count(shape, mode)


def test_counts_of_a_mixed_released_sample():
    shapes = [(20, 20, 1), (20, 20, 9)]
    volumes = released_volumes([np.random.default_rng(0).random((*s, 1), np.float32) for s in shapes])
    final = released_shape([s[2] for s in shapes])
    assert final == (256, 256, 8)
    for volume, shape, count in zip(volumes, shapes, (64, 512), strict=True):
        assert len(planes(volume)[0]) == plane_count(shape, 1, "released", final) == count
        assert patch_count(shape, "released", final) == len(planes(volume)[1]) == 128


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: target_shape((5, 5)), r"must be .height, width, depth. in voxels, got \(5, 5\)"),
        (lambda: target_shape((5, 0, 5)), r"got \(5, 0, 5\)"),
        (lambda: target_shape((5, 5, 2.5)), r"got \(5, 5, 2.5\)"),
        (lambda: target_shape((5, 5, 5), "fast"), "mode 'fast' must be one of paper, released"),
        (lambda: plane_count((5, 5, 5), 2), "1 or 3 channels, got 2"),
        (lambda: draw(32, 32, 4, 2), r"uint8\[32, 32, 4, 2\]"),
        (lambda: draw(32, 32, 4, 1, np.float64), r"float64\[32, 32, 4, 1\]"),
        (lambda: draw(32, 33, 4, 1), "width 33 is not a multiple of 32"),
        (lambda: draw(32, 32, 6, 1), "depth 6 is not a multiple of 4"),
        (lambda: draw(32, 32, 4, 1, depth=8), "4 slices cannot fill a depth of 8"),
    ],
)
def test_invalid_volumes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_the_cached_index_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        planes(draw(32, 32, 4, 1))[1][0] = 7
