"""Types shared by all readers: header, limits and errors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Literal

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
