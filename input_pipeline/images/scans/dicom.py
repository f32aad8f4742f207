"""DICOM: a single file, a multi-frame file, or the directory of one series."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pydicom
from pydicom import encaps, pixels, uid

from input_pipeline.images.scans import codestream, isolated, orientation
from input_pipeline.images.scans.access import as_scan_error, open_scan
from input_pipeline.images.scans.base import Header, ScanError, ScanLimits, join_offenders, limit_error, printable
from input_pipeline.images.scans.checks import check_shape, check_volume, to_intensities
from input_pipeline.images.scans.fields import DAMAGED_HEADER, EXPORT, GRAY, PIXELS, PLUGINS, Fields, Instance, load
from input_pipeline.images.scans.orientation import TOLERANCE

GAP = 0.25  # tolerated deviation from the usual slice distance: rounding to 0.1 mm stays below, a missing slice is 1.0
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
DAMAGED = "the file is damaged: " + EXPORT
JPEG2000 = (uid.JPEG2000, uid.JPEG2000Lossless)


def sniff(start: bytes) -> bool:
    return start[128:132] == b"DICM"


def encoded_frames(path, dataset: pydicom.Dataset, instance: Instance) -> Iterator[bytes]:
    """Yield the bytes of each frame, encoded or native. Raises unless the header states their number."""
    fields = Fields(path, dataset)
    present = [keyword for keyword in PIXELS if fields.raw(keyword) is not None]
    if present != ["PixelData"]:
        reason = f"has {present[0]} instead of integer pixels" if present else "has no pixel data"
        raise ScanError(path, reason, "leave it out", "unsupported")
    data = fields.raw("PixelData").value
    if not instance.syntax.is_encapsulated:
        swapped = instance.syntax == uid.ExplicitVRBigEndian and instance.bits_allocated == 8
        if swapped and fields.raw("PixelData").VR == "OW" and data and len(data) % 2 == 0:
            data = np.frombuffer(data, np.uint16).byteswap().tobytes()
        size = instance.rows * instance.columns * instance.samples * instance.bits_allocated // 8
        if instance.photometric == "YBR_FULL_422":
            size = size * 2 // 3
        total = size * instance.frames
        if not (data is not None and total <= len(data) <= total + (total & 1)):
            reason = f"has {len(data or b''):,} bytes of pixels, but its header requires {total:,}"
            raise ScanError(path, reason, "it is truncated or its header is damaged: copy it again")
        yield from (data[i * size : (i + 1) * size] for i in range(instance.frames))
        return
    if not data or fields.raw("PixelData").length not in (0xFFFFFFFF, -1):
        raise ScanError(path, "has no encapsulated pixel data", DAMAGED)
    tables = [fields.raw(keyword) for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    offsets = None if None in tables else tuple(table.value for table in tables)
    count = 0
    with as_scan_error(path, "splitting the pixel data into frames"):
        for frame in encaps.generate_frames(data, number_of_frames=instance.frames, extended_offsets=offsets):
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
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and size.bits != 8:
        reason = f"contains {size.bits}-bit JPEG, for which no decoder is installed"
        raise ScanError(path, reason, "transcode it to Explicit VR Little Endian", "unsupported")
    actual, stated = (size.rows, size.columns, size.channels), (instance.rows, instance.columns, instance.samples)
    if actual != stated or size.bits > instance.bits_allocated:
        reason = f"its pixel data has {actual} (rows, columns, samples) and {size.bits} bits, but its header states "
        raise ScanError(path, f"{reason}{stated} and {instance.bits_allocated} bits", DAMAGED)
    return size.bits


def decode_pixels(path, data: bytes, instance: Instance) -> np.ndarray:
    """Decode one frame to its stored values, colour as RGB, and check them against the header."""
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
    }
    buffer = data
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
        else:
            decoder = pixels.get_decoder(instance.syntax)
            frame, info = decoder.as_array(buffer, index=0, validate=False, decoding_plugin=plugin, **options)
    if instance.samples == 3 and info["photometric_interpretation"] != "RGB":
        reason = f"has colours as {info['photometric_interpretation']}, which could not be converted to RGB"
        raise ScanError(path, reason, EXPORT, "unsupported")
    if frame.shape[:2] != (instance.rows, instance.columns):
        raise ScanError(path, f"was decoded to the shape {frame.shape}", DAMAGED)
    return frame.astype(frame.dtype.newbyteorder("="), copy=False)


def decode(path, data: bytes, instance: Instance, dataset: pydicom.Dataset) -> np.ndarray:
    """Decode one frame to [H, W] or [H, W, 3]: MONOCHROME1 inverted, colour as RGB, lookup tables applied."""
    frame = decode_pixels(path, data, instance)
    if instance.samples == 1:
        low, high = -(1 << instance.bits_stored - 1) if instance.signed else 0, (1 << instance.bits_stored) - 1
        high += low
        if frame.min() < low or frame.max() > high:
            raise ScanError(path, f"has values outside the range {low} to {high} of its header", DAMAGED)
        frame = frame.astype(instance.dtype, copy=False)
        if instance.photometric == "MONOCHROME1":
            frame = (low + high - frame.astype(np.int64)).astype(instance.dtype)
    if instance.photometric == "PALETTE COLOR":
        with as_scan_error(path, "applying the palette", hide_message=True):
            frame = pixels.apply_color_lut(frame, dataset)
    if instance.lut:
        with as_scan_error(path, "applying the modality lookup table", hide_message=True):
            frame = pixels.apply_modality_lut(frame, dataset)
    return frame


def stack_frames(count: int, frames: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Stack (index, frame) pairs as [D, H, W, C]. Memory is allocated at the first frame, whose dtype is needed."""
    out = None
    for index, frame in frames:
        frame = frame[..., None] if frame.ndim == 2 else frame
        if out is None:
            out = np.empty((count, *frame.shape), frame.dtype)
        assert frame.dtype == out.dtype and frame.shape == out.shape[1:], (frame.dtype, frame.shape, out.shape)
        out[index] = frame
    return out


def to_voxels(path, frames: np.ndarray, instances: list[Instance], order, layout, limits: ScanLimits) -> np.ndarray:
    """Rescale frames [D, H, W, C], sorted by `order`, and return voxels [H, W, D, C] in display orientation."""
    slopes, intercepts = 1.0, 0.0
    if not instances[0].lut:
        slopes = np.concatenate([i.slopes for i in instances])[order]
        intercepts = np.concatenate([i.intercepts for i in instances])[order]
    voxels = to_intensities(path, frames, slopes, intercepts, limits).transpose(1, 2, 0, 3)
    return layout.apply(voxels) if layout else voxels


def stack_order(path, names, instance: Instance, positions) -> tuple[list[int], np.ndarray]:
    """Return the order of slices along their normal, and the mean step between slices in mm (patient coordinates).

    `positions` are those of the first voxel of each slice, [n > 1, 3]. A missing first or last slice, or the missing
    middle one of three, cannot be detected from them.
    """
    positions = np.array(positions, np.float64)
    across, down = np.array(instance.orientation[:3]), np.array(instance.orientation[3:])
    along = positions @ np.cross(across, down)
    order = [int(i) for i in np.argsort(along, kind="stable")]
    distances = np.diff(along[order])
    usual = float(np.median(distances))
    steps = [(names[a], names[b], d) for a, b, d in zip(order, order[1:], distances, strict=False)]
    if same := [f"{a} and {b}" for a, b, d in steps if d < 1e-3]:
        reason = f"has slices at the same position: {join_offenders(same)}"
        remedy = "it mixes several volumes (times, echoes, duplicates): give each its own directory"
        raise ScanError(path, reason, remedy, "series")
    if gaps := [f"{d:.3g} mm between {a} and {b}" for a, b, d in steps if abs(d - usual) > GAP * usual]:
        reason = f"slices are {usual:.3g} mm apart, but {join_offenders(gaps)}"
        raise ScanError(path, reason, "a slice is missing or another series is mixed in", "series")
    sorted_positions = positions[order]
    step = (sorted_positions[-1] - sorted_positions[0]) / (len(order) - 1)
    # A tilted gantry shifts all slices by the same step. A slice more than half a voxel off that line is another stack.
    share = (along[order] - along[order[0]]) / (along[order[-1]] - along[order[0]])
    line = sorted_positions[0] + share[:, None] * (sorted_positions[-1] - sorted_positions[0])
    off = sorted_positions - line
    shift = np.maximum(np.abs(off @ across) / instance.spacing[1], np.abs(off @ down) / instance.spacing[0])
    if shifted := [f"{names[i]} by {s:.1f} voxels" for i, s in zip(order, shift, strict=True) if s > 0.5]:
        reason = f"has slices shifted against the others: {join_offenders(shifted)}"
        raise ScanError(path, reason, "it mixes several stacks: give each its own directory", "series")
    return order, step


def slice_layout(path, names, instance: Instance, positions) -> tuple[list[int], orientation.DisplayLayout | None]:
    """Return the slice order and the display layout; without geometry, the file order and None."""
    count = len(names)
    if instance.orientation is None or instance.spacing is None or (count > 1 and positions is None):
        return list(range(count)), None
    across, down = np.array(instance.orientation[:3]), np.array(instance.orientation[3:])
    if abs(np.linalg.norm(across) - 1) > 0.01 or abs(np.linalg.norm(down) - 1) > 0.01 or abs(across @ down) > 0.01:
        raise ScanError(path, "has an ImageOrientationPatient that is not a rotation", DAMAGED_HEADER)
    order, step = stack_order(path, names, instance, positions) if count > 1 else ([0], np.cross(across, down))
    # ImageOrientationPatient gives the column direction first, so the array's second axis steps along `across`.
    affine = np.stack([down * instance.spacing[0], across * instance.spacing[1], step], axis=1) * LPS_TO_RAS[:, None]
    try:
        return order, orientation.display_layout(affine, (instance.rows, instance.columns, count), slice_axis=2)
    except ValueError as error:
        raise ScanError(path, f"states {error}", DAMAGED_HEADER) from None


def to_header(instance: Instance, layout: orientation.DisplayLayout | None, count: int) -> Header:
    shape, spacing = (instance.rows, instance.columns, count), (*(instance.spacing or (None, None)), None)
    if layout is not None:
        shape = layout.shape(shape)
        spacing = tuple(round(s, 6) for s in layout.spacing_mm)
        spacing = spacing if count > 1 else (*spacing[:2], None)
    padding = None
    if instance.padding is not None and instance.photometric in GRAY and not instance.lut:
        low, high = instance.padding
        if instance.photometric == "MONOCHROME1":
            total = -1 if instance.signed else (1 << instance.bits_stored) - 1
            low, high = total - high, total - low
        if len(set(instance.slopes)) == 1 == len(set(instance.intercepts)):
            ends = [v * instance.slopes[0] + instance.intercepts[0] for v in (low, high)]
            padding = (min(ends), max(ends))
    return Header(
        format="dicom",
        shape=(*shape, instance.channels),
        dtype=instance.dtype.name,
        modality=instance.modality,
        spacing_mm=None if spacing == (None, None, None) else spacing,
        orientation=layout.codes if layout else None,
        rescaled=instance.rescaled,
        photometric=instance.photometric,
        oblique_degrees=layout.oblique_degrees if layout else None,
        padding=padding,
    )


def read_file(path, limits: ScanLimits, *, with_pixels: bool) -> tuple[np.ndarray | None, Header]:
    """Read a single-frame or multi-frame file."""
    with open_scan(path, limits) as file:
        instance, dataset = load(path, file, limits, pixels=with_pixels)
    names = [f"frame {i + 1}" for i in range(instance.frames)]
    order, layout = slice_layout(path, names, instance, instance.positions)
    head = to_header(instance, layout, instance.frames)
    if not with_pixels:
        return None, head
    slot = {source: target for target, source in enumerate(order)}
    encoded = enumerate(encoded_frames(path, dataset, instance))
    frames = stack_frames(instance.frames, ((slot[i], decode(path, data, instance, dataset)) for i, data in encoded))
    return to_voxels(path, frames, [instance], order, layout, limits), head


def series_files(path, limits: ScanLimits) -> list[Path]:
    """Return all files of a directory, sorted by name. Anything but a regular file is an error."""
    files, others, size = [], [], 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if len(files) >= limits.max_slices:
                    raise limit_error(path, f"has more than {limits.max_slices} files", "max_slices")
                if entry.is_file():
                    files.append(Path(entry.path))
                    size += entry.stat().st_size
                else:
                    others.append(printable(entry.name))
    except OSError as error:
        raise ScanError(path, f"cannot be listed: {error.strerror}", "check its permissions", "missing") from None
    if others:
        reason = f"contains more than the files of one series: {join_offenders(sorted(others))}"
        raise ScanError(path, reason, "pass a directory with the files of one series only", "series")
    if not files:
        raise ScanError(path, "is an empty directory", "name a file, or the directory of a DICOM series", "missing")
    if size > limits.max_file_bytes:
        reason = f"has files of {size:,} bytes, more than the limit of {limits.max_file_bytes:,}"
        raise limit_error(path, reason, "max_file_bytes")
    return sorted(files)


def check_same_series(path, names: list[str], instances: list[Instance]) -> None:
    """Raise unless all files belong to one stack. The message lists those that differ from the majority."""
    exact = {
        "series": lambda i: i.series,
        "modality": lambda i: i.modality,
        "frame of reference": lambda i: i.frame_of_reference,
        "image size": lambda i: (i.rows, i.columns),
        "pixel format": lambda i: (i.samples, i.photometric, i.bits_allocated, i.bits_stored, i.signed),
        "use of a lookup table": lambda i: i.lut,
    }
    problems = []
    for name, key in exact.items():
        usual = Counter(map(key, instances)).most_common(1)[0][0]
        problems += [f"{n}: different {name}" for n, i in zip(names, instances, strict=True) if key(i) != usual]
    for name, key in {"orientation": lambda i: i.orientation, "pixel spacing": lambda i: i.spacing}.items():
        values = np.array([key(i) for i in instances])
        deviation = np.abs(values - np.median(values, axis=0)).max(axis=1)
        problems += [f"{n}: different {name}" for n, d in zip(names, deviation, strict=True) if d > TOLERANCE]
    if problems:
        reason = f"mixes series: {join_offenders(problems)}"
        raise ScanError(path, reason, "give each series its own directory", "series")


def load_series(path, files: list[Path], names: list[str], limits: ScanLimits, *, with_pixels: bool):
    """Return the instances and data sets of the files of a series. Raises ScanError listing files that do not fit."""
    instances, datasets, problems, size = [], [], [], 0
    for name, file_path in zip(names, files, strict=True):
        try:
            with open_scan(file_path, limits) as file:
                instance, dataset = load(file_path, file, limits, pixels=with_pixels)
        except ScanError as error:
            problems.append(f"{name} {error.reason}")
            continue
        if instance.frames > 1:
            problems.append(f"{name} has {instance.frames} frames")
        elif not instance.has_geometry:
            problems.append(f"{name} states no position, orientation or spacing, so it cannot be sorted")
        else:
            instances.append(instance)
            datasets.append(dataset)
            elements = (Fields(file_path, dataset).raw(keyword) for keyword in PIXELS)
            size += sum(len(element.value or b"") for element in elements if element is not None)
            if size > limits.max_file_bytes:  # deflated files are small on disk
                reason = f"unpacks to more than {limits.max_file_bytes:,} bytes"
                raise limit_error(path, reason, "max_file_bytes")
    if problems:
        reason = f"{len(problems)} of {len(files)} files are not slices of a series: {join_offenders(problems)}"
        remedy = "leave only one series in the directory, or name the one file you need"
        raise ScanError(path, reason, remedy, "series")
    check_same_series(path, names, instances)
    return instances, datasets


def read_series(path, limits: ScanLimits, *, with_pixels: bool) -> tuple[np.ndarray | None, Header]:
    """Read the directory of one series."""
    files = series_files(path, limits)
    if len(files) == 1:
        return read_file(files[0], limits, with_pixels=with_pixels)
    names = [printable(f.name) for f in files]
    instances, datasets = load_series(path, files, names, limits, with_pixels=with_pixels)
    first = instances[0]
    shape = (first.rows, first.columns, len(files), first.channels)
    check_shape(path, shape, first.bits_allocated // 8, limits)
    order, layout = slice_layout(path, names, first, [i.positions[0] for i in instances])
    head = to_header(first, layout, len(files))
    padding = head.padding if len({(i.slopes, i.intercepts, i.padding) for i in instances}) == 1 else None
    head = dataclasses.replace(head, rescaled=any(i.rescaled for i in instances), padding=padding)
    if not with_pixels:
        return None, head

    def decoded() -> Iterator[tuple[int, np.ndarray]]:
        for target, index in enumerate(order):
            file_path, instance, dataset = files[index], instances[index], datasets[index]
            datasets[index] = None  # frees the encoded bytes as the voxels are decoded
            data = list(encoded_frames(file_path, dataset, instance))
            yield target, decode(file_path, data[0], instance, dataset)

    return to_voxels(path, stack_frames(len(files), decoded()), instances, order, layout, limits), head


def header(path, *, limits: ScanLimits) -> Header:
    """Return the header without reading pixels."""
    return (read_series if os.path.isdir(path) else read_file)(path, limits, with_pixels=False)[1]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """Read a file or the directory of a series.

    Frames without positions (ultrasound) keep their order, and projections (CR, MG) their stored orientation. Windows
    and VOI tables are not applied.
    """
    check_volume(path, volume, 1, limits)
    return (read_series if os.path.isdir(path) else read_file)(path, limits, with_pixels=True)
