"""Scan -> volume at the model's size, with intensities in [0, 1].

`paper` mode follows the paper: min-max scaling over the whole scan, then resizing. `released` mode gives the numbers of
the released code (released_volumes.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from input_pipeline.images.augment import CROP_AREA, crop_box, flip_slices
from input_pipeline.images.contrast import contrast_notices, stretch_notice
from input_pipeline.images.intensity import Window, check_voxels, intensity_ranges, parse_intensity, without_padding
from input_pipeline.images.planes import FITS, MODES, PAPER_SIZES, STORAGE, Sizes, Volume, target_shape
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.resize import resize_volume

QUANTIZATION = {"uint8": (1 / 255, 0.0), "int16": (1 / 65535, 32768 / 65535), "float32": (1.0, 0.0)}  # scale, offset


def prepare_volume(
    voxels: np.ndarray,
    *,
    mode: str = "paper",
    window: Window | None = None,
    storage: str | None = None,
    rng: np.random.Generator | None = None,
    crop: float = CROP_AREA[0],
    flips: Sequence[str] = (),
    sizes: Sizes = PAPER_SIZES,
    fit: str = "stretch",
    padding: tuple[float, float] | None = None,
    value_range: tuple[float, float] | None = None,
    modality: str | None = None,
    stated_window: tuple[float, float] | None = None,
    spacing: tuple[float, float] | None = None,
    measure: bool = False,
) -> Volume:
    """Resize a scan, voxels [H, W, D, C] in any memory order, and scale its intensities to [0, 1].

    `paper` mode, in this order:
      1. Padding (voxels outside the field of view, often far darker than air) is set to the minimum of other voxels.
      2. Range: the minimum and maximum of the whole scan, before any crop or resize, become 0 and 1. With a window,
         voxels are clipped to it and its ends become 0 and 1; three windows become three channels. Being linear, the
         scaling is applied after the resize.
      3. Crop, with an rng: one box for all slices, `crop` (0.8) to 1.0 of their area, in the plane only.
      4. Height and width, each independently: box average when shrinking, linear when growing. `pad` keeps the ratio
         of the sides (in mm, where the spacing is known), centers the slices and fills the rest with 0.
      5. Depth: linear; when shrinking, the kernel widens with the ratio (antialiased), so every slice contributes.
      6. Flips, with an rng: each axis in `flips` with probability 0.5.
      7. Quantization from float32 to `storage`, with an error of at most half of QUANTIZATION's scale. So an 8-bit scan
         that keeps its size is exact, and Hounsfield units that span up to 65535 are exact to half a unit in int16.

    Args:
      window: an intensity setting (intensity.py); None is `minmax`.
      storage: uint8 (default), int16 or float32; `released` mode supports float32 only.
      rng: for training only. The same generator state gives the same volume.
      flips: of "height", "width", "depth". Off by default, because left and right matter in a report.
      fit: `stretch` to the square of the final size, or `pad`.
      padding: inclusive (low, high) of padding values. `released` mode ignores it and the following arguments, which
        `Header.facts` has for a scan from a file.
      value_range: (minimum, maximum) of `voxels` including padding. Saves a pass over them.
      modality: DICOM code. stated_window: the window in the header. spacing: mm between rows and between columns.
      measure: add notices about lost contrast and shape to the volume.
    Raises:
      ValueError: voxels that are not finite, all equal, all padding, or outside the window; invalid arguments.
    """
    if mode == "released":
        if parse_intensity(window).kind != "minmax" or flips or storage not in (None, "float32") or fit != "stretch":
            raise ValueError("released mode supports only minmax, 'stretch' and float32, without flips")
        return released_volumes([voxels], rng=rng)[0]
    storage = "uint8" if storage is None else storage
    for name, value, known in (("mode", mode, MODES), ("storage", storage, STORAGE), ("fit", fit, FITS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} must be one of {', '.join(known)}")
    voxels, low, high = without_padding(check_voxels(voxels), padding, value_range)
    ranges = intensity_ranges(voxels, low, high, window, modality, stated_window)
    notices = contrast_notices(voxels, low, high, ranges, window, modality) if measure else ()
    notices += stretch_notice(*voxels.shape[:2], spacing) if measure and fit == "stretch" else ()
    source = tuple(voxels.shape[:3])
    if rng is not None:
        top, left, h, w = crop_box(*voxels.shape[:2], rng, crop)
        voxels = voxels[top : top + h, left : left + w]
    height, width, depth = target_shape(source, mode, sizes)
    inner = (height, width) if fit == "stretch" else padded_size(voxels.shape[:2], (height, width), spacing)
    slices = _scaled_slices(voxels, (*inner, depth if source[2] > 1 else 1), ranges, (low, high), storage)
    slices = slices if inner == (height, width) else _centered(slices, height, width)
    slices = flip_slices(slices, flips, rng)
    volume = Volume.from_slices(slices, *QUANTIZATION[storage], patches=sizes.patches)
    return dataclasses.replace(volume, source=source, notices=notices)


def padded_size(
    shape: tuple[int, int], square: tuple[int, int], spacing: tuple[float, float] | None
) -> tuple[int, int]:
    """Return the largest (height, width) within `square` with the ratio of a slice of `shape`.

    The ratio is in mm if `spacing` (between rows, between columns) is known, else in pixels.
    """
    rows, columns = (n * step for n, step in zip(shape, spacing or (1.0, 1.0), strict=True))
    scale = min(square[0] / rows, square[1] / columns)
    return max(round(rows * scale), 1), max(round(columns * scale), 1)


def _centered(slices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Center slices [K, C, h, w] in [K, C, height, width] of the value 0."""
    zero = -32768 if slices.dtype == np.int16 else 0
    out = np.full((*slices.shape[:2], height, width), zero, slices.dtype)
    top, left = (height - slices.shape[2]) // 2, (width - slices.shape[3]) // 2
    out[:, :, top : top + slices.shape[2], left : left + slices.shape[3]] = slices
    return out


def _scaled_slices(
    voxels: np.ndarray,
    size: tuple[int, int, int],
    ranges: tuple[tuple[float, float], ...],
    whole: tuple[float, float],
    storage: str,
) -> np.ndarray:
    """Resize voxels [H, W, D, C] to `size` and return slices [K, C, H', W'] in the storage dtype.

    Each of `ranges` becomes 0 to 1. Several are the channels of a gray scan. `whole` is the range of all voxels.
    """
    height, width, depth = size
    slices = np.empty((depth, max(voxels.shape[3], len(ranges)), height, width), storage)
    # If the first axis varies fastest, as in arrays from nibabel, slices are processed transposed.
    swapped = abs(voxels.strides[0]) < abs(voxels.strides[1])
    if swapped:
        voxels, height, width = voxels.swapaxes(0, 1), width, height
    for first, (low, high) in enumerate(ranges):
        clip = None if low <= whole[0] and high >= whole[1] else (low, high)
        for k, c, plane in resize_volume(voxels, (height, width, depth), low, clip):
            plane = _quantize(plane, high - low, storage)
            slices[k, first + c] = cv2.transpose(plane) if swapped else plane
    return slices


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
