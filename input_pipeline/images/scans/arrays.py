"""Arrays in .npy files: [H, W, D], [H, W, D, C] with C = 1 or 3, or the released layout [S, 3, H, W, D].

Ambiguous shapes are errors: [H, W, 3] (a colour image or three slices), [3, H, W], [3, H, W, D]. The format has no
checksum, so a flipped bit in a voxel is not detected.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from input_pipeline.images.scans.access import BoundedFile, as_scan_error, open_scan, read_exactly
from input_pipeline.images.scans.base import WRONG_SIZE, Header, ScanError, ScanLimits
from input_pipeline.images.scans.checks import check_shape, check_volume, to_intensities

MAGIC = b"\x93NUMPY"
CHANNELS = (1, 3)
LAYOUTS = "save it as [H, W, D] or [H, W, D, C] with C = 1 or 3, or [S, 3, H, W, D]"
MAX_HEADER = 4096


def sniff(start: bytes) -> bool:
    return start.startswith(MAGIC)


@dataclasses.dataclass(frozen=True)
class NpyLayout:
    """Layout of an array in its .npy file, and the axis order that transposes it to [H, W, D, C]."""

    shape: tuple[int, ...]  # shape of the whole array
    fortran: bool
    dtype: np.dtype
    offset: int
    axes: tuple[int, ...]  # order that transposes one stored volume to [H, W, D, C]


def layout_of(path, shape: tuple[int, ...]) -> tuple[int, tuple[int, int, int, int], tuple[int, ...]]:
    """Return (volumes, (H, W, D, C), axis order of one volume) of an array shape."""

    def ambiguous(why: str, remedy: str) -> ScanError:
        return ScanError(path, f"has the shape {list(shape)}: {why}", remedy, "ambiguous")

    if len(shape) == 5:
        s, c, h, w, d = shape
        if c != 3:
            raise ambiguous("the released layout is [S, 3, H, W, D]", LAYOUTS)
        return s, (h, w, d, c), (1, 2, 3, 0)
    if len(shape) == 4:
        if shape[3] not in CHANNELS or min(shape[:2]) <= 4:
            raise ambiguous("neither [H, W, D, 1] nor [H, W, D, 3]", LAYOUTS + "; add the S axis to [3, H, W, D]")
        return 1, shape, (0, 1, 2, 3)
    if len(shape) == 3:
        if min(shape[:2]) <= 4:
            raise ambiguous("channels seem to come before rows and columns", LAYOUTS)
        if shape[2] in (3, 4):
            remedy = f"save a colour image as [H, W, 1, 3], {shape[2]} slices as [H, W, {shape[2]}, 1]"
            raise ambiguous(f"either {shape[2]} channels of a 2D image or {shape[2]} slices", remedy)
        return 1, (*shape, 1), (0, 1, 2, 3)
    raise ambiguous(f"{len(shape)} axes", LAYOUTS)


def read_layout(path, file: BoundedFile, limits: ScanLimits) -> tuple[NpyLayout, Header]:
    """Read the array header and check it against the file size and the limits. Object arrays are rejected."""
    with as_scan_error(path, "reading the .npy header"):
        version = np.lib.format.read_magic(file)
        readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        if version[0] not in readers:
            raise ScanError(path, f"is .npy version {version}", "save it again with numpy.save", "unsupported")
        shape, fortran, dtype = readers[version[0]](file, max_header_size=MAX_HEADER)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        reason = f"contains {'Python objects' if dtype.hasobject else dtype.name} instead of numbers"
        raise ScanError(path, reason, "save uint8, int16, uint16, int32 or float32", "unsupported")
    if any(isinstance(n, bool) or n < 0 for n in shape):
        raise ScanError(path, f"states the shape {shape}", "the header is damaged: copy the file again")
    volumes, hwdc, axes = layout_of(path, shape)
    check_shape(path, hwdc, dtype.itemsize, limits)
    check_volume(path, None, max(volumes, 1), limits, needed=False)
    offset = file.tell()
    expected = offset + math.prod(shape) * dtype.itemsize
    if expected != file.size:
        raise ScanError(path, f"has {file.size:,} bytes, but its header requires {expected:,}", WRONG_SIZE)
    if volumes < 1:
        raise ScanError(path, "contains no scan", "leave it out")
    head = Header(format="npy", shape=hwdc, dtype=dtype.newbyteorder("=").name, volumes=volumes)
    return NpyLayout(shape, fortran, dtype, offset, axes), head


def header(path, *, limits: ScanLimits) -> Header:
    with open_scan(path, limits) as file:
        return read_layout(path, file, limits)[1]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """Read one volume. Of a stack in C order only the bytes of that volume are read.

    The file is not memory-mapped: if a mapped file shrinks on a network disk, the process dies with a bus error.
    """
    with open_scan(path, limits) as file:
        layout, head = read_layout(path, file, limits)
        chosen = check_volume(path, volume, head.volumes, limits)
        stacked = len(layout.shape) == 5
        read_one = stacked and not layout.fortran
        shape = layout.shape[1:] if read_one else layout.shape
        count = math.prod(shape)
        if count * layout.dtype.itemsize > limits.max_bytes:
            reason = f"{head.volumes} scans in Fortran order exceed the limit of {limits.max_bytes:,} bytes"
            raise ScanError(path, reason, "save it in C order, or raise ScanLimits.max_bytes", "limit")
        file.seek(layout.offset + (chosen * count * layout.dtype.itemsize if read_one else 0))
        flat = np.empty(count, layout.dtype)
        read_exactly(path, file, memoryview(flat.view(np.uint8)), "voxels")
    array = flat.reshape(shape, order="F" if layout.fortran else "C")
    array = array[chosen] if stacked and not read_one else array
    array = array if array.ndim == 4 else array[..., None]
    return to_intensities(path, array.transpose(layout.axes), limits=limits), head
