"""The scans of a row as its arrays hold them: volumes put together from planes, and pictures of their slices.

Letters: D depth, C channels, (h, w, d) the patch, n patches of a scan, K stored slices.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from input_pipeline.images.planes import Volume, patch_grid, patch_positions

SLICES = 8  # pictures of a volume
PNG_BYTES = 32768  # a larger picture becomes a JPEG: a row of 2,048 tokens can show fifty of 512 x 512 pixels
JPEG_QUALITY = 92
THUMBNAIL = 96  # pixels


@dataclasses.dataclass(frozen=True)
class Picture:
    """A slice (from 1) as a data URI."""

    slice: int
    width: int
    height: int
    uri: str


@dataclasses.dataclass(frozen=True)
class ScanView:
    """What lies in a slot.

    Attributes:
      shape: (H, W, D) as the network sees it.
      slices, channels: that are stored; one slice may stand for all D, one channel for all 3.
      low, high, mean: of the values that the network gets.
      samples: those that show it.
    """

    slot: int
    vision_row: int
    patches: int
    shape: tuple[int, int, int]
    slices: int
    channels: int
    dtype: str
    scale: float
    offset: float
    low: float
    high: float
    mean: float
    samples: tuple[int, ...]
    pictures: tuple[Picture, ...]
    thumbnail: Picture | None


def volume_of_slot(arrays: Mapping[str, np.ndarray], slot: int) -> Volume:
    """The volume in a slot, put together from its planes and where its patches say they stand.

    The inverse of `planes.planes` and `packing.assemble`: every patch is laid where its position points, in whatever
    order patches stand in their vision row. One slice is kept where all D are the same planes, one channel where all 3
    are.

    Args:
      arrays: of one row, without the batch axis.
    Raises:
      ValueError: an empty slot; patches that do not cover a volume once.
    """
    vision_row = int(arrays["scan_rows"][slot])
    mine = arrays["patch_segments"][vision_row] == slot + 1
    if vision_row < 0 or not mine.any():
        raise ValueError(f"slot {slot} holds no patches")
    index, positions = arrays["plane_index"][vision_row][mine], arrays["patch_positions"][vision_row][mine]
    n, d, channels = index.shape
    h, w = arrays["planes"].shape[1:]
    axes = [np.unique(positions[:, axis]) for axis in range(3)]
    grid = tuple(len(axis) for axis in axes)
    order = np.lexsort(positions.T[::-1])
    if not np.array_equal(positions[order], patch_positions(grid)):
        raise ValueError(f"the {n} patches of slot {slot} do not cover a volume: their positions have gaps or repeat")
    # [rows, columns, depths, d, C] of plane numbers -> [D, C, rows, columns]
    standing = index[order].reshape(*grid, d, channels).transpose(2, 3, 4, 0, 1)
    standing = standing.reshape(-1, channels, *grid[:2])
    depth = len(standing)
    if (standing == standing[:1]).all():
        standing = standing[:1]
    if (standing == standing[:, :1]).all():
        standing = standing[:, :1]
    slices = arrays["planes"][standing]  # [K, C, rows, columns, h, w]
    slices = slices.swapaxes(3, 4).reshape(*standing.shape[:2], grid[0] * h, grid[1] * w)
    return Volume.from_slices(slices, float(arrays["scan_scale"][slot]), float(arrays["scan_offset"][slot]), depth)


def scan_facts(arrays, slot: int, volume: Volume, samples: tuple[int, ...]) -> tuple[ScanView, list[str]]:
    k, channels = volume.voxels.shape[2:]
    values = volume.slices.astype(np.float32) * np.float32(volume.scale) + np.float32(volume.offset)
    finite = np.isfinite(values)
    said, where = [], f"the scan in slot {slot}"
    if not finite.all():
        said.append(f"{where} has {int((~finite).sum())} values that are not finite")
        values = np.where(finite, values, 0)
    low, high = float(values.min()), float(values.max())
    if low == high:
        said.append(f"{where} is constant: every value is {low:g}")
    # One quantum of rounding lies outside without harm.
    if low < -1e-4 or high > 1 + 1e-4:
        said.append(f"{where} has values from {low:g} to {high:g}; the pictures show 0 to 1")
    if not samples:
        said.append(f"{where} is shown by no sample of the row")
    chosen = np.unique(np.rint(np.linspace(0, k - 1, min(SLICES, k))).astype(int)).tolist()
    shown = lambda i: np.rint(np.clip(values[i], 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)  # noqa: E731
    scan = ScanView(
        slot,
        int(arrays["scan_rows"][slot]),
        int(np.prod(patch_grid(volume.shape))),
        volume.shape,
        k,
        channels,
        volume.voxels.dtype.name,
        volume.scale,
        volume.offset,
        low,
        high,
        float(values.mean(dtype=np.float64)),
        samples,
        tuple(picture(shown(i), i + 1) for i in chosen),
        picture(shown(k // 2), k // 2 + 1, side=THUMBNAIL) if len(samples) > 1 else None,
    )
    return scan, said


def picture(pixels: np.ndarray, number: int, side: int | None = None) -> Picture:
    """uint8[H, W, 1 or 3] as a PNG, or where that is large as a JPEG.

    side: shrink to this many pixels.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    if side is not None:
        image.thumbnail((side, side))
    file, kind = io.BytesIO(), "png"
    image.save(file, "PNG")
    if file.tell() > PNG_BYTES:
        file, kind = io.BytesIO(), "jpeg"
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    code = base64.b64encode(file.getvalue()).decode()
    return Picture(number, image.width, image.height, f"data:image/{kind};base64,{code}")
