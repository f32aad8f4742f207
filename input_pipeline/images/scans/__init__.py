"""A scan file, or the directory of a DICOM series, -> voxels and what the header says.

    voxels, header = scans.read("ct.nii.gz")       # voxels [H, W, D, C]; a gray picture [H, W, 1, 1]
    header = scans.header("ct.nii.gz")             # for planning: no voxel is read where the format allows

| format | read as | damage that cannot be seen |
|---|---|---|
| NIfTI (.nii.gz) | slices in display order (`orientation`), intensities scaled | none in the stream (CRC of the whole) |
| NIfTI (.nii) | the same | flipped bits in voxels, spacing, affine, scaling |
| DICOM file, frames, series | slices sorted by position, in display order; rescaled; MONOCHROME1 inverted; RGB | flipped bits in native or compressed pixels and in numbers; a missing first or last slice |
| PNG | gray or colour, EXIF orientation applied | none (CRC of every chunk) |
| JPEG | the same | flipped bits in the picture data |
| TIFF | a page is a slice | flipped bits in plain pixels |
| .npy | [H, W, D], [H, W, D, C], released [S, 3, H, W, D] | flipped bits in voxels |

The format is told by a file's first bytes; a name that promises another format is an error (a picture may
have the name of any other kind). Intensities keep a natural dtype: as stored if that is uint8, uint16, int16, int32 or
float32; whole-numbered rescaling (Hounsfield units) gives int16 or int32; all else float32. Windows are not applied. Every array is checked: NaN, infinities and constant scans
are errors. Voxels may be a view with any strides.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import os
import stat

import numpy as np

from input_pipeline.images.scans import arrays, dicom, images, nifti, tiff
from input_pipeline.images.scans.base import (
    FAULTS,
    Header,
    ScanError,
    ScanLimits,
    blamed,
    check_values,
    file_stat,
    opened,
    resolve,
)

__all__ = ["FAULTS", "Header", "ScanLimits", "ScanError", "header", "read", "resolve"]

READERS = (dicom, nifti, images, tiff, arrays)  # DICOM first: its preamble may hold anything, its mark is at 128
ENDINGS = {
    nifti: (".nii", ".nii.gz"),
    dicom: (".dcm", ".dicom"),
    images: (".png", ".jpg", ".jpeg"),
    tiff: (".tif", ".tiff"),
    arrays: (".npy",),
}
# Files that people have and that cannot be read safely or at all, by their first bytes.
FOREIGN = {
    b"PK\x03\x04": ("is a zip or .npz archive", "unpack it, or save single .npy files"),
    b"GIF8": ("is a GIF", "save it as PNG"),
    b"BM": ("is a BMP", "save it as PNG"),
    b"RIFF": ("is a WebP or other RIFF file", "save it as PNG"),
    b"NRRD": ("is NRRD", "convert it to .nii.gz"),
    b"ObjectType": ("is MetaImage", "convert it to .nii.gz"),
    b"\x80\x04": ("is a pickle", "save it as .npy"),
    b"\x89HDF": ("is HDF5", "save it as .npy or .nii.gz"),
    b"version ": ("is a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
}


def reader(path, limits: ScanLimits):
    """The module that reads this path."""
    if stat.S_ISDIR(file_stat(path).st_mode):
        return dicom
    with opened(path, limits) as file:
        start = file.read(132)
    found = next((module for module in READERS if module.sniff(start)), None)
    name = os.fsdecode(path).lower()
    if found is None:
        for magic, (what, remedy) in FOREIGN.items():
            if start.startswith(magic):
                raise ScanError(path, what, remedy, "unsupported")
        remedy = "NIfTI, DICOM (with its 128-byte preamble), PNG, JPEG, TIFF and .npy are read"
        raise ScanError(path, f"is of no known format: it starts with {start[:8].hex()}", remedy, "unsupported")
    # Pictures are renamed among .png and .jpg every day and read the same; anything else is a mix-up.
    family = lambda module: "picture" if module in (images, tiff) else module  # noqa: E731
    named = next((module for module, ends in ENDINGS.items() if name.endswith(ends)), None)
    if named is not None and family(named) != family(found):
        kinds = {nifti: "NIfTI or gzip", dicom: "DICOM", images: "a picture", tiff: "a picture", arrays: ".npy"}
        what = f"is {kinds[found]}, which its name does not say"
        raise ScanError(path, what, "rename it, or copy the right file here", "ambiguous")
    return found


def read(path, *, volume: int | None = None, limits: ScanLimits = ScanLimits()) -> tuple[np.ndarray, Header]:  # noqa: B008
    """A scan's voxels and header.

    Args:
      path: a file, or the directory of one DICOM series.
      volume: which volume of a 4D NIfTI or of a stack [S, 3, H, W, D]; needed only where there are several.
    Returns:
      (voxels [H, W, D, C] of uint8, uint16, int16, int32 or float32; its header).
    Raises:
      ScanError: whatever is wrong with the file, named with a remedy; `fault` says of which kind.
    """
    path = os.fspath(path)
    with blamed(path, "reading the file"):
        voxels, head = reader(path, limits).read(path, volume=volume, limits=limits)
        assert voxels.shape == head.shape, (voxels.shape, head.shape)
        return voxels, dataclasses.replace(head, extremes=check_values(path, voxels))


def header(path, *, limits: ScanLimits = ScanLimits()) -> Header:  # noqa: B008
    """What `read` would say of the scan, from as little of the file as its format allows.

    Raises:
      ScanError: as `read`, for what the header alone shows.
    """
    path = os.fspath(path)
    with blamed(path, "reading the header"):
        return reader(path, limits).header(path, limits=limits)
