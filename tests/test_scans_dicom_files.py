"""Valid but unusual DICOM: no preamble, padding, overlays, lookup tables, mixed formats, codecs, slice distances."""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import edit, item, make_dicom, make_series, slices
from openjpeg.utils import encode_array
from PIL import Image
from pydicom import encaps, uid
from scan_files import axial_display, dicom_file, fails

from input_pipeline.images import scans
from input_pipeline.images.intensity import without_padding
from input_pipeline.index.scan_checks import scan_sha256

PICTURE = np.random.default_rng(0).integers(0, 4096, (40, 48), dtype=np.uint16)
TWELVE = {"BitsStored": 12}


def read(path) -> np.ndarray:
    return scans.read(path)[0][:, :, 0, 0]


# --- preamble and padding ---


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm"])
def test_files_without_preamble_or_meta_information(tmp_path, name):
    """The file starts with DICM, with the meta information, or with the data set."""
    data, path = Path(dicom_file(name)).read_bytes(), tmp_path / "noext"
    whole = scans.read(dicom_file(name))
    for start in (128, 132, 144 + struct.unpack_from("<L", data, 140)[0]):
        path.write_bytes(data[start:])
        voxels, header = scans.read(path)
        np.testing.assert_array_equal(voxels, whole[0])
        assert header == whole[1] == scans.header(path)


def test_files_that_state_no_transfer_syntax(tmp_path):
    path = tmp_path / "a.dcm"
    whole = Path(dicom_file("MR_small_RLE.dcm")).read_bytes()
    path.write_bytes(whole[144 + struct.unpack_from("<L", whole, 140)[0] :])
    fails(path, "ambiguous", "compressed pixels, but its transfer syntax is absent")
    fails(dicom_file("meta_missing_tsyntax.dcm"), "ambiguous", "states no transfer syntax")
    for start in (b" \x08\0\x05\0CS", b"\x08\0\x99\x99\x04\0\0\0"):  # shifted by one byte; no such element
        path.write_bytes(start + bytes(500))
        fails(path, "unsupported", "unknown format")


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b" "])
def test_padding_after_the_pixels(tmp_path, fill):
    for count in (2, 256, 3840, 4000):  # 3,840 bytes are the size of the image
        data = PICTURE.tobytes() + fill * count
        np.testing.assert_array_equal(read(make_dicom(tmp_path / "a.dcm", PICTURE, PixelData=data)), PICTURE)
    data = PICTURE.tobytes() + b"trailer"  # neither rows nor columns nor frames
    np.testing.assert_array_equal(read(make_dicom(tmp_path / "a.dcm", PICTURE, PixelData=data + b"!")), PICTURE)
    padded = scans.read(dicom_file("MR_small_padded.dcm"))[0]
    np.testing.assert_array_equal(padded, scans.read(dicom_file("MR_small.dcm"))[0])


def test_zeros_after_the_file(tmp_path):
    """Media and archives fill files to whole blocks. After a text-mode transfer the zeros may be the image's end."""
    path = make_dicom(tmp_path / "a.dcm", PICTURE)
    data = path.read_bytes()
    for count in (1, 2, 8, 512):
        path.write_bytes(data + bytes(count))
        np.testing.assert_array_equal(read(path), PICTURE)
    path.write_bytes(data + b"\0\1" * 4)
    fails(path, "damaged", "data after its pixels that is not DICOM")
    dark = PICTURE.copy()
    dark[20:] = 0
    path.write_bytes(make_dicom(path, dark).read_bytes().replace(b"\n", b"\r\n"))
    fails(path, "damaged", "data after its pixels that is not DICOM")


@pytest.mark.parametrize(
    ("attributes", "cause"),
    [
        ({"Rows": 30}, "more rows"),
        ({"Columns": 40}, "more rows or columns"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "more frames"),
        ({"Rows": 20}, "more frames"),
    ],
)
def test_more_pixels_than_the_header_states(tmp_path, attributes, cause):
    """The reason is not that the file is cut short."""
    error = fails(make_dicom(tmp_path / "a.dcm", PICTURE, **attributes), "damaged", cause, "correct the header")
    assert "truncated" not in str(error)
    colour = np.dstack([PICTURE.astype(np.uint8)] * 3)
    stated = {"PhotometricInterpretation": "YBR_FULL_422", "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    fails(make_dicom(tmp_path / "b.dcm", colour, **stated), "damaged", "full resolution, not YBR_FULL_422")


# --- bits, padding values, lookup tables ---


@pytest.mark.parametrize(
    ("signed", "padding"), [(False, 63536), (False, 4096), (False, 65535), (True, -32768), (True, -3024)]
)
def test_padding_beyond_bits_stored_is_not_tissue(tmp_path, signed, padding):
    """63536 is -2000 as unsigned: its lower 12 bits are 2096, the value of bone."""
    stored = PICTURE.astype(np.int16) - 2048 if signed else PICTURE.copy()
    stored[:8] = padding
    path = make_dicom(tmp_path / "a.dcm", stored, **TWELVE, RescaleIntercept=-1024)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "SS" if signed else "US", padding)
    dataset.save_as(path)
    voxels, header = scans.read(path)
    low, high = header.padding
    image = voxels[:, :, 0, 0]
    np.testing.assert_array_equal((image >= low) & (image <= high), np.arange(40)[:, None] + np.zeros(48) < 8)
    np.testing.assert_array_equal(image[8:], stored[8:].astype(int) - 1024)
    assert voxels.dtype == np.int16 or padding in (4096, -32768)
    assert scans.header(path) == header
    prepared = without_padding(voxels, header.padding, header.value_range)
    assert prepared[1:] == (image[8:].min(), image[8:].max())


def test_values_that_exceed_bits_stored_are_not_wrapped(tmp_path):
    """Smooth pixels of 13 bits, and the padding of -2000 that the header does not state, with 12 BitsStored."""
    rows, columns = np.mgrid[:40, :48]
    smooth = (2000 + 900 * np.sin(rows / 9) + 900 * np.cos(columns / 8)).astype(np.uint16)
    outside = np.hypot(rows - 20, columns - 24) > 19
    for stored in (2 * smooth, smooth.astype(np.int16), np.where(outside, 63536, smooth // 4).astype(np.uint16)):
        path = make_dicom(tmp_path / "a.dcm", stored, **TWELVE)
        fails(path, "damaged", "of its BitsStored", "increase BitsStored")
        np.testing.assert_array_equal(read(edit(path, BitsStored=16, HighBit=15)), stored)
    overlaid = smooth // 4 | np.where(outside, 0x7000, 0).astype(np.uint16)  # three overlays
    np.testing.assert_array_equal(read(make_dicom(tmp_path / "a.dcm", overlaid, **TWELVE)), smooth // 4)


def test_padding_differs_between_slices(tmp_path):
    """Per-slice intercepts and padding values give one padding intensity."""
    lps = slices(3)
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(3):
        stored = np.ascontiguousarray(lps[:, :, k].T)
        stored[0, 0] = -2000 - k
        at = {"ImagePositionPatient": [0, 0, 2 * k], "RescaleIntercept": -10 * k, "PixelPaddingValue": -2000 - k}
        make_dicom(folder / f"{k}.dcm", stored, **at)
    voxels, header = scans.read(folder)
    low, high = header.padding
    padded = (voxels >= low) & (voxels <= high)
    assert padded[0, 0].all() and padded.sum() == 3 and header.padding == (-2022, -2022)
    expected = axial_display(lps) - np.array([0, 10, 20])[:, None]
    np.testing.assert_array_equal(voxels[~padded], expected[~padded])


def lut(values, first: int = 0, bits: int = 16):
    data = np.asarray(values, "<u2").tobytes() if bits > 8 else np.asarray(values, np.uint8).tobytes()
    table = item(LUTDescriptor=[len(values) % 65536, first, bits], ModalityLUTType="OD", LUTData=data)
    table[0]["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    table[0]["LUTData"].VR = "OW"
    return table


def lut_dicom(path: Path, stored: np.ndarray, table, **attributes) -> Path:
    none = {"RescaleSlope": None, "RescaleIntercept": None}
    return make_dicom(path, stored, ModalityLUTSequence=table, **(none | attributes))


def test_monochrome1_is_inverted_after_the_modality_lookup_table(tmp_path):
    """The table is not linear, so the order matters; the range is that of the table."""
    values = np.round(4095 * np.sqrt(np.arange(256) / 255)).astype(int)
    stored = (PICTURE % 256).astype(np.uint8)
    path = lut_dicom(tmp_path / "a.dcm", stored, lut(values), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read(path), 4095 - values[stored])
    path = lut_dicom(path, stored, lut(values))
    np.testing.assert_array_equal(read(path), values[stored])


def test_lookup_tables(tmp_path):
    """Values outside the table, a negative first value, 8-bit and 12-bit entries, padding."""
    stored = np.array([[-32768, -1024, -1023, 0], [1, 100, 2975, 32767]], np.int16)
    values = np.arange(100, 2100)
    expected = values[np.clip(stored.astype(int) + 1024, 0, 1999)]
    np.testing.assert_array_equal(read(lut_dicom(tmp_path / "a.dcm", stored, lut(values, -1024, 12))), expected)
    values = np.arange(200)[::-1]
    expected = values[np.clip(stored.astype(int), 0, 199)]
    np.testing.assert_array_equal(read(lut_dicom(tmp_path / "a.dcm", stored, lut(values, 0, 8))), expected)
    path = lut_dicom(tmp_path / "a.dcm", stored, lut(values, 0, 8), PixelPaddingValue=-1024)
    voxels, header = scans.read(path)
    assert header.padding == (-1, -1) and np.argwhere(voxels[:, :, 0, 0] == -1).tolist() == [[0, 1]]
    table = lut(values)
    table[0].LUTData = b"\1\2\3\4"
    fails(lut_dicom(path, stored, table), "damaged", "modality lookup table of 4 bytes, but states 200 entries")


def test_lookup_tables_in_some_slices_are_refused(tmp_path):
    folder = make_series(tmp_path / "s", slices(4))
    first = sorted(folder.iterdir())[0]
    edit(first, RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=lut(np.arange(99)))
    fails(folder, "series", f"ModalityLUTSequence is absent in 3 slices and present in 1 slice ({first.name})")


def test_other_lookup_tables_of_monochrome1_slices_are_refused(tmp_path):
    """Each table would invert its slice within another range."""
    folder = make_series(tmp_path / "s", slices(4), RescaleSlope=None, RescaleIntercept=None)
    values = np.arange(99)
    for path in sorted(folder.iterdir()):
        edit(path, PhotometricInterpretation="MONOCHROME1", ModalityLUTSequence=lut(values))
    expected = 98 - axial_display(slices(4))
    np.testing.assert_array_equal(scans.read(folder)[0], expected)
    edit(path, ModalityLUTSequence=lut(2 * values))
    fails(folder, "series", "lookup table of MONOCHROME1 is one value in 3 slices and another value in 1 slice")


def test_monochrome1_with_slopes_of_slices(tmp_path):
    """All slices are inverted within one range, so that equal intensities remain equal."""
    lps = slices(2)
    folder = make_series(tmp_path / "s", lps, PhotometricInterpretation="MONOCHROME1", **TWELVE)
    for k, path in enumerate(sorted(folder.iterdir(), key=lambda p: p.name[-5])):
        edit(path, RescaleSlope=k + 1)
    voxels, _ = scans.read(folder)
    slopes = np.array([1, 2])[:, None]
    np.testing.assert_array_equal(voxels, -2048 * 2 + 2047 * 2 - axial_display(lps) * slopes)


def test_slices_of_other_pixel_formats_and_equal_intensities(tmp_path):
    """12 and 13 bits, unsigned with intercept -1024 and signed without, 8 and 16 bits: the same Hounsfield units."""
    lps = slices(6)
    folder = make_series(tmp_path / "s", lps.astype(np.uint16) + 1024, RescaleIntercept=-1024, **TWELVE)
    files = sorted(folder.iterdir())
    edit(files[0], BitsStored=13, HighBit=12)
    dataset = pydicom.dcmread(files[1])
    signed = np.frombuffer(dataset.PixelData, np.uint16).astype(np.int16) - 1024
    edit(files[1], PixelRepresentation=1, BitsStored=16, HighBit=15, RescaleIntercept=0, PixelData=signed.tobytes())
    narrow = np.frombuffer(pydicom.dcmread(files[2]).PixelData, np.uint16) - 1024
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    edit(files[2], RescaleIntercept=0, PixelData=narrow.astype(np.uint8).tobytes(), **eight)
    voxels, header = scans.read(folder)
    np.testing.assert_array_equal(voxels, axial_display(lps))
    assert scans.header(folder) == header


# --- compressed pixels ---


def compressed(
    path: Path, frames: list[bytes], syntax, pixels: np.ndarray, *, has_bot: bool = True, **attributes
) -> Path:
    data = encaps.encapsulate(frames, has_bot=has_bot)
    path = make_dicom(path, pixels, **attributes)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = data
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
    return path


def j2k(pixels: np.ndarray, bits: int = 16) -> bytes:
    return bytes(encode_array(pixels, bits_stored=bits, photometric_interpretation=2))


def test_overlay_bits_above_jpeg_2000_are_masked(tmp_path):
    overlaid = PICTURE | np.uint16(0x1000) * (PICTURE % 3 == 0) | np.uint16(0x8000) * (PICTURE % 5 == 0)
    path = compressed(tmp_path / "a.dcm", [j2k(overlaid)], uid.JPEG2000Lossless, PICTURE, **TWELVE)
    np.testing.assert_array_equal(read(path), PICTURE)
    signed = np.sort(PICTURE.view(np.int16) - 2048, axis=None).reshape(PICTURE.shape)
    words = (signed.view(np.uint16) & 0x0FFF) | np.uint16(0x4000)
    path = compressed(path, [j2k(words)], uid.JPEG2000Lossless, signed, **TWELVE)
    np.testing.assert_array_equal(read(path), signed)
    path = compressed(path, [j2k(overlaid)], uid.JPEG2000, PICTURE, **TWELVE)  # lossy: the bits are not separate
    fails(path, "damaged", "outside the range 0 to 4095 of its BitsStored")
    overflow = np.sort(PICTURE, axis=None).reshape(PICTURE.shape) + np.uint16(50)  # damage, as values beyond 4095
    path = compressed(path, [j2k(overflow)], uid.JPEG2000Lossless, PICTURE, **TWELVE)
    fails(path, "damaged", "outside the range 0 to 4095 of its BitsStored")


def test_padding_beyond_bits_stored_in_jpeg_2000(tmp_path):
    words = PICTURE.copy()
    words[:3] = 63536
    path = compressed(
        tmp_path / "a.dcm", [j2k(words)], uid.JPEG2000Lossless, PICTURE, **TWELVE, PixelPaddingValue=63536
    )
    voxels, header = scans.read(path)
    assert header.padding == (-2000, -2000) and (voxels[:3] == -2000).all()
    np.testing.assert_array_equal(voxels[3:, :, 0, 0], PICTURE[3:])


def test_zeros_after_a_jpeg_2000_frame(tmp_path):
    for count in (1, 2, 64):
        frame = j2k(PICTURE, 12) + bytes(count)
        path = compressed(tmp_path / "a.dcm", [frame], uid.JPEG2000Lossless, PICTURE, **TWELVE)
        np.testing.assert_array_equal(read(path), PICTURE)


def test_empty_last_fragment(tmp_path):
    frames = [j2k(PICTURE), j2k(PICTURE[::-1].copy())]
    frames = [frame + b"\0" * (len(frame) % 2) for frame in frames]
    for has_bot in (True, False):
        data = encaps.encapsulate([*frames], has_bot=has_bot)
        path = compressed(tmp_path / "a.dcm", frames, uid.JPEG2000Lossless, PICTURE, NumberOfFrames=2)
        for tail in (b"\xfe\xff\x00\xe0" + bytes(4), (b"\xfe\xff\x00\xe0" + bytes(4)) * 2):
            edit(path, PixelData=data + tail)
            np.testing.assert_array_equal(scans.read(path)[0][:, :, 1, 0], PICTURE[::-1])
    path = compressed(tmp_path / "b.dcm", [frames[0]], uid.JPEG2000Lossless, PICTURE)
    edit(path, PixelData=encaps.encapsulate([frames[0]], has_bot=False) + b"\xfe\xff\x00\xe0" + bytes(4))
    np.testing.assert_array_equal(read(path), PICTURE)
    edit(path, NumberOfFrames=2)
    with pytest.raises(scans.ScanError):
        scans.read(path)


def test_high_throughput_jpeg_2000(tmp_path):
    """No encoder is installed, so the file is stored: uint16[96, 128], lossless, with the digest of its voxels."""
    file = Path(__file__).parent / "data" / "htj2k.dcm"
    voxels, header = scans.read(file)
    assert header.shape == (96, 128, 1, 1) and header.dtype == "uint16"
    digest = "3e750c8136248c21a3ddab88aa0a8540b404de69ad522f2e4d282d50c68c54bf"
    assert hashlib.sha256(np.ascontiguousarray(voxels)).hexdigest() == digest
    dataset = pydicom.dcmread(file)
    for syntax in (uid.HTJ2K, uid.HTJ2KLosslessRPCL):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / "a.dcm")
        np.testing.assert_array_equal(scans.read(tmp_path / "a.dcm")[0], voxels)


def jpeg_with(data: bytes, *, ids: bytes | None = None, adobe: int | None = None, jfif: bool = True) -> bytes:
    """Return a JPEG stream with other component ids and markers, its samples unchanged."""
    body, header = data[2:], b""
    if body[:2] == b"\xff\xe0":
        length = struct.unpack_from(">H", body, 2)[0] + 2
        header, body = body[:length], body[length:]
    if adobe is not None:
        header = (header if jfif else b"") + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([adobe])
    elif not jfif:
        header = b""
    if ids:
        at = body.index(b"\xff\xc0")
        sos = body.index(b"\xff\xda")
        changed = bytearray(body)
        for k in range(3):
            changed[at + 10 + 3 * k] = changed[sos + 5 + 2 * k] = ids[k]
        body = bytes(changed)
    return data[:2] + header + body


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422", "YBR_FULL"])
@pytest.mark.parametrize(
    ("options", "colours"),
    [
        ({"ids": b"RGB", "jfif": False}, "RGB"),
        ({"ids": b"rgb", "jfif": False}, "RGB"),
        ({"adobe": 0, "jfif": False}, "RGB"),
        ({"adobe": 1, "jfif": False}, "YBR"),
        ({"jfif": True}, "YBR"),
        ({"jfif": False}, None),
    ],
)
def test_colours_of_jpeg(tmp_path, photometric, options, colours):
    """The stream's own statement decides, otherwise the header. Samples are stored as they are, without conversion."""
    y, x = np.mgrid[:64, :64]
    samples = np.dstack([2 * x + y, 255 - 3 * x // 2, 40 + 2 * y]).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.frombytes("YCbCr", (64, 64), samples.tobytes()).save(buffer, "JPEG", quality=100, subsampling=0)
    stated = {"SamplesPerPixel": 3, "PhotometricInterpretation": photometric, "PlanarConfiguration": 0}
    path = compressed(
        tmp_path / "a.dcm", [jpeg_with(buffer.getvalue(), **options)], uid.JPEGBaseline8Bit, samples, **stated
    )
    is_rgb = (colours or ("RGB" if photometric == "RGB" else "YBR")) == "RGB"
    converted = np.asarray(Image.frombytes("YCbCr", (64, 64), samples.tobytes()).convert("RGB"))
    np.testing.assert_allclose(scans.read(path)[0][:, :, 0].astype(int), samples if is_rgb else converted, atol=6)


# --- directories and slice spacing ---


def test_files_of_operating_systems_are_ignored(tmp_path):
    lps = slices(3)
    folder = make_series(tmp_path / "s", lps)
    digest = scan_sha256(folder)
    names = (".DS_Store", "Thumbs.db", "desktop.ini", "._70.dcm", "DICOMDIR", "Icon\r", ".nfs0000001", "lost+found")
    for name in (*names, "70.dcm:Zone.Identifier", ".fuse_hidden01", ".apdisk"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2 not a scan")
    (folder / "__MACOSX").mkdir()
    np.testing.assert_array_equal(scans.read(folder)[0], axial_display(lps))
    assert scan_sha256(folder) == digest
    shutil.make_archive(str(tmp_path / "packed"), "tar", folder)
    np.testing.assert_array_equal(scans.read(tmp_path / "packed.tar")[0], axial_display(lps))
    (folder / ".70.dcm.Xa1b2").write_bytes(b"a partial copy")
    fails(folder, "series", ".70.dcm.Xa1b2")


def positions(tmp_path, values, numbers=None):
    lps = slices(len(values))
    folder = tmp_path / f"s{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for k, z in enumerate(values):
        at = {"ImagePositionPatient": [0, 0, z]} | ({} if numbers is None else {"InstanceNumber": numbers[k]})
        make_dicom(folder / f"{k}.dcm", np.ascontiguousarray(lps[:, :, k].T), **at)
    return folder, lps


HEAD = [0, 2.5, 5, 7.5, 10, 12.5, 20, 27.5, 35, 42.5, 50]


@pytest.mark.parametrize("numbers", [None, range(1, 12), range(11, 0, -1), [7] * 11])
def test_one_change_of_the_slice_distance(tmp_path, numbers):
    """Head CT: thin slices through the base of the skull, thick ones above."""
    folder, lps = positions(tmp_path, HEAD, numbers)
    voxels, header = scans.read(folder)
    np.testing.assert_array_equal(voxels, axial_display(lps))
    (notice,) = header.notices
    assert "changes once, from 2.5 mm to 7.5 mm after 5.dcm" in notice
    assert header.spacing_mm == (1, 1, None) and header == scans.header(folder)


def test_other_slice_distances_are_gaps(tmp_path):
    short = [0, 2.5, 5, 7.5, 10, 12.5, 20]  # the last but one slice may be missing
    twice = [*HEAD, 52.5, 55, 57.5]
    one_missing = [z for z in HEAD if z != 35]
    for values in (short, twice, one_missing, [z for z in HEAD if z != 5]):
        fails(positions(tmp_path, values)[0], "series", "mm apart, but")
    fails(positions(tmp_path, HEAD, [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13])[0], "series", "mm apart, but")
    assert scans.read(positions(tmp_path, [0, 2, 4, 6, 8])[0])[1].notices == ()


def test_optional_attributes_fail_softly(tmp_path):
    """Unreadable padding, spacing of a single picture, modality and InstanceNumber do not matter to the voxels."""
    path = make_dicom(tmp_path / "a.dcm", PICTURE, PixelPaddingValue=7, InstanceNumber=1, **TWELVE)
    data = path.read_bytes()
    for old, new in [
        (b"\x28\0\x30\0DS\x08\x001.0\\1.0 ", b"\x28\0\x30\0DS\x08\0unknown "),
        (b"\x08\0\x60\0CS\x02\0CT", b"\x08\0\x60\0CS\x02\0ct"),
        (b"\x20\0\x13\0IS\x02\x001 ", b"\x20\0\x13\0IS\x02\0x "),
    ]:
        assert old in data, old
        data = data.replace(old, new)
    path.write_bytes(data)
    voxels, header = scans.read(path)
    np.testing.assert_array_equal(voxels[:, :, 0, 0], PICTURE)
    assert header.modality is None and header.spacing_mm is None and header.orientation == "PLS"
