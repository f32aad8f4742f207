"""Code shared by all readers: limits, header, error type, file access, dtype conversion and checks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from input_pipeline.images.value_range import value_range

Format = Literal["nifti", "dicom", "image", "npy"]
Fault = Literal[
    "missing", "refused", "damaged", "limit", "unsupported", "ambiguous", "series", "non-finite", "constant"
]
FAULTS: tuple[str, ...] = Fault.__args__
MAX_LISTED = 10  # offending files or slices named in one message
COPY_AGAIN = "the file is truncated or damaged: copy it again from its source"


class ScanError(ValueError):
    """A scan that cannot be used. The message names the file, the problem and the remedy.

    Attributes:
      fault: the kind of error, one of FAULTS. `constant` and `non-finite` are readable files with useless voxels.
    """

    def __init__(self, path, reason: str, remedy: str = "", fault: Fault = "damaged"):
        self.path, self.reason, self.remedy, self.fault = printable(path), reason, remedy, fault
        super().__init__(f"{self.path}: {reason}" + (f" ({remedy})" if remedy else ""))

    def __reduce__(self):  # BaseException would call the constructor with the message alone, which fails
        return type(self), (self.path, self.reason, self.remedy, self.fault)


def limit_error(path, reason: str, limit: str) -> ScanError:
    """Return the error for a scan that exceeds the field `limit` of ScanLimits."""
    return ScanError(path, reason, f"raise ScanLimits.{limit} if the file is correct", "limit")


@dataclasses.dataclass(frozen=True)
class ScanLimits:
    """Size limits, checked against the header before any memory is allocated.

    Attributes:
      max_bytes: bytes of one volume, as stored and as returned. Peak memory of a read stays below about three times
        this (stored voxels, returned voxels and the encoded file).
      max_side: rows and columns. The largest mammograms have about 6,000.
      max_slices: slices of a volume, frames of a DICOM file, pages of a TIFF, files of a series.
      max_volumes: volumes in a file.
      max_file_bytes: bytes of a file on disk, of all files of a series, and of an unpacked gzip stream.
    """

    max_bytes: int = 2 << 30
    max_side: int = 16384
    max_slices: int = 4096
    max_volumes: int = 16384
    max_file_bytes: int = 4 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a file states about its scan. It never holds names, dates, UIDs or institutions.

    Attributes:
      shape: (H, W, D, C) of the voxels that `read` returns.
      dtype: of the stored voxels.
      modality: DICOM modality code (CT, MR, CR, ...); None for other formats.
      spacing_mm: voxel spacing along H, W and D; None where the file does not state it.
      orientation: directions of increasing row, column and slice index. In "PLS" rows run to Posterior, columns to the
        patient's Left and slices to Superior. None if the file does not state it.
      volumes: number of volumes in the file; `read` returns one of them.
      rescaled: whether `read` maps the stored values (slope and intercept, or lookup table).
      photometric: as stored (MONOCHROME1, RGB, palette, ...); None for NIfTI and .npy.
      oblique_degrees: largest angle between a voxel axis and its anatomical axis; None without an orientation.
      padding: (low, high) of the values that mark voxels outside the field of view, after rescaling; None if unstated.
      value_range: (minimum, maximum) of the voxels from `read`; None from `header`, which reads no voxels. Ignored when
        headers are compared.
    """

    format: Format
    shape: tuple[int, int, int, int]
    dtype: str
    modality: str | None = None
    spacing_mm: tuple[float | None, float | None, float | None] | None = None
    orientation: str | None = None
    volumes: int = 1
    rescaled: bool = False
    photometric: str | None = None
    oblique_degrees: float | None = None
    padding: tuple[float, float] | None = None
    value_range: tuple[float, float] | None = dataclasses.field(default=None, compare=False)

    @property
    def kind(self) -> Literal["2d", "3d"]:
        """2d if the scan has one slice."""
        return "2d" if self.shape[2] == 1 else "3d"


def printable(path) -> str:
    """Return a path as printable text, with undecodable bytes and control characters escaped."""
    text = os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else str(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def join_offenders(offenders: Iterable[str]) -> str:
    """Join the first MAX_LISTED offenders and count the rest."""
    offenders = list(offenders)
    more = len(offenders) - MAX_LISTED
    return "; ".join(offenders[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


# --- file access ------------------------------------------------------------------------------------------------------


def stat_scan(path) -> os.stat_result:
    """Stat a path, following links. Raises ScanError unless it is a regular file or a directory."""
    try:
        result = os.stat(path)
    except FileNotFoundError:
        raise ScanError(path, "there is no such file", "check the path and the data set's root", "missing") from None
    except (OSError, ValueError) as error:  # loops, permissions, over-long names; ValueError: NUL in the name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ScanError(path, f"cannot be opened: {why}", "check the path", "missing") from None
    if not (stat.S_ISREG(result.st_mode) or stat.S_ISDIR(result.st_mode)):
        kinds = {stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
        kind = next((name for test, name in kinds.items() if test(result.st_mode)), "not a regular file")
        raise ScanError(path, f"is {kind}", "name a regular file or a DICOM directory", "refused")
    return result


class BoundedFile:
    """A file whose `read(n)` never allocates more than the rest of the file, even if a hostile header asks for it."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.seek, self.tell, self.readinto = file.seek, file.tell, file.readinto

    def read(self, n: int = -1) -> bytes:
        rest = max(self.size - self.file.tell(), 0)
        return self.file.read(rest if n is None or n < 0 else min(n, rest))

    def close(self) -> None:
        """Do nothing: `open_scan` closes the file, and libraries must not."""


@contextlib.contextmanager
def open_scan(path, limits: ScanLimits) -> Iterator[BoundedFile]:
    """Open a regular, non-empty file within the size limit.

    Raises:
      ScanError: anything else. A FIFO that replaces the file after the check does not block.
    """
    stat_scan(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ScanError(path, f"cannot be opened: {error.strerror}", "check its permissions", "missing") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ScanError(path, "is not a regular file", "name a regular file", "refused")
        if status.st_size == 0:
            raise ScanError(path, "is empty", "copy it again from its source")
        if status.st_size > limits.max_file_bytes:
            reason = f"has {status.st_size:,} bytes, more than the limit of {limits.max_file_bytes:,}"
            raise limit_error(path, reason, "max_file_bytes")
        yield BoundedFile(file, status.st_size)


def read_exactly(path, stream, buffer: memoryview, content: str, chunk: int | None = None) -> None:
    """Fill a buffer from a stream, `chunk` bytes at a time. Raises ScanError if the stream ends first."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done : done + chunk if chunk else None])
        if not count:
            raise ScanError(path, f"ends after {done:,} of {len(buffer):,} bytes of {content}", COPY_AGAIN)
        done += count


@contextlib.contextmanager
def as_scan_error(path, action: str, *, hide_message: bool = False) -> Iterator[None]:
    """Turn any exception of a library into a ScanError that names the file.

    Args:
      hide_message: drop the library's message and traceback, which can quote values of a patient's header.
    """
    try:
        yield
    except ScanError:
        raise
    except MemoryError as error:
        remedy = "lower ScanLimits.max_bytes or free memory"
        raise ScanError(path, f"not enough memory while {action}", remedy, "limit") from error
    except Exception as error:  # decoders raise nearly every type on hostile input
        lines = str(error).strip().splitlines()
        cause = type(error).__name__ + (f": {lines[0][:200]}" if lines and not hide_message else "")
        remedy = "the file is damaged or of an unusual kind: copy or export it again"
        raise ScanError(path, f"failed while {action} ({cause})", remedy) from (None if hide_message else error)


def resolve(root, path) -> Path:
    """Return the real path of a table entry, which must be below the root of the data set.

    Args:
      path: relative to `root`, or absolute and below it.
    Raises:
      ScanError: the path contains `..` or NUL, does not exist, or leads out of the root (as an absolute path, through a
        link, or through a link within a series directory). The message states the root.
    """
    remedy = f"paths must be below the root {printable(root)}"
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ScanError(repr(path), "is not a path", remedy, "refused")
    text = os.fsdecode(path)
    if "\0" in text:
        raise ScanError(text, "has a NUL character in its name", remedy, "refused")
    if ".." in Path(text).parts or ".." in text.replace("\\", "/").split("/"):
        raise ScanError(text, "goes up through '..'", remedy, "refused")

    def real(location: Path) -> Path:
        try:
            return location.resolve(strict=True)
        except FileNotFoundError:
            raise ScanError(location, "there is no such file", remedy, "missing") from None
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise ScanError(location, f"cannot be opened: {why}", remedy, "refused") from None

    base = real(Path(root))
    resolved = real(base / text)
    if not resolved.is_relative_to(base):
        raise ScanError(text, f"leads out of the root, to {printable(resolved)}", remedy, "refused")
    if resolved.is_dir():
        with os.scandir(resolved) as entries:
            links = [Path(e.path) for e in entries if e.is_symlink()]
        outside = [printable(link.name) for link in sorted(links) if not real(link).is_relative_to(base)]
        if outside:
            reason = f"contains links that lead out of the root: {join_offenders(outside)}"
            raise ScanError(text, reason, remedy, "refused")
    return resolved


# --- checks and conversion --------------------------------------------------------------------------------------------


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
    """Return slope * stored + intercept, in the smallest of a few dtypes that holds it.

    Without rescaling, uint8, uint16, int16, int32 and float32 keep their dtype. Integers with integer slopes and
    intercepts stay exact: int16, or int32 where that is too small. All else is computed in float64 and rounded to
    float32.

    Args:
      frames: [F, ...] stored values of any byte order.
      slopes, intercepts: one value, or one a frame.
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
        # Python integers: neither a 64-bit voxel nor its product with a slope can overflow.
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
    """Raise ScanError unless every alpha value is `opaque`: the intended background is unknown."""
    if (alpha != opaque).any():
        remedy = "blend it with the intended background and save it without alpha"
        raise ScanError(path, "has transparent pixels", remedy, "ambiguous")


def check_values(path, voxels: np.ndarray) -> tuple[float, float]:
    """Return (minimum, maximum) of voxels [H, W, D, C].

    Raises:
      ScanError: a voxel is NaN or infinite, or every channel is constant.
    """
    low, high = value_range(voxels)
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(voxels.size - np.count_nonzero(np.isfinite(voxels)))
        reason = f"{bad} of {voxels.size} voxels are NaN, infinite or too large for float32"
        raise ScanError(path, reason, "repair the scan, or leave it out", "non-finite")
    first = voxels[0, 0, 0]
    sample = voxels[tuple(slice(None, None, max(n // 16, 1)) for n in voxels.shape[:3])]
    if (sample == first).all() and (low == high or (voxels == first).all()):
        value = first[0].item() if len(first) == 1 else tuple(first.tolist())
        raise ScanError(path, f"constant: every voxel is {value}", "the scan shows nothing: leave it out", "constant")
    return low, high
