"""Readers of scan files, DICOM series and studies: path -> voxels and header. Resizing belongs to resize.py.

    voxels, header = scans.read("ct.nii.gz")       # voxels [H, W, D, C]; a 2D gray image is [H, W, 1, 1]
    header = scans.header("ct.nii.gz")             # for planning: reads no voxels where the format allows it
    voxels, header = scans.read("study/", series="axial lung")    # one series of a study (study/selection.py)

| format | result | undetectable damage |
|---|---|---|
| NIfTI (.nii.gz) | slices in display order (`orientation`), intensities scaled | none (CRC of the whole stream) |
| NIfTI (.nii) | the same | flipped bits in voxels, spacing, affine, scaling |
| DICOM file, frames, series | slices sorted by position, in display order; rescaled; MONOCHROME1 inverted; RGB | flipped bits in pixels and numbers; a missing first or last slice |
| study: folder, DICOMDIR, zip, tar | one of its DICOM series, as above | as above; none in zip and tar.gz (CRC) |
| FreeSurfer (.mgz, .mgh) | slices in display order | none in .mgz (CRC of the whole stream) |
| NRRD, MetaImage (extra `itk`) | slices in display order | flipped bits in voxels and header |
| PNG | gray or colour, EXIF orientation applied | none (CRC of every chunk) |
| JPEG | the same | flipped bits in the image data |
| TIFF | one slice per page | flipped bits in uncompressed pixels |
| .npy | [H, W, D], [H, W, D, C], released [S, 3, H, W, D] | flipped bits in voxels |

The first bytes of a file decide its format. A file name that promises another format is an error, except among image
formats. uint8, uint16, int16, int32 and float32 keep their dtype. Integer rescaling (Hounsfield units) gives int16 or
int32, all else float32. Windows are not applied. Infinities, constant scans, and NaN in more than 1 % of the voxels are
errors. `Header.notices` lists faults that do not prevent reading. The returned voxels may be a view with any strides.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import os
import stat

import numpy as np

from input_pipeline.images.scans import arrays, images, itk, mgh, nifti, tiff
from input_pipeline.images.scans.access import as_scan_error, open_scan, resolve, stat_scan
from input_pipeline.images.scans.base import FAULTS, Header, ScanError, ScanLimits, other_format
from input_pipeline.images.scans.checks import check_values
from input_pipeline.images.scans.study import containers, reading
from input_pipeline.images.scans.study.reading import files_of

__all__ = ["FAULTS", "Header", "ScanLimits", "ScanError", "extension", "files_of", "header", "read", "resolve"]

DICOM = ("DICOM", (".dcm", ".dicom"))
ARCHIVE = ("an archive", (".zip", ".tar", ".tar.gz", ".tgz"))
READERS = {  # DICOM first: its preamble may contain any bytes, its mark is at byte 128
    reading: DICOM,
    mgh: ("a FreeSurfer volume", (".mgz", ".mgh")),
    nifti: ("NIfTI or gzip", (".nii", ".nii.gz")),
    images: ("a 2D image", (".png", ".jpg", ".jpeg")),
    tiff: ("a 2D image", (".tif", ".tiff")),
    arrays: (".npy", (".npy",)),
    itk: ("NRRD or MetaImage", (".nrrd", ".mha", ".mhd")),
}


def find_reader(path, limits: ScanLimits):
    """Return the module that reads this path."""
    if stat.S_ISDIR(stat_scan(path).st_mode):
        return reading
    with open_scan(path, limits) as file:
        start = file.read(containers.SNIFFED)
    detected = next((module for module in READERS if module.sniff(start)), None)
    if detected is None:
        if (other := other_format(start)) is not None:
            raise ScanError(path, f"is {other[0]}", other[1], "unsupported")
        remedy = "supported are NIfTI, DICOM, PNG, JPEG, TIFF, .npy, NRRD, MetaImage and FreeSurfer volumes"
        raise ScanError(path, f"has an unknown format: it starts with {start[:8].hex()}", remedy, "unsupported")
    # 2D images are often renamed between .png and .jpg, which is harmless; any other mismatch suggests a wrong file.
    name, kind = os.fsdecode(path).lower(), (ARCHIVE if containers.sniff(start) else READERS[detected])[0]
    if any(name.endswith(extensions) and kind != named for named, extensions in (ARCHIVE, *READERS.values())):
        reason = f"is {kind}, which does not match its file name"
        raise ScanError(path, reason, "rename it, or copy the right file here", "ambiguous")
    return detected


def extension(start: bytes) -> str:
    """Return the file extension of a format, from the first 262 bytes of a file; "" if no reader accepts it."""
    if start.startswith(nifti.GZIP):
        return ".nii.gz"
    if images.sniff(start):
        return ".png" if start.startswith(images.PNG) else ".jpg"
    return next((extensions[0] for module, (_, extensions) in READERS.items() if module.sniff(start)), "")


def series_option(path, reader, series: str | None) -> dict:
    """Return the keyword arguments that select a series. Raises ScanError if the format has none."""
    if series is None:
        return {}
    if reader is not reading:
        reason = f"is one scan without series, so series={series!r} selects nothing"
        raise ScanError(path, reason, "leave the series out, or name a DICOM study", "ambiguous")
    return {"series": series}


def read(
    path, *, volume: int | None = None, series: str | None = None, limits: ScanLimits = ScanLimits()  # noqa: B008
) -> tuple[np.ndarray, Header]:  # fmt: skip
    """Return voxels [H, W, D, C] of uint8, uint16, int16, int32 or float32, and the header.

    Args:
      path: a file, the directory of one DICOM series, or a study: a directory, DICOMDIR, zip or tar.
      volume: index of the volume of a 4D NIfTI, a stack [S, 3, H, W, D] or a DICOM series of several times; required if
        there are several.
      series: words that select one series of a study (study/selection.py); required if it has several.
    Raises:
      ScanError: the file cannot be used; `fault` classifies the reason.
    """
    path = os.fspath(path)
    with as_scan_error(path, "reading the file"):
        reader = find_reader(path, limits)
        voxels, head = reader.read(path, volume=volume, limits=limits, **series_option(path, reader, series))
        assert voxels.shape == head.shape, (voxels.shape, head.shape)
        voxels, ends, notices = check_values(path, voxels)
        return voxels, dataclasses.replace(head, value_range=ends, notices=(*head.notices, *notices))


def header(path, *, series: str | None = None, limits: ScanLimits = ScanLimits()) -> Header:  # noqa: B008
    """Return the header as `read` does, and read as little as possible. Raises only errors that the header shows."""
    path = os.fspath(path)
    with as_scan_error(path, "reading the header"):
        reader = find_reader(path, limits)
        return reader.header(path, limits=limits, **series_option(path, reader, series))
