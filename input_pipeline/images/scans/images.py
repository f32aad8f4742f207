"""2D images in PNG and JPEG files, gray or colour.

Opaque alpha is dropped; transparency is an error, because the intended background is unknown. Palettes become RGB, 1, 2
and 4 bits become 8, CMYK becomes RGB without a colour profile. The orientation that EXIF or else XMP states is applied;
unreadable metadata become a notice. JPEG has no checksum, so a flipped bit in its image data is not detected.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from input_pipeline.images.scans import codestream
from input_pipeline.images.scans.access import as_scan_error, open_scan
from input_pipeline.images.scans.base import COPY_AGAIN, Header, ScanError, ScanLimits
from input_pipeline.images.scans.checks import check_opaque, check_shape, check_volume, to_intensities

PNG = b"\x89PNG\r\n\x1a\n"
PNG_START = 33  # bytes up to the end of the first chunk
JPEG = b"\xff\xd8\xff"
EXIF_ORIENTATION = 0x0112
# PNG texts that can state an orientation: XMP, and EXIF or XMP as ImageMagick writes them.
METADATA_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type ")
UNREADABLE = ("has unreadable EXIF or XMP metadata: if the image is not upright, save it again",)
FORMATS = ("PNG", "JPEG")  # Pillow may try no other decoder
GRAY_MODES = {"1": np.uint8, "L": np.uint8, "LA": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16}
COLOUR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK")
SHRINK = "shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS"


def sniff(start: bytes) -> bool:
    return start.startswith((PNG, JPEG))


def apply_orientation(pixels: np.ndarray, tag: int) -> np.ndarray:
    """Return a view of [H, W, ...] in display orientation, by the EXIF or TIFF orientation tag.

    A stored image and its display for each tag:

        stored   1: a b   2: b a   3: f e   4: e f   5: a c e   6: e c a   7: f d b   8: b d f
        a b         c d      d c      d c      c d      b d f      f d b      e c a      a c e
        c d         e f      f e      b a      a b
        e f
    """
    if tag >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if tag in (3, 4, 7, 8) else 1
    columns = -1 if tag in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def check_png(path, data: bytes) -> tuple[bytes, bytes]:
    """Check the CRC of every chunk (Pillow skips those of image data).

    Returns the file without optional chunks (texts, colour profiles, times), because Pillow fails on some of them. Also
    returns the chunks that can state an orientation. Raises ScanError if the image is damaged, animated, or has 16 bits
    and several channels (Pillow reduces it to 8).
    """
    offset, names, image, metadata = len(PNG), [], [PNG], []
    while not names or names[-1] != b"IEND":
        if offset + 12 > len(data):
            raise ScanError(path, "the PNG is truncated", COPY_AGAIN)
        length, name = struct.unpack_from(">I4s", data, offset)
        if offset + 12 + length > len(data):
            raise ScanError(path, "the PNG is truncated or a chunk length is damaged", COPY_AGAIN)
        body = memoryview(data)[offset + 4 : offset + 8 + length]
        if zlib.crc32(body) != struct.unpack_from(">I", data, offset + 8 + length)[0]:
            raise ScanError(path, f"the checksum of PNG chunk {len(names) + 1} is wrong", COPY_AGAIN)
        names.append(name)
        text = name in (b"iTXt", b"zTXt", b"tEXt") and bytes(body[4:24]).startswith(METADATA_TEXTS)
        chunk = data[offset : offset + 12 + length]
        if name == b"eXIf" or text:
            metadata.append(chunk)
        elif name[0] < 96 or name == b"tRNS":  # an upper-case letter: not optional
            image.append(chunk)
        offset += 12 + length
    if names[0] != b"IHDR" or b"IDAT" not in names or names.count(b"IHDR") > 1:
        raise ScanError(path, "the PNG has no image data", COPY_AGAIN)
    if b"acTL" in names:
        raise ScanError(path, "is an animated PNG", "save the frame you need as PNG", "unsupported")
    bits, colour = data[24], data[25]
    if bits == 16 and colour != 0:
        reason = "has 16 bits and several channels, which would be read as 8 bits"
        raise ScanError(path, reason, "save it as 8-bit colour or 16-bit gray", "unsupported")
    return b"".join(image), b"".join(metadata)


def png_orientation(chunks: bytes) -> tuple[int, tuple[str, ...]]:
    """Return the orientation that chunks of a PNG state, and notices. Pillow parses them in a one-pixel image."""
    if not chunks:
        return 1, ()
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "PNG")
    start, end = pixel.getvalue()[:PNG_START], pixel.getvalue()[PNG_START:]
    try:
        image = Image.open(io.BytesIO(start + chunks + end), formats=("PNG",))
    except Exception:  # as below
        return 1, UNREADABLE
    return orientation_tag(image)


def orientation_tag(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    """Return the orientation of EXIF or XMP, 1 if neither states a valid one, and notices."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tag = image.getexif().get(EXIF_ORIENTATION, 0) or 1
    except Exception:  # Pillow raises nearly every type on damaged metadata, whose text may name a patient
        return 1, UNREADABLE
    if tag not in range(1, 9):
        return 1, ("states an invalid orientation in its metadata: if the image is not upright, save it again",)
    return int(tag), ()


def open_image(path, limits: ScanLimits) -> tuple[Image.Image, int, Header]:
    """Return the image before decoding, its EXIF orientation, and its header."""
    with open_scan(path, limits) as file:
        data = file.read()
    png = data.startswith(PNG)
    if png:
        data, metadata = check_png(path, data)
    else:
        try:
            codestream.jpeg(data)
        except ValueError as error:
            raise ScanError(path, str(error), COPY_AGAIN) from None
    with as_scan_error(path, "opening the image"), warnings.catch_warnings(action="ignore"):  # on metadata
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ScanError(path, str(error), SHRINK, "limit") from None
    (width, height), limit = image.size, Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ScanError(path, f"{height} x {width} pixels are more than {limit:,}", SHRINK, "limit")
    _check_mode(path, image)
    gray, dtype = image.mode in GRAY_MODES, np.dtype(GRAY_MODES.get(image.mode, np.uint8))
    channels = 1 if gray else 3
    check_shape(path, (height, width, 1, channels + 1), dtype.itemsize, limits)  # + 1 for alpha, decoded as well
    tag, notices = png_orientation(metadata) if png else orientation_tag(image)
    photometric = "gray" if gray else {"P": "palette", "PA": "palette", "RGBA": "RGB"}.get(image.mode, image.mode)
    shape = (width, height, 1, channels) if tag >= 5 else (height, width, 1, channels)
    head = Header(format="image", shape=shape, dtype=dtype.name, photometric=photometric, notices=notices)
    return image, tag, head


def pixels_of(name, image: Image.Image) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the pixels of an image in memory in display orientation, [H, W] or [H, W, 3] in colour, and notices.

    Modes are treated as in files. Raises ScanError for a transparent image, or for one with several frames.
    """
    if getattr(image, "n_frames", 1) > 1:
        remedy = "pass one frame: image.seek(i), then image.copy()"
        raise ScanError(name, f"has {image.n_frames} frames", remedy, "ambiguous")
    with as_scan_error(name, "decoding the image"):
        image.load()  # Pillow applies the orientation of a TIFF, and only then forgets it
    tag, notices = orientation_tag(image)
    if image.mode in ("I", "F"):  # 32 bits; no file of the formats above has them
        return apply_orientation(np.asarray(image), tag), notices
    _check_mode(name, image)
    return apply_orientation(decode(name, image), tag), notices


def _check_mode(path, image: Image.Image) -> None:
    if image.mode not in GRAY_MODES and image.mode not in COLOUR_MODES:
        raise ScanError(path, f"has the pixel mode {image.mode}", "save it as gray or RGB", "unsupported")


def decode(path, image: Image.Image) -> np.ndarray:
    """Return the stored pixels, [H, W] or [H, W, 3]."""
    with as_scan_error(path, "decoding the image"):
        image.load()
        transparent, mode = image.info.get("transparency"), "L" if image.mode in GRAY_MODES else "RGB"
        if image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint16)
            if transparent is not None:
                check_opaque(path, pixels != transparent, True)
            return pixels
        if transparent is not None or image.mode in ("LA", "RGBA", "PA"):
            # Convert through RGBA: "L" maps one bit to 0 and 255, but leaves the transparent value as it is.
            rgba = image.convert("RGBA")
            check_opaque(path, np.asarray(rgba.getchannel("A")), 255)
            return np.asarray(rgba.getchannel(0) if mode == "L" else rgba.convert("RGB"))
        return np.asarray(image if image.mode == mode else image.convert(mode))  # convert always copies


def header(path, *, limits: ScanLimits) -> Header:
    """Return the header without decoding the image. The checksums of a PNG are verified."""
    return open_image(path, limits)[2]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    check_volume(path, volume, 1, limits)
    image, tag, head = open_image(path, limits)
    pixels = apply_orientation(decode(path, image), tag)
    return to_intensities(path, pixels[None])[0].reshape(head.shape), head
