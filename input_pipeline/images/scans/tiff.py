"""TIFF: a page is a slice, in the file's order.

tifffile says what is in the file and decodes plain, deflated and PackBits pages of any depth; Pillow (libtiff) decodes
the other compressions where it does so without loss: 8-bit gray and RGB, 16-bit gray. A TIFF has no checksum of its
own: a flipped bit in plain pixels changes voxels unseen.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

from input_pipeline.images.scans import codestream
from input_pipeline.images.scans.base import (
    Header,
    ScanError,
    ScanLimits,
    blamed,
    check_shape,
    check_volume,
    listed,
    natural,
    opened,
)
from input_pipeline.images.scans.images import oriented

PLAIN, PACKBITS, DEFLATE = 1, 32773, (8, 32946)
MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
NAMES = {MINISWHITE: "MINISWHITE", MINISBLACK: "MINISBLACK", RGB: "RGB", PALETTE: "palette", YCBCR: "YCbCr"}
SAVE = "save it as a plain 8 or 16-bit TIFF or PNG"


def sniff(start: bytes) -> bool:
    return start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclasses.dataclass(frozen=True)
class Page:
    """What all pages have in common.

    Attributes:
      samples: values a pixel, alpha included.
    """

    rows: int
    columns: int
    samples: int
    dtype: np.dtype
    bits: int
    photometric: int
    compression: int
    orientation: int
    alpha: bool

    @property
    def channels(self) -> int:
        return 1 if self.photometric in (MINISWHITE, MINISBLACK) else 3


def describe(path, page: tifffile.TiffPage) -> Page:
    tag = page.tags.get("Orientation")
    extra = tuple(int(e) for e in page.extrasamples)
    found = Page(
        rows=int(page.imagelength),
        columns=int(page.imagewidth),
        samples=int(page.samplesperpixel),
        dtype=np.dtype(page.dtype) if page.dtype is not None else np.dtype("V1"),
        bits=int(page.bitspersample),
        photometric=int(page.photometric),
        compression=int(page.compression),
        orientation=1 if tag is None else int(tag.value),
        alpha=bool(extra),
    )
    problem = None
    if found.photometric not in NAMES:
        problem = f"has pixels of the photometric kind {found.photometric}"
    elif found.dtype.kind not in "uif" or found.bits != 8 * found.dtype.itemsize:
        problem = f"has {found.bits}-bit pixels of {found.dtype}"
    elif found.samples != found.channels + len(extra) and found.photometric != PALETTE or len(extra) > 1:
        problem = f"has {found.samples} values a pixel"
    elif found.photometric == PALETTE and (found.samples != 1 or found.dtype != np.uint8):
        problem = "has a palette of other than 8 bits"
    elif int(page.imagedepth) != 1:
        problem = "has 3D tiles"
    elif not 1 <= found.orientation <= 8:
        problem = f"states the orientation {found.orientation}"
    if problem:
        raise ScanError(path, problem, SAVE, "unsupported")
    return found


def count_pages(path, data: bytes, limits: ScanLimits) -> int:
    """Pages in the file's chain of directories, which tifffile ends without a word where a link is broken."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    link, counter, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    width = struct.calcsize(link)
    at, seen = (8 if big else 4), set()
    while True:
        if at + width > len(data):
            raise ScanError(path, f"is cut short: no link after page {len(seen)}", "copy it again from its source")
        offset = struct.unpack_from(order + link, data, at)[0]
        if offset == 0:
            return len(seen)
        if offset in seen or offset + struct.calcsize(counter) > len(data):
            what = f"page {len(seen) + 1} lies {'in a loop' if offset in seen else 'outside the file'}"
            raise ScanError(path, what, "it is cut short or damaged: copy it again from its source")
        seen.add(offset)
        if len(seen) > limits.max_slices:
            what = f"has more than {limits.max_slices} pages"
            raise ScanError(path, what, "raise ScanLimits.max_slices if this is right", "limit")
        at = offset + struct.calcsize(counter) + entry * struct.unpack_from(order + counter, data, offset)[0]


def inspect(path, limits: ScanLimits) -> tuple[bytes, tifffile.TiffFile, list[tifffile.TiffPage], Page, Header]:
    with opened(path, limits) as file:
        data = file.read()
    linked = count_pages(path, data, limits)
    with blamed(path, "reading the TIFF's pages"):
        tif = tifffile.TiffFile(io.BytesIO(data))
        pages = [page if isinstance(page, tifffile.TiffPage) else page.aspage() for page in tif.pages]
        kinds = [describe(path, page) for page in pages]
        stated = int((tif.imagej_metadata or {}).get("images", len(pages))) if tif.is_imagej else len(pages)
        folded = any(found.get("truncated") for found in tif.shaped_metadata or ())
    if not pages or len(pages) != linked:
        raise ScanError(path, f"has {linked} pages of which {len(pages)} are readable", "copy it again")
    if folded:
        raise ScanError(path, "holds several slices in one page", "write one page a slice", "ambiguous")
    if stated != len(pages):
        what = f"states {stated} images but has {len(pages)} pages"
        raise ScanError(path, what, "export it from ImageJ with one page a slice", "ambiguous")
    unlike = [f"page {i + 1} is {k.rows} x {k.columns} {k.dtype}" for i, k in enumerate(kinds) if k != kinds[0]]
    if unlike:
        what = (
            f"page 1 is {kinds[0].rows} x {kinds[0].columns} {kinds[0].dtype}, but {listed(unlike)} or stored otherwise"
        )
        raise ScanError(path, what, "give each picture its own file", "ambiguous")
    kind, count = kinds[0], len(pages)
    rows, columns = kind.rows, kind.columns
    h, w = (columns, rows) if kind.orientation >= 5 else (rows, columns)
    check_shape(path, (h, w, count, max(kind.samples, kind.channels)), kind.dtype.itemsize, limits)
    head = Header(
        format="image",
        kind="2d" if count == 1 else "3d",
        modality=None,
        shape=(h, w, count, kind.channels),
        spacing_mm=None,
        orientation=None,
        dtype=kind.dtype.newbyteorder("=").name,
        photometric=NAMES[kind.photometric],
    )
    return data, tif, pages, kind, head


def check_segments(path, data: bytes, page: tifffile.TiffPage, kind: Page) -> None:
    """Check that strips or tiles lie in the file, and unpack to what they should before tifffile unpacks them.

    tifffile fills a missing strip with zeros, and unpacks a deflated one without a bound.
    """
    chunk = int(np.prod(page.chunks)) * kind.dtype.itemsize
    offsets, counts = page.dataoffsets, page.databytecounts
    needed = int(np.prod(page.chunked))
    if len(offsets) != needed or len(counts) != needed:
        raise ScanError(path, f"has {len(offsets)} strips where its header needs {needed}", "its header is damaged")
    tiled = page.is_tiled
    for i, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        expected = chunk
        if not tiled:  # the last strip of a picture may be lower
            per_plane = -(-kind.rows // page.rowsperstrip)
            rows = min(page.rowsperstrip, kind.rows - (i % per_plane) * page.rowsperstrip)
            expected = chunk // page.chunks[-3 if len(page.chunks) > 2 else 0] * rows
        if not (0 < offset and 0 < count and offset + count <= len(data)):
            raise ScanError(path, f"strip or tile {i + 1} lies outside the file", "it is cut short: copy it again")
        segment = memoryview(data)[offset : offset + count]
        size = count
        if kind.compression in DEFLATE:
            with blamed(path, "unpacking a strip"):
                unpacker = zlib.decompressobj()
                size = len(unpacker.decompress(segment, expected + 1))
                if size == expected and not unpacker.eof:
                    unpacker.decompress(unpacker.unconsumed_tail, 1)
                if size <= expected and not unpacker.eof:
                    raise ScanError(path, f"strip or tile {i + 1} is cut short", "copy it again from its source")
        elif kind.compression == PACKBITS:
            size = codestream.packbits_size(bytes(segment), expected + 1)
        if size != expected and not (kind.compression == PACKBITS and size == expected + 1):
            what = f"strip or tile {i + 1} has {'more than' * (size > expected)} {size} bytes, not {expected}"
            raise ScanError(path, what, "it is damaged: copy it again")


def decode_page(path, data: bytes, number: int, page: tifffile.TiffPage, kind: Page) -> np.ndarray:
    """[H, W] or [H, W, samples]."""
    if kind.compression in (PLAIN, PACKBITS, *DEFLATE) and kind.photometric != YCBCR:
        check_segments(path, data, page, kind)
        with blamed(path, f"decoding page {number + 1}"):
            pixels = page.asarray()
            if kind.samples > 1 and int(page.planarconfig) == 2:
                pixels = np.moveaxis(pixels, 0, -1)
        return pixels.reshape(kind.rows, kind.columns, *([kind.samples] if kind.samples > 1 else []))
    lossless = kind.dtype == np.uint8 or kind.dtype.newbyteorder("=") == np.uint16 and kind.samples == 1
    if not lossless:
        what = f"has {kind.dtype} pixels under the compression {page.compression.name}"
        raise ScanError(path, what, SAVE, "unsupported")
    with blamed(path, f"decoding page {number + 1}"):
        picture = Image.open(io.BytesIO(data), formats=("TIFF",))
        picture.seek(number)
        if picture.size not in ((kind.columns, kind.rows), (kind.rows, kind.columns)):
            raise ScanError(path, f"page {number + 1} has two sizes", "it is damaged: " + SAVE)
        # Pillow turns the page by its orientation tag when it loads it; here that is done for every page below.
        picture.tag_v2.pop(274, None)
        picture.load()
        if picture.mode == "YCbCr":
            picture = picture.convert("RGB")
        if kind.photometric == PALETTE:
            picture = picture.convert("RGB")
        pixels = np.asarray(picture)
    if kind.photometric == MINISWHITE:  # Pillow has inverted it already
        pixels = np.iinfo(pixels.dtype).max - pixels
    return pixels


def finish_page(path, pixels: np.ndarray, page: tifffile.TiffPage, kind: Page) -> np.ndarray:
    """Stored values -> [H, W, C]: MINISWHITE inverted, palette looked up, opaque alpha dropped."""
    if kind.alpha:
        full = np.iinfo(kind.dtype).max if kind.dtype.kind in "ui" else 1.0
        if (pixels[..., -1] != full).any():
            remedy = "blend it with the background that is meant and save it without alpha"
            raise ScanError(path, "has transparent pixels", remedy, "ambiguous")
        pixels = pixels[..., :-1]
        pixels = pixels[..., 0] if kind.channels == 1 else pixels
    if kind.photometric == MINISWHITE:
        if kind.dtype.kind != "u":
            raise ScanError(path, f"is MINISWHITE with {kind.dtype} pixels", SAVE, "unsupported")
        pixels = np.iinfo(kind.dtype).max - pixels
    if kind.photometric == PALETTE and pixels.ndim == 2:
        with blamed(path, "applying the palette"):
            pixels = (np.asarray(page.colormap, np.uint16) >> 8).astype(np.uint8)[:, pixels].transpose(1, 2, 0)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return oriented(pixels, kind.orientation)


def header(path, *, limits: ScanLimits) -> Header:
    return inspect(path, limits)[4]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    check_volume(path, volume, 1, limits)
    data, tif, pages, kind, head = inspect(path, limits)
    h, w, d, c = head.shape
    frames = None
    for number, page in enumerate(pages):
        pixels = finish_page(path, decode_page(path, data, number, page, kind), page, kind)
        if frames is None:
            frames = np.empty((d, h, w, c), pixels.dtype.newbyteorder("="))
        if pixels.shape != frames.shape[1:]:
            raise ScanError(path, f"page {number + 1} was decoded to {pixels.shape}", "it is damaged: " + SAVE)
        frames[number] = pixels
    tif.close()
    voxels = natural(path, frames, limits=limits).transpose(1, 2, 0, 3)
    return voxels, head
