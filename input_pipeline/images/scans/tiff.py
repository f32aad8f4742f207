"""TIFF: one slice per page, in the order of the file.

Pages that are smaller copies of others (thumbnails, pyramids) are dropped. Files whose metadata (ImageJ, OME, tifffile)
state times, channels or several images are rejected: their pages are not the slices of one volume. ImageJ's linear
calibration is applied.

tifffile parses the file and decodes uncompressed, deflated and PackBits pages of any depth. Pillow (libtiff) decodes
the other compressions where that is lossless: 8-bit gray and RGB, 16-bit gray. TIFF has no checksum, so a flipped bit
in uncompressed pixels is not detected.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

from input_pipeline.images.scans import codestream
from input_pipeline.images.scans.access import as_scan_error, open_scan
from input_pipeline.images.scans.base import (
    COPY_AGAIN,
    MAX_LISTED,
    Header,
    ScanError,
    ScanLimits,
    join_offenders,
    limit_error,
)
from input_pipeline.images.scans.checks import check_opaque, check_shape, check_volume, to_intensities
from input_pipeline.images.scans.images import apply_orientation

PLAIN, PACKBITS, DEFLATE = 1, 32773, (8, 32946)
MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
SLICE_AXES = "ZIQ"  # tifffile's codes for depth, a sequence, and an unknown axis
AXIS_NAMES = {"T": "times", "C": "channels", "S": "channels", "R": "tiles", "P": "positions", "A": "angles"}
REDUCED, MASK = 1, 4  # bits of the tag NewSubfileType
NAMES = {MINISWHITE: "MINISWHITE", MINISBLACK: "MINISBLACK", RGB: "RGB", PALETTE: "palette", YCBCR: "YCbCr"}
SAVE = "save it as an uncompressed 8 or 16-bit TIFF, or as PNG"


def sniff(start: bytes) -> bool:
    return start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclasses.dataclass(frozen=True)
class PageFormat:
    """The properties that all pages of a file must share."""

    rows: int
    columns: int
    samples: int  # values per pixel, including alpha
    dtype: np.dtype
    bits: int
    photometric: int
    compression: int
    orientation: int
    alpha: bool
    calibration: tuple[float, float] = (1.0, 0.0)  # slope and intercept that ImageJ states

    @property
    def channels(self) -> int:
        return 1 if self.photometric in (MINISWHITE, MINISBLACK) else 3


def page_format(path, page: tifffile.TiffPage) -> PageFormat:
    """Return the format of a page. Raises ScanError if it is unsupported."""
    tag, extra = page.tags.get("Orientation"), len(page.extrasamples)
    form = PageFormat(
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
    palette = form.photometric == PALETTE
    problems = {
        f"has the photometric interpretation {form.photometric}": form.photometric not in NAMES,
        f"has {form.bits}-bit pixels of {form.dtype}": form.dtype.kind not in "uif"
        or form.bits != 8 * form.dtype.itemsize,
        f"has {form.samples} values a pixel": form.samples != form.channels + extra and not palette or extra > 1,
        "has a palette of other than 8 bits": palette and (form.samples != 1 or form.dtype != np.uint8),
        "has 3D tiles": int(page.imagedepth) != 1,
        f"states the orientation {form.orientation}": not 1 <= form.orientation <= 8,
    }
    for problem, found in problems.items():
        if found:
            raise ScanError(path, problem, SAVE, "unsupported")
    return form


def count_pages(path, data: bytes, limits: ScanLimits) -> int:
    """Count the pages. Raises ScanError at a broken link between pages, which tifffile would treat as the end."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    link, counter, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    width = struct.calcsize(link)
    position, offsets = (8 if big else 4), set()
    while True:
        if position + width > len(data):
            raise ScanError(path, f"is truncated: no link after page {len(offsets)}", COPY_AGAIN)
        offset = struct.unpack_from(order + link, data, position)[0]
        if offset == 0:
            return len(offsets)
        if offset in offsets or offset + struct.calcsize(counter) > len(data):
            problem = "links back to an earlier page" if offset in offsets else "is outside the file"
            raise ScanError(path, f"page {len(offsets) + 1} {problem}", COPY_AGAIN)
        offsets.add(offset)
        if len(offsets) > limits.max_slices:
            raise limit_error(path, f"has more than {limits.max_slices} pages", "max_slices")
        position = offset + struct.calcsize(counter) + entry * struct.unpack_from(order + counter, data, offset)[0]


def check_axes(path, tif: tifffile.TiffFile, count: int) -> None:
    """Raise ScanError if the metadata of a series state that its `count` pages are not the slices of one volume."""
    full = [s for s in tif.series if not int(s.keyframe.subfiletype) & REDUCED] or tif.series
    for series in full:
        pages = [(axis, int(n)) for axis, n in zip(series.axes, series.shape, strict=True) if axis not in "YXS"]
        others = [f"{n} {AXIS_NAMES.get(axis, 'images along ' + axis)}" for axis, n in pages if n > 1]
        if any(n > 1 and axis not in SLICE_AXES for axis, n in pages) or len(others) > 1:
            others = [other.replace("images along Z", "slices") for other in others]
            reason = f"its metadata state {' x '.join(others)}: not the slices of one volume"
            remedy = "save each volume as a separate file, one page per slice, with the axes ZYX"
            raise ScanError(path, reason, remedy, "ambiguous")
    stated = [math.prod(n for axis, n in zip(s.axes, s.shape, strict=True) if axis not in "YXS") for s in full]
    one_by_one = full[0].kind == "shaped" and set(stated) == {1}  # tifffile writes pages without a volume so
    if count > 1 and full[0].kind in ("ome", "shaped", "imagej"):
        if len(stated) > 1 and not one_by_one:
            reason = f"its metadata state {len(stated)} images, of {', '.join(map(str, stated[:MAX_LISTED]))} slices"
            raise ScanError(path, reason, "save each image as a separate file", "ambiguous")
        if sum(stated) != count:
            reason = f"its metadata state {sum(stated)} slices, but it has {count} pages"
            raise ScanError(path, reason, "export it again, as one file with one page per slice", "ambiguous")
    if count > 1 and "<OME" in tif.pages[0].description and full[0].kind != "ome":
        reason = "has unreadable OME metadata, so its pages may be channels or times"
        raise ScanError(path, reason, "save the slices again without OME metadata", "ambiguous")


def imagej_calibration(tif: tifffile.TiffFile) -> tuple[float, float]:
    """Return the slope and intercept of ImageJ's linear calibration, with which it stores signed 16-bit voxels."""
    stated = (tif.imagej_metadata or {}) if tif.is_imagej else {}
    if stated.get("cf") != 0 or not all(isinstance(stated.get(key), int | float) for key in ("c0", "c1")):
        return 1.0, 0.0
    return float(stated["c1"]), float(stated["c0"])


def full_pages(path, tif: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Return the pages without smaller copies of others. Raises ScanError if a page is a transparency mask."""
    pages = [page if isinstance(page, tifffile.TiffPage) else page.aspage() for page in tif.pages]
    if any(int(page.subfiletype) & MASK for page in pages):
        raise ScanError(path, "has a transparency mask", "blend it and save it without the mask", "ambiguous")
    return [page for page in pages if not int(page.subfiletype) & REDUCED] or pages


def open_tiff(path, limits: ScanLimits) -> tuple[bytes, list[tifffile.TiffPage], PageFormat, Header]:
    """Read a file without decoding it. Returns its bytes, its pages, their format, and the header."""
    with open_scan(path, limits) as file:
        data = file.read()
    linked = count_pages(path, data, limits)
    with as_scan_error(path, "reading the TIFF pages"):
        tif = tifffile.TiffFile(io.BytesIO(data))
        pages, readable = full_pages(path, tif), len(tif.pages)
        forms = [page_format(path, page) for page in pages]
        stated = int((tif.imagej_metadata or {}).get("images", len(pages))) if tif.is_imagej else len(pages)
        folded = any(series.get("truncated") for series in tif.shaped_metadata or ())
    if not pages or readable != linked:
        raise ScanError(path, f"has {linked} pages, but only {readable} are readable", COPY_AGAIN)
    if folded:
        raise ScanError(path, "has several slices in one page", "write one page per slice", "ambiguous")
    if stated != len(pages):
        reason = f"states {stated} images but has {len(pages)} pages"
        raise ScanError(path, reason, "export it from ImageJ with one page per slice", "ambiguous")
    texts = [f"page {i + 1} is {f.rows} x {f.columns} {f.dtype}" for i, f in enumerate(forms)]
    different = [text for text, form in zip(texts, forms, strict=True) if form != forms[0]]
    if different:
        reason = f"{texts[0]}, but {join_offenders(different)}, or differs in its encoding"
        raise ScanError(path, reason, "save each image as a separate file", "ambiguous")
    with as_scan_error(path, "reading the TIFF metadata"):
        check_axes(path, tif, len(pages))
        form, count = dataclasses.replace(forms[0], calibration=imagej_calibration(tif)), len(pages)
    if not (form.calibration[0] and all(map(math.isfinite, form.calibration))):
        raise ScanError(path, "has an unusable calibration by ImageJ", "save it without calibration")
    h, w = (form.columns, form.rows) if form.orientation >= 5 else (form.rows, form.columns)
    check_shape(path, (h, w, count, max(form.samples, form.channels)), form.dtype.itemsize, limits)
    dtype, photometric = form.dtype.newbyteorder("=").name, NAMES[form.photometric]
    head = Header(
        format="image",
        shape=(h, w, count, form.channels),
        dtype=dtype,
        photometric=photometric,
        rescaled=form.calibration != (1.0, 0.0),
    )
    return data, pages, form, head


def check_segments(path, data: bytes, page: tifffile.TiffPage, form: PageFormat) -> None:
    """Check that strips or tiles are inside the file and unpack to their expected size.

    tifffile fills a missing strip with zeros, and unpacks a deflated one without a limit.
    """
    chunk, needed = int(np.prod(page.chunks)) * form.dtype.itemsize, int(np.prod(page.chunked))
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) != needed or len(counts) != needed:
        raise ScanError(path, f"has {len(offsets)} strips, but its header requires {needed}", COPY_AGAIN)
    for i, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        expected = chunk
        if not page.is_tiled:  # the last strip may have fewer rows
            per_plane = -(-form.rows // page.rowsperstrip)
            rows = min(page.rowsperstrip, form.rows - (i % per_plane) * page.rowsperstrip)
            expected = chunk // page.chunks[-3 if len(page.chunks) > 2 else 0] * rows
        if not (offset > 0 and count > 0 and offset + count <= len(data)):
            raise ScanError(path, f"strip or tile {i + 1} is outside the file", COPY_AGAIN)
        segment, size = memoryview(data)[offset : offset + count], count
        if form.compression in DEFLATE:
            with as_scan_error(path, "unpacking a strip"):
                unpacker = zlib.decompressobj()
                size = len(unpacker.decompress(segment, expected + 1))
                if size == expected and not unpacker.eof:
                    unpacker.decompress(unpacker.unconsumed_tail, 1)
                if size <= expected and not unpacker.eof:
                    raise ScanError(path, f"strip or tile {i + 1} is truncated", COPY_AGAIN)
        elif form.compression == PACKBITS:
            size = codestream.packbits_size(bytes(segment), expected)
        if size != expected and not (form.compression == PACKBITS and size == expected + 1):
            reason = f"strip or tile {i + 1} has {'more than ' * (size > expected)}{size} bytes instead of {expected}"
            raise ScanError(path, reason, COPY_AGAIN)


def upright(data: bytes, page: tifffile.TiffPage) -> bytes:
    """Return a file with the orientation 1 in a page. Pillow would apply another one; `to_slice` does so here."""
    tag = page.tags.get("Orientation")
    if tag is None or tag.value == 1:
        return data
    width = 4 if int(tag.dtype) == 4 else 2  # LONG or SHORT
    value = (1).to_bytes(width, "little" if data[:2] == b"II" else "big")
    return data[: tag.valueoffset] + value + data[tag.valueoffset + width :]


def decode_page(path, data: bytes, page: tifffile.TiffPage, form: PageFormat) -> np.ndarray:
    """Return the stored pixels of a page, [H, W] or [H, W, samples]."""
    number = page.index
    if form.compression in (PLAIN, PACKBITS, *DEFLATE) and form.photometric != YCBCR:
        check_segments(path, data, page, form)
        with as_scan_error(path, f"decoding page {number + 1}"):
            pixels = page.asarray()
            if form.samples > 1 and int(page.planarconfig) == 2:
                pixels = np.moveaxis(pixels, 0, -1)
        return pixels.reshape(form.rows, form.columns, *([form.samples] if form.samples > 1 else []))
    if not (form.dtype == np.uint8 or form.dtype.newbyteorder("=") == np.uint16 and form.samples == 1):
        reason = f"has {form.dtype} pixels with {page.compression.name} compression"
        raise ScanError(path, reason, SAVE, "unsupported")
    with as_scan_error(path, f"decoding page {number + 1}"):
        image = Image.open(io.BytesIO(upright(data, page)), formats=("TIFF",))
        image.seek(number)
        if image.size != (form.columns, form.rows):
            raise ScanError(path, f"page {number + 1} states two different sizes", SAVE)
        image.load()
        if image.mode == "YCbCr" or form.photometric == PALETTE:
            image = image.convert("RGB")
        pixels = np.asarray(image)
    if form.photometric == MINISWHITE:  # undo the inversion by Pillow; `to_slice` inverts every page
        pixels = np.iinfo(pixels.dtype).max - pixels
    return pixels


def to_slice(path, pixels: np.ndarray, page: tifffile.TiffPage, form: PageFormat) -> np.ndarray:
    """Turn stored pixels into [H, W, C]: invert MINISWHITE, apply the palette, drop opaque alpha, apply orientation."""
    if form.alpha:
        check_opaque(path, pixels[..., -1], np.iinfo(form.dtype).max if form.dtype.kind in "ui" else 1.0)
        pixels = pixels[..., :-1]
    if form.photometric == MINISWHITE:
        if form.dtype.kind != "u":
            raise ScanError(path, f"is MINISWHITE with {form.dtype} pixels", SAVE, "unsupported")
        pixels = np.iinfo(form.dtype).max - pixels
    if form.photometric == PALETTE and pixels.ndim == 2:
        with as_scan_error(path, "applying the palette"):
            pixels = (np.asarray(page.colormap, np.uint16) >> 8).astype(np.uint8)[:, pixels].transpose(1, 2, 0)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return apply_orientation(pixels, form.orientation)


def header(path, *, limits: ScanLimits) -> Header:
    return open_tiff(path, limits)[3]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    check_volume(path, volume, 1, limits)
    data, pages, form, head = open_tiff(path, limits)
    h, w, d, c = head.shape
    frames = None
    for number, page in enumerate(pages):
        pixels = to_slice(path, decode_page(path, data, page, form), page, form)
        if frames is None:
            frames = np.empty((d, h, w, c), pixels.dtype.newbyteorder("="))
        if pixels.shape != frames.shape[1:]:
            raise ScanError(path, f"page {number + 1} was decoded to the shape {pixels.shape}", SAVE)
        frames[number] = pixels
    return to_intensities(path, frames, *form.calibration, limits).transpose(1, 2, 0, 3), head
