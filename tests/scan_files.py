"""Synthetic scan files and installed real ones for the tests of the readers."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from input_pipeline.images import scans

NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"


def dicom_file(name: str) -> str:
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return path


def fails(path, fault: str, *words: str, **options) -> scans.ScanError:
    """Assert that reading fails with this fault and a message with the path, the words and a remedy."""
    with pytest.raises(scans.ScanError) as caught:
        scans.read(path, **options)
    error = caught.value
    assert error.fault == fault, (error.fault, str(error))
    assert "while reading the file" not in error.reason, error.reason  # the fallback for unexpected errors
    assert str(path) in str(error), str(error)
    assert error.remedy
    for word in words:
        assert word in str(error), (word, str(error))
    return error


def lps_volume() -> np.ndarray:
    """Return int16[4 right to left, 3 front to back, 2 feet to head], with distinct voxels.

    feet          front                 head         front
             0    6   12   18                   1    7   13   19
    right    2    8   14   20    left    right  3    9   15   21    left
             4   10   16   22                   5   11   17   23
                  back                              back
    """
    return np.arange(24, dtype=np.int16).reshape(4, 3, 2)


def axial_display(lps: np.ndarray) -> np.ndarray:
    """Turn [R->L, A->P, I->S] into axial images: rows front to back, columns right to left, slices feet to head."""
    return lps.transpose(1, 0, 2)[..., None]


def nifti(path: Path, array, affine, **header) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def patched(path: Path, *fields: tuple[str, int, object]) -> Path:
    data = bytearray(path.read_bytes())
    for form, offset, value in fields:
        struct.pack_into(form, data, offset, value)
    path.write_bytes(data)
    return path


RAMP = (np.arange(60).reshape(5, 12) * 4).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def save_image(path: Path, pixels, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def save_npy(path: Path, array) -> Path:
    np.save(path, array)
    return path
