"""Intensity, resizing and augmentation in paper mode, and invalid input."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scan_files import dicom_file
from voxels import draw, with_values

from input_pipeline.images import scans
from input_pipeline.images.augment import augment, crop_box
from input_pipeline.images.intensity import CT_WINDOWS, one_channel_if_gray
from input_pipeline.images.planes import target_shape
from input_pipeline.images.resize import area_weights, depth_weights
from input_pipeline.images.volumes import prepare_volume


def area_matrix(n, m):
    """Box averages by counting: every source pixel is split into m parts, every target pixel consists of n parts."""
    return np.stack([np.bincount(np.arange(j * n, (j + 1) * n) // m, minlength=n) / n for j in range(m)])


def linear_matrix(n, m):
    centres = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.stack([np.interp(centres, np.arange(n), row) for row in np.eye(n)], axis=1)


def by_definition(voxels, low, high, size):
    """Compute `paper` mode in float64 with dense matrices: clip, scale, then resize axis by axis."""
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
        ((300, 280, 9, 1), np.int16, None),  # all three shrink, by non-integer ratios
        ((512, 512, 6, 1), np.int16, (-500.0, 800.5)),  # whole boxes; depth grows
        ((200, 330, 8, 1), np.float32, None),  # one grows, one shrinks
        ((260, 256, 5, 3), np.uint8, None),  # colour
        ((40, 256, 70, 1), np.uint16, None),  # depth shrinks to its limit of 64
        ((100, 90, 3, 1), np.float64, (-700.25, 700.0)),
        ((90, 100, 3, 1), np.int32, (-700.25, 700.0)),
        ((600, 700, 1, 1), np.uint8, None),  # 2D
        ((700, 400, 1, 3), np.uint16, None),
    ],
)
def test_paper_mode_is_its_definition(shape, dtype, window):
    low, high = (0, 255 if dtype == np.uint8 else 60000) if np.dtype(dtype).kind == "u" else (-1000, 1500)
    voxels = draw(shape, dtype, low, high)
    size = (512, 512, 1) if shape[2] == 1 else target_shape(shape[:3])
    want = by_definition(voxels, *(window or (voxels.min(), voxels.max())), size)
    got = prepare_volume(voxels, storage="float32", window=window)
    assert got.shape == target_shape(shape[:3]) and got.voxels.dtype == np.float32
    assert got.voxels.min() >= 0 and got.voxels.max() <= 1
    # Measured maximum: 2.0e-7, from weights and sums in float32.
    np.testing.assert_allclose(got.voxels, want, rtol=0, atol=5e-7)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 2), (5, 4), (6, 8), (9, 8), (66, 64), (200, 64), (1, 1), (3, 4)])
def test_depth_weights_are_torch_antialiased_linear(n, m):
    want = torch.nn.functional.interpolate(torch.eye(n)[None, None], (m, n), mode="bilinear", antialias=True)[0, 0]
    # Measured: 6e-8, one float32 rounding.
    np.testing.assert_allclose(depth_weights(n, m), want.numpy(), rtol=0, atol=2e-7)


def test_weights_of_the_docstrings():
    np.testing.assert_allclose(depth_weights(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(depth_weights(4, 2) * 7, [[3, 3, 1, 0], [0, 1, 3, 3]], rtol=1e-6)
    np.testing.assert_allclose(area_weights(5, 2).toarray() * 5, [[2, 2, 1, 0, 0], [0, 0, 1, 2, 2]], rtol=1e-6)
    for n, m in [(700, 512), (513, 512), (480, 256), (7, 1), (4, 4)]:
        np.testing.assert_allclose(area_weights(n, m).toarray(), area_matrix(n, m), rtol=0, atol=1e-7)


ORDERS = [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3), (3, 2, 1, 0), (3, 0, 1, 2), (1, 2, 0, 3)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_order_does_not_matter(order, channels):
    """The memory orders of nibabel, numpy, released .npy files and flipped orientations."""
    voxels = draw((40, 30, 18, channels), np.int16, -1000, 2000)
    want = prepare_volume(voxels, storage="int16").voxels
    laid = np.ascontiguousarray(voxels.transpose(order)).transpose(np.argsort(order))
    assert laid.shape == voxels.shape
    for x in (laid, np.flip(np.ascontiguousarray(np.flip(laid, (0, 2))), (0, 2))):
        np.testing.assert_array_equal(prepare_volume(x, storage="int16").voxels, want)


def test_intensity_range_is_that_of_the_scan_before_resizing():
    """A voxel of 100 and one of -100 in zeros set the scale, although the resize averages them out."""
    voxels = np.zeros((512, 512, 8, 1), np.int16)
    voxels[100, 100, 3], voxels[300, 300, 5] = 100, -100
    got = prepare_volume(voxels, storage="float32").voxels
    assert got[0, 0, 0, 0] == 0.5
    np.testing.assert_allclose([got.max(), got.min()], [0.5 + 0.5 / 4, 0.5 - 0.5 / 4])


def field_of_view(dtype=np.int16):
    """A volume of 2 x 2 squares in its final size, the upper left one outside the field of view.

    -2000  -1000        0    0        in [0, 1] without padding, which becomes the minimum of the others
        0   1000        0.5  1
    """
    squares = np.array([[-2000, -1000], [0, 1000]], dtype).repeat(128, 0).repeat(128, 1)
    return np.stack([squares] * 4, axis=2)[..., None]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("order", ["C", "F", "backwards"])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_padding_is_not_in_the_range(dtype, order, known):
    voxels = field_of_view(dtype)
    voxels = np.asfortranarray(voxels) if order == "F" else voxels
    voxels = np.ascontiguousarray(voxels[::-1, ::-1])[::-1, ::-1] if order == "backwards" else voxels
    before = voxels.copy()

    def corners(padding, **options):
        value_range = (-2000, 1000) if known else None
        volume = prepare_volume(voxels, padding=padding, value_range=value_range, storage="float32", **options)
        return volume.voxels[64::128, 64::128, 2, 0].round(6).tolist()

    without = [[0, 0.333333], [0.666667, 1]]
    np.testing.assert_allclose(corners(None), without)
    for padding in [(-2000, -2000), (-2000.0, -1000.5), (-32768, -1500)]:
        np.testing.assert_allclose(corners(padding), [[0, 0], [0.5, 1]])
    np.testing.assert_allclose(corners((0, 0)), [[0, 0.333333], [0, 1]])  # mid-range padding is black too
    np.testing.assert_allclose(corners((1000, 3000)), [[0, 0.5], [1, 0]])
    for padding in [(-3000, -2001), (1001, 1002), (-999, -1)]:
        np.testing.assert_allclose(corners(padding), without)
    np.testing.assert_allclose(corners((-2000, -2000), window=(-500, 500)), [[0, 0], [0.5, 1]])
    np.testing.assert_array_equal(voxels, before)


def test_padding_of_a_real_head_ct():
    """A fifth is -3024, the rest from -1024 to 1468: padding in the range would cost 45 % of the contrast."""
    voxels, header = scans.read(dicom_file("693_UNCR.dcm"))
    outside = voxels == -3024
    assert header.padding == (-3024, -3024) and outside.mean() > 0.2 and header.value_range == (-3024, 1468)
    seen = voxels[~outside]
    assert (seen.min(), seen.max()) == (-1024, 1468)
    got = prepare_volume(voxels, padding=header.padding, value_range=header.value_range, storage="float32").voxels
    want = np.where(outside, 0, (voxels + 1024.0) / (1468 + 1024))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)  # measured: 6e-8, one float32 rounding


def test_released_mode_ignores_padding():
    voxels = field_of_view()
    want = prepare_volume(voxels, mode="released").voxels
    got = prepare_volume(voxels, mode="released", padding=(-2000, -2000), value_range=(-2000, 1000)).voxels
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        ((-2000, 1000), r"all 262144 voxels are padding \(-2000 to 1000\)"),
        ((-2000, 0), "all 65536 voxels are 1000"),
    ],
)
def test_only_padding_is_an_error(padding, message):
    with pytest.raises(ValueError, match=message):
        prepare_volume(field_of_view(), padding=padding)


@pytest.mark.parametrize("name", CT_WINDOWS)
def test_windows(name):
    low, high = CT_WINDOWS[name]
    voxels = np.linspace(-2000, 3000, 64 * 64 * 4).reshape(64, 64, 4, 1).astype(np.float32)
    by_name, by_ends = (prepare_volume(voxels, window=w, storage="float32").voxels for w in (name, (low, high)))
    np.testing.assert_array_equal(by_name, by_ends)
    big = np.repeat(np.repeat(voxels, 4, 0), 4, 1)  # 256 x 256: no resize
    got = prepare_volume(big, window=name, storage="float32").voxels
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
    exact = prepare_volume(voxels, storage="float32").values()
    stored = prepare_volume(voxels, storage=storage)
    error = np.abs(stored.values().astype(np.float64) - exact).max()
    # Rounding of float32 adds 1.2e-7 (measured).
    assert 0.4 * stored.scale < error <= stored.scale / 2 + 1.5e-7
    assert stored.scale == (1 / 255 if storage == "uint8" else 1 / 65535) and stored.voxels.dtype == storage


def test_8_bit_scans_are_recovered_exactly():
    full = np.arange(512 * 512, dtype=np.uint32).reshape(512, 512, 1, 1).astype(np.uint8)
    np.testing.assert_array_equal(prepare_volume(full).voxels, full)
    for low, high in [(0, 1), (3, 250), (17, 18), (100, 227)]:
        voxels = draw((256, 256, 8, 1), np.uint8, low, high)
        volume = prepare_volume(voxels)
        np.testing.assert_array_equal(np.rint(volume.values()[..., :1] * (high - low) + low), voxels)


@pytest.mark.parametrize(("low", "high"), [(-1024, 3071), (-32768, 32767), (-1000, 64535)])
def test_int16_keeps_every_hounsfield_unit(low, high):
    voxels = draw((256, 256, 4, 1), np.int32, low, high)
    voxels.flat[:2] = low, high
    volume = prepare_volume(voxels, storage="int16")
    assert volume.voxels.min() == -32768 and volume.voxels.max() == 32767
    values = volume.voxels * volume.scale + volume.offset
    np.testing.assert_array_equal(np.rint(values * (high - low) + low), voxels)


def test_a_large_offset_keeps_the_contrast():
    """int32 and float64 values with a large offset: float32 could not represent their differences of 1."""
    small = draw((256, 256, 4, 1), np.int16, 0, 255)
    want = prepare_volume(small).voxels
    for dtype in (np.int32, np.int64, np.float64, np.uint32):
        np.testing.assert_array_equal(prepare_volume(small.astype(dtype) + 10**9).voxels, want)


def test_2d_is_stored_once():
    volume = prepare_volume(draw((100, 80, 1, 1), np.uint16, 0, 4095))
    assert volume.voxels.shape == (512, 512, 1, 1) and volume.shape == (512, 512, 4) and volume.voxels.nbytes == 512**2
    assert volume.values().shape == (512, 512, 4, 3)


def test_one_channel_if_gray():
    colour = draw((5, 6, 2, 3), np.uint8, 0, 255)
    assert one_channel_if_gray(colour) is colour
    gray = np.repeat(colour[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(one_channel_if_gray(gray), colour[..., :1])
    gray[4, 5, 1, 2] ^= 1
    assert one_channel_if_gray(gray) is gray


@pytest.mark.parametrize("size", [(500, 480), (100, 400), (31, 7), (1, 1)])
def test_crops_have_their_area_and_are_inside(size):
    rng = np.random.default_rng(3)
    boxes = np.array([crop_box(*size, rng) for _ in range(400)])
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


def test_augmentation_depends_on_the_rng_only():
    voxels = draw((90, 80, 6, 1), np.int16, -1000, 1000)
    make = lambda seed, **kw: prepare_volume(  # noqa: E731
        voxels, rng=None if seed is None else np.random.default_rng(seed), **kw
    )
    np.testing.assert_array_equal(make(1).voxels, make(1).voxels)
    assert (make(1).voxels != make(2).voxels).any() and (make(1).voxels != make(None).voxels).any()
    assert make(1).shape == make(None).shape
    top, left, h, w = crop_box(90, 80, np.random.default_rng(1))
    box = voxels[top : top + h, left : left + w]
    window = (float(voxels.min()), float(voxels.max()))  # the range of the whole scan, not of the box
    np.testing.assert_array_equal(make(1).voxels, prepare_volume(box, window=window).voxels)


@pytest.mark.parametrize(("axis", "number"), [("height", 0), ("width", 1), ("depth", 2)])
def test_flips_are_optional(axis, number):
    voxels = draw((40, 50, 8, 1), np.uint8, 0, 255)
    seen = set()
    for seed in range(8):
        plain = prepare_volume(voxels, rng=np.random.default_rng(seed)).voxels
        got = prepare_volume(voxels, rng=np.random.default_rng(seed), flips=[axis]).voxels
        turned = np.array_equal(got, np.flip(plain, number))
        assert turned or np.array_equal(got, plain)
        seen.add(turned)
    assert seen == {True, False}


@pytest.mark.parametrize("storage", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augment_a_record(storage, channels):
    volume = prepare_volume(draw((90, 80, 6, channels), np.int16, -1000, 1000), storage=storage)
    before = volume.voxels.copy()
    one, two = (augment(volume, np.random.default_rng(4)) for _ in range(2))
    np.testing.assert_array_equal(one.voxels, two.voxels)
    np.testing.assert_array_equal(volume.voxels, before)
    assert one.shape == volume.shape and (one.scale, one.offset) == (volume.scale, volume.offset)
    top, left, h, w = crop_box(256, 256, np.random.default_rng(4))
    box = volume.voxels[top : top + h, left : left + w].astype(np.float64)
    for axis, n in enumerate((h, w)):
        box = np.moveaxis(np.tensordot(linear_matrix(n, 256), box, (1, axis)), 0, axis)
    # Measured: 0.755 steps in uint8 (OpenCV uses fixed point), 0.501 steps in int16, 6e-8 in float32.
    step = {"uint8": 0.8, "int16": 0.51, "float32": 2e-7}[storage]
    assert np.abs(one.voxels - box).max() <= step


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (with_values(np.nan, np.inf, -np.inf), r"3 of 120 voxels are not finite \(1 NaN, 2 infinite\)"),
        (with_values(np.nan, shape=(6, 5, 1, 1)), r"1 of 30 voxels are not finite"),
        (with_values(*[np.nan] * 120), "120 of 120"),
        (np.full((6, 5, 4, 1), -7, np.int16), "all 120 voxels are -7"),
        (np.full((6, 5, 1, 3), 9, np.uint8), "all 90 voxels are 9"),
        (np.zeros((6, 5, 4), np.int16), r"got \[6, 5, 4\]"),
        (np.zeros((6, 5, 4, 2), np.int16), r"got \[6, 5, 4, 2\]"),
        (np.zeros((6, 0, 4, 1), np.int16), r"got \[6, 0, 4, 1\]"),
        (np.zeros((6, 5, 4, 1), bool), "got bool"),
        (np.zeros((6, 5, 4, 1), complex), "got complex128"),
    ],
)
def test_bad_voxels_are_errors_with_numbers(mode, voxels, message):
    with pytest.raises(ValueError, match=message):
        prepare_volume(voxels, mode=mode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "lungs"}, "'lungs' is not one of lung, mediastinum"),
        ({"window": (5, 5)}, "the lower one first"),
        ({"window": (0, math.inf)}, "two finite intensities"),
        ({"window": (2, 3)}, r"range from 0 to 1, all outside the window 2 to 3: every voxel would be black"),
        ({"window": (-3, 0)}, "every voxel would be white"),
        ({"storage": "float16"}, "'float16' must be one of uint8, int16, float32"),
        ({"mode": "fast"}, "'fast' must be one of paper, released"),
        ({"flips": ["left"], "rng": np.random.default_rng(0)}, "some of height, width, depth"),
        ({"flips": ["width"]}, "need an rng"),
        ({"mode": "released", "window": "lung"}, "released mode supports only minmax"),
        ({"mode": "released", "storage": "uint8"}, "float32"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        prepare_volume(with_values(0, 1), **options)


def test_ranges_that_float32_cannot_scale_are_errors():
    for ends in [(-1e308, 1e308), (0, 1e-200)]:
        voxels = np.zeros((4, 4, 4, 1))
        voxels.flat[:2] = ends
        with pytest.raises(ValueError, match="float32 cannot scale"):
            prepare_volume(voxels)
