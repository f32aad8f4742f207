"""Survey of a study: its image series, the files that were set aside, and the files that prevent reading."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from input_pipeline.images.scans.base import MAX_LISTED, ScanError, ScanLimits
from input_pipeline.images.scans.mixtures import ORIENTATION, SPACING, Attribute, Columns, Value, show
from input_pipeline.images.scans.study import duplicates, splitting
from input_pipeline.images.scans.study.containers import Container
from input_pipeline.images.scans.study.instances import LOCALIZER, NOT_DICOM, Entry, aside, read_entry

PLANES = ("sagittal", "coronal", "axial")  # by the axis of patient coordinates that is nearest to the slice normal
UNLABELLED = {"Rows", "Columns", "Modality", SPACING.keyword, ORIENTATION.keyword}  # shown in columns of their own
COMPONENTS = {"M": "magnitude", "P": "phase", "R": "real", "I": "imaginary"}  # third value of ImageType of MR
MAX_LABELS = 3
Slice = tuple[Entry, int]  # a file, and the index of a frame in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """An image series, or a part of one whose slices form one volume, or one volume per time."""

    key: str  # the number that selects it: "3", "3.2" for the second of several parts, "s1" without a SeriesNumber
    number: int | None
    description: str
    modality: str
    plane: str  # "axial", "coronal" or "sagittal", the nearest one; "" if unknown
    label: str  # what distinguishes the part from the other parts with its number
    rows: int
    columns: int
    spacing_mm: tuple[float | None, float | None, float | None]  # between rows, columns and slices
    volumes: tuple[tuple[Slice, ...], ...]  # slices of each volume, in no order
    burned_in: bool
    aside: str  # why it is selected by its number only, or ""
    problem: str = ""  # why it cannot be read, or ""

    @property
    def slices(self) -> int:
        """Number of slices of a volume."""
        return len(self.volumes[0])

    @property
    def size(self) -> str:
        text = f"{self.rows} x {self.columns} x {self.slices}"
        return text + (f", {len(self.volumes)} times" if len(self.volumes) > 1 else "")

    def __str__(self) -> str:
        facts = [self.modality, self.plane, self.size, self.label, self.aside]
        name = f'{self.key} "{self.description}"' if self.description else self.key
        return f"{name} ({', '.join(filter(None, facts))})"


@dataclasses.dataclass(frozen=True)
class SetAside:
    """Files that are no scans, for one reason."""

    reason: str
    files: int
    names: tuple[str, ...]  # of the first ones


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that a study contains. `refused` are (file, reason) of files that may be slices of any series."""

    series: tuple[Series, ...]
    set_aside: tuple[SetAside, ...]
    refused: tuple[tuple[str, str], ...]
    files: int


def survey(
    path, container: Container, limits: ScanLimits, advance: Callable[[int], None] = lambda count: None
) -> Study:
    """Read the headers of all members, group the images to series, and set aside everything else.

    advance: called with 1 after each file.
    """
    entries = []
    for member in container.members:
        entries.append(read_entry(path, member, limits))
        advance(1)
    entries = refuse_lookalikes(entries)
    entries, dropped, conflicts = duplicates.drop(path, entries, limits)
    problems = collections.defaultdict(list, {uid: list(texts) for uid, texts in conflicts.items()})
    refused = [(skipped.name, skipped.reason) for skipped in container.skipped if skipped.may_be_slice]
    others = [(skipped.reason, skipped.name) for skipped in container.skipped if not skipped.may_be_slice]
    others += [("is a duplicate", name) for name in dropped]
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if entry.instance is not None:
            alone = entry.member.name if entry.instance.frames > 1 else ""
            groups.setdefault((entry.series or "", alone), []).append(entry)
        elif not entry.refused:
            others.append((entry.reason, entry.member.name))
        elif entry.series is not None:
            problems[entry.series].append(f"{entry.member.name} {entry.reason}")
        else:
            refused.append((entry.member.name, entry.reason))
    parts = [part for members in groups.values() for part in parts_of(members)]
    found = {part.entries[0].series or "" for part in parts}
    for uid in problems.keys() - found:  # none of its files can be read
        refused += [(text.partition(" ")[0], text.partition(" ")[2]) for text in problems[uid]]
    return Study(tuple(named(parts, problems)), join_reasons(others), tuple(sorted(refused)), len(container.members))


def refuse_lookalikes(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries. A file that is not DICOM, but is named like images in its folder, may be a damaged slice."""

    def kind(entry: Entry) -> tuple[str, str]:
        folder, name = os.path.split(entry.member.name)
        suffix = os.path.splitext(name)[1].lower()
        return folder, "" if suffix[1:].isdigit() else suffix  # UIDs and numbers as names

    kinds = {kind(entry) for entry in entries if entry.instance is not None}
    reason = "is not DICOM, but is named like the images next to it"
    return [
        dataclasses.replace(entry, reason=reason, refused=True)
        if entry.reason == NOT_DICOM and kind(entry) in kinds
        else entry
        for entry in entries
    ]


def join_reasons(others: Iterable[tuple[str, str]]) -> tuple[SetAside, ...]:
    names: dict[str, list[str]] = {}
    for reason, name in sorted(others):
        names.setdefault(reason.removeprefix("is "), []).append(name)
    return tuple(SetAside(reason, len(files), tuple(files[:MAX_LISTED])) for reason, files in sorted(names.items()))


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a series: its files, the slices of each volume as indices of `slices`, and the attributes of each."""

    entries: list[Entry]
    volumes: tuple[tuple[Slice, ...], ...]
    kinds: dict[Attribute, Value]  # of its first slice
    distance: float | None

    @property
    def order(self) -> tuple:
        """Sorts the parts of a study in the same way on every machine."""
        first = self.entries[0]
        numbers = [entry.instance.number for entry in self.entries if entry.instance.number is not None]
        number = (1, 0) if first.number is None else (0, first.number)
        return (*number, first.series or "", min(numbers, default=0), min(e.member.name for e in self.entries))


def parts_of(entries: Sequence[Entry]) -> list[Part]:
    """Return the parts of files with one SeriesInstanceUID: single images, or the frames of one file."""
    slices = [(entry, i) for entry in entries for i in range(entry.instance.frames)]
    columns = join_columns(entries)
    positions = [entry.instance.positions[i] if entry.instance.positions else None for entry, i in slices]
    parts = []
    for volumes in splitting.split(columns, positions, one_file=entries[0].instance.frames > 1):
        members = [i for volume in volumes for i in volume]
        first = min(members)
        owners = list({id(slices[i][0]): slices[i][0] for i in sorted(members)}.values())
        kinds = {attribute: values[first] for attribute, values in columns.items()}
        chosen = tuple(tuple(slices[i] for i in volume) for volume in volumes)
        located = [positions[i] for i in volumes[0]]
        parts.append(Part(owners, chosen, kinds, slice_distance(kinds[ORIENTATION], located)))
    return parts


def join_columns(entries: Sequence[Entry]) -> Columns:
    """Return the attributes of all frames of some files; None where a file does not have one."""
    attributes = dict.fromkeys(a for entry in entries for a in entry.instance.kinds)
    return {
        a: [v for entry in entries for v in entry.instance.kinds.get(a, [None] * entry.instance.frames)]
        for a in attributes
    }


def slice_distance(orientation, positions) -> float | None:
    """Return the usual distance of slices in mm, or None."""
    if orientation is None or len(positions) < 2 or None in positions:
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    return round(float(np.median(np.diff(np.sort(np.array(positions) @ normal)))), 3)


def plane_of(orientation) -> str:
    if orientation is None:
        return ""
    return PLANES[int(np.argmax(np.abs(np.cross(orientation[:3], orientation[3:]))))]


def named(parts: list[Part], problems: dict[str, list[str]]) -> Iterable[Series]:
    """Yield the series of parts, with their keys, in the order of their numbers."""
    by_number: dict[int | None, list[Part]] = {}
    reasons = {id(part): aside(part.entries) for part in parts}
    # A part of a series is a mixture, unless it is a localizer: its slices may belong to the other parts.
    scans = {part.entries[0].series for part in parts if not reasons[id(part)]}
    for part in sorted(parts, key=lambda part: part.order):
        by_number.setdefault(part.entries[0].number, []).append(part)
    for number, group in by_number.items():
        for place, part in enumerate(group, 1):
            key = f"s{place}" if number is None else str(number) if len(group) == 1 else f"{number}.{place}"
            uid, reason = part.entries[0].series, reasons[id(part)]
            problem = "; ".join(problems[uid or ""][:MAX_LISTED])
            reason = "" if uid in scans and reason != LOCALIZER else reason
            same = [other for other in group if other.entries[0].series == uid]
            yield to_series(part, key, label_of(part, same), reason, problem)


def label_of(part: Part, parts: Sequence[Part]) -> str:
    """Return the values that distinguish a part from others of its series, without free text and identifiers."""
    labels = []
    for attribute, value in part.kinds.items():
        others = {repr(other.kinds.get(attribute)) for other in parts}
        if len(others) > 1 and attribute.shown and attribute.private is None and attribute.keyword not in UNLABELLED:
            labels.append(f"{attribute.keyword} {show(value, attribute, 0)}")
    component = part.entries[0].image_type[2:3]
    if labels and part.entries[0].instance.modality == "MR" and component and component[0] in COMPONENTS:
        labels.insert(0, COMPONENTS[component[0]])
    return ", ".join(labels[:MAX_LABELS])


def to_series(part: Part, key: str, label: str, reason: str, problem: str) -> Series:
    first = part.entries[0]
    spacing = part.kinds[SPACING] or (None, None)
    return Series(
        key=key,
        number=first.number,
        description=first.description,
        modality=first.instance.modality or "",
        plane=plane_of(part.kinds[ORIENTATION]),
        label=label,
        rows=first.instance.rows,
        columns=first.instance.columns,
        spacing_mm=(*spacing, part.distance),
        volumes=part.volumes,
        burned_in=any(entry.instance.burned_in for entry in part.entries),
        aside=reason,
        problem=problem,
    )


def refuse(path, study: Study, series: Series) -> None:
    """Raise ScanError if a series cannot be read, or if files that may belong to it cannot."""
    if series.problem:
        raise ScanError(path, f"series {series.key} cannot be used: {series.problem}", "copy its files again", "series")
    if study.refused:
        shown = "; ".join(f"{name} {reason}" for name, reason in study.refused[:MAX_LISTED])
        more = len(study.refused) - MAX_LISTED
        reason = f"has files that may be slices of the series: {shown}" + (f"; and {more} more" if more > 0 else "")
        raise ScanError(path, reason, "copy them again, or remove them", "series")
