"""Intensity settings, padding, and the voxel values that become 0 to 1.

A setting is the text of `data.intensity`, of a source's `intensity`, or of a scan's `window`:

    minmax                     the minimum and maximum of the whole scan (the paper)
    percentile                 the 0.5th and 99.5th percentiles of the voxels above the minimum
    percentile:LOW,HIGH        other percentiles
    header                     the window that the file states (DICOM WindowCenter, WindowWidth; NIfTI cal_min, cal_max)
    brain                      a CT window of CT_WINDOWS, in Hounsfield units
    LOW,HIGH                   a window in the unit of the voxels
    lung/soft_tissue/bone      three windows, one a channel
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers

import numpy as np

from input_pipeline.field_rules import shown
from input_pipeline.files import nearest
from input_pipeline.images.planes import CHANNELS
from input_pipeline.images.value_range import value_range

# (low, high) in Hounsfield units: level -+ width / 2. Widths and levels are the typical settings of
# radiopaedia.org/articles/windowing-ct; other tables and viewers differ (soft tissue at level 40, bone 2000 wide).
CT_WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-1350.0, 150.0),  # width 1500, level -600
    "mediastinum": (-125.0, 225.0),  # width 350, level 50
    "soft_tissue": (-150.0, 250.0),  # width 400, level 50 (abdomen)
    "liver": (-45.0, 105.0),  # width 150, level 30
    "bone": (-500.0, 1300.0),  # width 1800, level 400 (spine)
    "brain": (0.0, 80.0),  # width 80, level 40
}
PERCENTILES = (0.5, 99.5)
SAMPLES = 1 << 16  # voxels from which percentiles are measured
Window = str | tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Intensity:
    """A parsed setting."""

    kind: str  # minmax, percentile, header or window
    windows: tuple[tuple[float, float], ...] = ()  # one, or one for each channel
    named: bool = False  # whether a window is one of CT_WINDOWS, so the voxels must be in Hounsfield units
    percentiles: tuple[float, float] = PERCENTILES


def ct_window(window: Window) -> tuple[float, float]:
    """Return (low, high) of a window given by name, as "LOW,HIGH", or by its two ends."""
    ends = window
    if isinstance(window, str):
        if window in CT_WINDOWS:
            return CT_WINDOWS[window]
        ends = _pair(window)
        if ends is None:
            known = ", ".join((*CT_WINDOWS, "minmax", "percentile", "percentile:LOW,HIGH", "header", "LOW,HIGH"))
            near = nearest(window, (*CT_WINDOWS, "minmax", "percentile", "header"))
            raise ValueError(f"intensity {shown(window)} is not one of {known}, or three windows separated by /{near}")
    if not (isinstance(ends, tuple | list) and len(ends) == 2 and all(map(_is_number, ends))):
        raise ValueError(f"intensity {shown(window)} must be a text, or the two numbers LOW, HIGH of a window")
    low, high = map(float, ends)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"CT window {(low, high)} must be two finite intensities, the lower one first")
    return low, high


def _is_number(end: object) -> bool:
    return isinstance(end, numbers.Real) and not isinstance(end, bool) and (isinstance(end, float) or abs(end) < 1e300)


def _pair(text: str) -> tuple[float, float] | None:
    """Return the two numbers of "LOW,HIGH", or None."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        return None
    return low, high


def parse_intensity(setting: Window | None) -> Intensity:
    """Parse a setting; None is `minmax`. Raises ValueError with the known settings."""
    if setting is None or isinstance(setting, str):
        return _parse(setting)
    return _parse(ct_window(setting))


@functools.lru_cache(maxsize=256)
def _parse(setting: Window | None) -> Intensity:
    if setting is None or setting in ("minmax", "header", "percentile"):
        return Intensity(setting or "minmax")
    if not isinstance(setting, str):
        return Intensity("window", (setting,))
    if setting.startswith("percentile:"):
        ends = _pair(setting.removeprefix("percentile:"))
        if ends is None or not 0 <= ends[0] < ends[1] <= 100:
            raise ValueError(f"intensity {shown(setting)} must be percentile:LOW,HIGH with 0 <= LOW < HIGH <= 100")
        return Intensity("percentile", percentiles=ends)
    names = [name.strip() for name in setting.split("/")]
    if len(names) not in (1, CHANNELS):
        raise ValueError(f"intensity {shown(setting)} has {len(names)} windows: give 1, or {CHANNELS} separated by /")
    return Intensity("window", tuple(map(ct_window, names)), any(name in CT_WINDOWS for name in names))


def canonical_window(setting: Window | None) -> Window | None:
    """Return a setting as a scan's `window` stores it: a window of numbers as a tuple of floats."""
    parsed = parse_intensity(setting)
    if parsed.kind == "window" and len(parsed.windows) == 1 and not parsed.named:
        return parsed.windows[0]
    return setting


def one_channel_if_gray(voxels: np.ndarray) -> np.ndarray:
    """Return a view [H, W, D, 1] if the three channels are equal (a gray image saved in colour), else the voxels.

    Check scans with this before planning, so that planes are counted by the actual channels, not by the header.
    """
    if voxels.shape[-1] == CHANNELS and all(np.array_equal(voxels[..., 0], voxels[..., c]) for c in (1, 2)):
        return voxels[..., :1]
    return voxels


def check_voxels(voxels: np.ndarray) -> np.ndarray:
    """Return voxels [H, W, D, C]. Raises ValueError for another shape or dtype."""
    shape = tuple(voxels.shape)
    if voxels.ndim != 4 or 0 in shape or shape[3] not in (1, CHANNELS):
        raise ValueError(f"voxels must be [height, width, depth, 1 or {CHANNELS} channels], got {list(shape)}")
    if not (np.issubdtype(voxels.dtype, np.integer) or np.issubdtype(voxels.dtype, np.floating)):
        raise ValueError(f"voxels must be integers or floats, got {voxels.dtype}")
    return voxels


def finite_range(voxels: np.ndarray) -> tuple[float, float]:
    """Return (minimum, maximum). Raises ValueError if a voxel is not finite or all voxels are equal."""
    low, high = value_range(voxels)
    if not (math.isfinite(low) and math.isfinite(high)):
        nan, inf = int(np.isnan(voxels).sum()), int(np.isinf(voxels).sum())
        raise ValueError(f"{nan + inf} of {voxels.size} voxels are not finite ({nan} NaN, {inf} infinite)")
    if low == high:
        raise ValueError(f"all {voxels.size} voxels are {low:g}: the scan is constant")
    return low, high


def without_padding(
    voxels: np.ndarray, padding: tuple[float, float] | None, known_range: tuple[float, float] | None
) -> tuple[np.ndarray, float, float]:
    """Return (voxels, minimum, maximum). Padding voxels are set to the minimum of the other voxels, in a copy."""
    low, high = finite_range(voxels) if known_range is None else known_range
    if padding is None or padding[0] > high or padding[1] < low:
        return voxels, low, high
    padded = (voxels >= padding[0]) & (voxels <= padding[1])
    if not padded.any():
        return voxels, low, high
    others = voxels[~padded]
    if not others.size:
        raise ValueError(f"all {voxels.size} voxels are padding ({padding[0]:g} to {padding[1]:g}): the scan is empty")
    low, high = finite_range(others)
    voxels = voxels.copy(order="K")
    voxels[padded] = others.min()
    return voxels, low, high


def setting_text(setting: Window | None) -> str:
    """Return a setting as one text: (low, high) as LOW,HIGH with all digits, None as `minmax`."""
    if setting is None or isinstance(setting, str):
        return setting or "minmax"
    return ",".join(repr(end).removesuffix(".0") for end in ct_window(setting))


def sample_voxels(voxels: np.ndarray, count: int = SAMPLES) -> np.ndarray:
    """Return a view of at most `count` of the voxels [H, W, D, C], evenly spaced, or of all if there are fewer."""
    steps = [1, 1, 1]
    sizes = np.array(voxels.shape[:3])
    while math.prod(-(-sizes // steps)) * voxels.shape[3] > count:
        steps[int(np.argmax(-(-sizes // steps)))] += 1
    return voxels[tuple(slice(step // 2, None, step) for step in steps)]


def intensity_ranges(
    voxels: np.ndarray,
    low: float,
    high: float,
    window: Window | None,
    modality: str | None = None,
    stated_window: tuple[float, float] | None = None,
) -> tuple[tuple[float, float], ...]:
    """Return the intensities that become 0 and 1: one pair, or one for each channel of several windows.

    Args:
      voxels: [H, W, D, C] from `low` to `high`, without padding.
      modality: DICOM code, or None if it is not stated.
      stated_window: the window in the file's header.
    Raises:
      ValueError: the window cannot be right for these voxels, or the header states none.
    """
    if not 1e-30 < high - low < 1e30:
        raise ValueError(f"voxels range from {low:g} to {high:g}, which float32 cannot scale")
    intensity = parse_intensity(window)
    if intensity.kind == "minmax":
        return ((low, high),)
    if intensity.kind == "percentile":
        sample = sample_voxels(voxels)
        sample = sample[sample > low]
        ends = np.percentile(sample, intensity.percentiles) if sample.size else (low, high)
        return ((float(ends[0]), float(ends[1])),) if ends[0] < ends[1] else ((low, high),)
    if intensity.kind == "header":
        if stated_window is None:
            raise ValueError("its header states no window, but intensity 'header' needs one: choose another intensity")
        _check_overlap(*stated_window, low, high)
        return (stated_window,)
    if len(intensity.windows) > 1 and voxels.shape[3] > 1:
        raise ValueError(f"{len(intensity.windows)} windows need a gray scan, but it has {voxels.shape[3]} channels")
    _check_window(intensity, low, high, window, modality)
    return intensity.windows


def _check_window(intensity: Intensity, low: float, high: float, window: Window, modality: str | None) -> None:
    """Raise ValueError if voxels from `low` to `high` are outside the windows, or not in their unit."""
    found, remedy = f"voxels range from {low:g} to {high:g}", "use minmax or percentile, or give LOW,HIGH in its unit"
    bottom, top = min(w[0] for w in intensity.windows), max(w[1] for w in intensity.windows)
    if intensity.named:
        if modality not in (None, "CT"):
            raise ValueError(f"CT window {window!r} needs Hounsfield units, but the modality is {modality}: {remedy}")
        if low >= 0 and high <= 255:
            raise ValueError(f"CT window {window!r} needs Hounsfield units, but {found} (8-bit image?): {remedy}")
        if low >= 0:
            why = "none is negative, but air is at -1000 HU (MR? a CT without its intercept of -1024?)"
            raise ValueError(f"CT window {window!r} needs Hounsfield units, but {found}: {why}; {remedy}")
    if bottom < 0 <= low and modality not in (None, "CT"):
        raise ValueError(f"the window {bottom:g} to {top:g} is for CT, but the modality is {modality}: {remedy}")
    _check_overlap(bottom, top, low, high)


def _check_overlap(bottom: float, top: float, low: float, high: float) -> None:
    if high <= bottom or low >= top:
        colour = f"every voxel would be {'black' if high <= bottom else 'white'}"
        raise ValueError(
            f"voxels range from {low:g} to {high:g}, all outside the window {bottom:g} to {top:g}: {colour}; is the "
            "scan in Hounsfield units?"
        )
