"""Any DICOM path -> voxels and header: a file, the folder of one series, or one series of a study.

A file, and a folder without folders, is first read as one scan (dicom.py). If that finds a mixture, or with a selector,
its series are surveyed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from input_pipeline.images.scans import dicom, itk
from input_pipeline.images.scans.access import as_scan_error, is_system_file, open_scan, stat_scan
from input_pipeline.images.scans.base import Header, ScanError, ScanLimits
from input_pipeline.images.scans.checks import check_values, check_volume
from input_pipeline.images.scans.study import containers
from input_pipeline.images.scans.study.selection import select
from input_pipeline.images.scans.study.survey import Series, Study, refuse, survey

__all__ = ["files_of", "header", "open_study", "read", "sniff"]


def sniff(start: bytes) -> bool:
    """Return whether a file is DICOM or an archive, from its first SNIFFED bytes."""
    return dicom.sniff(start) or containers.sniff(start)


def read(path, *, volume: int | None, series: str | None = None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """Read a volume of the only series, or of the series that `series` selects (selection.py)."""
    return _read(path, volume, series, limits, with_pixels=True)


def header(path, *, series: str | None = None, limits: ScanLimits) -> Header:
    """Return the header as `read` does for its first volume, without reading pixels."""
    return _read(path, None, series, limits, with_pixels=False)[1]


def _read(path, volume, series, limits: ScanLimits, *, with_pixels: bool):
    mixture = None
    if series is None and (volume is None or volume == 0) and is_single(path, limits):
        try:
            if with_pixels:
                return dicom.read(path, volume=volume, limits=limits)
            return None, dicom.header(path, limits=limits)
        except ScanError as error:
            beyond = error.fault == "limit" and os.path.isdir(path)  # one of its series may be within the limits
            if error.fault != "series" and not beyond:
                raise
            mixture = None if beyond else error
    with containers.open_container(path, limits) as container:
        study = survey(path, container, limits)
        try:
            chosen = select(path, study, series)
        except ScanError as error:
            if mixture is None:
                raise
            remedy = f"{mixture.remedy}, or {error.remedy}"
            raise ScanError(path, f"{mixture.reason}; it {error.reason}", remedy, "series") from mixture
        return read_one(path, study, chosen, volume, limits, with_pixels=with_pixels)


def is_single(path, limits: ScanLimits) -> bool:
    """Return whether a path may be one scan: a file that is no list of files, or a folder without folders."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            return not any(entry.is_dir() and not is_system_file(entry.name) for entry in entries)
    with open_scan(path, limits) as file:
        if containers.sniff(file.read(containers.SNIFFED)):
            return False
    return not containers.is_dicomdir(path) or containers.dicomdir_files(path, limits) is None


def read_one(path, study: Study, series: Series, volume: int | None, limits: ScanLimits, *, with_pixels: bool):
    """Read a volume of a series of a study."""
    refuse(path, study, series)
    count = len(series.volumes)
    try:
        number = check_volume(path, volume, count, limits, needed=with_pixels)
    except ScanError as error:
        reason = error.reason.replace("volumes", "volumes, one per time") if count > 1 else error.reason
        raise ScanError(path, f"series {series.key} {reason}", error.remedy, error.fault) from None
    slices = series.volumes[number]
    options = {"with_pixels": with_pixels, "timed": count > 1}
    entry = slices[0][0]
    if entry.instance.frames > 1:
        frames = [frame for _, frame in slices]
        voxels, head = dicom.read_some_frames(path, entry.member, frames, limits, **options)
    elif len(slices) == 1:
        voxels, head = dicom.read_some_frames(path, entry.member, [0], limits, **options)
    else:
        members = sorted((entry.member for entry, _ in slices), key=lambda member: member.name)
        voxels, head = dicom.read_members(path, members, limits, **options)
    return voxels, dataclasses.replace(head, volumes=count, notices=(*head.notices, *notices(study, series)))


def notices(study: Study, series: Series) -> tuple[str, ...]:
    """Return what a user should know about the choice of this series."""
    out = ()
    if series.aside:
        out += (f"the series is a {series.aside} by its header: check that it is the scan you mean",)
    if copies := sum(entry.files for entry in study.set_aside if entry.reason == "a duplicate"):
        out += (f"{copies} files of the study are copies of others, and are not read: remove them",)
    return out


@dataclasses.dataclass(frozen=True)
class OpenStudy:
    """A surveyed study whose series can be read without another survey."""

    path: str
    limits: ScanLimits
    study: Study

    def read(self, series: Series, volume: int | None = None) -> tuple[np.ndarray, Header]:
        """Return voxels and header as `scans.read` does. Raises ScanError."""
        with as_scan_error(self.path, "reading a series"):
            voxels, head = read_one(self.path, self.study, series, volume, self.limits, with_pixels=True)
            voxels, ends, found = check_values(self.path, voxels)
        return voxels, dataclasses.replace(head, value_range=ends, notices=(*head.notices, *found))


@contextlib.contextmanager
def open_study(
    path, limits: ScanLimits = ScanLimits(), advance: Callable[[int], None] = lambda count: None  # noqa: B008
) -> Iterator[OpenStudy]:  # fmt: skip
    """Open a folder, DICOMDIR, archive or DICOM file, and survey it. `advance` is called with 1 after each file."""
    path = os.fspath(path)
    stat_scan(path)
    with contextlib.ExitStack() as stack:
        with as_scan_error(path, "reading the study"):
            container = stack.enter_context(containers.open_container(path, limits))
            study = survey(path, container, limits, advance)
        yield OpenStudy(path, limits, study)


def files_of(path) -> list[str]:
    """Return the files whose content decides what a scan path contains.

    They are all files of a folder at any depth, a DICOMDIR and the files that it lists, or one file.
    """
    root = os.fspath(path)
    if os.path.isdir(root):
        files = []
        for parent, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not is_system_file(name)]
            files += [os.path.join(parent, name) for name in names if not is_system_file(name)]
        return sorted(file for file in files if os.path.exists(file) and stat.S_ISREG(os.stat(file).st_mode))
    if containers.is_dicomdir(root):
        with as_scan_error(root, "reading the DICOMDIR"), containers.open_container(root, ScanLimits()) as container:
            return [root, *sorted(str(member.path) for member in container.members if member.path != Path(root))]
    return itk.files_of(root) if root.lower().endswith((".mhd", ".mha")) else [root]
