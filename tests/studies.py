"""DICOM studies put together from the real files of pydicom and pydicom-data, and SimpleITK as the reference."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK
from pydicom import uid
from scan_files import dicom_file

DISPLAY = {  # plane -> [slices to head, rows to back, columns to left] of SimpleITK as [H, W, D]
    "axial": lambda lps: lps.transpose(1, 2, 0),
    "coronal": lambda lps: lps[::-1].transpose(0, 2, 1),
    "sagittal": lambda lps: lps[::-1],
}
LIBRARY = {"scout": "dicomdirtests/98892001/CT2N/6293", "report": "test-SR.dcm", "plan": "rtplan.dcm"}
LIBRARY |= {"segmentation": "liver.dcm", "dose": "rtdose.dcm", "capture": "SC_rgb.dcm"}
LIBRARY |= {"reformat": "MR-SIEMENS-DICOM-WithOverlays.dcm", "scout2": "dicomdirtests/98892001/CT2N/6924"}


def plant(folder: Path, *names: str) -> None:
    """Copy files of LIBRARY into a folder, under names without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(dicom_file(LIBRARY[name]), folder / f"IM_{name}")


def stack(folder: Path, base: str, count: int, number: int, start: int = 0, **attributes) -> list[Path]:
    """Write slices that are a real image, shifted a little more in each slice, and return their files.

    A value that is a function is called with the index of the slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = pydicom.dcmread(dicom_file(base))
    across, down = (np.array(source.ImageOrientationPatient[i : i + 3], float) for i in (0, 3))
    origin, normal, pixels = np.array(source.ImagePositionPatient, float), np.cross(across, down), source.pixel_array
    common = {"SeriesNumber": number, "SeriesInstanceUID": f"1.2.826.0.1.{number}", "SliceThickness": 2.5}
    files = []
    for k in range(count):
        dataset = pydicom.dcmread(dicom_file(base))
        own = {"ImagePositionPatient": [round(float(x), 4) for x in origin + 2.5 * (start + k) * normal]}
        own |= {"InstanceNumber": start + k + 1, "SOPInstanceUID": uid.generate_uid()}
        for keyword, value in (common | own | attributes).items():
            value = value(k) if callable(value) else value
            if value is None:
                dataset.pop(keyword, None)
            else:
                setattr(dataset, keyword, value)
        dataset.PixelData = np.roll(pixels, 3 * (start + k), axis=0).tobytes()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        files.append(folder / f"I{(7 * k) % 31:02d}_{number}_{start + k}_{len(list(folder.iterdir()))}")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


def reference(files: Sequence[Path], plane: str) -> np.ndarray:
    """Return the volume of some slices as SimpleITK reads it, as axial, coronal or sagittal images [H, W, D]."""
    if len(files) == 1:
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(files[0]))).transpose(1, 2, 0)
    datasets = {file: pydicom.dcmread(file, stop_before_pixels=True) for file in files}
    first = next(iter(datasets.values()))
    normal = np.cross(first.ImageOrientationPatient[:3], first.ImageOrientationPatient[3:])
    ordered = sorted(files, key=lambda file: float(np.dot(normal, datasets[file].ImagePositionPatient)))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in ordered])
    oriented = SimpleITK.DICOMOrient(reader.Execute(), "LPS")
    return DISPLAY[plane](SimpleITK.GetArrayFromImage(oriented))
