"""Series as NIfTI files with a JSON of their properties, without any attribute that identifies a patient."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np

from input_pipeline.files import atomic_write, write_json
from input_pipeline.images.scans.base import Header, ScanError
from input_pipeline.images.scans.study.reading import OpenStudy
from input_pipeline.images.scans.study.survey import Series
from input_pipeline.series.report import series_dict

RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
SLUG = 40  # characters of the description in a file name


def file_name(series: Series, volume: int) -> str:
    """Return for example "3.2_axial-lung" or "4_cine_t0", without a suffix."""
    words = re.sub(r"[^a-z0-9]+", "-", series.description.lower()).strip("-")[:SLUG].strip("-")
    time = f"t{volume}" if len(series.volumes) > 1 else ""
    return "_".join(filter(None, (series.key, words, time)))


def write(opened: OpenStudy, series: Series, directory: Path) -> Iterator[Path]:
    """Write each volume of a series; yield the files. Raises ScanError if one cannot be read or written."""
    for volume in range(len(series.volumes)):
        voxels, header = opened.read(series, volume)
        file = directory / f"{file_name(series, volume)}.nii.gz"
        image = to_nifti(voxels, header, opened.path)
        with atomic_write(file) as partial:
            partial.write_bytes(nibabel_bytes(image))
        facts = series_dict(series) | {
            "volume": volume,
            "dtype": voxels.dtype.name,
            "value_range": header.value_range,
            "padding": header.padding,
            "window": header.window,
            "photometric": header.photometric,
            "notices": header.notices,
        }
        write_json(file.with_name(f"{file_name(series, volume)}.json"), facts)
        yield file


def nibabel_bytes(image: nibabel.Nifti1Image) -> bytes:
    """Return the gzip stream of an image, without a name and a time in its header."""
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def to_nifti(voxels: np.ndarray, header: Header, path) -> nibabel.Nifti1Image:
    """Return voxels [H, W, D, C] as an image whose first axis is that of the columns.

    Without a position in the header, the image has sizes but no orientation. Raises ScanError if the slices are not on
    a regular grid, and for channels other than 1, or 3 of uint8.
    """
    if header.orientation and header.kind == "3d" and header.affine is None:
        remedy = "NIfTI needs equal distances"
        raise ScanError(path, "the distance of its slices changes", remedy, "unsupported")
    array = voxels.transpose(1, 0, 2, 3)
    if array.shape[3] == 1:
        array = array[..., 0]
    elif array.shape[3] == 3 and array.dtype == np.uint8:
        array = np.ascontiguousarray(array).view(RGB)[..., 0]
    else:
        raise ScanError(
            path, f"{array.shape[3]} channels of {array.dtype} have no NIfTI type", "use 8 bits", "unsupported"
        )
    if header.affine is not None:
        affine = np.vstack([np.array(header.affine)[:, [1, 0, 2, 3]], [0, 0, 0, 1]])
        image = nibabel.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        return image
    rows, columns, slices = header.spacing_mm or (None, None, None)
    image = nibabel.Nifti1Image(array, None)
    image.header.set_zooms((columns or 1.0, rows or 1.0, slices or 1.0))
    image.header.set_xyzt_units("mm")
    return image
