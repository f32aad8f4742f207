"""2D images in PNG and JPEG files."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from scan_files import COLOUR, RAMP, fails, save_image

from input_pipeline.images import scans


def test_png_gray_and_colour(tmp_path):
    for pixels in (RAMP, RAMP.astype(np.uint16) * 250, COLOUR):
        voxels, header = scans.read(save_image(tmp_path / "a.png", pixels))
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
        path = save_image(tmp_path / "a.png", np.concatenate([pixels, alpha], axis=-1))
        np.testing.assert_array_equal(scans.read(path)[0][:, :, 0], pixels)
        alpha[2, 3] = 254
        path = save_image(tmp_path / "a.png", np.concatenate([pixels, alpha], axis=-1))
        fails(path, "ambiguous", "transparent", "background")
    Image.fromarray(RAMP).save(tmp_path / "key.png", transparency=8)
    fails(tmp_path / "key.png", "ambiguous", "transparent")
    Image.fromarray(RAMP).save(tmp_path / "key.png", transparency=9)  # no pixel has this value
    np.testing.assert_array_equal(scans.read(tmp_path / "key.png")[0][..., 0, 0], RAMP)


def test_png_that_would_lose_bits_or_frames_is_refused(tmp_path):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    fails(tmp_path / "a.png", "unsupported", "16 bits")
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP[::-1])]
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    fails(tmp_path / "b.png", "unsupported", "animated")


def test_every_flipped_bit_of_a_png_is_detected(tmp_path):
    """Pillow itself skips the checksum of the image data."""
    path = save_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (6, 7), dtype=np.uint8))
    data = path.read_bytes()
    for bit in range(8 * 8, 8 * len(data), 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        fails(path, "damaged")


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_tag(tmp_path, tag):
    """A 3 x 2 image of distinct pixels against Pillow's own orientation, and as drawn for tag 6.

    stored  a b     displayed, rotated right   e c a
            c d                           f d b
            e f
    """
    pixels = np.array([[10, 60], [110, 160], [210, 250]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = tag
    path = save_image(tmp_path / "a.png", pixels, exif=exif)
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
    voxels, header = scans.read(save_image(tmp_path / "a.jpg", smooth, quality=95))
    assert header.shape == (64, 48, 1, 1)
    assert np.abs(voxels[..., 0, 0].astype(int) - smooth).max() <= 3  # measured: 3
    exif = Image.Exif()
    exif[0x0112] = 8
    turned, header = scans.read(save_image(tmp_path / "b.jpg", smooth, quality=95, exif=exif))
    assert header.shape == (48, 64, 1, 1)
    np.testing.assert_array_equal(turned[..., 0, 0], np.rot90(voxels[..., 0, 0]))
    colour, header = scans.read(save_image(tmp_path / "c.jpg", np.stack([smooth] * 3, axis=-1)))
    assert header.shape == (64, 48, 1, 3)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "d.jpg")
    assert scans.read(tmp_path / "d.jpg")[1].photometric == "CMYK"
    data = (tmp_path / "a.jpg").read_bytes()
    for end in range(3, len(data) - 1, 61):
        (tmp_path / "e.jpg").write_bytes(data[:end])
        with pytest.raises(scans.ScanError):
            scans.read(tmp_path / "e.jpg")


def test_a_jpeg_named_png_is_read_but_an_image_named_nii_is_not(tmp_path):
    smooth = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    path = save_image(tmp_path / "a.jpg", smooth)
    path.rename(tmp_path / "a.png")
    assert scans.read(tmp_path / "a.png")[1].shape == (64, 64, 1, 1)
    (tmp_path / "a.png").rename(tmp_path / "a.nii")
    fails(tmp_path / "a.nii", "ambiguous", "a 2D image")


def png_with(path, *chunks: tuple[bytes, bytes], before: bytes = b"IDAT"):
    """Insert chunks into a PNG of distinct pixels, before the first chunk of this name."""
    save_image(path, RAMP)
    data, added = path.read_bytes(), b""
    for name, body in chunks:
        added += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    position = data.index(before) - 4
    path.write_bytes(data[:position] + added + data[position:])
    return path


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
BAD_EXIF = {"text": b"this is no TIFF header", "cut": b"MM\0*\0\0\0\x08\0\x05\x01\x12", "order": b"XX\0*\0\0\0\x08\0\0"}


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("body", [b"\0\0\0\0" + XMP, b"\x01\0\0\0" + zlib.compress(XMP)])
def test_a_png_whose_orientation_is_in_xmp_only(tmp_path, before, body):
    path = png_with(tmp_path / "a.png", (b"iTXt", b"XML:com.adobe.xmp\0" + body), before=before)
    voxels, header = scans.read(path)
    np.testing.assert_array_equal(voxels[..., 0, 0], np.rot90(RAMP, -1))
    assert header == scans.header(path) and header.shape == (12, 5, 1, 1) and header.notices == ()


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", BAD_EXIF)
def test_unreadable_metadata_are_a_notice(tmp_path, kind, before):
    path = png_with(tmp_path / "a.png", (b"eXIf", BAD_EXIF[kind]), before=before)
    voxels, header = scans.read(path)
    np.testing.assert_array_equal(voxels[..., 0, 0], RAMP)
    assert kind == "cut" or "unreadable EXIF or XMP metadata" in header.notices[0]
    save_image(tmp_path / "b.jpg", RAMP, exif=b"Exif\0\0" + BAD_EXIF[kind])
    assert scans.read(tmp_path / "b.jpg")[0].shape == (5, 12, 1, 1)


def test_an_invalid_orientation_is_a_notice(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    voxels, header = scans.read(save_image(tmp_path / "a.png", RAMP, exif=exif))
    np.testing.assert_array_equal(voxels[..., 0, 0], RAMP)
    assert "invalid orientation" in header.notices[0]


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations_are_refused(tmp_path, kind):
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP[::-1])]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    fails(tmp_path / f"a.{kind}", "unsupported", "save")


def test_damaged_optional_chunks_do_not_matter(tmp_path):
    """Pillow fails on them, or on texts of several megabytes; the pixels do not depend on them."""
    data = save_image(tmp_path / "a.png", RAMP).read_bytes()
    exif = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x112, 3, 1, 6, 0, 0)

    def with_chunks(*chunks: tuple[bytes, bytes], last: bool = False):
        packed = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
        at = data.index(b"IEND" if last else b"IDAT") - 4
        (tmp_path / "a.png").write_bytes(data[:at] + b"".join(packed) + data[at:])
        return scans.read(tmp_path / "a.png")

    text = b"\0\0" + zlib.compress(bytes(5_000_000))
    damaged = [(name, b"\0") for name in (b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"iCCP")] + [(b"zTXt", b"Comment" + text)]
    for last in (False, True):
        for chunk in damaged:
            voxels, header = with_chunks(chunk, last=last)
            np.testing.assert_array_equal(voxels[:, :, 0, 0], RAMP)
            assert header.notices == ()
        voxels, header = with_chunks(*damaged, (b"eXIf", exif), last=last)
        np.testing.assert_array_equal(voxels[:, :, 0, 0], RAMP[::-1].T)
        voxels, header = with_chunks((b"zTXt", b"Raw profile type xmp" + text), last=last)
        np.testing.assert_array_equal(voxels[:, :, 0, 0], RAMP)
        assert "unreadable EXIF or XMP" in header.notices[0]
