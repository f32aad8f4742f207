"""Slices of a scan as 8-bit images at full resolution, for people and for models that take single images."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from input_pipeline.images import scans
from input_pipeline.images.contrast import is_hounsfield
from input_pipeline.images.intensity import CT_WINDOWS, Window, intensity_ranges, one_channel_if_gray, without_padding
from input_pipeline.samples import Scan


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slice `number` (from 1) of `count` along the third axis of the voxels from `scans.read`."""

    image: Image.Image
    number: int
    count: int
    low: float  # value that is black; of the first channel if the window differs between channels
    high: float  # value that is white
    window: str = ""  # the window it shows, as text; "" for the whole range of the scan


def slices(scan: Scan, max_slices: int = 1, *, for_people: bool = False) -> list[Slice]:
    """Return up to `max_slices` evenly spaced slices, first and last included; a single slice is the middle one.

    The ends of the scan's window, or else the minimum and maximum of the whole scan, become black and white. Padding is
    black. No header data is included. Raises ScanError, a ValueError, for a scan that cannot be used.

    Args:
      for_people: show a CT without a window setting in the window of its file, or else in the soft tissue window. Its
        whole range would leave soft tissue a few gray levels.
    """
    voxels, header = scans.read(scan.path, **scan.selection)
    return slices_of(voxels, header, scan.path, scan.window, max_slices, for_people=for_people)


def slices_of(
    voxels: np.ndarray, header: scans.Header, path, window: Window | None = None, max_slices: int = 1, *,
    for_people: bool = False,
) -> list[Slice]:  # fmt: skip
    """Return `slices` of a scan that `scans.read` has read from `path`."""
    try:
        voxels, low, high = without_padding(one_channel_if_gray(voxels), header.padding, header.value_range)
        if for_people and window is None:
            window = _reading_window(voxels, low, high, header)
        ranges = intensity_ranges(voxels, low, high, window, header.modality, header.window)
    except ValueError as error:
        raise scans.ScanError(path, str(error), fault="unsupported") from error
    count = voxels.shape[2]
    numbers = [count // 2]
    if max_slices > 1:
        numbers = np.unique(np.rint(np.linspace(0, count - 1, min(max_slices, count))).astype(int))
    out = []
    for k in numbers:
        stored = voxels[:, :, k].astype(np.float32)
        values = np.concatenate([(stored - bottom) / (top - bottom) for bottom, top in ranges], axis=-1)
        pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        out.append(Slice(image, int(k) + 1, count, *map(float, ranges[0]), _window_text(window, ranges)))
    return out


def _reading_window(voxels: np.ndarray, low: float, high: float, header: scans.Header) -> Window | None:
    """Return the window in which people read a scan without a window setting, or None."""
    if header.modality != "CT" and not is_hounsfield(voxels, low, high, header.modality):
        return None
    stated = header.window
    if stated is not None and stated[0] < high and stated[1] > low:
        return "header"
    bottom, top = CT_WINDOWS["soft_tissue"]
    return "soft_tissue" if low < 0 and high > bottom and low < top else None


def _window_text(window: Window | None, ranges: tuple[tuple[float, float], ...]) -> str:
    if window in (None, "minmax"):
        return ""
    ends = ", ".join(f"{low:g} to {high:g}" for low, high in ranges)
    return f"{window.replace('_', ' ')} ({ends})" if isinstance(window, str) and "," not in window else ends
