"""TIFF files: pages, compressions, photometric interpretations."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import tifffile
from PIL import Image
from scan_files import COLOUR, RAMP, fails, patched, save_image

from input_pipeline.images import scans
from input_pipeline.images.scans.images import apply_orientation, pixels_of

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
    fails(tmp_path / "a.tif", "limit", "3 pages", limits=scans.ScanLimits(max_slices=3))
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
    Image.fromarray(RAMP).save(tmp_path / "l.tif", compression="tiff_lzw")  # Pillow decodes LZW
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


def test_tiff_imagej_stack_is_not_reduced_to_its_first_slice(tmp_path):
    stack = np.stack([RAMP.astype(np.uint16) * (k + 1) for k in range(3)])
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    try:
        voxels, _ = scans.read(tmp_path / "a.tif")
    except scans.ScanError as error:
        assert error.fault == "ambiguous" and "3 images" in str(error)
    else:
        np.testing.assert_array_equal(voxels[..., 0], np.moveaxis(stack, 0, -1))
    tifffile.imwrite(tmp_path / "b.tif", stack, imagej=True)  # without axes, tifffile states channels
    fails(tmp_path / "b.tif", "ambiguous", "3 channels", "with the axes ZYX")


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
        for target, words in ((len(data) + 100, "outside the file"), (first, "links back")):
            broken = data.replace(struct.pack(form, last), struct.pack(form, target), 1)
            assert broken != data
            path.write_bytes(broken)
            fails(path, "damaged", "page 3", words)
    tifffile.imwrite(path, pages, photometric="minisblack", metadata={"axes": "ZYX"}, truncate=True)
    fails(path, "ambiguous", "several slices in one page")


def test_truncated_tiff(tmp_path):
    """By itself, tifffile fills missing data with zeros."""
    for compression in (None, "zlib"):
        tifffile.imwrite(
            tmp_path / "a.tif", np.random.default_rng(0).integers(0, 99, (40, 30)), compression=compression
        )
        data = (tmp_path / "a.tif").read_bytes()
        for end in range(8, len(data) - 1, 211):
            (tmp_path / "b.tif").write_bytes(data[:end])
            with pytest.raises(scans.ScanError):
                scans.read(tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("axes", "shape", "options", "words"),
    [
        ("TZCYX", (4, 3, 2, 30, 40), {"imagej": True}, "4 times x 3 slices x 2 channels"),
        ("TZCYX", (4, 3, 2, 30, 40), {"ome": True}, "4 times x 3 slices x 2 channels"),
        ("TYX", (4, 30, 40), {"imagej": True}, "4 times"),
        ("CYX", (2, 30, 40), {"ome": True}, "2 channels"),
        ("TCYX", (2, 3, 30, 40), {}, "2 times x 3 channels"),
        ("QQYX", (2, 3, 30, 40), {}, "2 images along Q x 3 images along Q"),
    ],
)
def test_times_and_channels_are_no_slices(tmp_path, axes, shape, options, words):
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    metadata = {"axes": axes} if axes != "QQYX" else {}
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", metadata=metadata, **options)
    fails(tmp_path / "a.tif", "ambiguous", f"its metadata state {words}", "save each volume as a separate file")


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}, {}])
def test_slices_with_metadata_are_read(tmp_path, options):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 30, 40), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", metadata={"axes": "ZYX"}, **options)
    np.testing.assert_array_equal(scans.read(tmp_path / "a.tif")[0][..., 0], np.moveaxis(pixels, 0, -1))


@pytest.mark.parametrize("small", [(16, 20), (8, 10)])
def test_pages_that_are_smaller_copies_are_dropped(tmp_path, small):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 20), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for page in pixels:
            tif.write(page, photometric="minisblack", metadata=None, compression="zlib")
            tif.write(np.zeros(small, np.uint8), photometric="minisblack", metadata=None, subfiletype=1)
    voxels, header = scans.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(voxels[..., 0], np.moveaxis(pixels, 0, -1))
    assert header.shape == (16, 20, 3, 1)
    with tifffile.TiffWriter(tmp_path / "b.tif") as tif:
        tif.write(pixels[0], photometric="minisblack", metadata=None)
        tif.write(pixels[1], photometric="minisblack", metadata=None, subfiletype=1)
    entry = lambda value: struct.pack("<HHII", 254, 4, 1, value)  # noqa: E731
    data = (tmp_path / "b.tif").read_bytes()
    assert data.count(entry(1)) == 1
    (tmp_path / "b.tif").write_bytes(data.replace(entry(1), entry(4)))
    fails(tmp_path / "b.tif", "ambiguous", "has a transparency mask")
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tif:
        tif.write(pixels[0], photometric="minisblack", subifds=1)
        tif.write(np.zeros((8, 10), np.uint8), photometric="minisblack", subfiletype=1)
    np.testing.assert_array_equal(scans.read(tmp_path / "pyramid.tif")[0][..., 0, 0], pixels[0])


def write_pages(path, description: str, count: int = 6):
    pages = np.arange(count * 12, dtype=np.uint16).reshape(count, 3, 4)
    with tifffile.TiffWriter(path) as file:
        for number, page in enumerate(pages):
            text = description if number == 0 else None
            file.write(page, photometric="minisblack", contiguous=False, metadata=None, description=text)
    return path, np.moveaxis(pages, 0, -1)


def test_several_images_in_one_file_are_refused(tmp_path):
    """Volumes one after another, and OME images, are not the slices of one volume; single pages are."""
    volume = np.stack([RAMP, RAMP // 2])
    for name, axes, written in (("a.tif", "ZYX", volume), ("b.ome.tif", "ZYX", volume), ("c.ome.tif", "YX", RAMP)):
        with tifffile.TiffWriter(tmp_path / name, ome=".ome" in name) as file:
            for _ in range(3):
                file.write(written, photometric="minisblack", metadata={"axes": axes})
        fails(tmp_path / name, "ambiguous", "its metadata state 3 images", "as a separate file")
    with tifffile.TiffWriter(tmp_path / "d.tif") as file:
        file.write(volume, photometric="minisblack")
        file.write(RAMP[::2, ::2], photometric="minisblack", subfiletype=1)  # a thumbnail
    np.testing.assert_array_equal(scans.read(tmp_path / "d.tif")[0][..., 0], np.moveaxis(volume, 0, -1))
    with tifffile.TiffWriter(tmp_path / "d.tif") as file:
        for page in volume:
            file.write(page, photometric="minisblack")
    np.testing.assert_array_equal(scans.read(tmp_path / "d.tif")[0][..., 0], np.moveaxis(volume, 0, -1))


def test_ome_metadata_that_do_not_fit_the_pages_are_refused(tmp_path):
    ome = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="4" SizeY="3" SizeZ="{}" SizeC="1" SizeT="1">'
        '<Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData/></Pixels></Image></OME>'
    )
    path, pages = write_pages(tmp_path / "a.tif", ome.format(6))
    np.testing.assert_array_equal(scans.read(path)[0][..., 0], pages)
    fails(write_pages(path, ome.format(12))[0], "ambiguous", "state 12 slices, but it has 6 pages")
    fails(write_pages(path, ome.format(3))[0], "ambiguous", "state 3 slices, but it has 6 pages")
    fails(write_pages(path, ome.format(6)[:150])[0], "ambiguous", "unreadable OME metadata")
    path, pages = write_pages(path, ome.format(6)[:150], 1)
    np.testing.assert_array_equal(scans.read(path)[0][..., 0], pages)


def test_calibration_of_imagej(tmp_path):
    """ImageJ stores signed 16-bit pixels as unsigned, and CT with its intercept as calibration."""
    text = "ImageJ=1.53t\nimages=6\nslices=6\n"
    for calibration, slope, intercept in (("", 1, 0), ("c0=-1024.0\nc1=1.0\n", 1, -1024), ("c0=-1\nc1=0.5\n", 0.5, -1)):
        path, pages = write_pages(tmp_path / "a.tif", text + "cf=0\n" * bool(calibration) + calibration)
        voxels, header = scans.read(path)
        np.testing.assert_array_equal(voxels[..., 0], pages * float(slope) + intercept)
        assert header.rescaled == bool(calibration) and scans.header(path) == header
    fails(write_pages(path, text + "cf=0\nc0=0\nc1=0\n")[0], "damaged", "calibration")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_orientation_with_every_decoder(tmp_path, compression):
    """Pillow decodes some compressions; the orientation is applied once, and to every page."""
    pages = [RAMP, RAMP[::-1], RAMP[:, ::-1]]
    for tag in range(1, 9):
        images = [Image.fromarray(np.ascontiguousarray(page)) for page in pages]
        options = {"tiffinfo": {274: tag}, "compression": compression}
        images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:], **options)
        voxels = scans.read(tmp_path / "a.tif")[0][..., 0].astype(int)
        for number, page in enumerate(pages):
            np.testing.assert_allclose(
                voxels[:, :, number], apply_orientation(page, tag), atol=12 * (compression == "jpeg")
            )


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_orientation_of_images_in_memory(tmp_path, suffix):
    """Pillow applies the orientation of a TIFF when it loads the image, and that of a PNG never."""
    exif = Image.Exif()
    for tag in range(1, 9):
        exif[274] = tag
        options = {"tiffinfo": {274: tag}, "compression": "tiff_lzw"} if suffix == "tif" else {"exif": exif}
        path = save_image(tmp_path / f"a.{suffix}", RAMP, **options)
        for loaded in (False, True):
            with Image.open(path) as image:
                if loaded:
                    image.load()
                np.testing.assert_array_equal(pixels_of("image", image)[0], apply_orientation(RAMP, tag))


@pytest.mark.parametrize("padding", [1, 3, 100])
def test_zeros_at_the_end_of_a_packbits_strip(tmp_path, padding):
    pixels, path = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8), 4, axis=1), tmp_path / "a.tif"
    Image.fromarray(pixels).save(path, compression="packbits")
    with tifffile.TiffFile(path) as file:
        tags, (start,), (size,) = file.pages[0].tags, file.pages[0].dataoffsets, file.pages[0].databytecounts
        offsets, counts = (tags[name].offset + 8 for name in ("StripOffsets", "StripByteCounts"))
    data = bytearray(path.read_bytes())
    strip = bytes(data[start : start + size]) + bytes(padding)
    struct.pack_into("<H", data, offsets, len(data))
    struct.pack_into("<L", data, counts, len(strip))
    path.write_bytes(data + strip)
    np.testing.assert_array_equal(scans.read(path)[0][:, :, 0, 0], pixels)
