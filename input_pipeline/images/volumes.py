"""Scan -> volume at the model's size, with intensities in [0, 1].

`paper` mode follows the paper: min-max scaling over the whole scan, then resizing. `released` mode gives the numbers of
the released code (released_volumes.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from input_pipeline.images.augment import CROP_AREA, crop_box, flip_slices
from input_pipeline.images.intensity import check_voxels, intensity_range, without_padding
from input_pipeline.images.planes import MODES, PAPER_SIZES, STORAGE, Sizes, Volume, target_shape
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.resize import resize_volume

QUANTIZATION = {"uint8": (1 / 255, 0.0), "int16": (1 / 65535, 32768 / 65535), "float32": (1.0, 0.0)}  # scale, offset


def prepare_volume(
    voxels: np.ndarray,
    *,
    mode: str = "paper",
    window: str | tuple[float, float] | None = None,
    storage: str | None = None,
    rng: np.random.Generator | None = None,
    crop: float = CROP_AREA[0],
    flips: Sequence[str] = (),
    sizes: Sizes = PAPER_SIZES,
    padding: tuple[float, float] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Volume:
    """Resize a scan, voxels [H, W, D, C] in any memory order, and scale its intensities to [0, 1].

    `paper` mode, in this order:
      1. Padding (voxels outside the field of view, often far darker than air) is set to the minimum of the others.
      2. Range: the minimum and maximum of the whole scan, before any crop or resize, become 0 and 1. With a window,
         voxels are clipped to it and its ends become 0 and 1. Being linear, the scaling is applied after the resize.
      3. Crop, with an rng: one box for all slices, `crop` (0.8) to 1.0 of their area, in the plane only.
      4. Height and width, each independently: box average when shrinking, linear when growing.
      5. Depth: linear; when shrinking, the kernel widens with the ratio (antialiased), so every slice contributes.
      6. Flips, with an rng: each axis in `flips` with probability 0.5.
      7. Quantization from float32 to `storage`, with an error of at most half of QUANTIZATION's scale. So an 8-bit scan
         that keeps its size is exact, and Hounsfield units that span up to 65535 are exact to half a unit in int16.

    Args:
      window: a name in CT_WINDOWS or (low, high) in the unit of the voxels.
      storage: uint8 (default), int16 or float32; `released` mode supports float32 only.
      rng: for training only. The same generator state gives the same volume.
      flips: of "height", "width", "depth". Off by default, because left and right matter in a report.
      padding: inclusive (low, high) of padding values: pass `Header.padding`. `released` mode ignores it.
      value_range: (minimum, maximum) of `voxels` including padding: pass `Header.value_range`. Saves a pass over them.
    Raises:
      ValueError: voxels that are not finite, all equal, all padding, or all outside the window; invalid arguments.
    """
    if mode == "released":
        if window is not None or flips or storage not in (None, "float32"):
            raise ValueError("released mode supports neither windows nor flips, and stores float32")
        return released_volumes([voxels], rng=rng)[0]
    if mode != "paper":
        raise ValueError(f"mode {mode!r} must be one of {', '.join(MODES)}")
    storage = "uint8" if storage is None else storage
    if storage not in STORAGE:
        raise ValueError(f"storage {storage!r} must be one of {', '.join(STORAGE)}")
    voxels, low, high = without_padding(check_voxels(voxels), padding, value_range)
    low, high = intensity_range(low, high, window)
    height, width, depth = target_shape(voxels.shape[:3], mode, sizes)
    if voxels.shape[2] == 1:
        depth = 1
    if rng is not None:
        top, left, h, w = crop_box(*voxels.shape[:2], rng, crop)
        voxels = voxels[top : top + h, left : left + w]
    clip = None if window is None else (low, high)
    slices = np.empty((depth, voxels.shape[3], height, width), storage)
    # If the first axis varies fastest, as in arrays from nibabel, slices are processed transposed.
    swapped = abs(voxels.strides[0]) < abs(voxels.strides[1])
    if swapped:
        voxels, height, width = voxels.swapaxes(0, 1), width, height
    for k, c, plane in resize_volume(voxels, (height, width, depth), low, clip):
        plane = _quantize(plane, high - low, storage)
        slices[k, c] = cv2.transpose(plane) if swapped else plane
    return Volume.from_slices(flip_slices(slices, flips, rng), *QUANTIZATION[storage])


def _quantize(plane: np.ndarray, span: float, storage: str) -> np.ndarray:
    """Convert float32[H', W'] from 0 to `span` to the storage dtype. Overwrites the plane."""
    if storage == "uint8":
        # Rounds to nearest and saturates in one pass; the only negative values are rounding noise around 0.
        return cv2.convertScaleAbs(plane, alpha=255 / span)
    if storage == "int16":
        plane *= np.float32(65535 / span)
        plane -= np.float32(32768)
        return np.clip(np.rint(plane, out=plane), -32768, 32767, out=plane).astype(np.int16)
    plane /= np.float32(span)
    return np.clip(plane, 0, 1, out=plane)
