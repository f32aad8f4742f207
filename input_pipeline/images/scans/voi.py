"""The display window that a DICOM file states (VOI attributes, PS3.3 C.11.2)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

VOI_KEYWORDS = ("WindowCenter", "WindowWidth", "VOILUTFunction")


def stated_window(fields, frames) -> tuple[float, float] | None:
    """Return (low, high) after rescaling, or None: the first window of the first frame that states one.

    Windows only suggest a display, so unreadable ones count as absent.

    Args:
      fields: fields.Fields of the main data set. frames: its instance.FrameFields.
    """
    groups = [frames.shared, *frames.per_frame]
    items = [item for group in groups if group is not None for item in group.items("FrameVOILUTSequence")]
    for source in (fields, *items):
        center, width = source.soft("numbers", "WindowCenter"), source.soft("numbers", "WindowWidth")
        if center and width:
            return window_ends(center[0], width[0], source.soft("code", "VOILUTFunction") or "LINEAR")
    return None


def window_ends(center: float, width: float, function: str) -> tuple[float, float] | None:
    """Return the values that become black and white, or None for an empty window or a function that is not linear."""
    if function == "LINEAR" and width > 1:
        return center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    if function == "LINEAR_EXACT" and width > 0:
        return center - width / 2, center + width / 2
    return None


def series_window(windows: Iterable[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Return the window of a series: the medians of the low and of the high ends that its files state."""
    stated = [window for window in windows if window is not None]
    if not stated:
        return None
    low, high = (statistics.median(ends) for ends in zip(*stated, strict=True))
    return (low, high) if low < high else None
