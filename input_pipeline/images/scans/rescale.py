"""Stored values of DICOM frames -> intensities: rescale, MONOCHROME1, and padding in the same units for all frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from input_pipeline.images.scans import lookup
from input_pipeline.images.scans.base import ScanLimits
from input_pipeline.images.scans.checks import to_intensities
from input_pipeline.images.scans.fields import GRAY
from input_pipeline.images.scans.instance import Instance

Padding = tuple[float, float] | None  # (low, high)


@dataclasses.dataclass(frozen=True)
class Rescale:
    """How the frames of one file or of a series become intensities.

    Attributes:
      slopes: float64[F], negative for MONOCHROME1.
      intercepts: float64[F].
      total: a MONOCHROME1 intensity becomes `total` minus itself; None for other frames and for lookup tables.
      in_place: whether this inversion is the only change and the stored dtype can store the result.
      stored_padding: of every frame, as decoded.
      padding: of all frames, as an intensity.
    """

    slopes: np.ndarray
    intercepts: np.ndarray
    total: float | None
    in_place: bool
    stored_padding: tuple[tuple[int, int] | None, ...]
    padding: Padding

    def apply(self, path, frames: np.ndarray, order: Sequence[int], limits: ScanLimits) -> np.ndarray:
        """Return the intensities of frames [F, H, W, C], which are sorted by `order`. May change `frames`."""
        if self.in_place:
            return np.subtract(frames.dtype.type(self.total), frames, out=frames)
        slopes, intercepts = self.slopes[order], self.intercepts[order]
        ends = [self.intensities_of(i) for i in order]
        moved = [k for k, end in enumerate(ends) if end is not None and end != self.padding]
        masks = {}
        for k in moved:
            low, high = self.stored_padding[order[k]]
            masks[k] = (frames[k] >= low) & (frames[k] <= high)
        voxels = to_intensities(path, frames, slopes, intercepts, limits)
        if any(mask.any() for mask in masks.values()):
            voxels = voxels.astype(np.float32)  # an integer type may not contain the padding of other frames
            for k, mask in masks.items():
                voxels[k][mask] = self.padding[0]
        return voxels

    def intensities_of(self, frame: int) -> Padding:
        """Return the padding of a frame as intensities."""
        return rescaled(self.stored_padding[frame], self.slopes[frame], self.intercepts[frame])


def rescaled(ends: tuple[int, int] | None, slope: float, intercept: float) -> Padding:
    if ends is None:
        return None
    low, high = (float(end * slope + intercept) for end in ends)
    return min(low, high), max(low, high)


def rescale_of(instances: Sequence[Instance]) -> Rescale:
    """Return the rescale of all frames. MONOCHROME1 is inverted within the range that the headers allow.

    If frames have different padding values, all of them become the lowest one.
    """
    first, count = instances[0], sum(i.frames for i in instances)
    gray = first.photometric in GRAY
    if first.lut:  # decoded frames are already intensities
        ones, padded = np.ones(count), gray and any(i.padding is not None for i in instances)
        padding = (float(lookup.PADDING),) * 2 if padded else None
        return Rescale(ones, np.zeros(count), None, False, (None,) * count, padding)
    slopes = np.concatenate([i.slopes for i in instances])
    intercepts = np.concatenate([i.intercepts for i in instances])
    stored_padding = tuple(i.frame_padding if gray else None for i in instances for _ in range(i.frames))
    total, in_place = None, False
    if first.photometric == "MONOCHROME1":
        ranges = [i.stored_range for i in instances for _ in range(i.frames)]
        ends = [rescaled(*entry) for entry in zip(ranges, slopes, intercepts, strict=True)]
        total = min(low for low, _ in ends) + max(high for _, high in ends)
        in_place = not any(i.rescaled or i.padding_beyond for i in instances) and len({i.dtype for i in instances}) == 1
        slopes, intercepts = -slopes, total - intercepts
    found = {rescaled(*entry) for entry in zip(stored_padding, slopes, intercepts, strict=True)} - {None}
    padding = found.pop() if len(found) == 1 else (min(low for low, _ in found),) * 2 if found else None
    return Rescale(slopes, intercepts, total, in_place, stored_padding, padding)
