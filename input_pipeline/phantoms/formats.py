"""Encodes voxels as PNG, JPEG, NIfTI and DICOM files. The same phantom always gives the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import uuid

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from input_pipeline.phantoms.plan import Study, random_generator

DICOM_KINDS = {
    "X-ray": ("CR", uid.ComputedRadiographyImageStorage),
    "CT": ("CT", uid.CTImageStorage),
    "MRI": ("MR", uid.MRImageStorage),
    "ultrasound": ("US", uid.UltrasoundImageStorage),
}
CT_INTERCEPT = -1024


def encode(study: Study, voxels: np.ndarray) -> dict[str, bytes]:
    """Return relative path -> content of voxels[H, W, D, 1]: one entry per slice for a DICOM volume, else one entry."""
    if study.file_format == "dicom":
        return _dicom(study, voxels[..., 0])
    if study.file_format == "nifti":
        return {study.path: _nifti(study, voxels[..., 0])}
    stream = io.BytesIO()
    options = {"format": "JPEG", "quality": 92} if study.file_format == "jpeg" else {"format": "PNG"}
    Image.fromarray(voxels[:, :, 0, 0]).save(stream, **options)
    return {study.path: stream.getvalue()}


def _nifti(study: Study, voxels: np.ndarray) -> bytes:
    """Encode [H, W, D] as .nii.gz, stored along the axes of `study.stored_as`.

    voxels [row, column, slice]   point to   posterior, left, superior
    array  [column, row, slice]   points to  L, P, S, and is then flipped to `stored_as`
    """
    array = voxels.transpose(1, 0, 2)
    row, column, slice_ = study.spacing
    # Left and posterior are negative: NIfTI coordinates increase towards right, anterior and superior.
    lps = np.diag([-column, -row, slice_, 1.0])
    lps[:3, 3] = -lps[:3, :3] @ ((np.array(array.shape) - 1) / 2)
    change = ornt_transform(io_orientation(lps), axcodes2ornt(study.stored_as))
    affine = lps @ inv_ornt_aff(change, array.shape)
    image = nibabel.Nifti1Image(nibabel.apply_orientation(array, change), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _uid(*name) -> str:
    """Return a deterministic DICOM UID: a name-based UUID under the root 2.25."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(map(str, ('phantom', *name)))).int}"


def _dicom(study: Study, voxels: np.ndarray) -> dict[str, bytes]:
    """Encode [H, W, D] as one file, or as one per slice: names are unordered, numbers ascend or descend."""
    head = _dicom_head(study)
    if study.depth == 1:
        return {study.path: _dicom_file(study, head, voxels[:, :, 0], 0)}
    numbers = range(1, study.depth + 1)
    if random_generator((study.seed, study.split, study.index), stream=3).random() >= 0.5:
        numbers = reversed(numbers)
    contents = {}
    for k, number in enumerate(numbers):
        head.InstanceNumber = number
        name = hashlib.sha256(f"{study.study_id}/{k}".encode()).hexdigest()[:8]
        contents[f"{study.path}/{name}.dcm"] = _dicom_file(study, head, voxels[:, :, k], k)
    return contents


def _dicom_head(study: Study) -> Dataset:
    """Return the attributes that all slices share. Patient, date and place are empty or `PHANTOM`."""
    modality, sop_class = DICOM_KINDS[study.labels.modality]
    head = Dataset()
    head.SOPClassUID = sop_class
    head.Modality = modality
    head.StudyInstanceUID = _uid(study.study_id)
    head.SeriesInstanceUID = _uid(study.study_id, "series")
    head.FrameOfReferenceUID = _uid(study.study_id, "frame")
    head.PatientName, head.PatientID = "PHANTOM", "PHANTOM"
    head.PatientBirthDate = head.PatientSex = head.ReferringPhysicianName = head.AccessionNumber = ""
    head.StudyDate = head.StudyTime = head.StudyID = head.Manufacturer = ""
    head.PatientIdentityRemoved, head.DeidentificationMethod = "YES", "drawn, no patient"
    head.ImageType = ["DERIVED", "SECONDARY"]
    head.BodyPartExamined = "PHANTOM"
    head.SeriesNumber = head.InstanceNumber = 1
    head.Rows = head.Columns = study.size
    head.PixelSpacing = list(study.spacing[:2])
    head.SamplesPerPixel = 1
    head.PhotometricInterpretation = "MONOCHROME1" if study.inverted else "MONOCHROME2"
    eight_bit = study.labels.modality == "ultrasound"
    head.BitsAllocated, head.BitsStored, head.HighBit = (8, 8, 7) if eight_bit else (16, 12, 11)
    head.PixelRepresentation = 0
    if study.labels.modality == "CT":
        head.RescaleIntercept, head.RescaleSlope, head.RescaleType = CT_INTERCEPT, 1, "HU"
    if study.labels.modality in ("CT", "MRI"):
        head.PatientPosition = "HFS"
        head.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]  # rows point left, columns point posterior
        head.SliceThickness = study.spacing[2]
    else:
        head.PatientOrientation = ["L", "F"]  # rows point left, columns point to the feet
    return head


def _dicom_file(study: Study, head: Dataset, pixels: np.ndarray, k: int) -> bytes:
    if "ImageOrientationPatient" in head:
        corner = [-(study.size - 1) / 2 * study.spacing[1], -(study.size - 1) / 2 * study.spacing[0]]
        height = (k - (study.depth - 1) / 2) * study.spacing[2]
        head.ImagePositionPatient = [round(c, 4) for c in (*corner, height)]
    if study.labels.modality == "CT":
        pixels = pixels.astype(np.int32) - CT_INTERCEPT
    if study.inverted:
        pixels = 4095 - pixels
    head.SOPInstanceUID = _uid(study.study_id, "slice", k)
    head.PixelData = np.ascontiguousarray(pixels, "u1" if head.BitsAllocated == 8 else "<u2").tobytes()
    head["PixelData"].VR = "OB" if head.BitsAllocated == 8 else "OW"
    head.file_meta = FileMetaDataset()
    head.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    stream = io.BytesIO()
    head.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
