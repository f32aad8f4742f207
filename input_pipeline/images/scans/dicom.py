"""DICOM: a single file, a multi-frame file, or the directory of one series."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
from pydicom import encaps, pixels, uid

from input_pipeline.images.scans import isolated, orientation
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
    printable,
)
from input_pipeline.images.scans.fields import (
    EXPORT,
    GRAY,
    PIXELS,
    PLUGINS,
    Fields,
    Instance,
    check_frame,
    load,
    tag_of,
)

GAP = 0.25  # of the usual distance: positions rounded to 0.1 mm pass at 0.625 mm, a missing slice is at 1.0
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


def sniff(start: bytes) -> bool:
    return start[128:132] == b"DICM"


def encoded_frames(path, dataset: pydicom.Dataset, instance: Instance):
    """Each frame's bytes, encoded or native. Raises unless there are exactly as many as the header says."""
    fields = Fields(path, dataset)
    present = [keyword for keyword in PIXELS if fields.raw(keyword) is not None]
    if present != ["PixelData"]:
        what = f"holds {present[0]}, not a picture of integers" if present else "holds no pixel data"
        raise ScanError(path, what, "leave it out", "unsupported")
    data = fields.raw("PixelData").value
    if not uid.UID(instance.syntax).is_encapsulated:
        swapped = instance.syntax == uid.ExplicitVRBigEndian and instance.bits_allocated == 8
        if swapped and fields.raw("PixelData").VR == "OW" and data and len(data) % 2 == 0:
            data = np.frombuffer(data, np.uint16).byteswap().tobytes()
        size = instance.rows * instance.columns * instance.samples * instance.bits_allocated // 8
        if instance.photometric == "YBR_FULL_422":
            size = size * 2 // 3
        total = size * instance.frames
        if not (data is not None and total <= len(data) <= total + (total & 1)):
            what = f"holds {len(data or b''):,} bytes of pixels, its header asks for {total:,}"
            raise ScanError(path, what, "it is cut short or its header is damaged")
        yield from (data[i * size : (i + 1) * size] for i in range(instance.frames))
        return
    if not data or fields.raw("PixelData").length not in (0xFFFFFFFF, -1):
        raise ScanError(path, "holds no encapsulated pixel data", "it is damaged: " + EXPORT)
    offsets = None
    if fields.raw("ExtendedOffsetTable") is not None and fields.raw("ExtendedOffsetTableLengths") is not None:
        offsets = (fields.raw("ExtendedOffsetTable").value, fields.raw("ExtendedOffsetTableLengths").value)
    count = 0
    with blamed(path, "splitting the pixel data into frames"):
        for frame in encaps.generate_frames(data, number_of_frames=instance.frames, extended_offsets=offsets):
            count += 1
            if count > instance.frames:
                break
            yield frame
    if count != instance.frames:
        amount = "more" if count > instance.frames else f"only {count}"
        raise ScanError(path, f"holds {amount} frames, its header says {instance.frames}", "it is damaged: " + EXPORT)


def decode(path, data: bytes, instance: Instance, dataset: pydicom.Dataset) -> np.ndarray:
    """One frame -> stored values [H, W] or [H, W, 3]: MONOCHROME1 inverted, colour as RGB, lookup tables applied."""
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
    if uid.UID(instance.syntax).is_encapsulated:
        options["bits_stored"] = check_frame(path, data, instance)
        jpeg2000 = instance.syntax in (uid.JPEG2000, uid.JPEG2000Lossless)
        if instance.photometric in ("YBR_RCT", "YBR_ICT") and not jpeg2000:
            raise ScanError(path, f"states {instance.photometric} outside JPEG 2000", EXPORT)
        buffer = encaps.encapsulate([data], has_bot=False)
    elif instance.syntax == uid.ExplicitVRBigEndian:
        options["pixel_vr"] = "OB" if instance.bits_allocated == 8 else "OW"  # 8-bit words were swapped above
    plugin = PLUGINS[instance.syntax] or ""
    with blamed(path, "decoding the pixels"):
        if plugin == "gdcm":
            frame, info = isolated.decode(instance.syntax, data, options)
        else:
            decoder = pixels.get_decoder(uid.UID(instance.syntax))
            frame, info = decoder.as_array(buffer, index=0, validate=False, decoding_plugin=plugin, **options)
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    if instance.samples == 3 and info["photometric_interpretation"] != "RGB":
        what = f"is coloured as {info['photometric_interpretation']}, which was not converted to RGB"
        raise ScanError(path, what, EXPORT, "unsupported")
    if frame.shape[:2] != (instance.rows, instance.columns):
        raise ScanError(path, f"was decoded to {frame.shape}", "it is damaged: " + EXPORT)
    if instance.samples == 1:
        low, high = -(1 << instance.bits_stored - 1) if instance.signed else 0, (1 << instance.bits_stored) - 1
        high += low
        if frame.min() < low or frame.max() > high:
            what = f"holds values outside the {low} to {high} of its header"
            raise ScanError(path, what, "it is damaged: " + EXPORT)
        frame = frame.astype(instance.dtype, copy=False)
        if instance.photometric == "MONOCHROME1":
            frame = (low + high - frame.astype(np.int64)).astype(instance.dtype)
    if instance.photometric == "PALETTE COLOR":
        with blamed(path, "applying the palette", quiet=True):
            frame = pixels.apply_color_lut(frame, dataset)
    if instance.lut:
        with blamed(path, "applying the modality lookup table", quiet=True):
            frame = pixels.apply_modality_lut(frame, dataset)
    return frame


def stack_order(path, names, instance: Instance, positions) -> tuple[list[int], np.ndarray]:
    """The order of slices along their normal, and the step from one to the next in mm (patient coordinates).

    Args:
      names: of the slices, for messages.
      positions: [n, 3] of each slice's first voxel; n > 1.
    Raises:
      ScanError: slices at one position, gaps, slices that are shifted against the others. A missing first or last
        slice, or the middle one of three, cannot be seen from positions.
    """
    positions = np.array(positions, np.float64)
    across, down = np.array(instance.orientation[:3]), np.array(instance.orientation[3:])
    along = positions @ np.cross(across, down)
    order = [int(i) for i in np.argsort(along, kind="stable")]
    distances = np.diff(along[order])
    pairs = list(zip(order, order[1:], strict=False))
    usual = float(np.median(distances))
    same = [f"{names[a]} and {names[b]}" for (a, b), d in zip(pairs, distances, strict=True) if d < 1e-3]
    if same:
        what = f"has slices at one position: {listed(same)}"
        remedy = "it holds several volumes (times, echoes, duplicates): give each its own directory"
        raise ScanError(path, what, remedy, "series")
    gaps = [
        f"{d:.3g} mm between {names[a]} and {names[b]}"
        for (a, b), d in zip(pairs, distances, strict=True)
        if abs(d - usual) > GAP * usual
    ]
    if gaps:
        what = f"slices are {usual:.3g} mm apart, but {listed(gaps)}"
        raise ScanError(path, what, "a slice is missing or another series is mixed in", "series")
    sorted_positions = positions[order]
    step = (sorted_positions[-1] - sorted_positions[0]) / (len(order) - 1)
    # A tilted gantry shifts every slice by the same step; anything beyond half a voxel from that line is another stack.
    share = (along[order] - along[order[0]]) / (along[order[-1]] - along[order[0]])
    line = sorted_positions[0] + share[:, None] * (sorted_positions[-1] - sorted_positions[0])
    off = sorted_positions - line
    shift = np.maximum(np.abs(off @ across) / instance.spacing[1], np.abs(off @ down) / instance.spacing[0])
    shifted = [f"{names[i]} by {s:.1f} voxels" for i, s in zip(order, shift, strict=True) if s > 0.5]
    if shifted:
        what = f"has slices shifted against the others: {listed(shifted)}"
        raise ScanError(path, what, "several stacks are mixed: give each its own directory", "series")
    return order, step


def arrange(path, names, instance: Instance, positions) -> tuple[list[int], orientation.DisplayLayout | None]:
    """The order of the slices and how rows, columns and slices are displayed; no layout without geometry."""
    count = len(names)
    if instance.orientation is None or instance.spacing is None or (count > 1 and positions is None):
        return list(range(count)), None
    across, down = np.array(instance.orientation[:3]), np.array(instance.orientation[3:])
    if abs(np.linalg.norm(across) - 1) > 0.01 or abs(np.linalg.norm(down) - 1) > 0.01 or abs(across @ down) > 0.01:
        raise ScanError(path, "has an ImageOrientationPatient that is no rotation", "its header is damaged: " + EXPORT)
    if count > 1:
        order, step = stack_order(path, names, instance, positions)
    else:
        order, step = [0], np.cross(across, down)
    # Columns run along `across`, so the array's second axis steps by it; rows along `down`.
    affine = np.stack([down * instance.spacing[0], across * instance.spacing[1], step], axis=1) * LPS_TO_RAS[:, None]
    try:
        return order, orientation.display(affine, (instance.rows, instance.columns, count), slice_axis=2)
    except ValueError as error:
        raise ScanError(path, f"states {error}", "its header is damaged: " + EXPORT) from None


def header_of(instance: Instance, layout: orientation.DisplayLayout | None, count: int) -> Header:
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
        kind="2d" if count == 1 else "3d",
        modality=instance.modality,
        shape=(*shape, instance.channels),
        spacing_mm=None if spacing == (None, None, None) else spacing,
        orientation=layout.codes if layout else None,
        dtype=instance.dtype.name,
        rescaled=instance.rescaled,
        photometric=instance.photometric,
        oblique_degrees=layout.oblique_degrees if layout else None,
        padding=padding,
    )


def finish(path, frames: np.ndarray, slopes, intercepts, layout, limits: ScanLimits) -> np.ndarray:
    """Sorted stored frames [D, H, W, C] -> voxels [H, W, D, C]."""
    frames = natural(path, frames, slopes, intercepts, limits)
    voxels = frames.transpose(1, 2, 0, 3)
    return layout.apply(voxels) if layout else voxels


def fill(frames: np.ndarray | None, count: int, index: int, frame: np.ndarray) -> np.ndarray:
    """Put a frame into [D, H, W, C], which is made when the first frame has shown its dtype."""
    frame = frame[..., None] if frame.ndim == 2 else frame
    if frames is None:
        frames = np.empty((count, *frame.shape), frame.dtype)
    assert frame.dtype == frames.dtype and frame.shape == frames.shape[1:], (frame.dtype, frame.shape, frames.shape)
    frames[index] = frame
    return frames


def one(path, limits: ScanLimits, *, want: bool) -> tuple[np.ndarray | None, Header]:
    with opened(path, limits) as file:
        instance, dataset = load(path, file, limits, pixels=want)
    names = [f"frame {i + 1}" for i in range(instance.frames)]
    order, layout = arrange(path, names, instance, instance.positions)
    head = header_of(instance, layout, instance.frames)
    if not want:
        return None, head
    frames, place = None, {source: target for target, source in enumerate(order)}
    for i, data in enumerate(encoded_frames(path, dataset, instance)):
        frames = fill(frames, instance.frames, place[i], decode(path, data, instance, dataset))
    slopes, intercepts = ([values[i] for i in order] for values in (instance.slopes, instance.intercepts))
    if instance.lut:
        slopes, intercepts = 1.0, 0.0
    return finish(path, frames, slopes, intercepts, layout, limits), head


def series_files(path, limits: ScanLimits) -> list[Path]:
    """Every entry of the directory, by name. Anything but regular files is an error."""
    files, others, size = [], [], 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if len(files) >= limits.max_slices:
                    what = f"has more than {limits.max_slices} files"
                    raise ScanError(path, what, "raise ScanLimits.max_slices if this is one series", "limit")
                if entry.is_file():
                    files.append(Path(entry.path))
                    size += entry.stat().st_size
                else:
                    others.append(printable(entry.name))
    except OSError as error:
        raise ScanError(path, f"cannot be listed: {error.strerror}", "check its permissions", "missing") from None
    if others:
        what = f"holds more than the files of one series: {listed(sorted(others))}"
        raise ScanError(path, what, "name the directory of one series, with nothing else in it", "series")
    if not files:
        raise ScanError(path, "is an empty directory", "name a file, or the directory of a DICOM series", "missing")
    if size > limits.max_file_bytes:
        what = f"has files of {size:,} bytes, more than the limit of {limits.max_file_bytes:,}"
        raise ScanError(path, what, "raise ScanLimits.max_file_bytes if this is right", "limit")
    return sorted(files)


def check_alike(path, names: list[str], instances: list[Instance]) -> None:
    """Raise unless all files belong to one stack; the message lists those that differ from the majority."""
    exact = {
        "series": lambda i: i.series,
        "modality": lambda i: i.modality,
        "frame of reference": lambda i: i.frame_of_reference,
        "rows and columns": lambda i: (i.rows, i.columns),
        "kind of pixel": lambda i: (i.samples, i.photometric, i.bits_allocated, i.bits_stored, i.signed),
        "use of a lookup table": lambda i: i.lut,
    }
    problems = []
    for what, key in exact.items():
        usual = Counter(map(key, instances)).most_common(1)[0][0]
        problems += [f"{n}: another {what}" for n, i in zip(names, instances, strict=True) if key(i) != usual]
    for what, key in {"orientation": lambda i: i.orientation, "pixel spacing": lambda i: i.spacing}.items():
        values = np.array([key(i) for i in instances])
        far = np.abs(values - np.median(values, axis=0)).max(axis=1)
        problems += [f"{n}: another {what}" for n, f in zip(names, far, strict=True) if f > 1e-3]
    if problems:
        raise ScanError(path, f"mixes series: {listed(problems)}", "give each series its own directory", "series")


def series(path, limits: ScanLimits, *, want: bool) -> tuple[np.ndarray | None, Header]:
    files = series_files(path, limits)
    if len(files) == 1:
        return one(files[0], limits, want=want)
    names, instances, datasets, problems, held = [printable(f.name) for f in files], [], [], [], 0
    for name, file_path in zip(names, files, strict=True):
        try:
            with opened(file_path, limits) as file:
                instance, dataset = load(file_path, file, limits, pixels=want)
        except ScanError as error:
            problems.append(f"{name} {error.reason}")
            continue
        if instance.frames > 1:
            problems.append(f"{name} holds {instance.frames} frames")
        elif not instance.geometry:
            problems.append(f"{name} states no position, orientation or spacing, so it cannot be sorted")
        else:
            instances.append(instance)
            datasets.append(dataset)
            found = (dataset.get_item(tag_of(keyword)) for keyword in PIXELS)
            held += sum(len(element.value or b"") for element in found if element is not None)
            if held > limits.max_file_bytes:  # of deflated files, which are small on disk
                what = f"unpacks to more than {limits.max_file_bytes:,} bytes"
                raise ScanError(path, what, "raise ScanLimits.max_file_bytes if this is right", "limit")
    if problems:
        what = f"{len(problems)} of {len(files)} files are no slices of a series: {listed(problems)}"
        raise ScanError(
            path, what, "leave only one series in the directory, or name the one file that is meant", "series"
        )
    check_alike(path, names, instances)
    first = instances[0]
    shape = (first.rows, first.columns, len(files), first.channels)
    check_shape(path, shape, first.bits_allocated // 8, limits)
    order, layout = arrange(path, names, first, [i.positions[0] for i in instances])
    whole = [instances[i] for i in order]
    slopes, intercepts = [i.slopes[0] for i in whole], [i.intercepts[0] for i in whole]
    head = header_of(first, layout, len(files))
    if any(i.rescaled or i.padding != first.padding for i in whole):
        one_map = len(set(slopes)) == 1 == len(set(intercepts)) and all(i.padding == first.padding for i in whole)
        changed = {"rescaled": any(i.rescaled for i in whole)} | ({} if one_map else {"padding": None})
        head = dataclasses.replace(head, **changed)
    if not want:
        return None, head
    frames = None
    for target, index in enumerate(order):
        file_path, instance, dataset = files[index], instances[index], datasets[index]
        datasets[index] = None  # the files' bytes go as the voxels come
        data = list(encoded_frames(file_path, dataset, instance))
        frames = fill(frames, len(files), target, decode(file_path, data[0], instance, dataset))
    if first.lut:
        slopes, intercepts = 1.0, 0.0
    return finish(path, frames, slopes, intercepts, layout, limits), head


def header(path, *, limits: ScanLimits) -> Header:
    """From attributes alone: no pixel is read. A directory's files are all looked at."""
    return (series if os.path.isdir(path) else one)(path, limits, want=False)[1]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """A file or the directory of a series.

    Slices are sorted along their normal and displayed as in `orientation`; frames without positions (ultrasound) stay
    in their order, single projections (CR, MG) as stored. Windows and VOI tables are not applied. Native pixels carry
    no checksum: a flipped bit in them, or in a number of the header, cannot be seen.
    """
    check_volume(path, volume, 1, limits)
    return (series if os.path.isdir(path) else one)(path, limits, want=True)
