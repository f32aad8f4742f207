"""DICOM files, frames and series: order, intensities, transfer syntaxes, damage."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import make_dicom, make_series, slices
from pydicom import uid
from scan_files import axial_display, dicom_file, fails, nifti

from input_pipeline.images import scans
from input_pipeline.images.scans import isolated


def test_series_is_sorted_by_position(tmp_path):
    lps = slices(6)
    folder = make_series(tmp_path / "s", lps, RescaleIntercept=-1024)
    voxels, header = scans.read(folder)
    np.testing.assert_array_equal(voxels, axial_display(lps) - 1024)
    assert voxels.dtype == np.int16 and header == scans.header(folder)
    assert header.orientation == "PLS" and header.spacing_mm == (1, 1, 2) and header.modality == "CT"
    assert header.rescaled and header.shape == (3, 4, 6, 1) and header.kind == "3d"


def test_a_series_that_unpacks_to_too_much_is_refused(tmp_path):
    """Only the sum of the unpacked slices exceeds the limit; single slices and the files on disk do not."""
    lps = np.zeros((256, 256, 3), np.int16)
    lps[0] = 1
    folder = make_series(tmp_path / "zeros", lps, syntax=uid.DeflatedExplicitVRLittleEndian)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000
    assert scans.read(folder)[0].shape == (256, 256, 3, 1)
    fails(folder, "limit", "unpacks to more than", limits=scans.ScanLimits(max_file_bytes=5 * lps.nbytes // 6))


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


def test_slices_stored_upside_down_are_flipped(tmp_path):
    lps = slices(3)
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(3):  # rows back to front, columns left to right, as after a prone scan
        picture = np.ascontiguousarray(lps[::-1, ::-1, k].T)
        make_dicom(
            folder / f"{k}.dcm", picture, ImagePositionPatient=[3, 2, k], ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]
        )
    np.testing.assert_array_equal(scans.read(folder)[0], axial_display(lps))


def test_gantry_tilt_is_one_stack_but_shifted_slices_are_not(tmp_path):
    lps = slices(5)
    folder = make_series(tmp_path / "s", lps)
    names = sorted(folder.iterdir())
    for path in names:
        dataset = pydicom.dcmread(path)
        z = float(dataset.ImagePositionPatient[2])
        dataset.ImagePositionPatient = [0, 0.4 * z, z]
        dataset.save_as(path)
    voxels, header = scans.read(folder)
    np.testing.assert_array_equal(voxels, axial_display(lps))
    assert "tilted by 21.8 degrees, so each slice is shifted by 0.80 mm" in header.notices[0]
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
    make_dicom(folder / "copy.dcm", lps[:, :, 1].T.copy(), ImagePositionPatient=[0, 0, 2])
    fails(folder, "series", "the same position", "71.dcm and copy.dcm")

    for name, attributes in {
        "SeriesInstanceUID is one value in 6 slices and another value": {"SeriesInstanceUID": "1.2.99"},
        "FrameOfReferenceUID is one value in 6 slices and another value": {"FrameOfReferenceUID": "1.2.98"},
        "Modality is CT in 6 slices and MR": {"Modality": "MR"},
        r"ImageOrientationPatient is 1\0\0\0\1\0 in 6 slices": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        r"PixelSpacing is 1\1 in 6 slices and 2\2": {"PixelSpacing": [2, 2]},
    }.items():
        folder = make_series(tmp_path / name.split()[0], lps)
        make_dicom(folder / "odd.dcm", lps[:, :, 0].T.copy(), ImagePositionPatient=[0, 0, 12], **attributes)
        error = fails(folder, "series", name, "1 slice (odd.dcm)")
        assert "1.2.9" not in str(error)  # messages contain no UID
    folder = make_series(tmp_path / "size", lps)
    make_dicom(folder / "odd.dcm", np.arange(20, dtype=np.int16).reshape(5, 4), ImagePositionPatient=[0, 0, 12])
    fails(folder, "series", "Rows is 3 in 6 slices and 5 in 1 slice (odd.dcm)")


def test_directory_with_other_files(tmp_path):
    lps = slices(4)
    folder = make_series(tmp_path / "s", lps)
    (folder / "notes.txt").write_text("not a slice")
    make_dicom(folder / "lost.dcm", lps[:, :, 0].T.copy(), ImagePositionPatient=None)
    fails(folder, "series", "2 of 6 files", "notes.txt", "lost.dcm", "cannot be sorted")
    (folder / "deeper").mkdir()
    fails(folder, "series", "has 2 series: ", "(CT, axial, 3 x 4 x 4)", 'series="s1"')
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "missing", "empty directory")
    fails(make_series(tmp_path / "many", lps), "limit", "more than 3 slices", limits=scans.ScanLimits(max_slices=3))
    one = tmp_path / "one"
    one.mkdir()
    make_dicom(one / "a.dcm", lps[:, :, 0].T.copy())
    assert scans.read(one)[1].shape == (3, 4, 1, 1)


def test_slopes_that_differ_between_slices(tmp_path):
    """As in PET, where every slice has its own slope."""
    lps = slices(3)
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(3):
        at = {"ImagePositionPatient": [0, 0, k], "RescaleSlope": 0.5 * (k + 1), "Modality": "PT"}
        make_dicom(folder / f"{k}.dcm", lps[:, :, k].T.copy(), **at)
    voxels, header = scans.read(folder)
    assert voxels.dtype == np.float32 and header.rescaled
    np.testing.assert_array_equal(voxels, axial_display(lps) * np.array([0.5, 1.0, 1.5], np.float32)[:, None])


def test_monochrome1_is_inverted(tmp_path):
    """0 becomes the largest value of BitsStored, also with a rescale and for signed pixels."""
    pixels = np.array([[0, 1, 2], [4095, 4094, 10]], np.uint16)
    stored = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "Modality": "CR"}
    voxels, header = scans.read(make_dicom(tmp_path / "a.dcm", pixels, **stored, RescaleIntercept=5))
    assert voxels[..., 0, 0].tolist() == [[4100, 4099, 4098], [5, 6, 4090]]
    assert header.photometric == "MONOCHROME1" and header.kind == "2d"
    signed = np.array([[-2048, 2047, 0]], np.int16)
    voxels, _ = scans.read(make_dicom(tmp_path / "b.dcm", signed, **stored))
    assert voxels.ravel().tolist() == [2047, -2048, -1]


def test_unused_high_bits_are_ignored(tmp_path):
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
        ({"RescaleSlope": 0}, "damaged", "RescaleSlope 0"),
        ({"RescaleSlope": None}, "ambiguous", "only one"),
        ({"BitsStored": 17}, "unsupported", "17 bits stored"),
        ({"HighBit": 12}, "unsupported", "high bit 12"),
        ({"SamplesPerPixel": 3}, "unsupported", "3 samples"),
        ({"PhotometricInterpretation": "HSV"}, "unsupported", "HSV"),
        ({"Rows": 5}, "damaged", "its header requires"),
        ({"Rows": 60000, "Columns": 60000}, "limit", "rows or columns"),
        ({"NumberOfFrames": 2}, "damaged", "its header requires"),
        ({"NumberOfFrames": 0}, "damaged", "NumberOfFrames"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "damaged", "not a rotation"),
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


def test_messages_contain_no_patient_data(tmp_path, caplog, capfd, recwarn):
    path = make_dicom(tmp_path / "a.dcm", slices(1)[..., 0], PixelSpacing=None, ImagePositionPatient=None)
    header = scans.read(path)[1]
    said = json.dumps(dataclasses.asdict(header))
    # One tag becomes another, so that the name is where a number should be.
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
    # The rescale to Hounsfield units is in the functional groups: intercept -1024.
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


# Each pair contains the same image, losslessly compressed and uncompressed.
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
    if "expb" in compressed:  # its palette is byte-swapped: 0x00ff instead of 0xff00
        a = a.byteswap()
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name", ["SC_rgb_dcmtk_+eb+cr", "SC_rgb_dcmtk_+eb+cy+n1", "SC_rgb_dcmtk_+eb+cy+np", "SC_ybr_full_uncompressed"]
)
def test_colour_spaces_become_rgb(name):
    """The stripes of the test card: red, green, blue, ... as in its uncompressed RGB original."""
    voxels, header = scans.read(dicom_file(f"{name}.dcm"))
    plain = scans.read(dicom_file("SC_rgb.dcm"))[0]
    assert header.shape == (100, 100, 1, 3) and header.dtype == "uint8"
    for row in (5, 15, 25, 55, 75):  # inside stripes, where JPEG and rounded YBR differ by at most 5
        np.testing.assert_allclose(voxels[row, 50, 0].astype(int), plain[row, 50, 0], atol=5)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_12_bit_jpeg_names_the_remedy(name):
    fails(dicom_file(name), "unsupported", "12-bit JPEG", "transcode")


def test_a_decoder_that_crashes_prints_or_hangs_is_an_error(tmp_path, monkeypatch):
    """An early end marker, for which gdcm prints a line and returns an image; then a killed and a stopped child."""
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
    np.testing.assert_array_equal(scans.read(dicom_file("SC_rgb_jpeg_gdcm.dcm"))[0], good)  # by a new child
    monkeypatch.setattr(isolated, "SECONDS", 0.2)
    os.kill(isolated._child.process.pid, signal.SIGSTOP)
    fails(dicom_file("SC_rgb_jpeg_gdcm.dcm"), "damaged", "did not finish within 0.2 s")
    monkeypatch.undo()
    np.testing.assert_array_equal(scans.read(dicom_file("SC_rgb_jpeg_gdcm.dcm"))[0], good)


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "SC_rgb_rle.dcm"])
def test_zeros_at_the_end_of_rle_segments(tmp_path, name):
    """Readers ignore any number of them. They unpack to one byte a pair, so more than one byte is too much."""
    dataset, expected = pydicom.dcmread(dicom_file(name)), scans.read(dicom_file(name))[0]
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    count, *offsets = struct.unpack_from("<16L", frame)
    ends = [*offsets[1:count], len(frame)]
    for padding, ending in ((1, b""), (2, b""), (3, b""), (8, b""), (1000, b""), (8, b"\1"), (1, b"\0abc")):
        header, body = [count], b""
        for start, end in zip(offsets, ends, strict=False):
            header.append(64 + len(body))
            body += frame[start:end] + bytes(padding) + ending
        header += [0] * (16 - len(header))
        dataset.PixelData = pydicom.encaps.encapsulate([struct.pack("<16L", *header) + body])
        dataset.save_as(tmp_path / "a.dcm")
        if ending:
            fails(tmp_path / "a.dcm", "damaged", "has an RLE segment of more than")
        else:
            np.testing.assert_array_equal(scans.read(tmp_path / "a.dcm")[0], expected)


def test_missing_and_oversized_frames(tmp_path):
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


def test_truncated_and_unsupported_dicom(tmp_path):
    fails(dicom_file("MR_truncated.dcm"), "damaged", "8,130", "8,192")
    fails(dicom_file("rtplan.dcm"), "unsupported", "treatment plan")
    fails(dicom_file("test-SR.dcm"), "unsupported", "structured report")
    fails(dicom_file("liver.dcm"), "unsupported", "segmentation")
    fails(dicom_file("dicomdirtests/DICOMDIR-bigEnd"), "unsupported", "a list of files")
    whole = Path(dicom_file("MR_small.dcm")).read_bytes()
    path = tmp_path / "a.dcm"
    end_of_pixels = whole.rindex(pydicom.dcmread(dicom_file("MR_small.dcm")).PixelData) + 2 * 64 * 64
    for end in [*range(0, end_of_pixels, 307), end_of_pixels - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(scans.ScanError):
            scans.read(path)


def test_inserted_bytes_are_detected(tmp_path):
    """As after a text-mode transfer: the image is shifted, and its end follows the element."""
    whole = Path(dicom_file("CT_small.dcm")).read_bytes()
    path = tmp_path / "a.dcm"
    for at in (len(whole) // 2, len(whole) - 2000):  # both within the pixels
        path.write_bytes(whole[:at] + b"\r\n" + whole[at:])
        fails(path, "damaged", "data after its pixels")
