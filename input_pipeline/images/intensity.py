"""Voxel intensities: CT windows, padding, and the range that becomes 0 to 1."""

from __future__ import annotations

import math

import numpy as np

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


def ct_window(window: str | tuple[float, float]) -> tuple[float, float]:
    """Return (low, high) of a window given by name or by its two ends."""
    if isinstance(window, str):
        if window not in CT_WINDOWS:
            raise ValueError(f"CT window {window!r} is not one of {', '.join(CT_WINDOWS)}; or give (low, high)")
        return CT_WINDOWS[window]
    low, high = map(float, window)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"CT window {(low, high)} must be two finite intensities, the lower one first")
    return low, high


def one_channel_if_gray(voxels: np.ndarray) -> np.ndarray:
    """Return a view [H, W, D, 1] of voxels with three equal channels (a gray image saved in colour), others unchanged.

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
    """Return (voxels, minimum, maximum) without padding. Padding is set to the minimum of the others, in a copy."""
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


def intensity_range(low: float, high: float, window: str | tuple[float, float] | None) -> tuple[float, float]:
    """Return the intensities that become 0 and 1, for voxels from `low` to `high`."""
    if not 1e-30 < high - low < 1e30:
        raise ValueError(f"voxels range from {low:g} to {high:g}, which float32 cannot scale")
    if window is None:
        return low, high
    ends, found = ct_window(window), f"voxels range from {low:g} to {high:g}"
    if isinstance(window, str) and low >= 0 and high <= 255:
        remedy = "remove the window, or give (low, high)"
        raise ValueError(f"CT window {window!r} needs Hounsfield units, but {found} (8-bit image?): {remedy}")
    if high <= ends[0] or low >= ends[1]:
        colour = f"every voxel would be {'black' if high <= ends[0] else 'white'}"
        raise ValueError(
            f"{found}, all outside the window {ends[0]:g} to {ends[1]:g}: {colour}; is the scan in Hounsfield units?"
        )
    return ends
