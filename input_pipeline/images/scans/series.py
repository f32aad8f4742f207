"""The directory of a DICOM series: its files, and whether they are the slices of one volume."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from input_pipeline.images.scans.access import Member, is_system_file
from input_pipeline.images.scans.base import ScanError, ScanLimits, join_offenders, limit_error, printable
from input_pipeline.images.scans.dicom_file import load
from input_pipeline.images.scans.fields import PIXELS, Fields
from input_pipeline.images.scans.instance import Instance
from input_pipeline.images.scans.mixtures import check_one_kind, without_times


def series_files(path, limits: ScanLimits) -> list[Path]:
    """Return the files of a directory, sorted by name, without those of operating systems.

    Anything else but a regular file is an error.
    """
    files, others, size = [], [], 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if is_system_file(entry.name):
                    continue
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


def join_kinds(instances: list[Instance]) -> dict:
    """Join the kinds of several instances to one."""
    return {a: [value for i in instances for value in i.kinds[a]] for a in instances[0].kinds}


def load_series(path, members: Sequence[Member], limits: ScanLimits, *, with_pixels: bool, timed: bool = False):
    """Return the instances and data sets of the files of a series. Raises ScanError listing files that do not fit.

    timed: the files are one time of several, so that the slices may have any trigger times.
    """
    instances, datasets, problems, errors, size = [], [], [], [], 0
    for member in members:
        try:
            with member.open(limits, with_pixels) as file:
                instance, dataset = load(member.path, file, limits, pixels=with_pixels)
        except ScanError as error:
            problems.append(f"{member.name} {error.reason}")
            errors.append(error)
            continue
        if instance.frames > 1:
            problems.append(f"{member.name} has {instance.frames} frames")
        elif absent := instance.absent_geometry:
            problems.append(f"{member.name} states no {' and no '.join(absent)}, so it cannot be sorted")
        else:
            instances.append(instance)
            datasets.append(dataset)
            elements = (Fields(member.path, dataset).raw(keyword) for keyword in PIXELS)
            size += sum(len(element.value or b"") for element in elements if element is not None)
            if size > limits.max_file_bytes:  # deflated files are small on disk
                reason = f"unpacks to more than {limits.max_file_bytes:,} bytes"
                raise limit_error(path, reason, "max_file_bytes")
    if len(errors) == len(members) and len({error.reason for error in errors}) == 1:
        reason = f"none of its {len(members)} files can be used: each {errors[0].reason}"
        raise ScanError(path, reason, errors[0].remedy, errors[0].fault)
    if problems:
        reason = f"{len(problems)} of {len(members)} files are not slices of a series: {join_offenders(problems)}"
        remedy = "leave only one series in the directory, or name the one file you need"
        raise ScanError(path, reason, remedy, "series")
    kinds = join_kinds(instances)
    check_one_kind(path, without_times(kinds) if timed else kinds, [member.name for member in members], "slice")
    return instances, datasets
