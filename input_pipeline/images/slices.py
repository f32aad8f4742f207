"""Slices of a scan as 8-bit images at full resolution, for people and for models that take single images."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from input_pipeline.images import scans
from input_pipeline.images.intensity import intensity_range, one_channel_if_gray, without_padding
from input_pipeline.samples import Scan


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slice `number` (from 1) of `count` along the third axis of the voxels from `scans.read`."""

    image: Image.Image
    number: int
    count: int
    low: float  # value that is black
    high: float  # value that is white


def slices(scan: Scan, max_slices: int = 1) -> list[Slice]:
    """Return up to `max_slices` evenly spaced slices, first and last included; a single slice is the middle one.

    The ends of the scan's window, or else the minimum and maximum of the whole scan, become black and white. Padding is
    black. No header data is included. Raises ScanError, a ValueError, for a scan that cannot be used.
    """
    voxels, header = scans.read(scan.path, volume=scan.volume)
    try:
        voxels, low, high = without_padding(one_channel_if_gray(voxels), header.padding, header.value_range)
        low, high = intensity_range(low, high, scan.window)
    except ValueError as error:
        raise scans.ScanError(scan.path, str(error), fault="unsupported") from error
    count = voxels.shape[2]
    numbers = [count // 2]
    if max_slices > 1:
        numbers = np.unique(np.rint(np.linspace(0, count - 1, min(max_slices, count))).astype(int))
    out = []
    for k in numbers:
        values = (voxels[:, :, k].astype(np.float32) - low) / (high - low)
        pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        out.append(Slice(image, int(k) + 1, count, float(low), float(high)))
    return out
