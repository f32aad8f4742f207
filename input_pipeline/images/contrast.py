"""Notices about contrast that is lost between a scan and the model, and about CT that is not in Hounsfield units.

All measures use a sample of the voxels (`intensity.sample_voxels`). Voxels equal to the scan's minimum or maximum are
excluded, because padding and saturation have no contrast to lose.
"""

from __future__ import annotations

import numpy as np

from input_pipeline.images.intensity import Window, parse_intensity, sample_voxels

LEVELS = 256  # gray levels of a display or of uint8 storage
FEW_LEVELS = 64  # fewer levels for the central 98 % of the voxels give a notice
WRAPPED = 0.002  # a larger share of values near 65535, with nearly none between them and the others, gives a notice
CLIPPED = 0.95  # a larger share of clipped voxels gives a notice
SOFT_TISSUE = (0.0, 80.0)  # HU: brain, muscle, blood and most organs
FEW_SOFT_LEVELS = 16
STRETCHED = 1.5  # a larger ratio of the sides gives a notice
SAMPLES = 1 << 13  # sampled voxels for all measures
MINIMUM = 64  # fewer sampled voxels are not measured


def contrast_notices(
    voxels: np.ndarray,
    low: float,
    high: float,
    ranges: tuple[tuple[float, float], ...],
    window: Window | None = None,
    modality: str | None = None,
) -> tuple[str, ...]:
    """Return notices about contrast that the scaling of voxels [H, W, D, C] loses, each with a remedy.

    Args:
      low, high: the minimum and maximum of the voxels, which have no padding.
      ranges: the intensities that become 0 and 1, from `intensity.intensity_ranges` for `window`.
      modality: DICOM code, or None if it is not stated.
    """
    sample = sample_voxels(voxels, SAMPLES)
    gray, dtype = sample.shape[3] == 1, voxels.dtype
    sample = sample[(sample > low) & (sample < high)].astype(np.float64)
    if sample.size < MINIMUM:
        return ()
    chosen = parse_intensity(window).kind in ("window", "header")
    notices = []
    # 12-bit radiographs have values like those of CT, so a single slice counts as CT only if it is stated.
    if gray and dtype != np.uint8 and (modality == "CT" or modality is None and voxels.shape[2] > 1):
        unit = _unit_notice(sample, dtype, low, high, modality)
        notices += [unit] if unit else []
        if not unit and not chosen and (modality == "CT" or _is_hounsfield(sample)):
            notices += _soft_tissue(sample, *ranges[0])
    if parse_intensity(window).kind == "window" and ranges[0][0] < 0 <= low:
        notices.append(
            f"the window {ranges[0][0]:g} to {ranges[0][1]:g} starts below 0, but no voxel is negative: is the scan in "
            "Hounsfield units?"
        )
    for bottom, top in ranges:
        notices += _clipped(sample, bottom, top) if chosen else _few_levels(sample, low, high, bottom, top)
    return tuple(notices)


def _few_levels(sample: np.ndarray, low: float, high: float, bottom: float, top: float) -> list[str]:
    first, last = np.percentile(np.clip(sample, bottom, top), (1, 99))
    levels = _levels(last - first, bottom, top)
    if levels >= FEW_LEVELS:
        return []
    return [
        f"contrast is lost: the central 98 % of the voxels ({first:.4g} to {last:.4g}) get {levels} of {LEVELS} gray "
        f"levels, because the scan ranges from {low:g} to {high:g}: remove the outliers, or choose another intensity"
    ]


def _clipped(sample: np.ndarray, bottom: float, top: float) -> list[str]:
    black, white = float((sample <= bottom).mean()), float((sample >= top).mean())
    first, last = np.percentile(np.clip(sample, bottom, top), (1, 99))
    if black + white > CLIPPED:
        return [
            f"the window {bottom:g} to {top:g} clips {black + white:.1%} of the voxels ({black:.1%} to black, "
            f"{white:.1%} to white): choose another intensity, or correct the unit of the scan"
        ]
    if (levels := _levels(last - first, bottom, top)) < FEW_LEVELS:
        return [
            f"the window {bottom:g} to {top:g} leaves {levels} of {LEVELS} gray levels for the central 98 % of the "
            f"voxels ({first:.4g} to {last:.4g}): choose a narrower one"
        ]
    return []


def _levels(width: float, bottom: float, top: float) -> int:
    return min(max(round(LEVELS * width / (top - bottom)), 1), LEVELS)


def _soft_tissue(sample: np.ndarray, bottom: float, top: float) -> list[str]:
    levels = _levels(min(SOFT_TISSUE[1], top) - max(SOFT_TISSUE[0], bottom), bottom, top)
    if levels >= FEW_SOFT_LEVELS or _share(sample, -150, 250) < 0.02:
        return []
    return [
        f"soft tissue of this CT (0 to 80 HU) gets {levels} of {LEVELS} gray levels: set an intensity such as "
        "soft_tissue, brain or lung/soft_tissue/bone"
    ]


def _share(sample: np.ndarray, bottom: float, top: float) -> float:
    return float(((sample >= bottom) & (sample <= top)).mean())


def is_hounsfield(voxels: np.ndarray, low: float, high: float, modality: str | None) -> bool:
    """Return whether voxels from `low` to `high`, of an unknown modality, look like a CT in Hounsfield units."""
    sample = sample_voxels(voxels, SAMPLES)
    sample = sample[(sample > low) & (sample < high)]
    return modality is None and voxels.shape[3] == 1 and sample.size >= MINIMUM and _is_hounsfield(sample)


def _is_hounsfield(sample: np.ndarray) -> bool:
    """Return whether voxels have the air and the soft tissue of a CT, and the gap between lung and fat."""
    tissue = _share(sample, -150, 250)
    return _share(sample, -1100, -900) >= 0.02 and tissue >= 0.02 and _share(sample, -600, -250) < tissue / 2


def _unit_notice(sample: np.ndarray, dtype: np.dtype, low: float, high: float, modality: str | None) -> str:
    """Return why voxels that are, or may be, CT are not in Hounsfield units, or "" if nothing indicates this."""
    name, numbers = ("this CT" if modality == "CT" else "if this is a CT, it"), f"({low:g} to {high:g})"
    wrapped = _share(sample, 63000, 65535)
    if dtype == np.uint16 and wrapped >= WRAPPED and _share(sample, 8192, 60000) < wrapped / 10:
        return f"negative values have wrapped to 16 bits {numbers}: read the voxels as signed integers"
    twice, once = _share(sample, -1124, -824), _share(sample, -200, 300)
    if low < -1500 and twice >= 0.02 and twice > 2 * once and _share(sample, -2124, -1800) >= 0.02:
        return f"{name} seems to be rescaled twice {numbers}, air is near -2024: subtract the intercept only once"
    if low > -500 and (modality == "CT" or 1350 < high < 5000):
        tissue, between = _share(sample, 900, 1350), _share(sample, 450, 800)
        air = modality == "CT" or dtype == np.uint16 or _share(sample, 0, 100) >= 0.05 and between < 0.3 * tissue
        if tissue >= 0.1 and air:
            return f"{name} has lost its intercept of -1024 {numbers}: add it, so that water is 0 HU"
    if modality == "CT" and once < 0.01 and low < 0:
        return f"{name} has no soft tissue between -200 and 300 HU {numbers}: check its slope and intercept"
    return ""


def stretch_notice(height: int, width: int, spacing: tuple[float, float] | None) -> tuple[str, ...]:
    """Return a notice if resizing to a square strongly changes the aspect ratio (in mm if `spacing` is known)."""
    rows, columns = spacing or (1.0, 1.0)
    ratio = max(height * rows, width * columns) / min(height * rows, width * columns)
    if ratio <= STRETCHED:
        return ()
    return (f"{height} x {width} pixels are stretched {ratio:.1f}:1 to a square: keep the shape with data.fit='pad'",)
