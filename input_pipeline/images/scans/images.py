"""PNG and JPEG pictures: always one 2D image, gray or colour.

Alpha is dropped where it is opaque everywhere and an error otherwise (which background was meant is not known).
Palettes become RGB, 1, 2 and 4 bits become 8, CMYK becomes RGB without a colour profile. The EXIF orientation is
applied. A JPEG has no checksum: a flipped bit in its picture data changes voxels unseen.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from input_pipeline.images.scans import codestream
from input_pipeline.images.scans.base import (
    Header,
    ScanError,
    ScanLimits,
    blamed,
    check_shape,
    check_volume,
    natural,
    opened,
)

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
EXIF_ORIENTATION = 0x0112
FORMATS = ("PNG", "JPEG")  # no other decoder of Pillow's is ever tried
GRAY_MODES = {"1": np.uint8, "L": np.uint8, "LA": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16}
COLOUR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK")


def sniff(start: bytes) -> bool:
    return start.startswith((PNG, JPEG))


def oriented(pixels: np.ndarray, tag: int) -> np.ndarray:
    """A view of [H, W, ...] as the picture is meant to be seen, by the EXIF or TIFF orientation tag.

    A stored picture (first row, first column ...) and what is shown:

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


def check_png(path, data: bytes) -> list[bytes]:
    """Check every chunk's CRC (Pillow skips those of the picture data) and the order IHDR, IDAT, IEND.

    Returns:
      The names of the chunks.
    Raises:
      ScanError: a damaged, cut, animated, or 16-bit picture with more than one channel, which Pillow cuts to 8 bits.
    """
    damaged = "it is damaged: copy it again from its source"
    at, names = len(PNG), []
    while not names or names[-1] != b"IEND":
        if at + 12 > len(data):
            raise ScanError(path, "the PNG is cut short", damaged)
        length, name = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            raise ScanError(path, "the PNG is cut short or a chunk length is damaged", damaged)
        body = memoryview(data)[at + 4 : at + 8 + length]
        if zlib.crc32(body) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            raise ScanError(path, f"the checksum of PNG chunk {len(names) + 1} is wrong", damaged)
        names.append(name)
        at += 12 + length
    if names[0] != b"IHDR" or b"IDAT" not in names or names.count(b"IHDR") > 1:
        raise ScanError(path, "the PNG has no picture", damaged)
    if b"acTL" in names:
        raise ScanError(path, "is an animated PNG", "save the frame that is meant", "unsupported")
    bits, colour = data[24], data[25]
    if bits == 16 and colour != 0:
        what = "has 16 bits and several channels, of which only 8 bits could be read"
        raise ScanError(path, what, "save it as 8-bit colour or 16-bit gray", "unsupported")
    return names


def inspect(path, limits: ScanLimits) -> tuple[Image.Image, int, Header]:
    """The opened, not yet decoded picture, its EXIF orientation, and its header."""
    with opened(path, limits) as file:
        data = file.read()
    exif = True
    if data.startswith(PNG):
        exif = b"eXIf" in check_png(path, data)  # without it Pillow would decode the picture to look for one behind it
    else:
        try:
            codestream.jpeg(data)
        except ValueError as error:
            raise ScanError(path, str(error), "it is damaged: copy it again from its source") from None
    with blamed(path, "opening the picture"):
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            remedy = "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
            raise ScanError(path, str(error), remedy, "limit") from None
    wide, high = picture.size
    if Image.MAX_IMAGE_PIXELS is not None and wide * high > Image.MAX_IMAGE_PIXELS:
        what = f"{high} x {wide} pixels are more than {Image.MAX_IMAGE_PIXELS:,}"
        raise ScanError(path, what, "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS", "limit")
    if picture.mode not in GRAY_MODES and picture.mode not in COLOUR_MODES:
        raise ScanError(path, f"has pixels of mode {picture.mode}", "save it as gray or RGB", "unsupported")
    with blamed(path, "reading the EXIF orientation", quiet=True):
        tag = int(picture.getexif().get(EXIF_ORIENTATION, 0) or 1) if exif else 1
    if not 1 <= tag <= 8:
        raise ScanError(path, f"states the EXIF orientation {tag}", "remove or repair the EXIF data", "ambiguous")
    h, w = (wide, high) if tag >= 5 else (high, wide)
    dtype = GRAY_MODES.get(picture.mode, np.uint8)
    channels = 1 if picture.mode in GRAY_MODES else 3
    check_shape(path, (h, w, 1, channels + 1), np.dtype(dtype).itemsize, limits)  # + 1: alpha, while it is checked
    names = {"1": "gray", "L": "gray", "LA": "gray", "P": "palette", "PA": "palette", "RGBA": "RGB"}
    head = Header(
        format="image",
        kind="2d",
        modality=None,
        shape=(h, w, 1, channels),
        spacing_mm=None,
        orientation=None,
        dtype=np.dtype(dtype).name,
        photometric=names.get(picture.mode, "gray" if channels == 1 else picture.mode),
    )
    return picture, tag, head


def opaque(path, alpha: np.ndarray, full: int) -> None:
    if (alpha != full).any():
        remedy = "blend it with the background that is meant and save it without alpha"
        raise ScanError(path, "has transparent pixels", remedy, "ambiguous")


def decode(path, picture: Image.Image) -> np.ndarray:
    """[H, W] or [H, W, 3] as stored."""
    with blamed(path, "decoding the picture"):
        picture.load()
        key = picture.info.get("transparency")
        if picture.mode == "I;16" or picture.mode.startswith("I;16"):
            pixels = np.asarray(picture).astype(np.uint16)
            if key is not None:
                opaque(path, (pixels != key).astype(np.uint8), 1)
            return pixels
        if key is not None or picture.mode in ("LA", "RGBA", "PA"):
            gray = picture.mode in GRAY_MODES
            # One bit is spread to 0 and 255 by "L", but its transparent value is not.
            full = picture.convert("RGBA")
            opaque(path, np.asarray(full.getchannel("A")), 255)
            return np.asarray(full.convert("RGB").getchannel(0) if gray else full.convert("RGB"))
        mode = "L" if picture.mode in GRAY_MODES else "RGB"
        return np.asarray(picture if picture.mode == mode else picture.convert(mode))  # convert always copies


def header(path, *, limits: ScanLimits) -> Header:
    """Without decoding; a PNG's checksums are checked."""
    return inspect(path, limits)[2]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    check_volume(path, volume, 1, limits)
    picture, tag, head = inspect(path, limits)
    pixels = oriented(decode(path, picture), tag)
    voxels = natural(path, pixels[None])[0].reshape(head.shape)
    return voxels, head
