"""NIfTI files: dtypes, scaling, volumes, colours, inconsistent headers, gzip streams."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib

import nibabel
import numpy as np
import pytest
from scan_files import axial_display, fails, lps_volume, nifti, patched

from input_pipeline.images import scans


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("endian", "<>")
def test_nifti_dtypes(tmp_path, dtype, endian):
    array = lps_volume().astype(endian + dtype)
    image = nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]), dtype=array.dtype)
    if endian == ">":
        image = nibabel.Nifti1Image(array, image.affine, image.header.as_byteswapped(">"))
    nibabel.save(image, tmp_path / "a.nii")
    voxels, header = scans.read(tmp_path / "a.nii")
    np.testing.assert_array_equal(voxels, axial_display(lps_volume()))
    natural_dtype = {"u1": "u1", "i1": "i2", "i2": "i2", "u2": "u2", "i4": "i4", "f4": "f4", "f8": "f4"}
    assert voxels.dtype == natural_dtype.get(dtype, "i2") and voxels.dtype.isnative
    assert header.dtype == np.dtype(dtype).name


def test_nifti_2(tmp_path):
    nibabel.save(nibabel.Nifti2Image(lps_volume(), np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scans.read(tmp_path / "a.nii.gz")[0], axial_display(lps_volume()))


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
    np.testing.assert_array_equal(voxels, (axial_display(lps_volume()) * float(slope) + inter).astype(dtype))


@pytest.mark.parametrize(
    ("slope", "inter", "fault"),
    [(0, 5, None), (np.nan, np.nan, None), (np.nan, 0, "damaged"), (1, np.nan, "damaged"), (np.inf, 0, "damaged")],
)
def test_nifti_scaling_that_is_not_finite(tmp_path, slope, inter, fault):
    path = nifti(tmp_path / "a.nii", lps_volume(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    data = bytearray(path.read_bytes())
    struct.pack_into("<ff", data, 112, slope, inter)
    path.write_bytes(data)
    if fault:
        fails(path, fault, "scaling")
    else:
        voxels, header = scans.read(path)
        np.testing.assert_array_equal(voxels, axial_display(lps_volume()))
        assert not header.rescaled


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_4d_needs_a_choice(tmp_path, ending):
    array = np.stack([lps_volume(), lps_volume() + 100, lps_volume() + 200], axis=3)
    path = nifti(tmp_path / f"a{ending}", array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    fails(path, "ambiguous", "3 volumes", "volume 0 to 2")
    for volume in range(3):
        voxels, header = scans.read(path, volume=volume)
        np.testing.assert_array_equal(voxels, axial_display(lps_volume()) + 100 * volume)
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


@pytest.mark.parametrize(
    ("field", "fault", "words"),
    [
        (("<h", 42, -4), "damaged", "dimensions"),
        (("<h", 42, 0), "damaged", "dimensions"),
        (("<h", 40, 9), "damaged", "dimensions"),
        (("<h", 40, 1), "unsupported", "1 dimensions"),
        (("<h", 42, 5), "damaged", "its header requires"),
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
    fails(path, "limit", "48 bytes", limits=scans.ScanLimits(max_bytes=47))
    fails(path, "limit", "rows or columns", limits=scans.ScanLimits(max_side=3))
    fails(path, "limit", "slices", limits=scans.ScanLimits(max_slices=1))
    fails(path, "limit", "limit of 300", limits=scans.ScanLimits(max_file_bytes=300))
    four = nifti(tmp_path / "c.nii", np.stack([lps_volume()] * 3, axis=3), np.eye(4))
    fails(four, "limit", "3 volumes", limits=scans.ScanLimits(max_volumes=2), volume=0)
    assert scans.read(path, limits=scans.ScanLimits(max_bytes=48, max_side=4, max_slices=2))[0].size == 24


def test_nifti_stream_must_have_the_size_in_its_header(tmp_path):
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


def test_other_gzip_streams_are_named(tmp_path):
    data = nifti(tmp_path / "a.nii", np.arange(96, dtype=np.int16).reshape(4, 4, 6), np.eye(4)).read_bytes()
    for kind in ("ustar", "gnu", "pax"):
        file = io.BytesIO()
        formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
        with tarfile.open(fileobj=file, mode="w:gz", format=formats[kind]) as archive:
            archive.add(tmp_path / "a.nii", "case/ct.nii")
        (tmp_path / f"{kind}.tar.gz").write_bytes(file.getvalue())
        fails(tmp_path / f"{kind}.tar.gz", "unsupported", "contains no DICOM image (1 file: not DICOM)")
        (tmp_path / f"{kind}.nii.gz").write_bytes(file.getvalue())
        fails(tmp_path / f"{kind}.nii.gz", "ambiguous", "is an archive, which does not match its file name")
    for start, name in (
        (b"\0" * 128 + b"DICM", "DICOM in a gzip stream (unpack it)"),
        (b"\x93NUMPY\1\0", ".npy in a gzip stream (unpack it)"),
        (b"\x89PNG\r\n\x1a\n", "PNG in a gzip stream (unpack it)"),
        (b"NRRD0004\n", "NRRD in a gzip stream (unpack it)"),
        (b"PK\3\4", "a zip or .npz archive in a gzip stream"),
        (b"id,path\n", "a gzip stream without a NIfTI header"),
    ):
        packed = tmp_path / "a.nii.gz"
        packed.write_bytes(gzip.compress(start + data))
        fails(packed, "unsupported", f"is {name}")


def test_gzip_streams_are_accepted_as_by_the_standard_library(tmp_path):
    """Data before and after a stream and every value of the header flags give the same result or an error."""
    data = nifti(tmp_path / "a.nii", lps_volume(), np.eye(4)).read_bytes()
    whole = gzip.compress(data, mtime=0)
    named = b"\x1f\x8b\x08\x08" + whole[4:10] + b"a.nii\0" + whole[10:]
    streams = [whole, named, whole + bytes(100), whole + bytes(100) + b"q", whole + b"\x1f\x8b", whole + b"\x1f"]
    streams += [
        whole + gzip.compress(b""),
        whole + bytes(7) + gzip.compress(b""),
        whole + whole,
        named[:14],
        whole[:10],
    ]
    streams += [whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:], whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-3]]
    streams += [whole[:3] + bytes([flags]) + whole[4:] for flags in range(256)]
    path, read = tmp_path / "a.nii.gz", 0
    for stream in streams:
        path.write_bytes(stream)
        try:
            good = gzip.decompress(stream) == data
        except (EOFError, OSError, zlib.error):
            good = False
        if good:
            np.testing.assert_array_equal(scans.read(path)[0], scans.read(tmp_path / "a.nii")[0])
            read += 1
        else:
            fails(path, "damaged")
    assert read >= 5, "the whole stream, its name, zeros and empty members behind it"


def test_every_flipped_bit_of_a_gzip_stream_is_detected(tmp_path):
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
    assert errors > 0.8 * (8 * len(data) / 3)  # the rest are unused header bytes: time, system


def with_header(path, array, affine=None, **fields):
    """Write a NIfTI file and set header fields (name -> bytes format, offset, values) that nibabel would correct."""
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2, 3, 4, 1]) if affine is None else affine), path)
    return patched(path, *(field for field in fields.values()))


VOLUME = np.arange(5 * 6 * 4, dtype=np.int16).reshape(5, 6, 4)
NO_SFORM, NO_QFORM = ("<h", 254, 0), ("<h", 252, 0)
QFORM = ("<h", 252, 1)


@pytest.mark.parametrize("sform", [False, True])
def test_qfac_zero_is_one(tmp_path, sform):
    array = VOLUME
    want, _ = scans.read(with_header(tmp_path / "one.nii", array, q=QFORM, **({} if sform else {"s": NO_SFORM})))
    path = with_header(tmp_path / "zero.nii", array, q=QFORM, f=("<f", 76, 0.0), **({} if sform else {"s": NO_SFORM}))
    got, header = scans.read(path)
    np.testing.assert_array_equal(got, want)
    assert header.notices == () and header.orientation == "PLS"


@pytest.mark.parametrize("value", [0.9, 1.5, float("nan")])
def test_a_bad_quaternion_beside_a_good_sform(tmp_path, value):
    bad = {"b": ("<f", 256, value), "c": ("<f", 260, value)}
    want, _ = scans.read(with_header(tmp_path / "good.nii", VOLUME))
    got, header = scans.read(with_header(tmp_path / "bad.nii", VOLUME, q=QFORM, **bad))
    np.testing.assert_array_equal(got, want)
    assert header.notices == ("has an invalid qform, so its sform is used: remove the qform",)
    with pytest.raises(scans.ScanError):
        scans.read(with_header(tmp_path / "only.nii", VOLUME, q=QFORM, s=NO_SFORM, **bad))


@pytest.mark.parametrize("forms", ["none", "qform", "sform"])
def test_a_single_slice_needs_no_step(tmp_path, forms):
    array, zero = VOLUME[..., :1], {"p": ("<f", 88, 0.0)}
    if forms == "sform":
        zero |= {f"z{k}": ("<f", 280 + 16 * k + 8, 0.0) for k in range(3)}  # the third column
    else:
        zero |= {"s": NO_SFORM, "q": QFORM if forms == "qform" else NO_QFORM}
    want, _ = scans.read(with_header(tmp_path / "good.nii", array))
    voxels, header = scans.read(with_header(tmp_path / "a.nii", array, **zero))
    assert voxels.shape == want.shape and header.spacing_mm == (3.0, 2.0, None)
    if forms != "none":
        np.testing.assert_array_equal(voxels, want)
    assert "no step between slices" in header.notices[0]
    path = with_header(tmp_path / "several.nii", VOLUME, **zero)
    fails(path, "damaged", "voxel spacing" if forms != "sform" else "zero, huge")


def test_vectors_are_no_scans(tmp_path):
    vectors = np.zeros((5, 6, 4, 1, 3), np.float32)
    vectors[0] = 1
    nibabel.save(nibabel.Nifti1Image(vectors, np.eye(4)), tmp_path / "v.nii")
    fails(tmp_path / "v.nii", "unsupported", "has 5 dimensions [5, 6, 4, 1, 3]")


def test_negative_voxel_sizes_do_not_mirror(tmp_path):
    """Without an sform, pixdim is read as positive, as nibabel does; a sform does not need pixdim."""
    array, affine = lps_volume(), np.diag([-2.0, -3.0, 4.0, 1.0])
    for axis in (1, 2, 3):
        for q_code, s_code in ((0, 0), (1, 0), (0, 1)):
            image = nibabel.Nifti1Image(array, affine)
            image.set_qform(affine, q_code)
            image.set_sform(affine, s_code)
            nibabel.save(image, tmp_path / "a.nii")
            plain, header = scans.read(tmp_path / "a.nii")
            voxels, _ = scans.read(patched(tmp_path / "a.nii", ("<f", 76 + 4 * axis, -(axis + 1))))
            np.testing.assert_array_equal(voxels, plain)
            notices = scans.header(tmp_path / "a.nii").notices
            assert header.notices == () and len(notices) == (not s_code)
            assert s_code or "negative voxel size" in notices[0]


def test_rounded_quaternions(tmp_path):
    """A quaternion that rounding made too long is scaled to 1; one that is no rotation is refused."""
    half = np.sqrt(0.5)
    rotation = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]]) * [2.0, 3.0, 4.0]  # b = c = sqrt(0.5)
    affine = np.eye(4)
    affine[:3, :3] = rotation
    image = nibabel.Nifti1Image(lps_volume(), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 0)
    nibabel.save(image, tmp_path / "a.nii")
    assert abs(image.header["quatern_b"] - half) < 1e-6
    plain, header = scans.read(tmp_path / "a.nii")
    for value in (0.7072, 0.70711, 0.71):
        path = patched(tmp_path / "a.nii", ("<f", 256, value), ("<f", 260, value))
        np.testing.assert_array_equal(scans.read(path)[0], plain)
        assert scans.header(path).orientation == header.orientation
    fails(patched(tmp_path / "a.nii", ("<f", 256, 5), ("<f", 260, 5)), "damaged", "quaternion has the length 7.07")
