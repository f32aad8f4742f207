"""The slices of one series -> parts that must not be mixed, and the volumes of a part that differ only in time.

columns: attribute -> value of each slice (mixtures.py)
1. A part has one value of every attribute with the rule "equal" or "presence", except those of TIMES.
2. If each position occurs n > 1 times and TIMES order the slices there, volume k has the k-th slice of each position.
3. Otherwise a part with repeated positions, or with several values of one attribute of TIMES, is split by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from input_pipeline.images.scans.fields import FRAME_VECTORS
from input_pipeline.images.scans.mixtures import ORIENTATION, Attribute, Columns, Value, group, interleaved, is_mixture

THICKNESS = "SliceThickness"
TIMES = (  # in the order in which they sort the slices of one position
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase"),
    *("AcquisitionNumber", "FrameAcquisitionNumber", "NominalCardiacTriggerDelayTime", "TriggerTime"),
    *FRAME_VECTORS[2:],
)
SAME_POSITION = 1e-3  # mm
Volumes = list[list[int]]  # the slices of each volume, in no order


def split(columns: Columns, positions: Sequence[tuple[float, ...] | None], *, one_file: bool) -> list[Volumes]:
    """Return the parts of a series, each as its volumes.

    Images without a position are parts of their own, but frames of one file keep their order in one part.
    """
    kinds = [a for a in columns if a.rule in ("equal", "presence") and a.keyword not in TIMES]
    parts = []
    for members in split_by(columns, kinds, range(len(positions))):
        located = [i for i in members if positions[i] is not None and columns[ORIENTATION][i] is not None]
        others = sorted(set(members) - set(located))
        parts += [[others]] if one_file and others else [[[i]] for i in others]
        parts += divide(columns, positions, located) if located else []
    return parts


def split_by(columns: Columns, attributes: Sequence[Attribute], members: Sequence[int]) -> list[list[int]]:
    """Return groups of members with equal values of all attributes."""
    exact: dict[tuple[Value, ...], list[int]] = {}
    plain = [a for a in attributes if not (a.relative or a.absolute)]
    for i in members:
        exact.setdefault(tuple(columns[a][i] for a in plain), []).append(i)
    groups = list(exact.values())
    for attribute in attributes:
        if attribute.relative or attribute.absolute:
            groups = [part for g in groups for part in by_value(columns[attribute], attribute, g)]
    return groups


def by_value(values: Sequence[Value], attribute: Attribute, members: Sequence[int]) -> list[list[int]]:
    found = group([values[i] for i in members], attribute)
    return [[members[k] for k in places] for _, places in found]


def divide(columns: Columns, positions, members: list[int]) -> list[Volumes]:
    """Return the parts of located slices of one kind."""
    if (volumes := as_volumes(columns, positions, members)) is not None:
        return [volumes]
    for keyword in (THICKNESS, *TIMES):
        for attribute in (a for a in columns if a.keyword == keyword):
            groups = by_value(columns[attribute], attribute, members)
            if len(groups) > 1 and (attribute.rule == "equal" or 2 * len(groups) <= len(members)):
                return [part for g in groups for part in divide(columns, positions, g)]
    return [[members]]  # reading it raises the error that says why it is no volume


def as_volumes(columns: Columns, positions, members: list[int]) -> Volumes | None:
    """Return the volumes if the slices are one volume, or several that differ in time only; otherwise None."""
    across, down = np.array(columns[ORIENTATION][members[0]][:3]), np.array(columns[ORIENTATION][members[0]][3:])
    along = np.array([positions[i] for i in members], np.float64) @ np.cross(across, down)
    order = np.argsort(along, kind="stable")
    stops = np.flatnonzero(np.diff(along[order]) >= SAME_POSITION) + 1
    places = [[members[k] for k in place] for place in np.split(order, stops)]
    times = [a for keyword in TIMES for a in columns if a.keyword == keyword]
    count = len(places[0])
    if any(len(place) != count for place in places):
        return None
    if count > 1:
        for place in places:
            place.sort(key=lambda i: time_key(columns, times, i))
            keys = [time_key(columns, times, i) for i in place]
            if len(set(keys)) < count:
                return None
    volumes = [[place[k] for place in places] for k in range(count)]
    for volume in volumes:
        for attribute in times:
            values = [columns[attribute][i] for i in volume]
            if attribute.rule == "equal" and is_mixture(values, attribute):
                return None
            if attribute.rule == "times" and count == 1 and is_mixture(values, attribute):
                return None
            if attribute.rule == "runs" and interleaved(values, attribute, range(len(values))):
                return None
        thickness = [a for a in columns if a.keyword == THICKNESS]
        if any(interleaved([columns[a][i] for i in volume], a, range(len(volume))) for a in thickness):
            return None
    return volumes


def time_key(columns: Columns, times: Sequence[Attribute], member: int) -> tuple:
    """Return a key that sorts slices by their times. Absent values come first, unreadable ones by their bytes."""
    values = [columns[a][member] for a in times]
    return tuple((0, ()) if v is None else (1, v) if isinstance(v, tuple) else (2, str(v)) for v in values)
