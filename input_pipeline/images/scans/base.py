"""Types shared by all readers: header, limits and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from input_pipeline.messages import printable

Format = Literal["nifti", "dicom", "image", "npy", "mgh", "itk"]
Fault = Literal[
    "missing", "refused", "damaged", "limit", "unsupported", "ambiguous", "series", "non-finite", "constant"
]  # "non-finite" and "constant": readable files with useless voxels
FAULTS: tuple[str, ...] = Fault.__args__
MAX_LISTED = 10  # offending files or slices named in one message
COPY_AGAIN = "the file is truncated or damaged: copy it again from its source"
WRONG_SIZE = "it is truncated or its header is damaged: copy it again"

# First bytes of common formats that cannot be read, or cannot be read safely.
UNSUPPORTED = {
    b"PK\x03\x04": ("a zip or .npz archive", "unpack it, or save single .npy files"),  # in a gzip stream
    b"GIF8": ("a GIF", "save it as PNG"),
    b"BM": ("a BMP", "save it as PNG"),
    b"RIFF": ("a WebP or other RIFF file", "save it as PNG"),
    b"NRRD": ("NRRD", "unpack it"),  # in a gzip stream
    b"ObjectType": ("MetaImage", "unpack it"),
    b"\x80\x04": ("a pickle", "save it as .npy"),
    b"\x89HDF": ("HDF5", "save it as .npy or .nii.gz"),
    b"version ": ("a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
}


def other_format(start: bytes) -> tuple[str, str] | None:
    """Return the name and the remedy of a format that no reader accepts, from the first 262 bytes of a file."""
    if start[257:262] == b"ustar":
        return "a tar archive", "unpack it, and name a scan or the folder of one series"
    return next((other for magic, other in UNSUPPORTED.items() if start.startswith(magic)), None)


class ScanError(ValueError):
    """A scan that cannot be used. The message names the file, the problem and the remedy."""

    def __init__(self, path, reason: str, remedy: str = "", fault: Fault = "damaged"):
        self.path, self.reason, self.remedy, self.fault = printable(path), reason, remedy, fault
        super().__init__(f"{self.path}: {reason}" + (f" ({remedy})" if remedy else ""))

    def __reduce__(self):  # BaseException would call the constructor with only the message, which fails
        return type(self), (self.path, self.reason, self.remedy, self.fault)


def limit_error(path, reason: str, limit: str) -> ScanError:
    """Return the error for a scan that exceeds the field `limit` of ScanLimits."""
    return ScanError(path, reason, f"raise ScanLimits.{limit} if the file is correct", "limit")


@dataclasses.dataclass(frozen=True)
class ScanLimits:
    """Size limits, checked against the header before any memory is allocated."""

    max_bytes: int = 2 << 30  # one volume, as stored and as returned; a read needs less than about three times this
    max_side: int = 16384  # rows and columns; the largest mammograms have about 6,000
    max_slices: int = 4096  # slices of a volume, frames of a DICOM file, pages of a TIFF, files of a series
    max_volumes: int = 16384  # volumes in a file
    max_instances: int = 65536  # files of a study: a folder of any depth, or an archive
    max_file_bytes: int = 4 << 30  # a file on disk, all files of a series, an unpacked gzip stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Properties that a file states about its scan; None if unstated. Never names, dates, UIDs or institutions."""

    format: Format
    shape: tuple[int, int, int, int]  # (H, W, D, C) of the voxels that `read` returns
    dtype: str  # dtype of the stored voxels
    modality: str | None = None  # DICOM modality code: CT, MR, CR, ...
    spacing_mm: tuple[float | None, float | None, float | None] | None = None  # along H, W and D
    # Directions of increasing row, column and slice index: "PLS" is Posterior, the patient's Left, Superior.
    orientation: str | None = None
    volumes: int = 1  # number of volumes in the file; `read` returns one of them
    rescaled: bool = False  # whether `read` maps the stored values (slope and intercept, or lookup table)
    photometric: str | None = None  # as stored: MONOCHROME1, RGB, palette, ...; None for NIfTI and .npy
    oblique_degrees: float | None = None  # largest angle between a voxel axis and its anatomical axis
    padding: tuple[float, float] | None = None  # (low, high) of values outside the field of view, after rescaling
    window: tuple[float, float] | None = None  # (low, high) to display, after rescaling
    # DICOM: (row, column, slice, 1) -> mm to the patient's Right, Anterior and Superior; None without a regular grid.
    affine: tuple[tuple[float, float, float, float], ...] | None = None
    # Faults that do not prevent reading, each with its remedy.
    notices: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    # (minimum, maximum) of the voxels from `read`; None from `header`, which reads no voxels.
    value_range: tuple[float, float] | None = dataclasses.field(default=None, compare=False)

    @property
    def kind(self) -> Literal["2d", "3d"]:
        """2d if the scan has one slice."""
        return "2d" if self.shape[2] == 1 else "3d"

    @property
    def facts(self) -> dict:
        """The keyword arguments of `prepare_volume` that a header states."""
        spacing = None if self.spacing_mm is None or None in self.spacing_mm[:2] else self.spacing_mm[:2]
        return {
            "padding": self.padding,
            "value_range": self.value_range,
            "modality": self.modality,
            "stated_window": self.window,
            "spacing": spacing,
        }


def join_offenders(offenders: Iterable[str]) -> str:
    """Join the first MAX_LISTED offenders and count the rest."""
    offenders = list(offenders)
    more = len(offenders) - MAX_LISTED
    return "; ".join(offenders[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
