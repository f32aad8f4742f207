"""The pixels of a DICOM file: from PixelData to decoded frames."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import pydicom
from PIL import Image
from pydicom import encaps, pixels, uid

from input_pipeline.images.scans import codestream, isolated
from input_pipeline.images.scans.access import as_scan_error
from input_pipeline.images.scans.base import ScanError
from input_pipeline.images.scans.fields import EXPORT, GRAY, PIXELS, PLUGINS, Fields
from input_pipeline.images.scans.instance import Instance
from input_pipeline.images.scans.lookup import Lut

DAMAGED = "the file is damaged: " + EXPORT
JPEG2000 = (uid.JPEG2000, uid.JPEG2000Lossless, uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL)
JPEG_8BIT = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
LOSSY = (*JPEG_8BIT, uid.JPEG2000, uid.HTJ2K, uid.JPEGLSNearLossless)
MAX_OVERLAYS = 2  # bits above BitsStored in compressed pixels; damage sets several
ITEM = b"\xfe\xff\x00\xe0"


def native_frames(path, data: bytes | None, instance: Instance) -> Iterator[bytes]:
    """Yield the bytes of each uncompressed frame. Padding after the last frame is skipped."""
    size = instance.rows * instance.columns * instance.samples * instance.bits_allocated // 8
    full = size
    if instance.photometric == "YBR_FULL_422":
        size = size * 2 // 3
    total, stored = size * instance.frames, len(data or b"")
    if data is None or stored < total:
        reason = f"has {stored:,} bytes of pixels, but its header requires {total:,}"
        raise ScanError(path, reason, "it is truncated or its header is damaged: copy it again")
    excess = stored - total
    image = f"{instance.rows} x {instance.columns} pixels of {instance.samples} x {instance.bits_allocated} bits"
    if excess > (total & 1) and data.count(data[-1:], total) < excess:  # not filled with one value
        units = {
            "more frames than its header states": size,
            "colours of full resolution, not YBR_FULL_422": full - size or None,
            "more rows or columns than its header states": size // instance.rows,
            "more columns than its header states": size // instance.columns,
        }
        if likely := [what for what, unit in units.items() if unit and excess % unit == 0]:
            reason = f"has {stored:,} bytes of pixels, but {instance.frames} x {image} need {total:,}"
            raise ScanError(path, f"{reason}: it may have {likely[0]}", "correct the header, or " + EXPORT)
    yield from (data[i * size : (i + 1) * size] for i in range(instance.frames))


def without_empty_end(data: bytes) -> bytes:
    """Remove empty fragments from the end of encapsulated pixel data. The offset table does not change."""
    offset, end, first = 0, 0, True
    while data[offset : offset + 4] == ITEM and offset + 8 <= len(data):
        (length,) = struct.unpack_from("<L", data, offset + 4)
        offset += 8 + length
        if length or first:
            end = offset
        first = False
    return data[:end] if offset == len(data) else data  # anything else is damage, which pydicom reports


def encoded_frames(path, dataset: pydicom.Dataset, instance: Instance) -> Iterator[bytes]:
    """Yield the bytes of each frame, encoded or native. Raises unless the header states their number."""
    fields = Fields(path, dataset)
    present = [keyword for keyword in PIXELS if fields.raw(keyword) is not None]
    if present != ["PixelData"]:
        reason = f"has {present[0]} instead of integer pixels" if present else "has no pixel data"
        raise ScanError(path, reason, "leave it out", "unsupported")
    element = fields.raw("PixelData")
    data, encapsulated = element.value, getattr(element, "length", 0) in (0xFFFFFFFF, -1)  # no length if empty
    if not instance.syntax.is_encapsulated:
        if encapsulated:
            reason = f"has compressed pixels, but its transfer syntax is absent or {instance.syntax.name}"
            raise ScanError(path, reason, "state the transfer syntax in its meta information", "ambiguous")
        swapped = instance.syntax == uid.ExplicitVRBigEndian and instance.bits_allocated == 8
        if swapped and element.VR == "OW" and data and len(data) % 2 == 0:
            data = np.frombuffer(data, np.uint16).byteswap().tobytes()
        yield from native_frames(path, data, instance)
        return
    if not data or not encapsulated:
        raise ScanError(path, "has no encapsulated pixel data", DAMAGED)
    tables = [fields.raw(keyword) for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    offsets = None if None in tables else tuple(table.value for table in tables)
    count, data = 0, without_empty_end(data)
    with as_scan_error(path, "splitting the pixel data into frames"):
        for frame in encaps.generate_frames(data, number_of_frames=instance.frames, extended_offsets=offsets):
            if count == instance.frames and not frame:
                continue  # an offset table with an entry for an empty last fragment
            count += 1
            if count > instance.frames:
                break
            yield frame
    if count != instance.frames:
        amount = "more" if count > instance.frames else f"only {count}"
        raise ScanError(path, f"has {amount} frames, but its header states {instance.frames}", DAMAGED)


def check_frame(path, data: bytes, instance: Instance) -> int:
    """Return the bits per sample of an encoded frame. Raises ScanError if its size is not that of the header."""
    syntax = instance.syntax
    try:
        if syntax == uid.RLELossless:
            planes = instance.samples * instance.bits_allocated // 8
            codestream.check_rle(data, planes, instance.rows * instance.columns)
            return instance.bits_stored
        size = codestream.jpeg2000(data) if syntax in JPEG2000 else codestream.jpeg(data)
    except ValueError as error:
        raise ScanError(path, str(error), DAMAGED) from None
    if syntax in JPEG_8BIT and size.bits != 8:
        reason = f"contains {size.bits}-bit JPEG, for which no decoder is installed"
        raise ScanError(path, reason, "transcode it to Explicit VR Little Endian", "unsupported")
    actual, stated = (size.rows, size.columns, size.channels), (instance.rows, instance.columns, instance.samples)
    if actual != stated or size.bits > instance.bits_allocated:
        reason = f"its pixel data has {actual} (rows, columns, samples) and {size.bits} bits, but its header states "
        raise ScanError(path, f"{reason}{stated} and {instance.bits_allocated} bits", DAMAGED)
    return size.bits


def decode_jpeg(data: bytes, instance: Instance) -> np.ndarray:
    """Decode an 8-bit colour JPEG to RGB. Its colour space is that of the stream, or if unstated, that of the header.

    pydicom's decoder fails for component ids R, G, B, and converts colours that Pillow has already converted.
    """
    stated, decoded = codestream.jpeg_colours(data)
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    if decoded == "YBR":
        image.draft("YCbCr", image.size)  # without conversion
    samples = np.asarray(image)
    is_ybr = (stated or ("RGB" if instance.photometric == "RGB" else "YBR")) == "YBR"
    return pixels.convert_color_space(samples, "YBR_FULL", "RGB") if is_ybr else samples


def decode_pixels(path, data: bytes, instance: Instance) -> np.ndarray:
    """Decode one frame to its stored values, colour as RGB, and check them against the header.

    Gray values keep the bits above BitsStored.
    """
    options = {
        "pixel_keyword": "PixelData",
        "rows": instance.rows,
        "columns": instance.columns,
        "number_of_frames": 1,
        "samples_per_pixel": instance.samples,
        "bits_allocated": instance.bits_allocated,
        "bits_stored": instance.bits_stored,
        "pixel_representation": int(instance.signed),
        "photometric_interpretation": instance.photometric,
        "planar_configuration": instance.planar,
        "correct_unused_bits": instance.samples == 3,
    }
    buffer, info = data, {"photometric_interpretation": "RGB"}
    if instance.syntax.is_encapsulated:
        options["bits_stored"] = check_frame(path, data, instance)
        if instance.photometric in ("YBR_RCT", "YBR_ICT") and instance.syntax not in JPEG2000:
            raise ScanError(path, f"has the color space {instance.photometric}, which requires JPEG 2000", EXPORT)
        buffer = encaps.encapsulate([data], has_bot=False)
    elif instance.syntax == uid.ExplicitVRBigEndian:
        options["pixel_vr"] = "OB" if instance.bits_allocated == 8 else "OW"  # encoded_frames swapped 8-bit words
    plugin = PLUGINS[instance.syntax] or ""
    with as_scan_error(path, "decoding the pixels"):
        if plugin == "gdcm":
            frame, info = isolated.decode(instance.syntax, data, options)
        elif plugin == "pillow" and instance.samples == 3:
            frame = decode_jpeg(data, instance)
        else:
            decoder = pixels.get_decoder(instance.syntax)
            with warnings.catch_warnings(action="ignore"):  # about the padding of an RLE segment
                frame, info = decoder.as_array(buffer, index=0, validate=False, decoding_plugin=plugin, **options)
    if instance.samples == 3 and info["photometric_interpretation"] != "RGB":
        reason = f"has colours as {info['photometric_interpretation']}, which could not be converted to RGB"
        raise ScanError(path, reason, EXPORT, "unsupported")
    if frame.shape[:2] != (instance.rows, instance.columns):
        raise ScanError(path, f"was decoded to the shape {frame.shape}", DAMAGED)
    return frame.astype(frame.dtype.newbyteorder("="), copy=False)


def is_overlay(words: np.ndarray, values: np.ndarray, outside: np.ndarray, instance: Instance) -> bool:
    """Return whether the bits above BitsStored are overlays, and not values that are too large for BitsStored.

    Removing an overlay does not make the image rougher. Removing the bits of an overflow leaves jumps. If many bits are
    set, equal words are an unstated padding value, and compressed pixels are damaged.

    Args:
      words: pixels with these bits. values: pixels without them. outside: where words are out of range.
    """
    upper = int(np.bitwise_or.reduce(words[outside].view(f"u{words.itemsize}"), initial=0)) >> instance.bits_stored
    rough = np.abs(np.diff(words.view(f"i{words.itemsize}").astype(np.int64), axis=1)).sum()
    clean = np.abs(np.diff(values.astype(np.int64), axis=1)).sum()
    many = upper.bit_count() > MAX_OVERLAYS
    filled = np.count_nonzero(outside) > 1 and np.ptp(words[outside]) == 0
    return not (many and (filled or instance.syntax.is_encapsulated)) and bool(clean <= rough)


def stored_values(path, words: np.ndarray, instance: Instance) -> np.ndarray:
    """Return gray values of `frame_dtype`. Bits above BitsStored (overlays) are removed, except from padding."""
    low, high = instance.stored_range
    words = words.astype(instance.dtype, copy=False)
    if words.min() >= low and words.max() <= high:
        return words.astype(instance.frame_dtype, copy=False)
    outside, unused = (words < low) | (words > high), instance.bits_allocated - instance.bits_stored
    values = ((words << unused) >> unused).astype(instance.frame_dtype, copy=False)
    if instance.padding_beyond:
        first, last = instance.padding
        padded = outside & (words >= first) & (words <= last)
        values[padded] = instance.frame_padding[0]
        outside &= ~padded
    if outside.any() and (instance.syntax in LOSSY or not is_overlay(words, values, outside, instance)):
        remedy = "if the values are right, increase BitsStored or add PixelPaddingValue; otherwise " + EXPORT
        raise ScanError(path, f"has values outside the range {low} to {high} of its BitsStored", remedy)
    return values


def decode(path, data: bytes, instance: Instance, dataset: pydicom.Dataset, lut: Lut | None) -> np.ndarray:
    """Decode one frame to [H, W] or [H, W, 3]: colour as RGB, lookup tables applied, slopes not."""
    frame = decode_pixels(path, data, instance)
    if instance.samples == 1:
        frame = stored_values(path, frame, instance)
    if instance.photometric == "PALETTE COLOR":
        with as_scan_error(path, "applying the palette", hide_message=True):
            frame = pixels.apply_color_lut(frame, dataset)
    return frame if lut is None or instance.photometric not in GRAY else lut.apply(frame, instance)
