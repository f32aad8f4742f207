"""Scan files -> voxels: orientation, intensity, sizes and errors, on hand-made files and on installed real scans."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import nilearn
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image, ImageOps
from pydicom import uid
from pydicom.data import get_testdata_file

from input_pipeline import scans
from input_pipeline.scans import codestream, isolated, orientation
from input_pipeline.scans.base import natural

NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"
ICBM = Path(nilearn.__file__).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


def dicom_file(name: str) -> str:
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return path


def fails(path, fault: str, *words: str, **options) -> scans.ScanError:
    """Reading fails with this fault; the message holds the path, the words and a remedy."""
    with pytest.raises(scans.ScanError) as caught:
        scans.read(path, **options)
    error = caught.value
    assert error.fault == fault, (error.fault, str(error))
    assert "while reading the file" not in error.reason, error.reason  # the last resort: a case that nobody thought of
    assert str(path) in str(error), str(error)
    assert error.remedy
    for word in words:
        assert word in str(error), (word, str(error))
    return error


def lps_volume() -> np.ndarray:
    """int16[4 right to left, 3 front to back, 2 feet to head], every voxel different:

    feet          front                 head         front
             0    6   12   18                   1    7   13   19
    right    2    8   14   20    left    right  3    9   15   21    left
             4   10   16   22                   5   11   17   23
                  back                              back
    """
    return np.arange(24, dtype=np.int16).reshape(4, 3, 2)


def seen(lps: np.ndarray) -> np.ndarray:
    """[R->L, A->P, I->S] as axial pictures: rows front to back, columns right to left, slices feet to head."""
    return lps.transpose(1, 0, 2)[..., None]


def nifti(path: Path, array, affine, **header) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


# ---------------------------------------------------------------- orientation


def test_drawn_volume_is_displayed_as_drawn():
    first = seen(lps_volume())[:, :, 0, 0]
    assert first.tolist() == [[0, 6, 12, 18], [2, 8, 14, 20], [4, 10, 16, 22]]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL", "SRP", "IAR", "SLA"])
def test_nifti_of_any_storage_is_displayed_alike(tmp_path, codes):
    lps = lps_volume()
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])  # LPS array in RAS millimetres
    stored = nibabel.Nifti1Image(lps, affine)
    to = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("LPS"), nibabel.orientations.axcodes2ornt(codes)
    )
    stored = stored.as_reoriented(to)
    assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
    path = nifti(tmp_path / "a.nii.gz", np.asarray(stored.dataobj), stored.affine)
    voxels, header = scans.read(path)
    np.testing.assert_array_equal(voxels, seen(lps))
    assert header.orientation == "PLS" and header.spacing_mm == (2, 2, 2) and header.oblique_degrees == 0
    assert header.shape == (3, 4, 2, 1) and header.kind == "3d" and header.dtype == "int16"


@pytest.mark.parametrize(("degrees", "axis"), [(20, 0), (-35, 1), (40, 2)])
def test_oblique_nifti_takes_the_nearest_axes(tmp_path, degrees, axis):
    a = np.radians(degrees)
    turn = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    turn[i, i] = turn[j, j] = np.cos(a)
    turn[i, j], turn[j, i] = -np.sin(a), np.sin(a)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.0, -1.0, 1.0])
    voxels, header = scans.read(nifti(tmp_path / "a.nii", lps_volume(), affine))
    np.testing.assert_array_equal(voxels, seen(lps_volume()))
    assert header.oblique_degrees == pytest.approx(abs(degrees), abs=0.01)  # float32 affine: 1e-5 degrees off


@pytest.mark.parametrize(
    ("spacing", "codes", "order"),
    [
        ((1, 1, 5), "PLS", (1, 0, 2)),  # thick axial slices
        ((5, 1, 1), "IPL", (2, 1, 0)),  # thick sagittal slices stay sagittal
        ((1, 5, 1), "ILP", (2, 0, 1)),  # thick coronal slices stay coronal
        ((1.4, 1, 1), "PLS", (1, 0, 2)),  # nearly isotropic: axial
    ],
)
def test_thick_slices_keep_their_plane(tmp_path, spacing, codes, order):
    lps = lps_volume()
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    voxels, header = scans.read(nifti(tmp_path / "a.nii", lps, affine))
    expected = lps.transpose(order)
    if codes != "PLS":
        expected = expected[::-1]  # head on top; the array runs feet to head
    np.testing.assert_array_equal(voxels[..., 0], expected)
    assert header.orientation == codes
    assert header.spacing_mm == tuple(pytest.approx(spacing[a]) for a in order)


def test_one_slice_keeps_its_plane(tmp_path):
    lps = lps_volume()[:, 1:2]
    voxels, header = scans.read(nifti(tmp_path / "a.nii", lps, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert (header.orientation, header.kind, header.shape) == ("ILP", "2d", (2, 4, 1, 1))
    np.testing.assert_array_equal(voxels[:, :, 0, 0], lps[:, 0].T[::-1])


def test_orientation_that_is_not_stated_is_none(tmp_path):
    image = nibabel.Nifti1Image(lps_volume(), None)
    nibabel.save(image, tmp_path / "a.nii")
    voxels, header = scans.read(tmp_path / "a.nii")
    assert header.orientation is None and header.oblique_degrees is None
    # ANALYZE order: right to left, back to front, feet to head
    np.testing.assert_array_equal(voxels, seen(lps_volume()[:, ::-1]))


def test_sform_and_qform_that_disagree_on_the_side(tmp_path):
    image = nibabel.Nifti1Image(lps_volume(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.set_sform(np.diag([1.0, -1.0, 1.0, 1.0]), code=1)
    image.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), code=1)
    nibabel.save(image, tmp_path / "a.nii")
    fails(tmp_path / "a.nii", "ambiguous", "which side is left")


@pytest.mark.parametrize("column", [(0, 0, 0), (1, 0, 0), (np.nan, 0, 1), (np.inf, 0, 1)])
def test_impossible_affine(tmp_path, column):
    path = nifti(tmp_path / "a.nii", lps_volume(), np.eye(4))
    data = bytearray(path.read_bytes())
    for row, value in enumerate(column):
        struct.pack_into("<f", data, 280 + 16 * row + 8, value)
    path.write_bytes(data)
    fails(path, "damaged", "orientation")


# ---------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("endian", "<>")
def test_nifti_dtypes(tmp_path, dtype, endian):
    array = lps_volume().astype(endian + dtype)
    image = nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]), dtype=array.dtype)
    if endian == ">":
        image = nibabel.Nifti1Image(array, image.affine, image.header.as_byteswapped(">"))
    nibabel.save(image, tmp_path / "a.nii")
    voxels, header = scans.read(tmp_path / "a.nii")
    np.testing.assert_array_equal(voxels, seen(lps_volume()))
    natural_dtype = {"u1": "u1", "i1": "i2", "i2": "i2", "u2": "u2", "i4": "i4", "f4": "f4", "f8": "f4"}
    assert voxels.dtype == natural_dtype.get(dtype, "i2") and voxels.dtype.isnative
    assert header.dtype == np.dtype(dtype).name


def test_nifti_2(tmp_path):
    nibabel.save(nibabel.Nifti2Image(lps_volume(), np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scans.read(tmp_path / "a.nii.gz")[0], seen(lps_volume()))


@pytest.mark.parametrize(
    ("slope", "inter", "dtype"),
    [
        (1, -1024, np.int16),  # Hounsfield units
        (1000, 0, np.int16),
        (5000, 7, np.int32),
        (1e9, 0, np.float32),  # beyond int32
        (0.5, 10, np.float32),
    ],
)
def test_nifti_scaling(tmp_path, slope, inter, dtype):
    path = nifti(tmp_path / "a.nii", lps_volume(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    data = bytearray(path.read_bytes())
    struct.pack_into("<ff", data, 112, slope, inter)
    path.write_bytes(data)
    voxels, header = scans.read(path)
    assert voxels.dtype == dtype and header.rescaled
    np.testing.assert_array_equal(voxels, (seen(lps_volume()) * float(slope) + inter).astype(dtype))


@pytest.mark.parametrize(
    ("slope", "inter", "fault"),
    [(0, 5, None), (np.nan, np.nan, None), (np.nan, 0, "damaged"), (1, np.nan, "damaged"), (np.inf, 0, "damaged")],
)
def test_nifti_scaling_without_meaning(tmp_path, slope, inter, fault):
    path = nifti(tmp_path / "a.nii", lps_volume(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    data = bytearray(path.read_bytes())
    struct.pack_into("<ff", data, 112, slope, inter)
    path.write_bytes(data)
    if fault:
        fails(path, fault, "scaling")
    else:
        voxels, header = scans.read(path)
        np.testing.assert_array_equal(voxels, seen(lps_volume()))
        assert not header.rescaled


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_4d_needs_a_choice(tmp_path, ending):
    array = np.stack([lps_volume(), lps_volume() + 100, lps_volume() + 200], axis=3)
    path = nifti(tmp_path / f"a{ending}", array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    fails(path, "ambiguous", "3 volumes", "volume=0 to 2")
    for volume in range(3):
        voxels, header = scans.read(path, volume=volume)
        np.testing.assert_array_equal(voxels, seen(lps_volume()) + 100 * volume)
        assert header.volumes == 3 and header == scans.header(path)
    for volume in (3, -1):
        fails(path, "ambiguous", f"no volume {volume}", "0 to 2", volume=volume)


@pytest.mark.parametrize("names", ["RGB", "RGBA"])
def test_nifti_colour(tmp_path, names):
    pixels = np.stack([lps_volume() + 10 * c for c in range(3)] + [np.full((4, 3, 2), 255)][: len(names) - 3], axis=-1)
    array = np.ascontiguousarray(pixels.astype(np.uint8)).view([(c, "u1") for c in names])[..., 0]
    path = nifti(tmp_path / "a.nii", array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    voxels, header = scans.read(path)
    assert header.shape == (3, 4, 2, 3) == voxels.shape and voxels.dtype == np.uint8
    np.testing.assert_array_equal(voxels, pixels[..., :3].transpose(1, 0, 2, 3))
    if names == "RGBA":
        array["A"][0, 0, 0] = 254
        fails(nifti(path, array, np.eye(4)), "ambiguous", "transparent")


def patched(path: Path, *fields: tuple[str, int, object]) -> Path:
    data = bytearray(path.read_bytes())
    for form, offset, value in fields:
        struct.pack_into(form, data, offset, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("field", "fault", "words"),
    [
        (("<h", 42, -4), "damaged", "dimensions"),
        (("<h", 42, 0), "damaged", "dimensions"),
        (("<h", 40, 9), "damaged", "dimensions"),
        (("<h", 40, 1), "unsupported", "1 dimensions"),
        (("<h", 42, 5), "damaged", "its header asks for"),
        (("<h", 70, 1792), "unsupported", "complex"),
        (("<h", 70, 7), "damaged", "data type 7"),
        (("<h", 72, 8), "damaged", "bits"),
        (("<f", 108, 12.5), "damaged", "byte 12.5"),
        (("<f", 108, np.nan), "damaged", "byte nan"),
        (("<B", 123, 7), "damaged", "unit"),
        (("4s", 344, b"ni1\0"), "unsupported", "pair"),
        (("4s", 344, b"n+3\0"), "damaged", "magic"),
    ],
)
def test_nifti_header_fields(tmp_path, field, fault, words):
    path = patched(nifti(tmp_path / "a.nii", lps_volume(), np.eye(4)), field)
    fails(path, fault, words)


def test_nifti_sizes_are_checked_before_allocation(tmp_path):
    path = nifti(tmp_path / "a.nii", lps_volume(), np.eye(4))
    huge = [("<h", 42 + 2 * i, 32767) for i in range(3)]
    fails(patched(path, *huge), "limit", "more than")
    path = nifti(tmp_path / "b.nii", lps_volume(), np.eye(4))
    fails(path, "limit", "48 bytes", limits=scans.Limits(max_bytes=47))
    fails(path, "limit", "rows or columns", limits=scans.Limits(max_side=3))
    fails(path, "limit", "slices", limits=scans.Limits(max_slices=1))
    fails(path, "limit", "limit of 300", limits=scans.Limits(max_file_bytes=300))
    four = nifti(tmp_path / "c.nii", np.stack([lps_volume()] * 3, axis=3), np.eye(4))
    fails(four, "limit", "3 volumes", limits=scans.Limits(max_volumes=2), volume=0)
    assert scans.read(path, limits=scans.Limits(max_bytes=48, max_side=4, max_slices=2))[0].size == 24


def test_nifti_stream_must_end_where_its_header_says(tmp_path):
    path = nifti(tmp_path / "a.nii", lps_volume(), np.eye(4))
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0"):
        path.write_bytes(wrong)
        fails(path, "damaged", f"{len(wrong)} bytes")
        packed = tmp_path / "a.nii.gz"
        packed.write_bytes(gzip.compress(wrong))
        fails(packed, "damaged")
    whole = gzip.compress(data)
    for cut in (whole[:-1], whole[:-8], whole[: len(whole) // 2], whole[:5]):
        packed.write_bytes(cut)
        fails(packed, "damaged")
    packed.write_bytes(whole + b"more")
    fails(packed, "damaged")
    packed.write_bytes(gzip.compress(data[:400]) + gzip.compress(data[400:]))  # two members are one stream
    assert scans.read(packed)[0].size == 24
    packed.write_bytes(gzip.compress(b"\0" * 128 + b"DICM" + b"\0" * 300))
    fails(packed, "unsupported", "DICOM in a gzip")


def test_every_flipped_bit_of_a_gzip_stream_is_seen(tmp_path):
    data = gzip.compress(nifti(tmp_path / "a.nii", lps_volume(), np.eye(4)).read_bytes(), mtime=0)
    path, good, errors = tmp_path / "a.nii.gz", None, 0
    path.write_bytes(data)
    good = scans.read(path)[0]
    for bit in range(0, 8 * len(data), 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(scans.read(path)[0], good)
        except scans.ScanError:
            errors += 1
    assert errors > 0.8 * (8 * len(data) / 3)  # the rest are header bytes without meaning: time, system


# ---------------------------------------------------------------- DICOM


def make_dicom(path: Path, pixels: np.ndarray, **attributes) -> Path:
    """A CT slice of int16[H, W] unless the attributes say otherwise."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.CTImageStorage, uid.generate_uid()
    defaults = {
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
        "HighBit": 8 * pixels.itemsize - 1,
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
    dataset.save_as(path, enforce_file_format=True)
    return path


def make_series(folder: Path, lps: np.ndarray, step=2.0, **attributes) -> Path:
    """Axial slices of [R->L, A->P, I->S], written head first under names that sort otherwise."""
    folder.mkdir()
    for k in range(lps.shape[2]):
        name = folder / f"{(7 * k) % 10}{k}.dcm"
        make_dicom(
            name, np.ascontiguousarray(lps[:, :, k].T), **({"ImagePositionPatient": [0, 0, step * k]} | attributes)
        )
    return folder


def slices(count: int) -> np.ndarray:
    return np.arange(12 * count, dtype=np.int16).reshape(4, 3, count)


def test_series_is_sorted_by_position(tmp_path):
    lps = slices(6)
    folder = make_series(tmp_path / "s", lps, RescaleIntercept=-1024)
    voxels, header = scans.read(folder)
    np.testing.assert_array_equal(voxels, seen(lps) - 1024)
    assert voxels.dtype == np.int16 and header == scans.header(folder)
    assert header.orientation == "PLS" and header.spacing_mm == (1, 1, 2) and header.modality == "CT"
    assert header.rescaled and header.shape == (3, 4, 6, 1) and header.kind == "3d"


def test_series_equals_its_nifti(tmp_path):
    """A sagittal series with thick slices, stored from left to right, and the same voxels as NIfTI."""
    lps = np.random.default_rng(0).integers(-100, 100, (5, 4, 3), dtype=np.int16)
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(5):
        picture = np.ascontiguousarray(lps[k].T[::-1])  # rows head to feet, columns front to back
        at = {"ImagePositionPatient": [3.0 * k, 0, 2], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
        make_dicom(folder / f"{9 - k}.dcm", picture, Modality="MR", **at)
    affine = np.diag([-3.0, -1.0, 1.0, 1.0])
    a, b = scans.read(folder), scans.read(nifti(tmp_path / "a.nii.gz", lps, affine))
    np.testing.assert_array_equal(a[0], b[0])
    assert a[1].orientation == b[1].orientation == "IPL"
    assert a[1].spacing_mm == b[1].spacing_mm == (1, 1, 3)
    np.testing.assert_array_equal(a[0][..., 0], lps.transpose(2, 1, 0)[::-1])


def test_slices_stored_upside_down_are_turned(tmp_path):
    lps = slices(3)
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(3):  # rows back to front, columns left to right, as after a prone scan
        picture = np.ascontiguousarray(lps[::-1, ::-1, k].T)
        make_dicom(
            folder / f"{k}.dcm", picture, ImagePositionPatient=[3, 2, k], ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]
        )
    np.testing.assert_array_equal(scans.read(folder)[0], seen(lps))


def test_gantry_tilt_is_one_stack_but_shifted_slices_are_not(tmp_path):
    lps = slices(5)
    folder = make_series(tmp_path / "s", lps)
    names = sorted(folder.iterdir())
    for path in names:
        dataset = pydicom.dcmread(path)
        z = float(dataset.ImagePositionPatient[2])
        dataset.ImagePositionPatient = [0, 0.4 * z, z]
        dataset.save_as(path)
    np.testing.assert_array_equal(scans.read(folder)[0], seen(lps))
    dataset = pydicom.dcmread(names[1])
    dataset.ImagePositionPatient[0] += 0.8
    dataset.save_as(names[1])
    fails(folder, "series", "shifted", names[1].name)


def test_gap_duplicate_and_mixed_series_name_the_offenders(tmp_path):
    lps = slices(6)
    folder = make_series(tmp_path / "gap", lps)
    missing = next(p for p in folder.iterdir() if p.name.endswith("3.dcm"))
    missing.unlink()
    fails(folder, "series", "2 mm apart", "4 mm between", "42.dcm", "84.dcm")

    folder = make_series(tmp_path / "twice", lps)
    shutil.copy(folder / "71.dcm", folder / "copy.dcm")
    fails(folder, "series", "one position", "71.dcm and copy.dcm")

    for name, attributes in {
        "another series": {"SeriesInstanceUID": "1.2.99"},
        "another frame of reference": {"FrameOfReferenceUID": "1.2.98"},
        "another modality": {"Modality": "MR"},
        "another orientation": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        "another pixel spacing": {"PixelSpacing": [2, 2]},
    }.items():
        folder = make_series(tmp_path / name.replace(" ", "_"), lps)
        make_dicom(folder / "odd.dcm", lps[:, :, 0].T.copy(), ImagePositionPatient=[0, 0, 12], **attributes)
        error = fails(folder, "series", f"odd.dcm: {name}")
        assert "1.2.9" not in str(error)  # no UID leaves the reader
    folder = make_series(tmp_path / "size", lps)
    make_dicom(folder / "odd.dcm", np.arange(20, dtype=np.int16).reshape(5, 4), ImagePositionPatient=[0, 0, 12])
    fails(folder, "series", "odd.dcm: another rows and columns")


def test_directory_with_other_things(tmp_path):
    lps = slices(4)
    folder = make_series(tmp_path / "s", lps)
    (folder / "notes.txt").write_text("not a slice")
    make_dicom(folder / "lost.dcm", lps[:, :, 0].T.copy(), ImagePositionPatient=None)
    fails(folder, "series", "2 of 6 files", "notes.txt", "lost.dcm", "cannot be sorted")
    (folder / "deeper").mkdir()
    fails(folder, "series", "deeper")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "missing", "empty directory")
    fails(make_series(tmp_path / "many", lps), "limit", "3 files", limits=scans.Limits(max_slices=3))
    one = tmp_path / "one"
    one.mkdir()
    make_dicom(one / "a.dcm", lps[:, :, 0].T.copy())
    assert scans.read(one)[1].shape == (3, 4, 1, 1)


def test_slopes_that_differ_from_slice_to_slice(tmp_path):
    """As in PET, where every slice has its own slope."""
    lps = slices(3)
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(3):
        at = {"ImagePositionPatient": [0, 0, k], "RescaleSlope": 0.5 * (k + 1), "Modality": "PT"}
        make_dicom(folder / f"{k}.dcm", lps[:, :, k].T.copy(), **at)
    voxels, header = scans.read(folder)
    assert voxels.dtype == np.float32 and header.rescaled
    np.testing.assert_array_equal(voxels, seen(lps) * np.array([0.5, 1.0, 1.5], np.float32)[:, None])


def test_monochrome1_is_inverted(tmp_path):
    """0 becomes the largest value of BitsStored, also below a rescale and with a sign."""
    pixels = np.array([[0, 1, 2], [4095, 4094, 10]], np.uint16)
    stored = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "Modality": "CR"}
    voxels, header = scans.read(make_dicom(tmp_path / "a.dcm", pixels, **stored, RescaleIntercept=5))
    assert voxels[..., 0, 0].tolist() == [[4100, 4099, 4098], [5, 6, 4090]]
    assert header.photometric == "MONOCHROME1" and header.kind == "2d"
    signed = np.array([[-2048, 2047, 0]], np.int16)
    voxels, _ = scans.read(make_dicom(tmp_path / "b.dcm", signed, **stored))
    assert voxels.ravel().tolist() == [2047, -2048, -1]


def test_unused_high_bits_are_no_intensity(tmp_path):
    """Old files keep overlays in the bits above BitsStored."""
    pixels = np.array([[0x0001, 0xF001, 0x0FFF]], np.uint16)
    voxels, _ = scans.read(make_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11))
    assert voxels.ravel().tolist() == [1, 1, 4095]
    voxels, _ = scans.read(make_dicom(tmp_path / "b.dcm", pixels, BitsStored=12, HighBit=11, PixelRepresentation=1))
    assert voxels.ravel().tolist() == [1, 1, -1]


def test_padding_is_stated_in_rescaled_units():
    header = scans.header(dicom_file("CT_small.dcm"))
    assert header.padding == (-3024, -3024)  # -2000 stored, intercept -1024


@pytest.mark.parametrize(
    ("attributes", "fault", "words"),
    [
        ({"Modality": "SEG"}, "unsupported", "segmentation"),
        ({"RescaleSlope": 0}, "damaged", "slope 0"),
        ({"RescaleSlope": None}, "ambiguous", "only one"),
        ({"BitsStored": 17}, "unsupported", "17 bits"),
        ({"HighBit": 12}, "unsupported", "highest at 12"),
        ({"SamplesPerPixel": 3}, "unsupported", "3 samples"),
        ({"PhotometricInterpretation": "HSV"}, "unsupported", "HSV"),
        ({"Rows": 5}, "damaged", "its header asks for"),
        ({"Rows": 60000, "Columns": 60000}, "limit", "rows or columns"),
        ({"NumberOfFrames": 2}, "damaged", "its header asks for"),
        ({"NumberOfFrames": 0}, "damaged", "NumberOfFrames"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "damaged", "no rotation"),
        ({"syntax": uid.MPEG2MPML}, "unsupported", "transfer syntax"),
        ({"PixelData": b""}, "damaged", "0 bytes"),
    ],
)
def test_dicom_attributes(tmp_path, attributes, fault, words):
    if attributes.get("syntax"):
        path = make_dicom(tmp_path / "a.dcm", slices(1)[..., 0])
        data = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
        path.write_bytes(data)
    else:
        path = make_dicom(tmp_path / "a.dcm", slices(1)[..., 0], **attributes)
    fails(path, fault, words)


def test_nothing_of_the_patient_leaves_the_reader(tmp_path, caplog, capfd, recwarn):
    path = make_dicom(tmp_path / "a.dcm", slices(1)[..., 0], PixelSpacing=None, ImagePositionPatient=None)
    header = scans.read(path)[1]
    said = json.dumps(dataclasses.asdict(header))
    # A tag that turns into another, so that the name stands where a number should.
    data = path.read_bytes()
    damaged = data.replace(b"\x10\0\x10\0PN", b"\x28\0\x30\0DS").replace(b"\x10\0\x20\0LO", b"\x20\0\x32\0DS")
    assert damaged != data
    path.write_bytes(damaged)
    said += str(fails(path, "damaged", "unreadable"))
    said += caplog.text + "".join(capfd.readouterr()) + "".join(str(w.message) for w in recwarn)
    assert "Secret" not in said and "4711" not in said and "1.2.3" not in said


def test_multiframe_is_sorted_and_rescaled_by_its_functional_groups():
    path = dicom_file("eCT_Supplemental.dcm")
    voxels, header = scans.read(path)
    assert header.shape == (512, 512, 2, 1) and header.spacing_mm[2] == 10 and header.orientation == "PLS"
    # The rescale to Hounsfield units stands in the functional groups: intercept -1024.
    stored = pydicom.dcmread(path).pixel_array.astype(int)
    np.testing.assert_array_equal(np.sort(voxels, axis=None), np.sort(stored - 1024, axis=None))
    fails(path, "ambiguous", "only volume is 0", volume=1)


def test_multiframe_with_reversed_positions(tmp_path):
    dataset = pydicom.dcmread(dicom_file("eCT_Supplemental.dcm"))
    groups = dataset.PerFrameFunctionalGroupsSequence
    before = scans.read(dicom_file("eCT_Supplemental.dcm"))[0]
    first, second = (g.PlanePositionSequence[0].ImagePositionPatient for g in groups)
    groups[0].PlanePositionSequence[0].ImagePositionPatient = second
    groups[1].PlanePositionSequence[0].ImagePositionPatient = first
    dataset.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(scans.read(tmp_path / "a.dcm")[0], before[:, :, ::-1])
    groups[0].PlanePositionSequence[0].ImagePositionPatient = first
    dataset.save_as(tmp_path / "a.dcm")
    fails(tmp_path / "a.dcm", "series", "frame 1 and frame 2")
    del dataset.PerFrameFunctionalGroupsSequence[1]
    dataset.save_as(tmp_path / "a.dcm")
    fails(tmp_path / "a.dcm", "damaged", "describes 1 frames but has 2")


# Every pair holds the same picture, compressed without loss and plain.
LOSSLESS = [
    ("MR_small_RLE.dcm", "MR_small.dcm"),
    ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
    ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
    ("MR_small_bigendian.dcm", "MR_small.dcm"),
    ("MR_small_implicit.dcm", "MR_small.dcm"),
    ("693_J2KR.dcm", "693_UNCR.dcm"),
    ("RG3_J2KR.dcm", "RG3_UNCR.dcm"),
    ("emri_small_RLE.dcm", "emri_small.dcm"),
    ("emri_small_jpeg_2k_lossless.dcm", "emri_small.dcm"),
    ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm"),
    ("emri_small_big_endian.dcm", "emri_small.dcm"),
    ("SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_16bit_2frame.dcm"),
    ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb.dcm"),
    ("SC_rgb_small_odd_big_endian.dcm", "SC_rgb_small_odd.dcm"),
    ("OBXXXX1A_expb_2frame.dcm", "OBXXXX1A_2frame.dcm"),
    ("OBXXXX1A_rle_2frame.dcm", "OBXXXX1A_2frame.dcm"),
    ("US1_J2KR.dcm", "US1_UNCR.dcm"),
]


@pytest.mark.parametrize(("compressed", "plain"), LOSSLESS)
def test_compressed_equals_plain(compressed, plain):
    a, b = scans.read(dicom_file(compressed))[0], scans.read(dicom_file(plain))[0]
    assert a.dtype == b.dtype
    if "expb" in compressed:  # written with its palette's bytes swapped: 0x00ff where the other has 0xff00
        a = a.byteswap()
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name", ["SC_rgb_dcmtk_+eb+cr", "SC_rgb_dcmtk_+eb+cy+n1", "SC_rgb_dcmtk_+eb+cy+np", "SC_ybr_full_uncompressed"]
)
def test_colour_spaces_end_as_rgb(name):
    """The test card's stripes: red, green, blue, ... as in its uncompressed RGB original."""
    voxels, header = scans.read(dicom_file(f"{name}.dcm"))
    plain = scans.read(dicom_file("SC_rgb.dcm"))[0]
    assert header.shape == (100, 100, 1, 3) and header.dtype == "uint8"
    for row in (5, 15, 25, 55, 75):  # inside stripes; JPEG and rounded YBR are at most 5 off there
        np.testing.assert_allclose(voxels[row, 50, 0].astype(int), plain[row, 50, 0], atol=5)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_12_bit_jpeg_names_the_remedy(name):
    fails(dicom_file(name), "unsupported", "12 bits", "transcode")


def test_a_decoder_that_crashes_complains_or_hangs_is_an_error(tmp_path, monkeypatch):
    """An end mark in the middle: gdcm prints a line and returns a picture. Then a killed and a stopped child."""
    whole = Path(dicom_file("SC_rgb_jpeg_gdcm.dcm")).read_bytes()
    good = scans.read(dicom_file("SC_rgb_jpeg_gdcm.dcm"))[0]
    path = tmp_path / "a.dcm"
    start = whole.index(b"\xff\xda")
    path.write_bytes(whole[: start + 400] + b"\xff\xd9" + whole[start + 402 :])
    fails(path, "damaged", "decoding the pixels", "Corrupt JPEG data")
    child = isolated._child.process
    child.kill()
    child.wait()
    fails(dicom_file("SC_rgb_jpeg_gdcm.dcm"), "damaged", "decoder crashed")
    np.testing.assert_array_equal(scans.read(dicom_file("SC_rgb_jpeg_gdcm.dcm"))[0], good)  # a new one is started
    monkeypatch.setattr(isolated, "SECONDS", 0.2)
    os.kill(isolated._child.process.pid, signal.SIGSTOP)
    fails(dicom_file("SC_rgb_jpeg_gdcm.dcm"), "damaged", "did not end within 0.2 s")
    monkeypatch.undo()
    np.testing.assert_array_equal(scans.read(dicom_file("SC_rgb_jpeg_gdcm.dcm"))[0], good)


def test_frames_that_are_missing_or_too_large(tmp_path):
    for name, words in [("emri_small_jpeg_2k_lossless.dcm", "frames"), ("MR_small_RLE.dcm", "")]:
        path = tmp_path / name
        dataset = pydicom.dcmread(dicom_file(name))
        dataset.NumberOfFrames = int(dataset.get("NumberOfFrames", 1)) + 1
        dataset.save_as(path)
        fails(path, "damaged", words)
    for name in (
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
    ):
        dataset = pydicom.dcmread(dicom_file(name))
        dataset.Rows += 1
        dataset.save_as(tmp_path / name)
        fails(tmp_path / name, "damaged", "header")


def test_truncated_and_strange_dicom(tmp_path):
    fails(dicom_file("MR_truncated.dcm"), "damaged", "8,130", "8,192")
    fails(dicom_file("rtplan.dcm"), "unsupported", "treatment plan")
    fails(dicom_file("test-SR.dcm"), "unsupported", "structured report")
    fails(dicom_file("liver.dcm"), "unsupported", "segmentation")
    fails(dicom_file("no_meta.dcm"), "unsupported", "preamble")
    fails(dicom_file("meta_missing_tsyntax.dcm"), "ambiguous", "transfer syntax")
    whole = Path(dicom_file("MR_small.dcm")).read_bytes()
    path = tmp_path / "a.dcm"
    end_of_pixels = whole.rindex(pydicom.dcmread(dicom_file("MR_small.dcm")).PixelData) + 2 * 64 * 64
    for end in [*range(0, end_of_pixels, 307), end_of_pixels - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(scans.ScanError):
            scans.read(path)


def test_inserted_bytes_are_seen(tmp_path):
    """As after a transfer in text mode: the picture is shifted, its end stands behind the element."""
    whole = Path(dicom_file("CT_small.dcm")).read_bytes()
    path = tmp_path / "a.dcm"
    for at in (len(whole) // 2, len(whole) - 2000):  # both within the pixels
        path.write_bytes(whole[:at] + b"\r\n" + whole[at:])
        fails(path, "damaged", "goes on after its pixels")


# ---------------------------------------------------------------- real scans: what is where, and how bright


def test_head_ct():
    """pydicom-data 693: a bone ring, brain near 35 HU, air outside, the frontal sinus on top."""
    voxels, header = scans.read(dicom_file("693_UNCR.dcm"))
    assert header.modality == "CT" and header.orientation == "PLS" and header.padding == (-3024, -3024)
    ct = voxels[:, :, 0, 0]
    assert ct[5, 5] < -900
    brain = ct[(ct > 0) & (ct < 80)]
    assert 20 < np.median(brain) < 45
    skull = np.argwhere(ct > 700)
    top, left, bottom, right = *skull.min(0), *skull.max(0)
    assert 200 < bottom - top < 360 and 200 < right - left < 480
    # The frontal sinus, air within bone, lies in front: in the upper part of the picture.
    middle = slice(230, 290)
    assert ct[top : top + 40, middle].min() < -500 < ct[bottom - 40 : bottom - 8, middle].min()


def test_abdomen_ct_stored_upside_down_is_upright():
    """explicit_VR-UN stores rows from back to front. Shown: the table below, the liver on the picture's left."""
    voxels, header = scans.read(dicom_file("explicit_VR-UN.dcm"))
    ct = voxels[:, :, 0, 0]
    np.testing.assert_array_equal(ct, pydicom.dcmread(dicom_file("explicit_VR-UN.dcm")).pixel_array[::-1])
    body = (ct > -200) & (ct < 300)
    assert body[:100].mean() < 0.001 < body[440:].mean()  # nothing above; the table below
    enhanced = (ct > 80) & (ct < 160)
    assert enhanced[150:300, 80:200].mean() > 2 * enhanced[150:300, 312:432].mean()  # liver against stomach and spleen


def test_chest_film_is_shown_with_white_bones():
    """RG1 is MONOCHROME1: stored with bright lungs. Shown: lungs dark, spine and heart bright, heart on the right."""
    voxels, header = scans.read(dicom_file("RG1_UNCR.dcm"))
    film = voxels[:, :, 0, 0].astype(float)
    assert header.modality == "CR" and header.shape == (1955, 1841, 1, 1)
    lung_right, lung_left, spine = film[500:800, 350:500], film[500:800, 1330:1480], film[500:800, 880:960]
    assert spine.mean() > 1.15 * max(lung_right.mean(), lung_left.mean())
    assert film[1150:1300, 1050:1200].mean() > film[1150:1300, 500:650].mean()


def test_template_brain_is_axial_and_upright():
    """ICBM152 T1: the frontal lobes above, the cerebellum below and low in the stack, ventricles dark in the middle."""
    voxels, header = scans.read(ICBM)
    assert header.shape == (233, 197, 189, 1) and header.orientation == "PLS" and header.spacing_mm == (1, 1, 1)
    image = nibabel.load(ICBM)
    # MNI millimetres (RAS): -> row from the front, column from the right, slice from below.
    for x, y, z in [(0, 60, 20), (-40, -60, -40), (30, 20, 50), (-12, -20, 20)]:
        i, j, k = np.round(np.linalg.inv(image.affine) @ [x, y, z, 1]).astype(int)[:3]
        value = np.asarray(image.dataobj[i, j, k])
        x0, y0, z0 = image.affine[:3, 3]
        row, column, height = 232 - (y - y0), 196 - (x - x0), z - z0
        assert voxels[int(row), int(column), int(height), 0] == value
    brain = voxels[..., 0] > 60
    low, high = brain[:, :, 40].mean(axis=1), brain[:, :, 120].mean(axis=1)
    assert low[150:].sum() > low[:60].sum()  # cerebellum behind
    assert abs(high[:116].sum() - high[116:].sum()) < 0.5 * high.sum()
    ventricle, white = voxels[100:120, 100:104, 92, 0].mean(), voxels[100:120, 60:70, 100, 0].mean()
    assert ventricle < white


def test_functional_mr_of_two_volumes():
    path = NIBABEL / "example4d.nii.gz"
    fails(path, "ambiguous", "2 volumes")
    voxels, header = scans.read(path, volume=1)
    stored = nibabel.load(path)
    assert header.shape == (96, 128, 24, 1) and header.orientation == "PLS"
    assert header.spacing_mm == pytest.approx((2, 2, 2.2), abs=1e-4) and header.oblique_degrees > 0.1
    canonical = nibabel.as_closest_canonical(stored.slicer[..., 1:])
    np.testing.assert_array_equal(voxels[..., 0], np.asarray(canonical.dataobj)[::-1, ::-1, :, 0].transpose(1, 0, 2))


def test_real_series():
    folder = Path(dicom_file("CT_small.dcm")).parent / "dicomdirtests" / "98892001" / "CT5N"
    voxels, header = scans.read(folder)
    assert header.shape == (16, 16, 5, 1) and header.spacing_mm[2] == 2.5 and header.modality == "CT"
    files = sorted((pydicom.dcmread(f) for f in folder.iterdir()), key=lambda d: float(d.ImagePositionPatient[2]))
    expected = np.stack([f.pixel_array.astype(int) + int(f.RescaleIntercept) for f in files], axis=-1)
    np.testing.assert_array_equal(voxels[..., 0], expected)
    fails(folder.parent / "CT2N", "series", "another orientation")


def test_header_equals_read():
    names = ["CT_small.dcm", "examples_ybr_color.dcm", "eCT_Supplemental.dcm", "RG3_J2KI.dcm", "examples_palette.dcm"]
    for path in [*map(dicom_file, names), NIBABEL / "anatomical.nii", NIBABEL / "standard.nii.gz"]:
        voxels, header = scans.read(path)
        assert scans.header(path) == header and voxels.shape == header.shape
        json.dumps(dataclasses.asdict(header))


# ---------------------------------------------------------------- pictures

RAMP = (np.arange(60).reshape(5, 12) * 4).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def picture(path: Path, pixels, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_png_gray_and_colour(tmp_path):
    for pixels in (RAMP, RAMP.astype(np.uint16) * 250, COLOUR):
        voxels, header = scans.read(picture(tmp_path / "a.png", pixels))
        assert voxels.shape == header.shape == (5, 12, 1, pixels.ndim if pixels.ndim == 3 else 1)
        assert voxels.dtype == pixels.dtype == header.dtype and header.kind == "2d" and header.format == "image"
        np.testing.assert_array_equal(voxels.reshape(pixels.shape), pixels)
        assert scans.header(tmp_path / "a.png") == header


def test_png_palette_and_few_bits(tmp_path):
    palette = Image.fromarray(RAMP // 60).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    palette.save(tmp_path / "a.png")
    voxels, header = scans.read(tmp_path / "a.png")
    assert header.photometric == "palette" and voxels[0, 0, 0].tolist() == [10, 20, 30]
    assert voxels[4, 11, 0].tolist() == [1, 2, 3]
    Image.fromarray(RAMP > 100).save(tmp_path / "b.png")
    assert set(scans.read(tmp_path / "b.png")[0].ravel()) == {0, 255}


def test_alpha_is_dropped_only_if_opaque(tmp_path):
    for pixels in (COLOUR, RAMP[..., None]):
        alpha = np.full((5, 12, 1), 255, np.uint8)
        path = picture(tmp_path / "a.png", np.concatenate([pixels, alpha], axis=-1))
        np.testing.assert_array_equal(scans.read(path)[0][:, :, 0], pixels)
        alpha[2, 3] = 254
        path = picture(tmp_path / "a.png", np.concatenate([pixels, alpha], axis=-1))
        fails(path, "ambiguous", "transparent", "background")
    Image.fromarray(RAMP).save(tmp_path / "key.png", transparency=8)
    fails(tmp_path / "key.png", "ambiguous", "transparent")
    Image.fromarray(RAMP).save(tmp_path / "key.png", transparency=9)  # no pixel has it
    np.testing.assert_array_equal(scans.read(tmp_path / "key.png")[0][..., 0, 0], RAMP)


def test_png_refuses_what_would_lose_bits_or_frames(tmp_path):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    fails(tmp_path / "a.png", "unsupported", "16 bits")
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP[::-1])]
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    fails(tmp_path / "b.png", "unsupported", "animated")


def test_every_damaged_bit_of_a_png_is_seen(tmp_path):
    """Pillow itself skips the checksum of the picture data."""
    path = picture(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (6, 7), dtype=np.uint8))
    data = path.read_bytes()
    for bit in range(8 * 8, 8 * len(data), 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        fails(path, "damaged")


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_tag(tmp_path, tag):
    """3 x 2 picture, told apart at every place, against Pillow's own turning, and drawn for tag 6:

    stored  a b     shown, turned right   e c a
            c d                           f d b
            e f
    """
    pixels = np.array([[10, 60], [110, 160], [210, 250]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = tag
    path = picture(tmp_path / "a.png", pixels, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    voxels, header = scans.read(path)
    np.testing.assert_array_equal(voxels[..., 0, 0], expected)
    assert header.shape[:2] == expected.shape
    if tag == 6:
        assert expected.tolist() == [[210, 110, 10], [250, 160, 60]]
    tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=[(274, "H", 1, tag, True)])
    np.testing.assert_array_equal(scans.read(tmp_path / "a.tif")[0][..., 0, 0], expected)


def test_jpeg(tmp_path):
    smooth = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    voxels, header = scans.read(picture(tmp_path / "a.jpg", smooth, quality=95))
    assert header.shape == (64, 48, 1, 1)
    assert np.abs(voxels[..., 0, 0].astype(int) - smooth).max() <= 3  # measured: 3
    exif = Image.Exif()
    exif[0x0112] = 8
    turned, header = scans.read(picture(tmp_path / "b.jpg", smooth, quality=95, exif=exif))
    assert header.shape == (48, 64, 1, 1)
    np.testing.assert_array_equal(turned[..., 0, 0], np.rot90(voxels[..., 0, 0]))
    colour, header = scans.read(picture(tmp_path / "c.jpg", np.stack([smooth] * 3, axis=-1)))
    assert header.shape == (64, 48, 1, 3)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "d.jpg")
    assert scans.read(tmp_path / "d.jpg")[1].photometric == "CMYK"
    data = (tmp_path / "a.jpg").read_bytes()
    for end in range(3, len(data) - 1, 61):
        (tmp_path / "e.jpg").write_bytes(data[:end])
        with pytest.raises(scans.ScanError):
            scans.read(tmp_path / "e.jpg")


def test_a_jpeg_named_png_is_read_but_a_picture_named_nii_is_not(tmp_path):
    smooth = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    path = picture(tmp_path / "a.jpg", smooth)
    path.rename(tmp_path / "a.png")
    assert scans.read(tmp_path / "a.png")[1].shape == (64, 64, 1, 1)
    (tmp_path / "a.png").rename(tmp_path / "a.nii")
    fails(tmp_path / "a.nii", "ambiguous", "a picture")


TIFFS = {
    "u8": (RAMP, {}),
    "u16": (RAMP.astype(np.uint16) * 250, {}),
    "i16": (RAMP.astype(np.int16) - 100, {}),
    "f32": (RAMP.astype(np.float32) / 7, {}),
    "rgb": (COLOUR, {"photometric": "rgb"}),
    "rgb16": (COLOUR.astype(np.uint16) * 250, {"photometric": "rgb"}),
    "planar": (np.moveaxis(COLOUR, -1, 0), {"photometric": "rgb", "planarconfig": "separate"}),
    "deflate": (COLOUR.astype(np.uint16) * 250, {"photometric": "rgb", "compression": "zlib", "predictor": False}),
    "big": (RAMP.astype(np.uint16) * 250, {"bigtiff": True, "byteorder": ">"}),
    "strips": (RAMP, {"rowsperstrip": 2}),
    "tiles": (np.tile(RAMP, (8, 4)), {"tile": (16, 16)}),
    "tiles_deflate": (np.tile(RAMP, (8, 4)), {"tile": (16, 16), "compression": "zlib"}),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiff(tmp_path, kind):
    pixels, options = TIFFS[kind]
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    voxels, header = scans.read(tmp_path / "a.tif")
    expected = np.moveaxis(pixels, 0, -1) if kind == "planar" else pixels
    np.testing.assert_array_equal(voxels.reshape(expected.shape), expected)
    assert voxels.dtype == pixels.dtype.newbyteorder("=") and header == scans.header(tmp_path / "a.tif")
    assert header.shape == (*expected.shape[:2], 1, 3 if expected.ndim == 3 else 1)


def test_tiff_pages_are_slices(tmp_path):
    pages = np.stack([RAMP.astype(np.uint16) * (k + 1) for k in range(4)])
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack", metadata=None)
    voxels, header = scans.read(tmp_path / "a.tif")
    assert header.shape == (5, 12, 4, 1) and header.kind == "3d"
    np.testing.assert_array_equal(voxels[..., 0], np.moveaxis(pages, 0, -1))
    fails(tmp_path / "a.tif", "limit", "3 pages", limits=scans.Limits(max_slices=3))
    with tifffile.TiffWriter(tmp_path / "b.tif") as tif:
        tif.write(RAMP, photometric="minisblack")
        tif.write(RAMP[:, :6], photometric="minisblack")
    fails(tmp_path / "b.tif", "ambiguous", "page 2 is 5 x 6")


@pytest.mark.parametrize(
    ("compression", "pixels"),
    [
        (compression, pixels)
        for pixels in (RAMP, COLOUR, RAMP.astype(np.uint16) * 250)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        if compression != "jpeg" or pixels.dtype == np.uint8
    ],
)
def test_tiff_compressions(tmp_path, compression, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
    voxels, _ = scans.read(tmp_path / "a.tif")
    if compression != "jpeg":
        np.testing.assert_array_equal(voxels.reshape(pixels.shape), pixels)
    else:
        expected = np.asarray(Image.open(tmp_path / "a.tif").convert("RGB" if pixels.ndim == 3 else "L"))
        np.testing.assert_array_equal(voxels.reshape(pixels.shape), expected)


def test_tiff_miniswhite_palette_and_alpha(tmp_path):
    for compression in (None, "zlib"):
        tifffile.imwrite(tmp_path / "a.tif", RAMP, photometric="miniswhite", compression=compression)
        np.testing.assert_array_equal(scans.read(tmp_path / "a.tif")[0][..., 0, 0], 255 - RAMP)
    Image.fromarray(RAMP).save(tmp_path / "l.tif", compression="tiff_lzw")  # LZW goes through Pillow
    np.testing.assert_array_equal(scans.read(tmp_path / "l.tif")[0][..., 0, 0], RAMP)
    with tifffile.TiffFile(tmp_path / "l.tif") as tif:
        photometric = tif.pages[0].tags["PhotometricInterpretation"].valueoffset
    np.testing.assert_array_equal(
        scans.read(patched(tmp_path / "l.tif", ("<H", photometric, 0)))[0][..., 0, 0], 255 - RAMP
    )
    colormap = np.zeros((3, 256), np.uint16)
    colormap[:, 4] = 10 * 257, 20 * 257, 30 * 257
    tifffile.imwrite(tmp_path / "p.tif", RAMP, photometric="palette", colormap=colormap)
    voxels = scans.read(tmp_path / "p.tif")[0]
    assert voxels[0, 1, 0].tolist() == [10, 20, 30] and voxels[0, 0, 0].tolist() == [0, 0, 0]
    rgba = np.concatenate([COLOUR, np.full((5, 12, 1), 255, np.uint8)], axis=-1)
    tifffile.imwrite(tmp_path / "r.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(scans.read(tmp_path / "r.tif")[0][:, :, 0], COLOUR)
    rgba[0, 0, 3] = 0
    tifffile.imwrite(tmp_path / "r.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    fails(tmp_path / "r.tif", "ambiguous", "transparent")


def test_tiff_imagej_stack_is_not_cut_to_its_first_slice(tmp_path):
    stack = np.stack([RAMP.astype(np.uint16) * (k + 1) for k in range(3)])
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True)
    try:
        voxels, _ = scans.read(tmp_path / "a.tif")
    except scans.ScanError as error:
        assert error.fault == "ambiguous" and "3 images" in str(error)
    else:
        np.testing.assert_array_equal(voxels[..., 0], np.moveaxis(stack, 0, -1))


def test_tiff_with_a_broken_chain_of_pages(tmp_path):
    path = tmp_path / "a.tif"
    for big in (False, True):
        pages = np.stack([RAMP.astype(np.uint16) * (k + 1) for k in range(3)])
        tifffile.imwrite(path, pages, photometric="minisblack", metadata=None, bigtiff=big)
        with tifffile.TiffFile(path) as tif:
            last = tif.pages[2].offset
            first = tif.pages[0].offset
        data = path.read_bytes()
        form = "<Q" if big else "<I"
        for target, words in ((len(data) + 100, "outside the file"), (first, "loop")):
            broken = data.replace(struct.pack(form, last), struct.pack(form, target), 1)
            assert broken != data
            path.write_bytes(broken)
            fails(path, "damaged", "page 3", words)
    tifffile.imwrite(path, pages, photometric="minisblack", metadata={"axes": "ZYX"}, truncate=True)
    fails(path, "ambiguous", "several slices in one page")


def test_tiff_cut_short(tmp_path):
    """tifffile would fill what is missing with zeros."""
    for compression in (None, "zlib"):
        tifffile.imwrite(
            tmp_path / "a.tif", np.random.default_rng(0).integers(0, 99, (40, 30)), compression=compression
        )
        data = (tmp_path / "a.tif").read_bytes()
        for end in range(8, len(data) - 1, 211):
            (tmp_path / "b.tif").write_bytes(data[:end])
            with pytest.raises(scans.ScanError):
                scans.read(tmp_path / "b.tif")


# ---------------------------------------------------------------- arrays


def saved(path: Path, array) -> Path:
    np.save(path, array)
    return path


def test_npy_layouts(tmp_path):
    array = np.random.default_rng(0).integers(0, 200, (6, 7, 5), dtype=np.uint8)
    for stored in (array, np.asfortranarray(array), array[..., None], array.astype(">i2"), array.astype(np.float64)):
        voxels, header = scans.read(saved(tmp_path / "a.npy", stored))
        np.testing.assert_array_equal(voxels, array[..., None])
        assert header.shape == (6, 7, 5, 1) and header.kind == "3d" and header.volumes == 1
    colour = np.stack([array, array + 1, array + 2], axis=-1)
    assert scans.read(saved(tmp_path / "a.npy", colour))[1].shape == (6, 7, 5, 3)
    assert scans.read(saved(tmp_path / "a.npy", array[:, :, :1]))[1].kind == "2d"


@pytest.mark.parametrize("order", "CF")
def test_npy_released_layout(tmp_path, order):
    """[S, 3, H, W, D]: scan s has the voxels s * 1000 + c * 100 + ..."""
    s, c, h, w, d = np.indices((3, 3, 6, 7, 4))
    stack = np.array(s * 10000 + c * 1000 + h * 100 + w * 10 + d, np.float32, order=order)
    path = saved(tmp_path / "a.npy", stack)
    fails(path, "ambiguous", "3 volumes")
    for volume in range(3):
        voxels, header = scans.read(path, volume=volume)
        assert header.shape == (6, 7, 4, 3) and header.volumes == 3
        assert voxels[2, 3, 1, 2] == volume * 10000 + 2 * 1000 + 2 * 100 + 3 * 10 + 1
        np.testing.assert_array_equal(voxels, np.moveaxis(stack[volume], 0, -1))
    assert scans.read(saved(tmp_path / "b.npy", stack[:1]))[1].volumes == 1


@pytest.mark.parametrize(
    "shape", [(6,), (6, 7), (6, 7, 3), (6, 7, 4), (3, 6, 7), (3, 6, 7, 5), (6, 7, 5, 2), (1, 1, 6, 7, 5), (1, 6, 7, 3)]
)
def test_npy_ambiguous_shapes(tmp_path, shape):
    path = saved(tmp_path / "a.npy", np.arange(np.prod(shape)).reshape(shape))
    fails(path, "ambiguous", str(list(shape)), "save")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_npy_never_unpickles(tmp_path):
    marker = tmp_path / "ran"
    path = saved(tmp_path / "a.npy", np.array([[[Payload(str(marker))]]], dtype=object))
    fails(path, "unsupported", "Python objects")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Payload(str(marker)), protocol=4))
    fails(tmp_path / "b.npy", "unsupported", "pickle")
    assert not marker.exists()


@pytest.mark.parametrize("array", [np.zeros((6, 7, 5), bool), np.zeros((6, 7, 5), complex), np.zeros((6, 7, 5), "U3")])
def test_npy_of_no_numbers(tmp_path, array):
    fails(saved(tmp_path / "a.npy", array), "unsupported")


def test_npy_sizes(tmp_path):
    path = saved(tmp_path / "a.npy", np.arange(210, dtype=np.int16).reshape(6, 7, 5))
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", data[:100]):
        path.write_bytes(wrong)
        fails(path, "damaged")
    path.write_bytes(data)
    fails(path, "limit", "420 bytes", limits=scans.Limits(max_bytes=419))


# ---------------------------------------------------------------- values, paths, errors


def test_constant_and_non_finite_scans(tmp_path):
    fails(saved(tmp_path / "a.npy", np.full((6, 7, 5), 7, np.int16)), "constant", "every voxel is 7")
    flat = np.broadcast_to(np.array([255, 0, 1], np.uint8), (6, 7, 5, 3))
    fails(saved(tmp_path / "a.npy", flat), "constant", "(255, 0, 1)")
    array = np.random.default_rng(0).normal(size=(6, 7, 5)).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        array[1, 2, 3] = bad
        fails(saved(tmp_path / "a.npy", array), "non-finite", "1 of 210 voxels")
        fails(nifti(tmp_path / "a.nii.gz", array, np.eye(4)), "non-finite", "1 of 210 voxels")
    fails(saved(tmp_path / "a.npy", np.linspace(0, 1e300, 210).reshape(6, 7, 5)), "non-finite", "too large")


def test_natural_dtypes():
    whole = np.array([[0, 40000]], np.uint16)
    assert natural("x", whole).dtype == np.uint16
    assert natural("x", whole, 1, -40000).tolist() == [[-40000, 0]]  # int32
    assert natural("x", whole // 2, 1, -1024).dtype == np.int16
    big = np.array([[0, 2**63]], np.uint64)
    assert natural("x", big).tolist() == [[0, 2.0**63]] and natural("x", big).dtype == np.float32
    assert natural("x", np.array([[-(2**31), 2**31 - 1]], np.int64)).dtype == np.int32
    half = natural("x", whole, 0.5, 0)
    assert half.dtype == np.float32 and half.tolist() == [[0, 20000]]


def test_missing_and_special_files(tmp_path):
    fails(tmp_path / "none.nii.gz", "missing", "no such file")
    os.mkfifo(tmp_path / "fifo.nii.gz")
    fails(tmp_path / "fifo.nii.gz", "refused", "a FIFO")
    fails("/dev/zero", "refused", "a device")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    fails(tmp_path / "loop", "missing", "cannot be opened")
    (tmp_path / "empty.png").touch()
    fails(tmp_path / "empty.png", "damaged", "is empty")
    with pytest.raises(scans.ScanError, match="cannot be opened"):
        scans.read(str(tmp_path / "a\0b.png"))
    with pytest.raises(scans.ScanError, match="cannot be opened"):
        scans.read(tmp_path / ("n" * 300))
    (tmp_path / "a.nii.gz").write_text("plain text, not a scan")
    fails(tmp_path / "a.nii.gz", "unsupported", "no known format")
    np.savez(tmp_path / "a.npz", x=np.arange(9))
    fails(tmp_path / "a.npz", "unsupported", "npz")


def test_error_travels_between_processes():
    error = scans.ScanError("a\nb.png", "is empty", "copy it", "damaged")
    back = pickle.loads(pickle.dumps(error))
    assert (back.path, back.reason, back.remedy, back.fault) == ("a\\nb.png", "is empty", "copy it", "damaged")
    assert str(back) == str(error) and "\n" not in str(error)


def test_resolve(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "in").mkdir(parents=True)
    outside.mkdir()
    for folder in (root / "in", outside):
        (folder / "a.png").write_text("x")
    assert scans.resolve(root, "in/a.png") == (root / "in" / "a.png").resolve()
    assert scans.resolve(root, root / "in" / "a.png") == (root / "in" / "a.png").resolve()
    (root / "link.png").symlink_to(root / "in" / "a.png")
    assert scans.resolve(root, "link.png") == (root / "in" / "a.png").resolve()
    (root / "out.png").symlink_to(outside / "a.png")
    (root / "outdir").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "series").mkdir()
    (root / "series" / "1.dcm").symlink_to(outside / "a.png")
    sibling = tmp_path / "root2"  # shares the root's beginning as text
    sibling.mkdir()
    (sibling / "a.png").write_text("x")
    refused = ["../outside/a.png", "in/../in/a.png", "..", "in\\..\\..\\a", str(outside / "a.png"), "out.png"]
    refused += ["outdir/a.png", "/etc/passwd", "a\0.png", "", "series", str(sibling / "a.png"), "loop", "n" * 300]
    for path in refused:
        with pytest.raises(scans.ScanError) as caught:
            scans.resolve(root, path)
        assert caught.value.fault == "refused" and str(root) in str(caught.value), path
    with pytest.raises(scans.ScanError) as caught:
        scans.resolve(root, "none.png")
    assert caught.value.fault == "missing"
    for path in (None, 7):
        with pytest.raises(scans.ScanError):
            scans.resolve(root, path)


def test_orientation_refuses_flat_axes():
    with pytest.raises(ValueError, match="one plane"):
        orientation.display(np.ones((3, 3)) + np.eye(3) * 1e-3, (2, 2, 2))


def test_codestream_sizes():
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "JPEG")
    assert codestream.jpeg(buffer.getvalue()) == codestream.Size(5, 12, 3, 8)
    with pytest.raises(ValueError, match="end mark"):
        codestream.jpeg(buffer.getvalue()[:-2])
    with pytest.raises(ValueError, match="201 JPEG scans"):
        codestream.jpeg(b"\xff\xd8" + b"\xff\xda" * 201 + b"\xff\xd9")
    # 3 literals, 5 times the same, a no-op
    assert codestream.packbits_size(b"\x02abc\xfcx\x80", 100) == 8


# ---------------------------------------------------------------- bombs

BOMBS = """
import sys, time
from input_pipeline import scans

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024

for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is in use
    before, start = peak(), time.monotonic()
    limits = scans.Limits(max_bytes=1 << 26) if "deflated" in path else scans.Limits()
    try:
        scans.read(path, limits=limits)
        said = "READ"
    except scans.ScanError as error:
        said = error.fault + ": " + error.reason[:90]
    print(said, peak() - before, round(time.monotonic() - start, 2), path, sep="|")
"""


def bombs(folder: Path) -> list[Path]:
    """Small files that ask for much memory."""
    made = []

    def add(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        made.append(folder / name)

    image = nibabel.Nifti1Image(lps_volume(), np.eye(4))
    header = bytearray(image.to_bytes()[:352])
    block = zlib.compressobj(1, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    seventy = zlib.compress(zeros * 70, 1)
    add(
        "goes_on.nii.gz",
        block.compress(bytes(header)) + b"".join(block.compress(zeros) for _ in range(70)) + block.flush(),
    )
    for i, n in enumerate((1000, 1000, 1000)):
        struct.pack_into("<h", header, 42 + 2 * i, n)
    add("claims.nii.gz", gzip.compress(bytes(header) + zeros))  # 2 GB stated, 1 MB there
    for i in range(3):
        struct.pack_into("<h", header, 42 + 2 * i, 32767)
    add("huge.nii.gz", gzip.compress(bytes(header) + zeros))
    struct.pack_into("<f", header, 108, 3e9)
    add("extension.nii", bytes(header))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def png(w: int, h: int, *extra: bytes) -> bytes:
        start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
        return start + b"".join(extra) + chunk(b"IDAT", zlib.compress(zeros)) + chunk(b"IEND", b"")

    add("sides.png", png(60000, 60000))
    add("cut.png", png(9000, 9000))
    add("text.png", png(30, 30, chunk(b"zTXt", b"k\0\0" + seventy)))
    add("profile.png", png(30, 30, chunk(b"iCCP", b"k\0\0" + seventy)))
    jpeg = io.BytesIO()
    Image.fromarray(np.tile(RAMP, (4, 4))).save(jpeg, "JPEG")
    data = bytearray(jpeg.getvalue())
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, 65000, 65000)
    add("sides.jpg", bytes(data))

    def npy(shape, rest: bytes) -> bytes:
        text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {shape}, }}".encode()
        text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
        return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + rest

    add("claims.npy", npy((1000, 1000, 1000), zeros))
    add("huge.npy", npy((10**9, 10**9, 10**9), zeros))
    add("nested.npy", npy("(" * 2000 + ")" * 2000, zeros))
    version2 = b"\x93NUMPY\x02\0" + struct.pack("<I", 1 << 31) + b"{" * 1000
    add("header.npy", version2)

    for name in (
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
    ):
        dataset = pydicom.dcmread(dicom_file(name))
        raw = dataset.PixelData
        for mark, form, shift in ((b"\xff\x4f\xff\x51", ">II", 8), (b"\xff\xc3", ">HH", 5), (b"\xff\xf7", ">HH", 5)):
            if mark in raw:  # the stream says 16,000 x 16,000, the header 64 x 64
                at = raw.index(mark) + shift
                raw = raw[:at] + struct.pack(form, 16000, 16000) + raw[at + struct.calcsize(form) :]
        if "RLE" in name:  # packets of 128 times one byte
            packets = b"\x81\0" * 500_000
            frame = struct.pack("<16L", 2, 64, 64 + len(packets) // 2, *[0] * 13) + packets
            raw = pydicom.encaps.encapsulate([frame])
        dataset.PixelData = raw
        dataset.save_as(folder / f"bomb_{name}")
        made.append(folder / f"bomb_{name}")
    dataset = pydicom.dcmread(dicom_file("MR_small_jp2klossless.dcm"))
    dataset.Rows = dataset.Columns = 16000
    dataset.save_as(folder / "both.dcm")  # header only: the stream still says 64 x 64
    made.append(folder / "both.dcm")

    source = Path(dicom_file("image_dfl.dcm")).read_bytes()
    inner = zlib.decompressobj(-15)
    start = 132 + 12 + struct.unpack_from("<L", source, 140)[0]
    plain = inner.decompress(source[start:])
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(plain) + b"".join(packer.compress(zeros) for _ in range(70)) + packer.flush()
    add("deflated.dcm", source[:start] + packed)

    tifffile.imwrite(folder / "strip.tif", np.tile(RAMP, (20, 20)), compression="zlib")
    data = bytearray((folder / "strip.tif").read_bytes())
    with tifffile.TiffFile(folder / "strip.tif") as tif:
        page = tif.pages[0]
        count = page.tags["StripByteCounts"].valueoffset
        offset = page.tags["StripOffsets"].valueoffset
    packed = seventy
    struct.pack_into("<I", data, count, len(packed)), struct.pack_into("<I", data, offset, len(data))
    add("strip.tif", bytes(data) + packed)
    return made


def test_bombs_cost_little(tmp_path):
    """Each is refused within 5 s and 30 MB; measured: at most 0.3 s (the deflated zeros) and 5 MB."""
    paths = bombs(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(scans.__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    warm = dicom_file("MR_small_RLE.dcm"), dicom_file("MR_small_jp2klossless.dcm"), dicom_file("SC_rgb_jpeg_gdcm.dcm")
    command = [sys.executable, "-c", BOMBS, *warm, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == len(warm) + len(paths) and all(line[0] == "READ" for line in lines[: len(warm)])
    print(done.stdout)
    for said, grown, seconds, path in lines[len(warm) :]:
        assert said.split(":")[0] in ("limit", "damaged"), (said, path)
        assert int(grown) < 30 and float(seconds) < 5, (grown, seconds, path)
