"""Volumes equal those of the released code. data/preprocess.npz holds its results for seeded inputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from voxels import draw, with_values

from input_pipeline.images.planes import released_shape
from input_pipeline.images.released_volumes import (
    nearest_index,
    released_crop_box,
    released_volumes,
    resize_image,
    resize_nearest,
    scale_intensities,
)
from input_pipeline.images.volumes import prepare_volume

GOLDEN = np.load(Path(__file__).parent / "data" / "preprocess.npz")
META = json.loads(str(GOLDEN["meta_json"]))
VOLUMES = {x["name"]: x for x in META["volumes"] if "seed" in x}
IMAGES = {x["name"]: x for x in META["images"]}


def sha(*arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def released_stack(scans, *, intensity="stack") -> np.ndarray:
    """float32[S, 3, 512, 512, D']: the scans of a sample after the released stack_images.

    D' is the largest depth, rounded to the nearest multiple of 4, ties down. Without scans: zeros [1, 3, 512, 512, 4].
    """
    size = released_shape([v.shape[2] for v in scans], collate=False)
    out = np.zeros((max(len(scans), 1), 3, *size), np.float32)
    for i, voxels in enumerate(scale_intensities(scans, intensity, None)):
        out[i] = resize_nearest(voxels, size).transpose(3, 0, 1, 2)
    return out


def released_collate(stacks) -> np.ndarray:
    """float32[B, S, 3, H', W', D']: samples joined as by the released training collator; missing scans are zeros.

    Args:
      stacks: float32[S_b, 3, 512, 512, D_b] of each sample.
    """
    count = max(len(s) for s in stacks)
    size = released_shape([max(s.shape[-1] for s in stacks)] * count, batch=len(stacks))
    out = np.zeros((len(stacks), count, 3, *size), np.float32)
    for b, stack in enumerate(stacks):
        for i, scan in enumerate(stack):
            out[b, i] = resize_nearest(scan.transpose(1, 2, 3, 0), size).transpose(3, 0, 1, 2)
    return out


def golden_scans(name):
    """Return the inputs [H, W, D, 3] of a golden volume; a missing depth axis becomes 1."""
    rng = np.random.default_rng(VOLUMES[name]["seed"])
    scans = [rng.random(shape, np.float32) for shape in VOLUMES[name]["shapes"]]
    return [(x if x.ndim == 4 else x[..., None]).transpose(1, 2, 3, 0) for x in scans]


def test_released_depths():
    got = [released_shape([int(d)], collate=False) for d in GOLDEN["depth_in"]]
    assert got == [(512, 512, d) for d in GOLDEN["stack_depth_out"]]


@pytest.mark.parametrize(
    ("case", "batch", "scans"), [("b1_s1", 1, 1), ("b1_s6", 1, 6), ("b1_s7", 1, 7), ("b2_s1", 2, 1)]
)
def test_released_collator_sizes(case, batch, scans):
    depths = GOLDEN[f"collate_{case}_in"]
    got = np.array([released_shape([int(d)] * scans, batch) for d in depths])
    np.testing.assert_array_equal(got[:, 2], GOLDEN[f"collate_{case}_outD"])
    np.testing.assert_array_equal(got[:, 0], GOLDEN[f"collate_{case}_outH"])
    np.testing.assert_array_equal(got[:, 1], got[:, 0])


def test_released_nearest_indices():
    for depth, (row, out) in enumerate(zip(GOLDEN["idxmap_depth"], GOLDEN["stack_depth_out"], strict=True), 1):
        np.testing.assert_array_equal(nearest_index(depth, out), row[:out])
    for size, row in zip(GOLDEN["idxmap_hw_in"], GOLDEN["idxmap_hw_to512"], strict=True):
        np.testing.assert_array_equal(nearest_index(int(size), 512), row)
    np.testing.assert_array_equal(nearest_index(512, 256), GOLDEN["idxmap_512_to_256"])
    chain = nearest_index(300, 512)[nearest_index(512, 256)]
    np.testing.assert_array_equal(chain, GOLDEN["chain_300_to512_to256"])
    for n_in, n_out in GOLDEN["pairs_differ_from_integer_floor"].tolist():
        index = nearest_index(n_in, n_out)
        assert index.tolist() != [i * n_in // n_out for i in range(n_out)]
        source = torch.arange(n_in, dtype=torch.float32)[None, None]
        assert index.tolist() == torch.nn.functional.interpolate(source, n_out)[0, 0].int().tolist()


@pytest.mark.parametrize("name", sorted(VOLUMES, key=lambda n: (len(n), n)))
def test_released_volumes(name):
    meta, scans = VOLUMES[name], golden_scans(name)
    if name == "batch2":
        stacks = [released_stack(group, intensity="as_is") for group in (scans[:2], scans[2:])]
        assert [list(s.shape) for s in stacks] == meta["stack_shapes"]
        out = released_collate(stacks)
        np.testing.assert_array_equal(out[:, :, :, ::64, ::64], GOLDEN["batch2_collate_sub"])
    else:
        if len(scans) == 7:  # a separate test covers its stack of 880 MB
            parts = released_volumes(scans, intensity="as_is")
            out = np.stack([p.values().transpose(3, 0, 1, 2) for p in parts])[None]
        else:
            stack = released_stack(scans, intensity="as_is")
            assert list(stack.shape) == meta["stack_shape"]
            assert sha(stack) == meta["stack_sha256"]
            np.testing.assert_array_equal(stack[:, :, :6, :6, :8], GOLDEN[f"{name}_stack_corner"])
            out = released_collate([stack])
        np.testing.assert_array_equal(out[0, :, :, ::64, ::64], GOLDEN[f"{name}_collate_sub"])
    assert list(out.shape) == meta["collate_shape"]
    assert sha(out) == meta["collate_sha256"]


@pytest.mark.slow
def test_released_stack_of_seven_scans():
    """Seven equal depths are stacked one by one."""
    digest = hashlib.sha256()
    for scan, corner in zip(golden_scans("v11"), GOLDEN["v11_stack_corner"], strict=True):
        stack = released_stack([scan], intensity="as_is")
        np.testing.assert_array_equal(stack[0, :, :6, :6, :8], corner)
        digest.update(stack.data)
    assert digest.hexdigest() == VOLUMES["v11"]["stack_sha256"]


@pytest.mark.parametrize("name", ["v2", "v5", "v10", "v12"])
@pytest.mark.parametrize("collate", [True, False])
def test_released_volumes_equal_stack_then_collate(name, collate):
    scans = golden_scans(name)
    stack = released_stack(scans)
    want = released_collate([stack])[0] if collate else stack
    got = [p.values().transpose(3, 0, 1, 2) for p in released_volumes(scans, collate=collate)]
    np.testing.assert_array_equal(got, want)


def test_released_sample_without_scans():
    stack = released_stack([])
    assert stack.shape == (1, 3, 512, 512, 4) and not stack.any()
    assert released_collate([stack]).shape == (1, 1, 3, 512, 512, 4)
    assert released_volumes([]) == []


@pytest.mark.parametrize("name", IMAGES)
def test_resize_image(name):
    meta = IMAGES[name]
    pixels = np.random.default_rng(meta["seed"]).integers(0, 256, (*meta["hw"], 3), np.uint8)
    out = resize_image(pixels, meta["box_top_left_h_w"])
    np.testing.assert_array_equal(out[[0, 1, 100, 255, 510, 511]][:, ::3], GOLDEN[f"{name}_rows"])
    np.testing.assert_array_equal(out[200:216, 300:316], GOLDEN[f"{name}_block"])
    assert sha(out) == meta["sha256_uint8"]
    # A gray image is not converted to colour: each channel is resized independently.
    gray = resize_image(pixels[..., 1:2], meta["box_top_left_h_w"])
    np.testing.assert_array_equal(gray[..., 0], out[..., 1])
    if name == "im1":
        stack = released_stack([pixels[:, :, None]])
        assert sha(stack) == meta["vision_x_sha256_1x3x512x512x4"]
        np.testing.assert_array_equal(stack[0, :, 200:204, 300:304, 0], GOLDEN["im1_totensor_block"])
        volume = prepare_volume(pixels[:, :, None], mode="released")
        assert volume.voxels.dtype == np.float32 and volume.voxels.shape == (512, 512, 1, 3)
        np.testing.assert_array_equal(volume.values().transpose(3, 0, 1, 2), stack[0])


def test_released_intensity():
    """Two scans from 0 to 10 and from 5 to 30."""
    scans = [draw((8, 8, 4, 1), np.float32, 0, 10, seed=1), draw((8, 8, 4, 1), np.float32, 5, 30, seed=2)]
    scans[0].flat[:2], scans[1].flat[:2] = (0, 10), (5, 30)
    ends = lambda intensity: [  # noqa: E731
        (float(x.voxels.min()), float(x.voxels.max())) for x in released_volumes(scans, intensity=intensity)
    ]
    assert ends("as_is") == [(0, 10), (5, 30)]
    assert ends("scan") == [(0, 1), (0, 1)]
    np.testing.assert_allclose(ends("stack"), [(0, 1 / 3), (1 / 6, 1)], rtol=1e-7)
    # 2D images are divided by 255, independent of other scans.
    image = np.full((8, 8, 1, 1), 51, np.uint8)
    image[0] = 102
    both = released_volumes([image, scans[1]], intensity="stack")
    assert both[0].voxels[-1, 0, 0, 0] == np.float32(0.2) and (both[1].voxels.min(), both[1].voxels.max()) == (0, 1)


def test_released_crop_follows_the_definition():
    rng = np.random.default_rng(5)
    boxes = np.array([released_crop_box(500, 480, rng) for _ in range(300)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 500).all() and (left + w <= 480).all()
    area = h * w / (500 * 480)
    assert 0.795 < area.min() < 0.83 and 0.9 < area.max() <= 1
    # 0.8 of the area of a 4:1 image never has an aspect ratio of 4:3: the box is the 4:3 centre.
    assert released_crop_box(100, 400, rng) == (0, 133, 100, 133)
    assert released_crop_box(400, 100, rng) == (133, 0, 133, 100)


def test_unknown_released_intensity_names_the_options():
    with pytest.raises(ValueError, match="'minmax' must be one of stack, scan, as_is"):
        released_stack([with_values(0, 1)], intensity="minmax")
