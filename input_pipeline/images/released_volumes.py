"""Volumes with the exact numbers of the released code, which the released weights expect.

Source: the data sets, `stack_images` and the training collator of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from input_pipeline.images.augment import CROP_AREA
from input_pipeline.images.intensity import check_voxels, finite_range
from input_pipeline.images.planes import Volume, released_shape

INTENSITIES = ("stack", "scan", "as_is")


def nearest_index(n_in: int, n_out: int) -> np.ndarray:
    """int64[n_out], the source index of each output index, as torch's nearest interpolation computes it in float32.

    min(floor(i * (n_in / n_out)), n_in - 1). Integer arithmetic gives other indices, for instance 26 -> 44 at i = 22.
    """
    ratio = np.float32(n_in) / np.float32(n_out)
    return np.minimum(np.floor(np.arange(n_out, dtype=np.float32) * ratio).astype(np.int64), n_in - 1)


def resize_nearest(voxels: np.ndarray, *sizes: tuple[int, int, int]) -> np.ndarray:
    """Resize [H, W, D, C] to each of `sizes` in turn. The indices are composed, so voxels are copied once."""
    index = [np.arange(n) for n in voxels.shape[:3]]
    for size in sizes:
        index = [i[nearest_index(len(i), n)] for i, n in zip(index, size, strict=True)]
    return voxels[np.ix_(*index)]


def resize_image(pixels: np.ndarray, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Crop uint8[h, w, C] to `box` (top, left, height, width) and resize to 512 x 512 by Pillow's bicubic filter."""
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    if box is not None:
        top, left, h, w = box
        image = image.crop((left, top, left + w, top + h))
    return np.asarray(image.resize((512, 512), Image.Resampling.BICUBIC)).reshape(512, 512, -1)


def released_crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as RandomResizedCrop(scale=(0.8, 1.0)) does.

    An area of 0.8 to 1.0 and an aspect ratio (width / height) of 3/4 to 4/3 are drawn up to ten times until the box
    fits. Otherwise the box is the centre of the image, with an aspect ratio of 3/4 or 4/3.
    """
    min_ratio, max_ratio = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(min_ratio), math.log(max_ratio)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, max(round(width / min_ratio), 1))
    w = min(width, max(round(height * max_ratio), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def scale_intensities(scans: Sequence[np.ndarray], intensity: str, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Return the scans as the released data sets pass them to stack_images: float32[H, W, D, C], 2D ones 512 x 512."""
    if intensity not in INTENSITIES:
        raise ValueError(f"intensity {intensity!r} must be one of {', '.join(INTENSITIES)}")
    is_image = [check_voxels(v).dtype == np.uint8 and v.shape[2] == 1 for v in scans]
    ranges = [finite_range(v) for v in scans]
    if intensity == "stack":
        stacked = [r for r, image in zip(ranges, is_image, strict=True) if not image] or [(0.0, 1.0)]
        ranges = [(min(low for low, _ in stacked), max(high for _, high in stacked))] * len(scans)
    out = []
    for voxels, image, (low, high) in zip(scans, is_image, ranges, strict=True):
        if image:
            box = None if rng is None else released_crop_box(*voxels.shape[:2], rng)
            out.append((resize_image(voxels[:, :, 0], box)[:, :, None] / np.float32(255)).astype(np.float32))
            continue
        voxels = voxels.astype(np.float32)
        if intensity != "as_is":
            voxels = (voxels - np.float32(low)) / (np.float32(high) - np.float32(low))
        out.append(voxels)
    return out


def released_volumes(
    scans: Sequence[np.ndarray], *, intensity="stack", collate=True, rng: np.random.Generator | None = None
) -> list[Volume]:
    """Return the scans of one sample as the released code feeds them, with equal depth, each as a float32 Volume.

    Gray scans keep one channel and 2D scans one slice. A sample without scans has no volumes here (the released code
    adds one of zeros that no token refers to). Raises ValueError for voxels that are not finite or all equal, which the
    released code replaces by noise.

    Args:
      scans: voxels [H, W, D, C]. uint8 of depth 1 is a 2D image: cropped if there is an rng (the released test and demo
        programs crop too), resized to 512 x 512 by Pillow's bicubic filter, divided by 255. All others are resized by
        nearest neighbour.
      intensity: how the others are scaled. "stack": the minimum and maximum of all of them become 0 and 1 (the .npy
        families); "scan": those of each scan (Rad3D-Modality); "as_is": not at all.
      collate: True as in training; False as in the released test program, where volumes stay at 512 x 512.
    """
    depths = [v.shape[2] for v in scans]
    stacked, final = released_shape(depths, collate=False), released_shape(depths, collate=collate)
    volumes = []
    for voxels in scale_intensities(scans, intensity, rng):
        sizes = [(*size[:2], 1 if voxels.shape[2] == 1 else size[2]) for size in (stacked, final)]
        slices = np.ascontiguousarray(resize_nearest(voxels, *sizes).transpose(2, 3, 0, 1))
        volumes.append(Volume.from_slices(slices, 1.0, 0.0, final[2]))
    return volumes
