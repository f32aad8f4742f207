"""Rows of one sample each, drawn by hand."""

import numpy as np
import pytest

from input_pipeline.images.planes import patch_positions
from radfm_jax.inference.plain_rows import plain_rows

V, L = 10, 2
FORM = {"vocab_size": V, "num_latents": L, "patch": (4, 4, 2), "tables": (2, 2, 4)}

# Two rows of nine tokens with two scans each; `I` and `/I` are V and V + 1, scan s latent j is V + 2 + 2 s + j.
#             <s>   I  s0 s0  /I   I  s1 s1  /I          <s>  5   I  s1 s0  /I  6  7  2
IDS = [[1, 10, 12, 13, 11, 10, 14, 15, 11], [1, 5, 10, 14, 13, 11, 6, 7, 2]]
DRAWN = {
    "ids": [[1, 10, 0, 0, 11, 10, 0, 0, 11], [1, 5, 10, 0, 0, 11, 6, 7, 2]],
    "visual_index": [[-1, -1, 0, 1, -1, -1, 2, 3, -1], [-1, -1, -1, 2, 1, -1, -1, -1, -1]],
    "segments": [[1] * 9] * 2,
    "positions": [[0, 1, 2, 3, 4, 5, 6, 7, 8]] * 2,
    "key_ok": [[1] * 9, [1, 1, 1, 1, 1, 1, 0, 1, 0]],
    "scan_rows": [[0, 1]] * 2,
    "scan_scale": [[1, 1]] * 2,
    "scan_offset": [[0, 0]] * 2,
    # Each scan is 8 x 4 x 2 voxels, so two patches, alone in its vision row.
    "patch_segments": [[[1, 1], [2, 2]]] * 2,
    "patch_positions": [[[[0, 1, 3], [1, 1, 3]]] * 2] * 2,
}
MASK = np.array([[1] * 9, [1, 1, 1, 1, 1, 1, 0, 1, 0]])


def vision(rows=2, scans=2, shape=(8, 4, 2), channels=3):
    return np.random.default_rng(0).standard_normal((rows, scans, channels, *shape)).astype(np.float32)


def test_rows_as_drawn():
    rows = plain_rows(np.array(IDS), vision(), MASK, **FORM)
    for name, drawn in DRAWN.items():
        np.testing.assert_array_equal(rows[name], drawn, err_msg=name)
        assert rows[name].flags.c_contiguous
    floats, bools = {"planes", "scan_scale", "scan_offset"}, {"key_ok"}
    for name, array in rows.items():
        assert array.dtype == (np.float32 if name in floats else bool if name in bools else np.int32), name
        assert len(array) == 2, name


def test_planes_are_indexed_back_into_the_volume():
    """Plane by plane: patch n is rows 4 n to 4 n + 3, slice p, channel c of scan s."""
    volumes = vision()
    rows = plain_rows(np.array(IDS), volumes, **FORM)
    assert rows["planes"].shape == (2, 2 * 2 * 2 * 3, 4, 4) and rows["plane_index"].shape == (2, 2, 2, 2, 3)
    for b, s, n, p, c in np.ndindex(2, 2, 2, 2, 3):
        plane = rows["planes"][b, rows["plane_index"][b, s, n, p, c]]
        np.testing.assert_array_equal(plane, volumes[b, s, c, 4 * n : 4 * n + 4, :, p])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_masks_and_ids_of_any_kind(dtype):
    rows = plain_rows(np.array(IDS, dtype), vision(), MASK.astype(bool), **FORM)
    np.testing.assert_array_equal(rows["key_ok"], MASK)
    np.testing.assert_array_equal(rows["visual_index"], DRAWN["visual_index"])
    assert plain_rows(np.array(IDS, dtype), vision(), **FORM)["key_ok"].all()


def test_released_sizes():
    ids = np.array([[1, 32000, *range(32002, 32034), 32001, 5]])
    rows = plain_rows(ids, np.zeros((1, 1, 3, 256, 256, 8), np.float32), vocab_size=32000)
    np.testing.assert_array_equal(rows["visual_index"], [[-1, -1, *range(32), -1, -1]])
    assert rows["planes"].shape == (1, 128 * 12, 32, 32) and rows["plane_index"].shape == (1, 1, 128, 4, 3)
    np.testing.assert_array_equal(rows["patch_positions"][0, 0], patch_positions((8, 8, 2)))


def with_id(value):
    ids = np.array(IDS)
    ids[1, 1] = value
    return ids


@pytest.mark.parametrize(
    "ids, volumes, mask, message",
    [
        (with_id(-1), vision(), None, "ids range from -1 to 15, .* for a vocabulary of 10, 2 image marks and 2 scans"),
        (with_id(16), vision(), None, "ids range from 1 to 16, but the maximum is 15"),
        (np.array(IDS), vision(scans=1), None, "ids range from 1 to 15, .* is 13 .* 1 scans of 2 visual tokens"),
        (np.array(IDS, float), vision(), None, r"ids must be integers \[B, L\] \(got float64\[2, 9\]\)"),
        (np.array(IDS) > 3, vision(), None, r"got bool\[2, 9\]"),
        (np.array(IDS)[0], vision(), None, r"got int64\[9\]"),
        (np.array(IDS), vision()[0], None, r"vision must be \[B, S, C, H, W, D\] \(got \[2, 3, 8, 4, 2\]\)"),
        (np.array(IDS), vision(rows=1), None, "ids has 2 rows but vision has 1"),
        (np.array(IDS), vision(), MASK[:, 1:], r"attention_mask is \[2, 8\] but ids are \[2, 9\]"),
        (np.array(IDS), vision(), MASK[0], r"attention_mask is \[9\] but ids are \[2, 9\]"),
        (np.array(IDS), vision(shape=(6, 4, 2)), None, "height 6 is not a multiple of 4"),
        (np.array(IDS), vision(shape=(4, 12, 2)), None, "width 12 is 3 patches, but there are 2 learned positions"),
    ],
)
def test_what_does_not_fit_is_an_error_with_numbers(ids, volumes, mask, message):
    with pytest.raises(ValueError, match=message):
        plain_rows(ids, volumes, mask, **FORM)
