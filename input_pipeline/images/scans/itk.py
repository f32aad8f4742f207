"""NRRD and MetaImage (.nrrd, .mha, .mhd) through SimpleITK, the extra `itk`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from input_pipeline.images.scans import orientation
from input_pipeline.images.scans.access import as_scan_error, open_scan, stat_scan
from input_pipeline.images.scans.base import Header, ScanError, ScanLimits, limit_error
from input_pipeline.images.scans.checks import check_shape, check_volume, to_intensities

NRRD, META = b"NRRD0", (b"ObjectType", b"NDims", b"Comment = ")
MAX_HEADER = 1 << 16  # bytes in which the header of a file must end
TYPES = {
    **{f"{bits}-bit unsigned integer": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"{bits}-bit signed integer": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"{bits}-bit float": f"float{bits}" for bits in (32, 64)},
}
LPS_TO_RAS = np.array([[-1.0], [-1.0], [1.0]])
ONE_FILE = "write it as one file (.nrrd, .mha)"


def sniff(start: bytes) -> bool:
    """Return whether a file is NRRD or MetaImage, from its first bytes."""
    return start.startswith((NRRD, *META))


def data_file(path, start: bytes) -> Path | None:
    """Return the file with the voxels of a header without them; None if the file has its own.

    It must be next to the header: a path could name any file of the machine. Raises ScanError otherwise.
    """
    pattern = rb"^data ?file: *(.*)$" if start.startswith(NRRD) else rb"^ElementDataFile *= *(.*)$"
    found = re.search(pattern, start.partition(b"\n\n")[0] if start.startswith(NRRD) else start, re.M | re.I)
    name = found[1].strip().decode("utf-8", "surrogateescape") if found else ""
    if start.startswith(NRRD) and not name:
        return None
    if name.upper() == "LOCAL":
        return None
    plain = name and not set(name) & set("/\\%") and not name.upper().startswith("LIST")  # "%", LIST: several files
    if start.startswith(NRRD) or not plain:
        raise ScanError(path, "has its voxels in other files", ONE_FILE, "unsupported")
    file = Path(path).parent / name
    if os.path.realpath(file) != os.path.join(os.path.realpath(Path(path).parent), name):
        raise ScanError(path, "has its voxels in a file that is a link", ONE_FILE, "refused")
    return file


def files_of(path) -> list[str]:
    """Return the file, and the file with its voxels if there is one."""
    with open(path, "rb") as file:
        start = file.read(MAX_HEADER)
    voxels = data_file(path, start) if sniff(start) else None
    return [os.fspath(path), *([os.fspath(voxels)] if voxels is not None else [])]


class Image:
    """An open file: its SimpleITK reader, after the header was read, and what the header states."""

    def __init__(self, path, limits: ScanLimits):
        try:
            import SimpleITK
        except ImportError:
            remedy = 'pip install "radfm_jax[itk]", or convert it to .nii.gz'
            raise ScanError(path, "is NRRD or MetaImage, which needs SimpleITK", remedy, "unsupported") from None
        with open_scan(path, limits) as file:
            start = file.read(MAX_HEADER)
        voxels = data_file(path, start)
        if voxels is not None and stat_scan(voxels).st_size > limits.max_file_bytes:
            raise limit_error(path, f"has voxels of more than {limits.max_file_bytes:,} bytes", "max_file_bytes")
        self.itk, self.reader = SimpleITK, SimpleITK.ImageFileReader()
        self.reader.SetFileName(os.fspath(path))
        with as_scan_error(path, "reading the header"):
            self.reader.ReadImageInformation()
        self.interpret(path, limits)

    def interpret(self, path, limits: ScanLimits) -> None:
        """Check the header. Sets shape (x, y, z), channels, display and header."""
        size, dimensions = self.reader.GetSize(), self.reader.GetDimension()
        kind = self.itk.GetPixelIDValueAsString(self.reader.GetPixelIDValue()).removeprefix("vector of ")
        self.channels = self.reader.GetNumberOfComponents()
        if dimensions not in (2, 3, 4) or kind not in TYPES or self.channels not in (1, 3):
            reason = f"has {dimensions} dimensions of {self.channels} x {kind}"
            raise ScanError(path, reason, "convert it to .nii.gz", "unsupported")
        self.dtype, self.shape = np.dtype(TYPES[kind]), (*size[:3], 1)[:3]
        spacing = (*self.reader.GetSpacing()[:3], 1.0)[:3]
        direction = np.eye(3)
        side = min(dimensions, 3)
        direction[:side, :side] = np.array(self.reader.GetDirection()).reshape(dimensions, dimensions)[:side, :side]
        slice_axis = 2 if dimensions == 2 else None
        try:
            affine = direction * np.array(spacing) * LPS_TO_RAS
            self.display = orientation.display_layout(affine, self.shape, slice_axis)
        except ValueError as error:
            raise ScanError(path, f"states {error}", "correct its spacing and directions") from None
        shape = self.display.shape(self.shape)
        volumes = size[3] if dimensions == 4 else 1
        check_shape(path, (*shape, self.channels), self.dtype.itemsize, limits)
        check_volume(path, None, volumes, limits, needed=False)
        located, spacing_mm = dimensions > 2, tuple(round(s, 6) for s in self.display.spacing_mm)
        self.header = Header(
            format="itk",
            shape=(*shape, self.channels),
            dtype=self.dtype.name,
            spacing_mm=(*spacing_mm[:2], spacing_mm[2] if located else None),
            orientation=self.display.codes if located else None,
            volumes=volumes,
            oblique_degrees=self.display.oblique_degrees if located else None,
        )


def header(path, *, limits: ScanLimits) -> Header:
    """Return the header without reading voxels."""
    return Image(path, limits).header


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """Read one volume."""
    image = Image(path, limits)
    chosen = check_volume(path, volume, image.header.volumes, limits)
    if image.reader.GetDimension() == 4:
        image.reader.SetExtractIndex([0, 0, 0, chosen])
        image.reader.SetExtractSize([*image.shape, 0])
    with as_scan_error(path, "reading the voxels"):
        stored = image.itk.GetArrayFromImage(image.reader.Execute())
    frames = stored.reshape(*image.shape[::-1], image.channels)  # [z, y, x, C]
    frames = to_intensities(path, frames, limits=limits)
    return image.display.apply(frames.transpose(2, 1, 0, 3)), image.header
