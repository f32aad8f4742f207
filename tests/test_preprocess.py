"""Intensity, size, depth and augmentation of scans: by the paper, and equal to the released code's numbers.

data/preprocess.npz holds what the released code made of seeded inputs.
"""

import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from input_pipeline import volumes as v

GOLDEN = np.load(Path(__file__).parent / "data" / "preprocess.npz")
META = json.loads(str(GOLDEN["meta_json"]))
VOLUMES = {x["name"]: x for x in META["volumes"] if "seed" in x}
IMAGES = {x["name"]: x for x in META["images"]}


def sha(*arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def draw(shape, dtype=np.float32, low=0, high=1, seed=0):
    x = np.random.default_rng(seed).random(shape) * (high - low) + low
    return (np.rint(x) if np.issubdtype(dtype, np.integer) else x).astype(dtype)


def golden_scans(name):
    """The inputs [H, W, D, 3] of a golden volume; a depth that is not there is 1."""
    rng = np.random.default_rng(VOLUMES[name]["seed"])
    scans = [rng.random(shape, np.float32) for shape in VOLUMES[name]["shapes"]]
    return [(x if x.ndim == 4 else x[..., None]).transpose(1, 2, 3, 0) for x in scans]


# The released numbers.


def test_released_depths():
    got = [v.released_shape([int(d)], collate=False) for d in GOLDEN["depth_in"]]
    assert got == [(512, 512, d) for d in GOLDEN["stack_depth_out"]]


@pytest.mark.parametrize(
    ("case", "batch", "scans"), [("b1_s1", 1, 1), ("b1_s6", 1, 6), ("b1_s7", 1, 7), ("b2_s1", 2, 1)]
)
def test_released_collator_sizes(case, batch, scans):
    depths = GOLDEN[f"collate_{case}_in"]
    got = np.array([v.released_shape([int(d)] * scans, batch) for d in depths])
    np.testing.assert_array_equal(got[:, 2], GOLDEN[f"collate_{case}_outD"])
    np.testing.assert_array_equal(got[:, 0], GOLDEN[f"collate_{case}_outH"])
    np.testing.assert_array_equal(got[:, 1], got[:, 0])


def test_released_nearest_indices():
    for depth, (row, out) in enumerate(zip(GOLDEN["idxmap_depth"], GOLDEN["stack_depth_out"], strict=True), 1):
        np.testing.assert_array_equal(v.nearest_index(depth, out), row[:out])
    for size, row in zip(GOLDEN["idxmap_hw_in"], GOLDEN["idxmap_hw_to512"], strict=True):
        np.testing.assert_array_equal(v.nearest_index(int(size), 512), row)
    np.testing.assert_array_equal(v.nearest_index(512, 256), GOLDEN["idxmap_512_to_256"])
    chain = v.nearest_index(300, 512)[v.nearest_index(512, 256)]
    np.testing.assert_array_equal(chain, GOLDEN["chain_300_to512_to256"])
    for n_in, n_out in GOLDEN["pairs_differ_from_integer_floor"].tolist():
        index = v.nearest_index(n_in, n_out)
        assert index.tolist() != [i * n_in // n_out for i in range(n_out)]
        source = torch.arange(n_in, dtype=torch.float32)[None, None]
        assert index.tolist() == torch.nn.functional.interpolate(source, n_out)[0, 0].int().tolist()


@pytest.mark.parametrize("name", sorted(VOLUMES, key=lambda n: (len(n), n)))
def test_released_volumes(name):
    meta, scans = VOLUMES[name], golden_scans(name)
    if name == "batch2":
        stacks = [v.released_stack(group, intensity="as_is") for group in (scans[:2], scans[2:])]
        assert [list(s.shape) for s in stacks] == meta["stack_shapes"]
        out = v.released_collate(stacks)
        np.testing.assert_array_equal(out[:, :, :, ::64, ::64], GOLDEN["batch2_collate_sub"])
    else:
        if len(scans) == 7:  # its stack of 880 MB has a test of its own
            parts = v.released_volumes(scans, intensity="as_is")
            out = np.stack([p.values().transpose(3, 0, 1, 2) for p in parts])[None]
        else:
            stack = v.released_stack(scans, intensity="as_is")
            assert list(stack.shape) == meta["stack_shape"]
            assert sha(stack) == meta["stack_sha256"]
            np.testing.assert_array_equal(stack[:, :, :6, :6, :8], GOLDEN[f"{name}_stack_corner"])
            out = v.released_collate([stack])
        np.testing.assert_array_equal(out[0, :, :, ::64, ::64], GOLDEN[f"{name}_collate_sub"])
    assert list(out.shape) == meta["collate_shape"]
    assert sha(out) == meta["collate_sha256"]


@pytest.mark.slow
def test_released_stack_of_seven_scans():
    """Seven equal depths are stacked one by one."""
    digest = hashlib.sha256()
    for scan, corner in zip(golden_scans("v11"), GOLDEN["v11_stack_corner"], strict=True):
        stack = v.released_stack([scan], intensity="as_is")
        np.testing.assert_array_equal(stack[0, :, :6, :6, :8], corner)
        digest.update(stack.data)
    assert digest.hexdigest() == VOLUMES["v11"]["stack_sha256"]


@pytest.mark.parametrize("name", ["v2", "v5", "v10", "v12"])
@pytest.mark.parametrize("collate", [True, False])
def test_released_volumes_in_one_step_are_stack_then_collate(name, collate):
    scans = golden_scans(name)
    stack = v.released_stack(scans)
    want = v.released_collate([stack])[0] if collate else stack
    got = [p.values().transpose(3, 0, 1, 2) for p in v.released_volumes(scans, collate=collate)]
    np.testing.assert_array_equal(got, want)


def test_released_sample_without_scans():
    stack = v.released_stack([])
    assert stack.shape == (1, 3, 512, 512, 4) and not stack.any()
    assert v.released_collate([stack]).shape == (1, 1, 3, 512, 512, 4)
    assert v.released_volumes([]) == []


@pytest.mark.parametrize("name", IMAGES)
def test_released_pictures(name):
    meta = IMAGES[name]
    pixels = np.random.default_rng(meta["seed"]).integers(0, 256, (*meta["hw"], 3), np.uint8)
    out = v.released_picture(pixels, meta["box_top_left_h_w"])
    np.testing.assert_array_equal(out[[0, 1, 100, 255, 510, 511]][:, ::3], GOLDEN[f"{name}_rows"])
    np.testing.assert_array_equal(out[200:216, 300:316], GOLDEN[f"{name}_block"])
    assert sha(out) == meta["sha256_uint8"]
    # A gray picture is not turned into colour first: each channel is resized by itself.
    gray = v.released_picture(pixels[..., 1:2], meta["box_top_left_h_w"])
    np.testing.assert_array_equal(gray[..., 0], out[..., 1])
    if name == "im1":
        stack = v.released_stack([pixels[:, :, None]])
        assert sha(stack) == meta["vision_x_sha256_1x3x512x512x4"]
        np.testing.assert_array_equal(stack[0, :, 200:204, 300:304, 0], GOLDEN["im1_totensor_block"])
        volume = v.prepare_volume(pixels[:, :, None], mode="released")
        assert volume.voxels.dtype == np.float32 and volume.voxels.shape == (512, 512, 1, 3)
        np.testing.assert_array_equal(volume.values().transpose(3, 0, 1, 2), stack[0])


def test_released_intensity():
    """Two scans from 0 to 10 and from 5 to 30."""
    scans = [draw((8, 8, 4, 1), np.float32, 0, 10, seed=1), draw((8, 8, 4, 1), np.float32, 5, 30, seed=2)]
    scans[0].flat[:2], scans[1].flat[:2] = (0, 10), (5, 30)
    ends = lambda intensity: [  # noqa: E731
        (float(x.voxels.min()), float(x.voxels.max())) for x in v.released_volumes(scans, intensity=intensity)
    ]
    assert ends("as_is") == [(0, 10), (5, 30)]
    assert ends("scan") == [(0, 1), (0, 1)]
    np.testing.assert_allclose(ends("stack"), [(0, 1 / 3), (1 / 6, 1)], rtol=1e-7)
    # Pictures are divided by 255 whatever stands beside them.
    picture = np.full((8, 8, 1, 1), 51, np.uint8)
    picture[0] = 102
    both = v.released_volumes([picture, scans[1]], intensity="stack")
    assert both[0].voxels[-1, 0, 0, 0] == np.float32(0.2) and (both[1].voxels.min(), both[1].voxels.max()) == (0, 1)


def test_released_crop_follows_the_definition():
    rng = np.random.default_rng(5)
    boxes = np.array([v.released_crop_box(500, 480, rng) for _ in range(300)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 500).all() and (left + w <= 480).all()
    area = h * w / (500 * 480)
    assert 0.795 < area.min() < 0.83 and 0.9 < area.max() <= 1
    # 0.8 of a picture of 4:1 never has a side ratio of 4:3: the middle, as wide as 4:3.
    assert v.released_crop_box(100, 400, rng) == (0, 133, 100, 133)
    assert v.released_crop_box(400, 100, rng) == (133, 0, 133, 100)


# What the paper says.


def area_matrix(n, m):
    """Box averages by counting: every source pixel cut into m parts, every target one made of n of them."""
    return np.stack([np.bincount(np.arange(j * n, (j + 1) * n) // m, minlength=n) / n for j in range(m)])


def linear_matrix(n, m):
    centres = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.stack([np.interp(centres, np.arange(n), row) for row in np.eye(n)], axis=1)


def by_definition(voxels, low, high, size):
    """`paper` mode in float64 by dense matrices: clip, scale, then resize axis by axis."""
    x = (np.clip(voxels.astype(np.float64), low, high) - low) / (high - low)
    for axis, m in enumerate(size[:2]):
        n = x.shape[axis]
        matrix = area_matrix(n, m) if n > m else linear_matrix(n, m)
        x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    with jax.enable_x64(True):
        depth = (*x.shape[:2], size[2], x.shape[3])
        return np.asarray(jax.image.resize(jnp.asarray(x), depth, "linear", antialias=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "window"),
    [
        ((300, 280, 9, 1), np.int16, None),  # all three shrink, by broken ratios
        ((512, 512, 6, 1), np.int16, (-500.0, 800.5)),  # whole boxes; depth grows
        ((200, 330, 8, 1), np.float32, None),  # one grows, one shrinks
        ((260, 256, 5, 3), np.uint8, None),  # colour
        ((40, 256, 70, 1), np.uint16, None),  # depth to its limit of 64
        ((100, 90, 3, 1), np.float64, (-700.25, 700.0)),
        ((90, 100, 3, 1), np.int32, (-700.25, 700.0)),
        ((600, 700, 1, 1), np.uint8, None),  # 2D
        ((700, 400, 1, 3), np.uint16, None),
    ],
)
def test_paper_mode_is_its_definition(shape, dtype, window):
    low, high = (0, 255 if dtype == np.uint8 else 60000) if np.dtype(dtype).kind == "u" else (-1000, 1500)
    voxels = draw(shape, dtype, low, high)
    size = (512, 512, 1) if shape[2] == 1 else v.target_shape(shape[:3])
    want = by_definition(voxels, *(window or (voxels.min(), voxels.max())), size)
    got = v.prepare_volume(voxels, storage="float32", window=window)
    assert got.shape == v.target_shape(shape[:3]) and got.voxels.dtype == np.float32
    assert got.voxels.min() >= 0 and got.voxels.max() <= 1
    # Measured: 2.0e-7 at most, from weights and sums in float32.
    np.testing.assert_allclose(got.voxels, want, rtol=0, atol=5e-7)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 2), (5, 4), (6, 8), (9, 8), (66, 64), (200, 64), (1, 1), (3, 4)])
def test_depth_weights_are_torch_antialiased_linear(n, m):
    want = torch.nn.functional.interpolate(torch.eye(n)[None, None], (m, n), mode="bilinear", antialias=True)[0, 0]
    # Measured: 6e-8, one rounding of float32.
    np.testing.assert_allclose(v.depth_weights(n, m), want.numpy(), rtol=0, atol=2e-7)


def test_weights_of_the_docstrings():
    np.testing.assert_allclose(v.depth_weights(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(v.depth_weights(4, 2) * 7, [[3, 3, 1, 0], [0, 1, 3, 3]], rtol=1e-6)
    np.testing.assert_allclose(v.area_weights(5, 2).toarray() * 5, [[2, 2, 1, 0, 0], [0, 0, 1, 2, 2]], rtol=1e-6)
    for n, m in [(700, 512), (513, 512), (480, 256), (7, 1), (4, 4)]:
        np.testing.assert_allclose(v.area_weights(n, m).toarray(), area_matrix(n, m), rtol=0, atol=1e-7)


ORDERS = [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3), (3, 2, 1, 0), (3, 0, 1, 2), (1, 2, 0, 3)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_order_does_not_matter(order, channels):
    """As nibabel, numpy, the released .npy files and flipped orientations lay voxels out."""
    voxels = draw((40, 30, 18, channels), np.int16, -1000, 2000)
    want = v.prepare_volume(voxels, storage="int16").voxels
    laid = np.ascontiguousarray(voxels.transpose(order)).transpose(np.argsort(order))
    assert laid.shape == voxels.shape
    for x in (laid, np.flip(np.ascontiguousarray(np.flip(laid, (0, 2))), (0, 2))):
        np.testing.assert_array_equal(v.prepare_volume(x, storage="int16").voxels, want)


def test_intensity_is_that_of_the_whole_scan_before_the_resize():
    """One bright voxel of 100 and one dark of -100 in zeros: averaged away, yet they set the scale."""
    voxels = np.zeros((512, 512, 8, 1), np.int16)
    voxels[100, 100, 3], voxels[300, 300, 5] = 100, -100
    got = v.prepare_volume(voxels, storage="float32").voxels
    assert got[0, 0, 0, 0] == 0.5
    np.testing.assert_allclose([got.max(), got.min()], [0.5 + 0.5 / 4, 0.5 - 0.5 / 4])


@pytest.mark.parametrize("name", v.CT_WINDOWS)
def test_windows(name):
    low, high = v.CT_WINDOWS[name]
    voxels = np.linspace(-2000, 3000, 64 * 64 * 4).reshape(64, 64, 4, 1).astype(np.float32)
    by_name, by_ends = (v.prepare_volume(voxels, window=w, storage="float32").voxels for w in (name, (low, high)))
    np.testing.assert_array_equal(by_name, by_ends)
    big = np.repeat(np.repeat(voxels, 4, 0), 4, 1)  # 256 x 256: nothing is resized
    got = v.prepare_volume(big, window=name, storage="float32").voxels
    np.testing.assert_allclose(got, (np.clip(big, low, high) - low) / (high - low), atol=2e-7)
    assert got.min() == 0 and got.max() == 1


@pytest.mark.parametrize("storage", ["uint8", "int16"])
@pytest.mark.parametrize(
    ("shape", "dtype", "low", "high"),
    [
        ((300, 300, 7, 1), np.int16, -1024, 3071),
        ((40, 600, 1, 3), np.uint8, 17, 200),
        ((64, 64, 9, 1), np.float32, 0, 1e-3),
    ],
)
def test_quantisation_error_is_at_most_half_a_step(storage, shape, dtype, low, high):
    voxels = draw(shape, dtype, low, high)
    exact = v.prepare_volume(voxels, storage="float32").values()
    stored = v.prepare_volume(voxels, storage=storage)
    error = np.abs(stored.values().astype(np.float64) - exact).max()
    # float32's own rounding adds 1.2e-7 (measured).
    assert 0.4 * stored.scale < error <= stored.scale / 2 + 1.5e-7
    assert stored.scale == (1 / 255 if storage == "uint8" else 1 / 65535) and stored.voxels.dtype == storage


def test_8_bit_scans_come_back_exactly():
    full = np.arange(512 * 512, dtype=np.uint32).reshape(512, 512, 1, 1).astype(np.uint8)
    np.testing.assert_array_equal(v.prepare_volume(full).voxels, full)
    for low, high in [(0, 1), (3, 250), (17, 18), (100, 227)]:
        voxels = draw((256, 256, 8, 1), np.uint8, low, high)
        volume = v.prepare_volume(voxels)
        np.testing.assert_array_equal(np.rint(volume.values()[..., :1] * (high - low) + low), voxels)


@pytest.mark.parametrize(("low", "high"), [(-1024, 3071), (-32768, 32767), (-1000, 64535)])
def test_int16_keeps_every_hounsfield_unit(low, high):
    voxels = draw((256, 256, 4, 1), np.int32, low, high)
    voxels.flat[:2] = low, high
    volume = v.prepare_volume(voxels, storage="int16")
    assert volume.voxels.min() == -32768 and volume.voxels.max() == 32767
    values = volume.voxels * volume.scale + volume.offset
    np.testing.assert_array_equal(np.rint(values * (high - low) + low), voxels)


def test_a_large_offset_costs_no_contrast():
    """int32 and float64 around ten million: in float32 their differences of 1 would vanish."""
    small = draw((256, 256, 4, 1), np.int16, 0, 255)
    want = v.prepare_volume(small).voxels
    for dtype in (np.int32, np.int64, np.float64, np.uint32):
        np.testing.assert_array_equal(v.prepare_volume(small.astype(dtype) + 10**9).voxels, want)


def test_2d_is_stored_once():
    volume = v.prepare_volume(draw((100, 80, 1, 1), np.uint16, 0, 4095))
    assert volume.voxels.shape == (512, 512, 1, 1) and volume.shape == (512, 512, 4) and volume.voxels.nbytes == 512**2
    assert volume.values().shape == (512, 512, 4, 3)


def test_one_channel_if_gray():
    colour = draw((5, 6, 2, 3), np.uint8, 0, 255)
    assert v.one_channel_if_gray(colour) is colour
    gray = np.repeat(colour[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(v.one_channel_if_gray(gray), colour[..., :1])
    gray[4, 5, 1, 2] ^= 1
    assert v.one_channel_if_gray(gray) is gray


# Augmentation.


@pytest.mark.parametrize("size", [(500, 480), (100, 400), (31, 7), (1, 1)])
def test_crops_keep_their_area_and_stay_inside(size):
    rng = np.random.default_rng(3)
    boxes = np.array([v.crop_box(*size, rng) for _ in range(400)])
    top, left, h, w = boxes.T
    assert (
        (boxes[:, :2] >= 0).all() and (top + h <= size[0]).all() and (left + w <= size[1]).all() and (h * w > 0).all()
    )
    if size[0] >= 100:
        area = h * w / math.prod(size)
        assert 0.79 < area.min() < 0.82 and 0.98 < area.max() <= 1
        stretch = np.log(w / size[1] * size[0] / h)
        assert abs(stretch.mean()) < 0.02 and 0.1 < stretch.max() < 0.24
        assert top.max() > 0.08 * size[0] and left.max() > 0.08 * size[1]


def test_training_is_drawn_from_the_rng_alone():
    voxels = draw((90, 80, 6, 1), np.int16, -1000, 1000)
    make = lambda seed, **kw: v.prepare_volume(  # noqa: E731
        voxels, rng=None if seed is None else np.random.default_rng(seed), **kw
    )
    np.testing.assert_array_equal(make(1).voxels, make(1).voxels)
    assert (make(1).voxels != make(2).voxels).any() and (make(1).voxels != make(None).voxels).any()
    assert make(1).shape == make(None).shape
    top, left, h, w = v.crop_box(90, 80, np.random.default_rng(1))
    box = voxels[top : top + h, left : left + w]
    window = (float(voxels.min()), float(voxels.max()))  # the whole scan's range, not the box's
    np.testing.assert_array_equal(make(1).voxels, v.prepare_volume(box, window=window).voxels)


@pytest.mark.parametrize(("axis", "number"), [("height", 0), ("width", 1), ("depth", 2)])
def test_flips_only_when_asked(axis, number):
    voxels = draw((40, 50, 8, 1), np.uint8, 0, 255)
    seen = set()
    for seed in range(8):
        plain = v.prepare_volume(voxels, rng=np.random.default_rng(seed)).voxels
        got = v.prepare_volume(voxels, rng=np.random.default_rng(seed), flips=[axis]).voxels
        turned = np.array_equal(got, np.flip(plain, number))
        assert turned or np.array_equal(got, plain)
        seen.add(turned)
    assert seen == {True, False}


@pytest.mark.parametrize("storage", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augment_a_record(storage, channels):
    volume = v.prepare_volume(draw((90, 80, 6, channels), np.int16, -1000, 1000), storage=storage)
    before = volume.voxels.copy()
    one, two = (v.augment(volume, np.random.default_rng(4)) for _ in range(2))
    np.testing.assert_array_equal(one.voxels, two.voxels)
    np.testing.assert_array_equal(volume.voxels, before)
    assert one.shape == volume.shape and (one.scale, one.offset) == (volume.scale, volume.offset)
    top, left, h, w = v.crop_box(256, 256, np.random.default_rng(4))
    box = volume.voxels[top : top + h, left : left + w].astype(np.float64)
    for axis, n in enumerate((h, w)):
        box = np.moveaxis(np.tensordot(linear_matrix(n, 256), box, (1, axis)), 0, axis)
    # Measured: 0.755 of a uint8 step (OpenCV computes it in fixed point), 0.501 of int16, 6e-8 in float32.
    step = {"uint8": 0.8, "int16": 0.51, "float32": 2e-7}[storage]
    assert np.abs(one.voxels - box).max() <= step


# Bad input.


def with_values(*values, shape=(6, 5, 4, 1)):
    x = draw(shape, np.float32)
    x.flat[: len(values)] = values
    return x


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (with_values(np.nan, np.inf, -np.inf), r"3 of 120 voxels are not finite \(1 NaN, 2 infinite\)"),
        (with_values(np.nan, shape=(6, 5, 1, 1)), r"1 of 30 voxels are not finite"),
        (with_values(*[np.nan] * 120), "120 of 120"),
        (np.full((6, 5, 4, 1), -7, np.int16), "every one of the 120 voxels is -7"),
        (np.full((6, 5, 1, 3), 9, np.uint8), "every one of the 90 voxels is 9"),
        (np.zeros((6, 5, 4), np.int16), r"got \[6, 5, 4\]"),
        (np.zeros((6, 5, 4, 2), np.int16), r"got \[6, 5, 4, 2\]"),
        (np.zeros((6, 0, 4, 1), np.int16), r"got \[6, 0, 4, 1\]"),
        (np.zeros((6, 5, 4, 1), bool), "got bool"),
        (np.zeros((6, 5, 4, 1), complex), "got complex128"),
    ],
)
def test_bad_voxels_are_errors_with_numbers(mode, voxels, message):
    with pytest.raises(ValueError, match=message):
        v.prepare_volume(voxels, mode=mode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "lungs"}, "'lungs' is none of lung, mediastinum"),
        ({"window": (5, 5)}, "the lower one first"),
        ({"window": (0, math.inf)}, "two finite intensities"),
        ({"window": (2, 3)}, r"run from 0 to 1, all outside the window 2 to 3: every one would be black"),
        ({"window": (-3, 0)}, "every one would be white"),
        ({"storage": "float16"}, "'float16' is none of uint8, int16, float32"),
        ({"mode": "fast"}, "'fast' is none of paper, released"),
        ({"flips": ["left"], "rng": np.random.default_rng(0)}, "some of height, width, depth"),
        ({"flips": ["width"]}, "and an rng"),
        ({"mode": "released", "window": "lung"}, "released mode has neither windows"),
        ({"mode": "released", "storage": "uint8"}, "float32"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        v.prepare_volume(with_values(0, 1), **options)


def test_ranges_that_float32_cannot_scale_are_errors():
    for ends in [(-1e308, 1e308), (0, 1e-200)]:
        voxels = np.zeros((4, 4, 4, 1))
        voxels.flat[:2] = ends
        with pytest.raises(ValueError, match="float32 cannot scale"):
            v.prepare_volume(voxels)


def test_released_intensity_names_its_options():
    with pytest.raises(ValueError, match="'minmax' is none of stack, scan, as_is"):
        v.released_stack([with_values(0, 1)], intensity="minmax")
