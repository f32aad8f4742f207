"""Slices of a scan as 8-bit pictures of full resolution, for people and for models that see single pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from input_pipeline.images import scans
from input_pipeline.images.volumes import intensity_range, one_channel_if_gray, without_padding
from input_pipeline.samples import Scan


@dataclasses.dataclass(frozen=True)
class Slice:
    """number: from 1, of `count` along the third axis of the scan as `scans.read` returns it."""

    picture: Image.Image
    number: int
    count: int


def slices(scan: Scan, most: int = 1) -> list[Slice]:
    """Up to `most` slices from the first to the last, evenly; one slice is the middle one (the later of two middles).

    The scan's window, or else the least and the greatest voxel of the whole scan, become black and white; padding is
    black. Only pixels: nothing of a header goes along.

    Raises:
      ValueError (scans.ScanError): a scan that cannot be used.
    """
    voxels, header = scans.read(scan.path, volume=scan.volume)
    try:
        voxels, least, greatest = without_padding(one_channel_if_gray(voxels), header.padding, header.extremes)
        low, high = intensity_range(least, greatest, scan.window)
    except ValueError as error:
        raise scans.ScanError(scan.path, str(error), fault="unsupported") from error
    count = voxels.shape[2]
    chosen = [count // 2] if most == 1 else np.unique(np.rint(np.linspace(0, count - 1, min(most, count))).astype(int))
    found = []
    for k in chosen:
        values = (voxels[:, :, k].astype(np.float32) - low) / (high - low)
        pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
        found.append(Slice(Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]), int(k) + 1, count))
    return found
