"""Checks of shapes and voxels against limits, and stored values converted to intensities."""

from __future__ import annotations

import math

import numpy as np

from input_pipeline.images.scans.base import ScanError, ScanLimits, limit_error
from input_pipeline.images.value_range import value_range

MAX_NAN_SHARE = 0.01  # share of a scan's voxels; with more, a reader has failed or the scan is masked by NaN


def check_shape(path, shape, itemsize: int, limits: ScanLimits) -> None:
    """Raise ScanError unless a volume (H, W, D, C) of `itemsize` bytes a value is non-empty and within the limits."""
    h, w, d, c = (int(n) for n in shape)
    text = f"has {h} x {w} x {d} voxels of {c} channel{'s' * (c != 1)}"
    if min(h, w, d, c) < 1:
        raise ScanError(path, text, "a scan needs at least one voxel along every axis")
    if max(h, w) > limits.max_side:
        raise limit_error(path, f"{text}: more than {limits.max_side} rows or columns", "max_side")
    if d > limits.max_slices:
        raise limit_error(path, f"{text}: more than {limits.max_slices} slices", "max_slices")
    size = h * w * d * c * itemsize
    if size > limits.max_bytes:
        raise limit_error(path, f"{text}: {size:,} bytes, more than the limit of {limits.max_bytes:,}", "max_bytes")


def check_volume(path, volume: int | None, volumes: int, limits: ScanLimits, *, needed: bool = True) -> int:
    """Return the index of the requested volume. A file with several needs a choice, unless `needed` is False."""
    if volumes > limits.max_volumes:
        raise limit_error(path, f"has {volumes} volumes, more than the limit of {limits.max_volumes}", "max_volumes")
    if volume is None:
        if volumes > 1 and needed:
            raise ScanError(path, f"has {volumes} volumes", f"choose one: volume 0 to {volumes - 1}", "ambiguous")
        return 0
    if isinstance(volume, bool) or not isinstance(volume, int | np.integer):
        raise ScanError(path, f"volume={volume!r} is not an integer", "count volumes from 0", "ambiguous")
    if not 0 <= volume < volumes:
        remedy = "its only volume is 0" if volumes == 1 else f"its volumes are 0 to {volumes - 1}"
        raise ScanError(path, f"has no volume {volume}", remedy, "ambiguous")
    return int(volume)


def to_intensities(
    path, frames: np.ndarray, slopes=1.0, intercepts=0.0, limits: ScanLimits | None = None
) -> np.ndarray:
    """Return slope * stored + intercept of frames [F, ...]. Slopes and intercepts are one value, or one per frame.

    Without rescaling, uint8, uint16, int16, int32 and float32 keep their dtype. Integers with integer slopes and
    intercepts stay exact: int16, or int32 where that is too small. All else is computed in float64, rounded to float32.
    """
    count = len(frames)
    slopes, intercepts = (np.broadcast_to(np.asarray(x, np.float64), count) for x in (slopes, intercepts))
    unscaled = bool((slopes == 1).all() and (intercepts == 0).all())
    stored = frames.dtype.newbyteorder("=")
    if unscaled and stored.type in (np.uint8, np.uint16, np.int16, np.int32, np.float32):
        return frames.astype(stored, copy=False)
    exact = np.issubdtype(stored, np.integer)
    exact = exact and bool((slopes == np.round(slopes)).all() and (intercepts == np.round(intercepts)).all())
    target = np.dtype(np.float32)
    if exact:
        # With Python integers, neither a 64-bit voxel nor its product with a slope overflows.
        ends = [
            int(end) * int(a) + int(b)
            for frame, a, b in zip(frames, slopes, intercepts, strict=True)
            for end in (frame.min(), frame.max())
        ]
        fitting = (t for t in (np.int16, np.int32) if np.iinfo(t).min <= min(ends) and max(ends) <= np.iinfo(t).max)
        target = np.dtype(next(fitting, np.float32))
    size = frames.size * target.itemsize
    if limits is not None and size > limits.max_bytes:
        raise limit_error(path, f"{size:,} bytes as {target}, more than the limit of {limits.max_bytes:,}", "max_bytes")
    out = np.empty(frames.shape, target)
    with np.errstate(over="ignore", invalid="ignore"):  # check_values reports the infinities of an overflow
        for i, (a, b) in enumerate(zip(slopes, intercepts, strict=True)):
            if target.kind == "i":
                out[i] = frames[i].astype(np.int64) * int(a) + int(b)
            else:
                out[i] = frames[i] if unscaled else frames[i].astype(np.float64) * a + b
    return out


def check_opaque(path, alpha: np.ndarray, opaque: float) -> None:
    """Raise ScanError unless every alpha value is `opaque`. A transparent pixel has no defined gray value."""
    if (alpha != opaque).any():
        remedy = "blend it with the intended background and save it without alpha"
        raise ScanError(path, "has transparent pixels", remedy, "ambiguous")


def check_values(path, voxels: np.ndarray) -> tuple[np.ndarray, tuple[float, float], tuple[str, ...]]:
    """Check voxels [H, W, D, C]. Returns them, their (minimum, maximum), and notices.

    A share of NaN of at most MAX_NAN_SHARE becomes the minimum of the other voxels, in a copy. Raises ScanError for
    more NaN, for infinite voxels, and if every channel is constant.
    """
    (low, high), notices = value_range(voxels), ()
    if not (math.isfinite(low) and math.isfinite(high)):
        bad, nan = int(voxels.size - np.count_nonzero(np.isfinite(voxels))), np.isnan(voxels)
        count = int(np.count_nonzero(nan))
        if bad > count or count > MAX_NAN_SHARE * voxels.size:
            reason = f"{bad} of {voxels.size} voxels are NaN, infinite or too large for float32"
            remedy = f"repair the scan, or leave it out; up to {MAX_NAN_SHARE:.0%} of NaN are read as padding"
            raise ScanError(path, reason, remedy, "non-finite")
        voxels = voxels.copy(order="K")
        voxels[nan] = voxels[~nan].min()
        low, high = value_range(voxels)
        notices = (f"{count} of {voxels.size} voxels are NaN, and are read as the minimum {low:g}: repair the scan",)
    first = voxels[0, 0, 0]
    sample = voxels[tuple(slice(None, None, max(n // 16, 1)) for n in voxels.shape[:3])]
    if (sample == first).all() and (low == high or (voxels == first).all()):
        value = first[0].item() if len(first) == 1 else tuple(first.tolist())
        raise ScanError(path, f"constant: every voxel is {value}", "the scan is blank: leave it out", "constant")
    return voxels, (low, high), notices
