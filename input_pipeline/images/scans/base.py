"""What every scan format shares: limits, the header, the typed error, safe opening, natural dtypes, value checks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from input_pipeline.images.extremes import extremes

Format = Literal["nifti", "dicom", "image", "npy"]
Fault = Literal[
    "missing", "refused", "damaged", "limit", "unsupported", "ambiguous", "series", "non-finite", "constant"
]
FAULTS: tuple[str, ...] = Fault.__args__
LISTED = 10  # offenders named in one message


class ScanError(ValueError):
    """A scan that cannot be used: which file, why, and what the user can do.

    Attributes:
      fault: the kind of error, one of FAULTS, for a quarantine report; `constant` and `non-finite` are readable files
        whose voxels are of no use.
    """

    def __init__(self, path, reason: str, remedy: str = "", fault: Fault = "damaged"):
        self.path, self.reason, self.remedy, self.fault = printable(path), reason, remedy, fault
        super().__init__(f"{self.path}: {reason}" + (f" ({remedy})" if remedy else ""))

    def __reduce__(self):  # an exception is otherwise rebuilt from its message alone, which fails between processes
        return type(self), (self.path, self.reason, self.remedy, self.fault)


@dataclasses.dataclass(frozen=True)
class ScanLimits:
    """What a scan may cost, checked from headers before anything is allocated.

    Attributes:
      max_bytes: of one volume, as stored and as returned. Peak memory of a read stays below about three times this
        (stored and returned voxels, and the encoded file).
      max_side: rows and columns, in voxels. The largest mammograms have some 6,000.
      max_slices: slices of a volume, frames of a DICOM file, pages of a TIFF, files of a series.
      max_volumes: volumes in a file.
      max_file_bytes: of a file on disk, of all files of a series, and of a gzip stream when unpacked.
    """

    max_bytes: int = 2 << 30
    max_side: int = 16384
    max_slices: int = 4096
    max_volumes: int = 16384
    max_file_bytes: int = 4 << 30


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says about its scan. Never identity: no names, dates, UIDs, institutions.

    Attributes:
      kind: `2d` if the depth is 1, else `3d`.
      modality: DICOM modality code (CT, MR, CR, ...); None for other formats.
      shape: (H, W, D, C) of the voxels that `read` returns.
      spacing_mm: distance of neighbouring voxels along H, W and D; None where the file does not say.
      orientation: where rows, columns and slices run to, e.g. "PLS": rows towards Posterior, columns towards the
        patient's Left, slices towards Superior. None if the file does not say.
      dtype: of the stored voxels.
      volumes: volumes in the file, of which one is read.
      rescaled: whether stored values are mapped (slope and intercept, lookup table) to what `read` returns.
      photometric: as stored (MONOCHROME1, RGB, palette, ...); None for NIfTI and .npy.
      oblique_degrees: largest angle between a voxel axis and its anatomical axis; None without an orientation.
      padding: (low, high) values that mark voxels outside the field of view, after rescaling; None if not stated.
      extremes: (least, greatest) of the voxels that `read` returned; None from `header`, which reads none, and no part
        of a comparison.
    """

    format: Format
    kind: Literal["2d", "3d"]
    modality: str | None
    shape: tuple[int, int, int, int]
    spacing_mm: tuple[float | None, float | None, float | None] | None
    orientation: str | None
    dtype: str
    volumes: int = 1
    rescaled: bool = False
    photometric: str | None = None
    oblique_degrees: float | None = None
    padding: tuple[float, float] | None = None
    extremes: tuple[float, float] | None = dataclasses.field(default=None, compare=False)


def printable(path) -> str:
    """A path as text that any log can hold: undecodable bytes and control characters are escaped."""
    text = os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else str(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def listed(offenders) -> str:
    """The first LISTED offenders and how many more there are."""
    offenders = list(offenders)
    more = len(offenders) - LISTED
    return "; ".join(offenders[:LISTED]) + (f"; and {more} more" if more > 0 else "")


def file_stat(path) -> os.stat_result:
    """stat that follows links, with ScanError for everything that is no regular file or directory."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise ScanError(path, "there is no such file", "check the path and the data set's root", "missing") from None
    except (OSError, ValueError) as error:  # loops, permissions, over-long names; ValueError: NUL in the name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ScanError(path, f"cannot be opened: {why}", "check the path", "missing") from None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        kinds = {stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
        kind = next((name for test, name in kinds.items() if test(found.st_mode)), "no regular file")
        raise ScanError(path, f"is {kind}", "only regular files and DICOM directories are read", "refused")
    return found


class BoundedFile:
    """A file whose `read(n)` never allocates more than the file still has, whatever a hostile header asks for."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.seek, self.tell, self.readinto = file.seek, file.tell, file.readinto

    def read(self, n: int = -1) -> bytes:
        left = max(self.size - self.file.tell(), 0)
        return self.file.read(left if n is None or n < 0 else min(n, left))

    def close(self) -> None:
        """The owner closes the file; libraries that close what they were given must not."""


@contextlib.contextmanager
def opened(path, limits: ScanLimits) -> Iterator[BoundedFile]:
    """A regular, non-empty file within the limit.

    Raises:
      ScanError: everything else. A FIFO swapped in after the check does not block.
    """
    file_stat(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ScanError(path, f"cannot be opened: {error.strerror}", "check its permissions", "missing") from None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ScanError(path, "is no regular file", "only regular files are read", "refused")
        if found.st_size == 0:
            raise ScanError(path, "is empty", "copy it again from its source")
        if found.st_size > limits.max_file_bytes:
            what = f"has {found.st_size:,} bytes, more than the limit of {limits.max_file_bytes:,}"
            raise ScanError(path, what, "raise ScanLimits.max_file_bytes if it is meant to be", "limit")
        yield BoundedFile(file, found.st_size)


@contextlib.contextmanager
def blamed(path, doing: str, *, quiet: bool = False) -> Iterator[None]:
    """Whatever a library raises on a damaged file becomes a ScanError that names the file.

    Args:
      quiet: leave out the library's message and the chained traceback: those of a header's parser can quote its values.
    """
    try:
        yield
    except ScanError:
        raise
    except MemoryError as error:
        what = f"not enough memory while {doing}"
        raise ScanError(path, what, "lower ScanLimits.max_bytes or free memory", "limit") from error
    except Exception as error:  # decoders raise nearly every type on hostile input; it is never dropped
        text = str(error).strip().splitlines()
        said = type(error).__name__ + (f": {text[0][:200]}" if text and not quiet else "")
        remedy = "the file is damaged or of a rare kind: copy or export it again"
        raise ScanError(path, f"failed while {doing} ({said})", remedy) from (None if quiet else error)


def check_shape(path, shape, itemsize: int, limits: ScanLimits) -> None:
    """Raise unless a volume (H, W, D, C) of `itemsize` bytes a value is non-empty and within the limits."""
    h, w, d, c = (int(n) for n in shape)
    text = f"{h} x {w} x {d} voxels of {c} channel{'s' * (c != 1)}"
    if min(h, w, d, c) < 1:
        raise ScanError(path, f"is a volume of {text}", "a scan needs at least one voxel along every axis")
    if max(h, w) > limits.max_side:
        what = f"{text}: more than {limits.max_side} rows or columns"
        raise ScanError(path, what, "raise ScanLimits.max_side if this is right", "limit")
    if d > limits.max_slices:
        what = f"{text}: more than {limits.max_slices} slices"
        raise ScanError(path, what, "raise ScanLimits.max_slices if this is right", "limit")
    size = h * w * d * c * itemsize
    if size > limits.max_bytes:
        what = f"{text} are {size:,} bytes, more than the limit of {limits.max_bytes:,}"
        raise ScanError(path, what, "raise ScanLimits.max_bytes if this is right", "limit")


def check_volume(path, volume: int | None, volumes: int, limits: ScanLimits, *, needed: bool = True) -> int:
    """Which of the file's volumes is meant. Several need a choice (`needed`), one may do without."""
    if volumes > limits.max_volumes:
        what = f"has {volumes} volumes, more than the limit of {limits.max_volumes}"
        raise ScanError(path, what, "raise ScanLimits.max_volumes if this is right", "limit")
    if volume is None:
        if volumes > 1 and needed:
            raise ScanError(path, f"has {volumes} volumes", f"choose one: volume 0 to {volumes - 1}", "ambiguous")
        return 0
    if isinstance(volume, bool) or not isinstance(volume, int | np.integer):
        raise ScanError(path, f"volume={volume!r} is no integer", "count volumes from 0", "ambiguous")
    if not 0 <= volume < volumes:
        last = "its only volume is 0" if volumes == 1 else f"its volumes are 0 to {volumes - 1}"
        raise ScanError(path, f"has no volume {volume}", last, "ambiguous")
    return int(volume)


def natural(path, frames: np.ndarray, slopes=1.0, intercepts=0.0, limits: ScanLimits | None = None) -> np.ndarray:
    """Stored values -> intensities: slope * stored + intercept, in the smallest of a few dtypes that holds them.

    uint8, uint16, int16, int32 and float32 stay as they are when nothing is to be rescaled. With whole-numbered slopes
    and intercepts whole numbers stay exact: int16, or int32 where that is too small. All else becomes float32: computed
    in float64 and rounded once.

    Args:
      frames: [F, ...] stored values of any byte order.
      slopes, intercepts: one, or one a frame.
    """
    count = len(frames)
    slopes, intercepts = (np.broadcast_to(np.asarray(x, np.float64), count) for x in (slopes, intercepts))
    plain = bool((slopes == 1).all() and (intercepts == 0).all())
    stored = frames.dtype.newbyteorder("=")
    if plain and stored.type in (np.uint8, np.uint16, np.int16, np.int32, np.float32):
        return frames.astype(stored, copy=False)
    whole = np.issubdtype(stored, np.integer)
    whole = whole and bool((slopes == np.round(slopes)).all() and (intercepts == np.round(intercepts)).all())
    target = np.dtype(np.float32)
    if whole:
        # Python's integers: neither a 64-bit voxel nor its product with a slope can wrap.
        ends = [
            int(end) * int(a) + int(b)
            for frame, a, b in zip(frames, slopes, intercepts, strict=True)
            for end in (frame.min(), frame.max())
        ]
        fitting = (t for t in (np.int16, np.int32) if np.iinfo(t).min <= min(ends) and max(ends) <= np.iinfo(t).max)
        target = np.dtype(next(fitting, np.float32))
    if limits is not None and frames.size * target.itemsize > limits.max_bytes:
        what = f"{frames.size * target.itemsize:,} bytes as {target}, more than the limit of {limits.max_bytes:,}"
        raise ScanError(path, what, "raise ScanLimits.max_bytes if this is right", "limit")
    out = np.empty(frames.shape, target)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is inf, and named by check_values
        for i, (a, b) in enumerate(zip(slopes, intercepts, strict=True)):
            if target.kind == "i":
                out[i] = frames[i].astype(np.int64) * int(a) + int(b)
            else:
                out[i] = frames[i] if plain else frames[i].astype(np.float64) * a + b
    return out


def check_values(path, voxels: np.ndarray) -> tuple[float, float]:
    """The least and the greatest of voxels [H, W, D, C].

    Raises:
      ScanError: a voxel is NaN or infinite, or every channel is constant.
    """
    low, high = extremes(voxels)
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(voxels.size - np.count_nonzero(np.isfinite(voxels)))
        what = f"{bad} of {voxels.size} voxels are NaN, infinite or too large for float32"
        raise ScanError(path, what, "repair the scan, or leave it out", "non-finite")
    first = voxels[0, 0, 0]
    some = voxels[tuple(slice(None, None, max(n // 16, 1)) for n in voxels.shape[:3])]
    if (some == first).all() and (low == high or (voxels == first).all()):
        value = first[0].item() if len(first) == 1 else tuple(first.tolist())
        raise ScanError(path, f"constant: every voxel is {value}", "it shows nothing: leave it out", "constant")
    return low, high


def resolve(root, path) -> Path:
    """The real path of a table's entry, which must lie in the data set's root.

    Args:
      path: relative to `root`, or absolute and below it.
    Raises:
      ScanError: `..` anywhere, an absolute path or a link that leads out of the root (also from within a series
        directory), NUL, a missing file. The message states the root.
    """
    remedy = f"paths must lie below the root {printable(root)}"
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ScanError(repr(path), "is no path", remedy, "refused")
    text = os.fsdecode(path)
    if "\0" in text:
        raise ScanError(text, "has a NUL in its name", remedy, "refused")
    if ".." in Path(text).parts or ".." in text.replace("\\", "/").split("/"):
        raise ScanError(text, "goes up through '..'", remedy, "refused")

    def real(where: Path) -> Path:
        try:
            return where.resolve(strict=True)
        except FileNotFoundError:
            raise ScanError(where, "there is no such file", remedy, "missing") from None
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise ScanError(where, f"cannot be opened: {why}", remedy, "refused") from None

    base = real(Path(root))
    found = real(base / text)
    if not found.is_relative_to(base):
        raise ScanError(text, f"leads out of the root, to {printable(found)}", remedy, "refused")
    if found.is_dir():
        with os.scandir(found) as entries:
            links = [Path(e.path) for e in entries if e.is_symlink()]
        out = [printable(link.name) for link in sorted(links) if not real(link).is_relative_to(base)]
        if out:
            raise ScanError(text, f"holds links that lead out of the root: {listed(out)}", remedy, "refused")
    return found
