"""The scans of a row: volumes rebuilt from the planes in its arrays, and images of their slices.

Letters: D depth, C channels, (h, w, d) the patch, n patches of a scan, K stored slices.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from input_pipeline.images.planes import RADFM_PATCHES, Patches, Volume, patch_positions, source_slice

SLICES = 8  # images of a volume
PNG_BYTES = 32768  # a larger image becomes a JPEG: a row of 2,048 tokens can show fifty of 512 x 512 pixels
JPEG_QUALITY = 92
THUMBNAIL = 96  # pixels
ROUNDING = 1e-4  # how far values may exceed [0, 1]


@dataclasses.dataclass(frozen=True)
class SliceImage:
    """A slice, counted from 1, as a data URI."""

    slice: int  # slice of the scan's file; a stored slice averages several of them
    width: int
    height: int
    uri: str


@dataclasses.dataclass(frozen=True)
class ScanView:
    """The scan in a slot."""

    slot: int
    vision_row: int
    patches: int
    shape: tuple[int, int, int]  # (H, W, D) as the network sees it
    source: tuple[int, int, int] | None  # (H, W, D) of the scan's file, if it is known
    slices: int  # stored; one may be repeated D times
    channels: int  # stored; one may be repeated 3 times
    dtype: str
    scale: float
    offset: float
    low: float  # low, high, mean of the values that the network gets
    high: float
    mean: float
    samples: tuple[int, ...]  # the numbers of the samples that show it
    images: tuple[SliceImage, ...]
    thumbnail: SliceImage | None


def volume_of_slot(arrays: Mapping[str, np.ndarray], slot: int, patches: Patches = RADFM_PATCHES) -> Volume:
    """Rebuild the volume in a slot from its planes and the positions of its patches.

    The inverse of `planes.planes` and `collate_row`, for patches in any order. Repeated slices and channels are kept
    once. The arrays are those of one row, without the batch axis.

    Raises ValueError if the slot is empty, or its patches do not cover a volume exactly once.
    """
    vision_row = int(arrays["scan_rows"][slot])
    mask = arrays["patch_segments"][vision_row] == slot + 1
    if vision_row < 0 or not mask.any():
        raise ValueError(f"slot {slot} has no patches")
    index, positions = arrays["plane_index"][vision_row][mask], arrays["patch_positions"][vision_row][mask]
    n, d, channels = index.shape
    h, w = arrays["planes"].shape[1:]
    grid = tuple(len(np.unique(positions[:, axis])) for axis in range(3))
    order = np.lexsort(positions.T[::-1])
    if not np.array_equal(positions[order], patch_positions(grid, patches.tables)):
        raise ValueError(f"the {n} patches of slot {slot} do not cover a volume: their positions have gaps or repeat")
    # [rows, columns, depths, d, C] of plane numbers -> [D, C, rows, columns]
    numbers = index[order].reshape(*grid, d, channels).transpose(2, 3, 4, 0, 1)
    numbers = numbers.reshape(-1, channels, *grid[:2])
    depth = len(numbers)
    if (numbers == numbers[:1]).all():
        numbers = numbers[:1]
    if (numbers == numbers[:, :1]).all():
        numbers = numbers[:, :1]
    slices = arrays["planes"][numbers]  # [K, C, rows, columns, h, w]
    slices = slices.swapaxes(3, 4).reshape(*numbers.shape[:2], grid[0] * h, grid[1] * w)
    scale, offset = float(arrays["scan_scale"][slot]), float(arrays["scan_offset"][slot])
    return Volume.from_slices(slices, scale, offset, depth, patches)


def scan_view(
    arrays, slot: int, volume: Volume, samples: tuple[int, ...], source: tuple[int, int, int] | None = None
) -> tuple[ScanView, list[str]]:
    """Return the view of a scan, and warnings about its values. `source` is (H, W, D) of its file."""
    k, channels = volume.voxels.shape[2:]
    values = volume.slices.astype(np.float32) * np.float32(volume.scale) + np.float32(volume.offset)
    finite = np.isfinite(values)
    warnings, name = [], f"the scan in slot {slot}"
    if not finite.all():
        warnings.append(f"{name} has {int((~finite).sum())} values that are not finite")
        values = np.where(finite, values, 0)
    low, high = float(values.min()), float(values.max())
    if low == high:
        warnings.append(f"{name} is constant: every value is {low:g}")
    if low < -ROUNDING or high > 1 + ROUNDING:
        warnings.append(f"{name} has values from {low:g} to {high:g}; the images show 0 to 1")
    if not samples:
        warnings.append(f"{name} is not shown by any sample of the row")
    selected = np.unique(np.rint(np.linspace(0, k - 1, min(SLICES, k))).astype(int)).tolist()
    pixels = lambda i: np.rint(np.clip(values[i], 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)  # noqa: E731
    depth = source[2] if source else k
    number = lambda i: source_slice(i, k, depth)  # noqa: E731
    view = ScanView(
        slot=slot,
        vision_row=int(arrays["scan_rows"][slot]),
        patches=int(np.prod(volume.patches.grid(volume.shape))),
        shape=volume.shape,
        source=source,
        slices=k,
        channels=channels,
        dtype=volume.voxels.dtype.name,
        scale=volume.scale,
        offset=volume.offset,
        low=low,
        high=high,
        mean=float(values.mean(dtype=np.float64)),
        samples=samples,
        images=tuple(slice_image(pixels(i), number(i)) for i in selected),
        thumbnail=slice_image(pixels(k // 2), number(k // 2), side=THUMBNAIL) if len(samples) > 1 else None,
    )
    return view, warnings


def slice_image(pixels: np.ndarray, number: int, side: int | None = None) -> SliceImage:
    """Encode uint8[H, W, 1 or 3], shrunk to `side` pixels, as PNG, or as JPEG if the PNG is large."""
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    if side is not None:
        image.thumbnail((side, side))
    file, kind = io.BytesIO(), "png"
    image.save(file, "PNG")
    if file.tell() > PNG_BYTES:
        file, kind = io.BytesIO(), "jpeg"
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    code = base64.b64encode(file.getvalue()).decode()
    return SliceImage(number, image.width, image.height, f"data:image/{kind};base64,{code}")
