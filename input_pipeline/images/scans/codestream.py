"""Size and integrity of compressed images from their headers, checked before a decoder allocates memory.

JPEG (ITU T.81), JPEG-LS (T.87), JPEG 2000 (T.800) and PackBits (DICOM PS3.5 annex G, TIFF 6.0 section 9).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

MAX_TILES = 16384  # more than any encoder writes
MAX_SCANS = 200  # every scan of a progressive JPEG costs one pass over the image


Colours = Literal["RGB", "YBR"]


class Size(NamedTuple):
    """Size of an image as its codestream states it; `bits` is per sample."""

    rows: int
    columns: int
    channels: int
    bits: int


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, content) of the segments of a JPEG or JPEG-LS stream before its first scan."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        length = struct.unpack_from(">H", data, offset + 2)[0]
        if marker == 0xDA or length < 2:
            return
        yield marker, data[offset + 4 : offset + 2 + length]
        offset += 2 + length


def is_frame_header(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7


def jpeg(data: bytes) -> Size:
    """Return the size in the frame header of a JPEG or JPEG-LS stream. Raises ValueError if it is damaged."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("does not start with a JPEG marker")
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise ValueError(f"has {scans} JPEG scans, more than the limit of {MAX_SCANS}")
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise ValueError("has no JPEG end marker: it is truncated")
    for marker, content in jpeg_segments(data):
        if is_frame_header(marker) and len(content) >= 6:
            bits, rows, columns, channels = struct.unpack_from(">BHHB", content)
            return Size(rows, columns, channels, bits)
    raise ValueError("has no JPEG frame header")


def jpeg_colours(data: bytes) -> tuple[Colours | None, Colours]:
    """Return the colours that a JPEG stream states (None if it does not), and those that libjpeg assumes.

    A stream states its colours by component ids R, G, B, by a JFIF marker (YBR), or by the transform of an Adobe
    marker. libjpeg looks for JFIF, then Adobe, then component ids; without any of them it assumes YBR.
    """
    jfif, adobe, ids = False, None, b""
    for marker, content in jpeg_segments(data):
        if marker == 0xE0 and content.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12:
            adobe = content[11]
        elif is_frame_header(marker):
            ids = content[6::3][:3]
    transform: Colours | None = None if adobe is None else "YBR" if adobe == 1 else "RGB"
    named = ids.upper() == b"RGB"
    stated: Colours | None = "RGB" if named else "YBR" if jfif else transform
    assumed: Colours = "YBR" if jfif else transform or ("RGB" if ids == b"RGB" else "YBR")
    return stated, assumed


def jpeg2000(data: bytes) -> Size:
    """Return the size in the SIZ segment of a JPEG 2000 codestream. Raises ValueError if it is damaged."""
    offset = data.find(b"\xff\x4f\xff\x51", 0, 4096)  # not at 0 in a JP2 box
    if offset < 0 or offset + 42 > len(data):
        raise ValueError("has no JPEG 2000 header")
    width, height, x0, y0, tile_w, tile_h, tx0, ty0, channels = struct.unpack_from(">8IH", data, offset + 8)
    if not (channels and tile_w and tile_h and offset + 42 + 3 * channels <= len(data)):
        raise ValueError("has an empty JPEG 2000 header")
    if b"\xff\xd9" not in data.rstrip(b"\0")[-16:]:  # padding may follow the marker
        raise ValueError("has no JPEG 2000 end marker: it is truncated")
    components = {struct.unpack_from("BBB", data, offset + 42 + 3 * i) for i in range(channels)}
    if len(components) > 1:
        raise ValueError("has JPEG 2000 channels of different sizes or bit depths")
    depth, dx, dy = components.pop()
    if not (dx and dy and x0 < width and y0 < height and tx0 <= x0 and ty0 <= y0):
        raise ValueError("has an inconsistent JPEG 2000 header")
    tiles = -(-(width - tx0) // tile_w) * -(-(height - ty0) // tile_h)
    if tiles * channels > MAX_TILES:
        raise ValueError(f"has {tiles} JPEG 2000 tiles of {channels} channels, more than the limit of {MAX_TILES}")
    side = lambda end, start, step: -(-end // step) + (-start // step)  # noqa: E731
    return Size(side(height, y0, dy), side(width, x0, dx), channels, (depth & 0x7F) + 1)


def packbits_size(data: bytes, expected: int) -> int:
    """Return the unpacked size of a PackBits stream in bytes. Counting stops above `expected + 1`.

    Zero bytes after the expected size are padding and do not count.
    """
    offset = size = 0
    while offset < len(data) and size <= expected + 1:
        head = data[offset]
        if head == 0 and size == expected and data.count(0, offset) == len(data) - offset:
            break
        if head < 128:
            size += head + 1
            offset += head + 2
        elif head > 128:
            size += 257 - head
            offset += 2
        else:
            offset += 1
    return size


def check_rle(data: bytes, planes: int, plane_bytes: int) -> None:
    """Raise ValueError unless a DICOM RLE frame has a segment of `plane_bytes` (or one more) for each byte plane."""
    if len(data) < 64:
        raise ValueError("has an RLE frame without a header")
    count, *offsets = struct.unpack_from("<16L", data)
    if count != planes or count > 15:
        raise ValueError(f"has {count} RLE segments, but its header requires {planes}")
    ends = [*offsets[1:count], len(data)]
    for start, end in zip(offsets, ends, strict=False):
        if not 64 <= start < end <= len(data):
            raise ValueError("has RLE segments outside the frame")
        size = packbits_size(data[start:end], plane_bytes)
        if not plane_bytes <= size <= plane_bytes + 1:
            amount = f"more than {plane_bytes + 1}" if size > plane_bytes else f"only {size}"
            raise ValueError(f"has an RLE segment of {amount} bytes, but its header requires {plane_bytes}")
