"""Synthetic DICOM files for the tests of the DICOM reader: single slices, series, multi-frame files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid


def make_dicom(path: Path, pixels: np.ndarray, **attributes) -> Path:
    """Write a CT slice of int16[H, W], with attributes to override."""
    dataset = pydicom.Dataset()
    dataset.SOPInstanceUID = uid.generate_uid()
    defaults = {
        "SOPClassUID": uid.CTImageStorage,
        "Modality": "CT",
        "PatientName": "Secret^Person",
        "PatientID": "4711",
        "SeriesInstanceUID": "1.2.3",
        "FrameOfReferenceUID": "1.2.4",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": attributes.get("BitsStored", 8 * pixels.itemsize) - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, 0],
        "PixelSpacing": [1, 1],
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
    }
    syntax = attributes.pop("syntax", uid.ExplicitVRLittleEndian)
    for name, value in (defaults | attributes).items():
        if value is not None:
            setattr(dataset, name, value)
    if "PixelData" not in attributes:
        dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def make_series(folder: Path, lps: np.ndarray, step=2.0, **attributes) -> Path:
    """Write axial slices of [R->L, A->P, I->S] head first, under names that sort differently."""
    folder.mkdir()
    for k in range(lps.shape[2]):
        name = folder / f"{(7 * k) % 10}{k}.dcm"
        make_dicom(
            name, np.ascontiguousarray(lps[:, :, k].T), **({"ImagePositionPatient": [0, 0, step * k]} | attributes)
        )
    return folder


def slices(count: int) -> np.ndarray:
    return np.arange(12 * count, dtype=np.int16).reshape(4, 3, count)


def edit(path: Path, **attributes) -> Path:
    """Set attributes of a file, or delete those that are None."""
    dataset = pydicom.dcmread(path)
    for name, value in attributes.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)
    return path


def item(**attributes) -> pydicom.Sequence:
    """Return a sequence of one item."""
    dataset = pydicom.Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return pydicom.Sequence([dataset])


def make_frames(path: Path, lps: np.ndarray, frames: list[dict], shared: dict | None = None, **attributes) -> Path:
    """Write a multi-frame file of [R->L, A->P, I->S], 3 mm apart, with functional groups besides the geometry."""
    groups = []
    for k, own in enumerate(frames):
        groups.append(item(PlanePositionSequence=item(ImagePositionPatient=[0, 0, 3 * k]), **own)[0])
    geometry = {
        "PlaneOrientationSequence": item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        "PixelMeasuresSequence": item(PixelSpacing=[1, 1]),
    }
    absent = dict.fromkeys(("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"))
    absent |= dict.fromkeys(("RescaleSlope", "RescaleIntercept"))
    defaults = {
        "SOPClassUID": uid.EnhancedMRImageStorage,
        "Modality": "MR",
        "NumberOfFrames": len(frames),
        "PerFrameFunctionalGroupsSequence": pydicom.Sequence(groups),
        "SharedFunctionalGroupsSequence": item(**geometry, **(shared or {})),
        "PixelData": np.ascontiguousarray(lps.transpose(2, 1, 0)).tobytes(),
    }
    return make_dicom(path, np.ascontiguousarray(lps[:, :, 0].T), **(absent | defaults | attributes))
