"""Files with one SOPInstanceUID: copies are dropped, and different images are a conflict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from input_pipeline.images.scans.access import Member
from input_pipeline.images.scans.base import ScanLimits
from input_pipeline.images.scans.dicom_file import load
from input_pipeline.images.scans.fields import Fields
from input_pipeline.images.scans.lookup import read_lut
from input_pipeline.images.scans.pixel_data import decode, encoded_frames
from input_pipeline.images.scans.study.instances import Entry

STATED = ("frames", "positions", "slopes", "intercepts", "kinds")  # equal in a copy with another transfer syntax


def drop(path, entries: Sequence[Entry], limits: ScanLimits) -> tuple[list[Entry], list[str], dict[str, list[str]]]:
    """Return the entries without copies, the names of the copies, and SeriesInstanceUID -> conflicts.

    Only the pixels of files with a repeated SOPInstanceUID are read.
    """
    kept: list[Entry] = []
    first: dict[str, Entry] = {}
    dropped: list[str] = []
    conflicts: dict[str, list[str]] = {}
    for entry in entries:
        other = first.setdefault(entry.sop, entry) if entry.sop else entry
        if other is entry:
            kept.append(entry)
        elif is_copy(path, other, entry, limits):
            dropped.append(entry.member.name)
        else:
            text = f"{other.member.name} and {entry.member.name} are different images with one SOP instance UID"
            for uid in {other.series or "", entry.series or ""}:
                conflicts.setdefault(uid, []).append(text)
            kept.append(entry)
    return kept, dropped, conflicts


def is_copy(path, a: Entry, b: Entry, limits: ScanLimits) -> bool:
    """Return whether two files have the same bytes, or the same pixels and attributes."""
    if content(a.member, limits) == content(b.member, limits):
        return True
    if a.instance is None or b.instance is None:
        return a.instance is b.instance and not (a.refused or b.refused)
    if a.series != b.series or any(getattr(a.instance, name) != getattr(b.instance, name) for name in STATED):
        return False
    return all(map(np.array_equal, pixels(path, a.member, limits), pixels(path, b.member, limits)))


def content(member: Member, limits: ScanLimits) -> bytes:
    with member.open(limits, True) as file:
        file.seek(0)
        return file.read()


def pixels(path, member: Member, limits: ScanLimits) -> list[np.ndarray]:
    """Return the decoded frames of a file."""
    with member.open(limits, True) as file:
        instance, dataset = load(path, file, limits, pixels=True, mixed=True)
    lut = read_lut(path, Fields(path, dataset), instance)
    return [decode(path, data, instance, dataset, lut) for data in encoded_frames(path, dataset, instance)]
