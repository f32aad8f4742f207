"""What a compressed picture says about its own size, read before a decoder allocates by it.

JPEG (ITU T.81), JPEG-LS (T.87), JPEG 2000 (T.800) and PackBits (DICOM PS3.5 annex G, TIFF 6.0 section 9).
"""

from __future__ import annotations

import dataclasses
import struct

MAX_TILES = 16384
MAX_SCANS = 200  # a progressive JPEG of a thousand scans costs a thousand passes over the picture


@dataclasses.dataclass(frozen=True)
class Size:
    rows: int
    columns: int
    channels: int
    bits: int


def jpeg(data: bytes) -> Size:
    """The frame header of a JPEG or JPEG-LS stream.

    Raises:
      ValueError: no such stream, no frame header, no end mark, or more scans than any encoder writes.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("does not start as JPEG")
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise ValueError(f"has {scans} JPEG scans, more than the limit of {MAX_SCANS}")
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise ValueError("has no JPEG end mark: it is cut short")
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = struct.unpack_from(">H", data, at + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            if length < 8 or at + 10 > len(data):
                break
            bits, rows, columns, channels = struct.unpack_from(">BHHB", data, at + 4)
            return Size(rows, columns, channels, bits)
        if marker == 0xDA or length < 2:
            break
        at += 2 + length
    raise ValueError("has no JPEG frame header")


def jpeg2000(data: bytes) -> Size:
    """The SIZ segment of a JPEG 2000 codestream, bare or in a JP2 box.

    Raises:
      ValueError: no such segment, channels of different sizes, or more tiles than any encoder writes.
    """
    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or at + 42 > len(data):
        raise ValueError("has no JPEG 2000 header")
    width, height, x0, y0, tile_w, tile_h, tx0, ty0, channels = struct.unpack_from(">8IH", data, at + 8)
    if not (channels and tile_w and tile_h and at + 42 + 3 * channels <= len(data)):
        raise ValueError("has an empty JPEG 2000 header")
    if b"\xff\xd9" not in data[-16:]:  # the last bytes but padding
        raise ValueError("has no JPEG 2000 end mark: it is cut short")
    parts = {struct.unpack_from("BBB", data, at + 42 + 3 * i) for i in range(channels)}
    if len(parts) > 1:
        raise ValueError("has JPEG 2000 channels of different sizes or bit depths")
    depth, dx, dy = parts.pop()
    if not (dx and dy and x0 < width and y0 < height and tx0 <= x0 and ty0 <= y0):
        raise ValueError("has an impossible JPEG 2000 header")
    tiles = -(-(width - tx0) // tile_w) * -(-(height - ty0) // tile_h)
    if tiles * channels > MAX_TILES:
        raise ValueError(f"has {tiles} JPEG 2000 tiles of {channels} channels, more than the limit of {MAX_TILES}")
    side = lambda end, start, step: -(-end // step) + (-start // step)  # noqa: E731
    return Size(side(height, y0, dy), side(width, x0, dx), channels, (depth & 0x7F) + 1)


def packbits_size(data: bytes, expected: int) -> int:
    """Bytes that a PackBits stream unpacks to; stops counting once they exceed `expected`."""
    at = size = 0
    end = len(data)
    while at < end and size <= expected:
        head = data[at]
        if head < 128:
            size += head + 1
            at += head + 2
        elif head > 128:
            size += 257 - head
            at += 2
        else:
            at += 1
    return size


def check_rle(data: bytes, planes: int, plane_bytes: int) -> None:
    """Check the header and segments of a DICOM RLE frame: one segment for each byte plane of the picture.

    Raises:
      ValueError: other segments than that, or one that unpacks to more or less than a plane (one pad byte allowed).
    """
    if len(data) < 64:
        raise ValueError("has an RLE frame without a header")
    count, *offsets = struct.unpack_from("<16L", data)
    if count != planes or count > 15:
        raise ValueError(f"has {count} RLE segments where its header needs {planes}")
    ends = [*offsets[1:count], len(data)]
    for start, end in zip(offsets, ends, strict=False):
        if not 64 <= start < end <= len(data):
            raise ValueError("has RLE segments outside the frame")
        size = packbits_size(data[start:end], plane_bytes + 1)
        if not plane_bytes <= size <= plane_bytes + 1:
            amount = "more" if size > plane_bytes else f"only {size}"
            raise ValueError(f"has an RLE segment of {amount} bytes where its header needs {plane_bytes}")
