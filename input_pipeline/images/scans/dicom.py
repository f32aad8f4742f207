"""DICOM: a single file, a multi-frame file, or the directory of one series."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from input_pipeline.images.scans import orientation
from input_pipeline.images.scans.access import Member, open_scan
from input_pipeline.images.scans.base import Header, ScanError, ScanLimits, join_offenders
from input_pipeline.images.scans.checks import check_shape, check_volume
from input_pipeline.images.scans.dicom_file import load, sniff
from input_pipeline.images.scans.fields import DAMAGED_HEADER, Fields
from input_pipeline.images.scans.instance import Instance, select_frames
from input_pipeline.images.scans.lookup import read_lut
from input_pipeline.images.scans.mixtures import check_one_kind, check_runs, without_times
from input_pipeline.images.scans.pixel_data import decode, encoded_frames
from input_pipeline.images.scans.rescale import Rescale, rescale_of
from input_pipeline.images.scans.series import join_kinds, load_series, series_files
from input_pipeline.images.scans.voi import series_window

__all__ = ["header", "read", "sniff"]

GAP = 0.25  # tolerated deviation from the usual slice distance: rounding to 0.1 mm stays below, a missing slice is 1.0
TILT = 1.0  # degrees between the slice normal and the line through the slices, from which a tilt is reported
RUN = 3  # distances on either side of a change of the slice distance that is not a missing slice
BURNED_IN = "the header states burned-in annotation: look for names and dates in the image"
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


def stack_frames(count: int, frames: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Stack (index, frame) pairs as [D, H, W, C], in a dtype that contains all frames."""
    out = None
    for index, frame in frames:
        frame = frame[..., None] if frame.ndim == 2 else frame
        if out is None:
            out = np.empty((count, *frame.shape), frame.dtype)
        assert frame.shape == out.shape[1:], (frame.shape, out.shape)
        out = out.astype(np.result_type(out, frame), copy=False)  # slices may differ in BitsStored or sign
        out[index] = frame
    return out


def distance_change(distances: np.ndarray, numbers: Sequence[int | None]) -> int | None:
    """Return the index of the only change of the slice distance, as in head CT; None if there is no such index.

    Args:
      distances: float[n] between adjacent slices, in mm.
      numbers: InstanceNumber of the n + 1 slices in their order. If they count along the slices, none is missing.
    """
    steps = np.diff(numbers) if None not in numbers else np.zeros(0)
    if steps.size and (np.sign(steps) == np.sign(steps[0])).all() and (steps != np.median(steps)).any():
        return None  # a number is missing
    for index in range(RUN, len(distances) - RUN + 1):
        runs = distances[:index], distances[index:]
        if all((np.abs(run - np.median(run)) <= GAP * np.median(run)).all() for run in runs):
            return index
    return None


def stack_order(path, names, instance: Instance, positions, numbers) -> tuple[list[int], np.ndarray, str | None]:
    """Return the order of slices along their normal, their mean step in mm (patient coordinates), and a notice.

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
    notice, change = None, distance_change(distances, [numbers[i] for i in order])
    if gaps := [f"{d:.3g} mm between {a} and {b}" for a, b, d in steps if abs(d - usual) > GAP * usual]:
        if change is not None:
            near, far = np.median(distances[:change]), np.median(distances[change:])
            notice = f"the slice distance changes once, from {near:.3g} mm to {far:.3g} mm after {names[order[change]]}"
            notice, gaps = (
                f"{notice}; no slice is missing, but depth is not to scale: resample the scan if it matters",
                [],
            )
    if gaps:
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
    return order, step, notice


class SliceLayout(NamedTuple):
    """The order of slices and how they are displayed; without geometry, the file order and None."""

    order: list[int]
    display: orientation.DisplayLayout | None = None
    affine: np.ndarray | None = None  # Header.affine
    changes: bool = False  # whether the slice distance changes
    notices: tuple[str, ...] = ()


def tilt_notice(instance: Instance, step: np.ndarray) -> tuple[str, ...]:
    """Return the notice of a tilted gantry, whose slices are shifted against each other."""
    normal = np.cross(instance.orientation[:3], instance.orientation[3:])
    along = float(step @ normal)
    shift = float(np.linalg.norm(step - along * normal))
    degrees = float(np.degrees(np.arctan2(shift, abs(along))))
    if degrees < TILT:
        return ()
    return (f"the gantry is tilted by {degrees:.1f} degrees, so each slice is shifted by {shift:.2f} mm against the "
            "one before: the shape is sheared, and is not corrected",)  # fmt: skip


def slice_layout(path, names, instance: Instance, positions, numbers) -> SliceLayout:
    """Return the layout of the slices of one volume."""
    count = len(names)
    spacing = instance.spacing or ((1.0, 1.0) if count == 1 else None)  # for a single slice, only the directions matter
    if instance.orientation is None or spacing is None or (count > 1 and positions is None):
        return SliceLayout(list(range(count)))
    across, down = np.array(instance.orientation[:3]), np.array(instance.orientation[3:])
    if abs(np.linalg.norm(across) - 1) > 0.01 or abs(np.linalg.norm(down) - 1) > 0.01 or abs(across @ down) > 0.01:
        raise ScanError(path, "has an ImageOrientationPatient that is not a rotation", DAMAGED_HEADER)
    order, step, notices, changes = [0], np.cross(across, down), (), False
    if count > 1:
        order, step, notice = stack_order(path, names, instance, positions, numbers)
        changes = notice is not None
        notices = tilt_notice(instance, step) + (() if notice is None else (notice,))
    # ImageOrientationPatient gives the column direction first, so the array's second axis steps along `across`.
    affine = np.stack([down * spacing[0], across * spacing[1], step], axis=1) * LPS_TO_RAS[:, None]
    shape = instance.rows, instance.columns, count
    try:
        display = orientation.display_layout(affine, shape, slice_axis=2)
    except ValueError as error:
        raise ScanError(path, f"states {error}", DAMAGED_HEADER) from None
    if positions is None or instance.spacing is None or changes:
        return SliceLayout(order, display, None, changes, notices)
    origin = np.array(positions[order[0]], np.float64) * LPS_TO_RAS
    return SliceLayout(order, display, display.affine(np.column_stack([affine, origin]), shape), False, notices)


def to_header(instances: Sequence[Instance], slices: SliceLayout, rescale: Rescale) -> Header:
    """Return the header of the volume of one file, or of the files of a series."""
    layout = slices.display
    first, count = instances[0], sum(i.frames for i in instances)
    shape, spacing = (first.rows, first.columns, count), (*(first.spacing or (None, None)), None)
    if layout is not None:
        shape = layout.shape(shape)
        distance = None if count == 1 or slices.changes else round(layout.spacing_mm[2], 6)
        spacing = (*(round(s, 6) if first.spacing else None for s in layout.spacing_mm[:2]), distance)
    return Header(
        format="dicom",
        shape=(*shape, first.channels),
        dtype=np.result_type(*(i.dtype for i in instances)).name,
        modality=first.modality,
        spacing_mm=None if spacing == (None, None, None) else spacing,
        orientation=layout.codes if layout else None,
        rescaled=any(i.rescaled for i in instances),
        photometric=first.photometric,
        oblique_degrees=layout.oblique_degrees if layout else None,
        padding=rescale.padding,
        window=shown_window(instances, rescale),
        affine=None if slices.affine is None else tuple(tuple(map(float, row)) for row in slices.affine),
        notices=(*slices.notices, *((BURNED_IN,) if any(i.burned_in for i in instances) else ())),
    )


def shown_window(instances: Sequence[Instance], rescale: Rescale) -> tuple[float, float] | None:
    """Return the window that the files state, in the units of `read`. It is inverted for MONOCHROME1."""
    window, photometric = series_window(i.window for i in instances), instances[0].photometric
    if window is None or photometric == "MONOCHROME2":
        return window
    if photometric != "MONOCHROME1" or rescale.total is None:
        return None
    return rescale.total - window[1], rescale.total - window[0]


def read_slices(path, instances: list[Instance], frames, names, positions, limits: ScanLimits, noun: str):
    """Sort, decode and rescale the slices of one file or of a series.

    Args:
      frames: function that takes the slice order and yields decoded (position in the order, frame); None to read only
        the header.
      positions: of the first voxel of each slice, or None.
      noun: "slice" or "frame", for messages.
    """
    first, numbers = instances[0], [i.number if i.frames == 1 else None for i in instances for _ in range(i.frames)]
    layout = slice_layout(path, names, first, positions, numbers)
    order = layout.order
    if layout.display is not None:
        check_runs(path, join_kinds(instances), order, names, noun)
    rescale = rescale_of(instances)
    head = to_header(instances, layout, rescale)
    if frames is None:
        return None, head
    voxels = rescale.apply(path, stack_frames(len(names), frames(order)), order, limits).transpose(1, 2, 0, 3)
    return (layout.display.apply(voxels) if layout.display else voxels), head


def read_file(path, limits: ScanLimits, *, with_pixels: bool) -> tuple[np.ndarray | None, Header]:
    """Read a single-frame or multi-frame file."""
    with open_scan(path, limits) as file:
        instance, dataset = load(path, file, limits, pixels=with_pixels)
    return read_frames(path, instance, dataset, range(instance.frames), limits, with_pixels=with_pixels)


def read_some_frames(
    path, member: Member, frames: Sequence[int], limits: ScanLimits, *, with_pixels: bool, timed: bool
) -> tuple[np.ndarray | None, Header]:
    """Read those frames of a multi-frame file that are one volume. `timed` as in `load_series`."""
    with member.open(limits, with_pixels) as file:
        instance, dataset = load(member.path, file, limits, pixels=with_pixels, mixed=True)
    kinds = select_frames(instance, frames).kinds
    names = [f"frame {i + 1}" for i in frames]
    check_one_kind(member.path, without_times(kinds) if timed else kinds, names, "frame")
    return read_frames(member.path, instance, dataset, frames, limits, with_pixels=with_pixels)


def read_frames(
    path, instance: Instance, dataset, frames: Sequence[int], limits: ScanLimits, *, with_pixels: bool
) -> tuple[np.ndarray | None, Header]:
    """Read frames of one file that are one volume."""
    part = select_frames(instance, frames)

    def decoded(order: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        lut = read_lut(path, Fields(path, dataset), instance)
        slot = {frames[source]: target for target, source in enumerate(order)}
        for i, data in enumerate(encoded_frames(path, dataset, instance)):
            if i in slot:
                yield slot[i], decode(path, data, instance, dataset, lut)

    names = [f"frame {i + 1}" for i in frames]
    source = decoded if with_pixels else None
    return read_slices(path, [part], source, names, part.positions, limits, "frame")


def read_series(path, limits: ScanLimits, *, with_pixels: bool) -> tuple[np.ndarray | None, Header]:
    """Read the directory of one series."""
    files = series_files(path, limits)
    if len(files) == 1:
        return read_file(files[0], limits, with_pixels=with_pixels)
    return read_members(path, [Member.of_file(file) for file in files], limits, with_pixels=with_pixels)


def read_members(
    path, members: Sequence[Member], limits: ScanLimits, *, with_pixels: bool, timed: bool = False
) -> tuple[np.ndarray | None, Header]:
    """Read the single-frame files of one volume. `timed` as in `load_series`."""
    instances, datasets = load_series(path, members, limits, with_pixels=with_pixels, timed=timed)
    first = instances[0]
    shape = (first.rows, first.columns, len(members), first.channels)
    check_shape(path, shape, max(i.bits_allocated for i in instances) // 8, limits)

    def decoded(order: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for target, index in enumerate(order):
            file_path, instance, dataset = members[index].path, instances[index], datasets[index]
            datasets[index] = None  # frees the encoded bytes as the voxels are decoded
            lut = read_lut(file_path, Fields(file_path, dataset), instance)
            data = list(encoded_frames(file_path, dataset, instance))
            yield target, decode(file_path, data[0], instance, dataset, lut)

    frames, names = decoded if with_pixels else None, [member.name for member in members]
    return read_slices(path, instances, frames, names, [i.positions[0] for i in instances], limits, "slice")


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
