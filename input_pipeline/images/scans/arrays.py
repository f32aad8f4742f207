"""Arrays in .npy files: [H, W, D], [H, W, D, C] with C = 1 or 3, or the released layout [S, 3, H, W, D].

What could be either of two layouts is an error: [H, W, 3] (a picture or three slices?), [3, H, W], [3, H, W, D].
There is no checksum: a flipped bit in a voxel cannot be seen.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from input_pipeline.images.scans.base import (
    BoundedFile,
    Header,
    ScanError,
    ScanLimits,
    blamed,
    check_shape,
    check_volume,
    natural,
    opened,
)

MAGIC = b"\x93NUMPY"
CHANNELS = (1, 3)
LAYOUTS = "save it as [H, W, D] or [H, W, D, C] with C = 1 or 3, or [S, 3, H, W, D]"
MAX_HEADER = 4096


def sniff(start: bytes) -> bool:
    return start.startswith(MAGIC)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array's place in its file.

    Attributes:
      shape: of the whole array.
      shape_hwdc: of one volume.
      axes: of one volume in the file -> [H, W, D, C].
      volumes: S of the released layout, else 1.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int
    volumes: int
    shape_hwdc: tuple[int, int, int, int]
    axes: tuple[int, ...]


def layout_of(path, shape: tuple[int, ...]) -> tuple[int, tuple[int, int, int, int], tuple[int, ...]]:
    """(volumes, (H, W, D, C), order of one volume's axes)."""
    text = str(list(shape))

    def ambiguous(why: str, remedy: str) -> ScanError:
        return ScanError(path, f"has the shape {text}: {why}", remedy, "ambiguous")

    if len(shape) == 5:
        s, c, h, w, d = shape
        if c != 3:
            raise ambiguous("the released layout is [S, 3, H, W, D]", LAYOUTS)
        return s, (h, w, d, c), (1, 2, 3, 0)
    if len(shape) == 4:
        if shape[3] not in CHANNELS or min(shape[:2]) <= 4:
            raise ambiguous("neither [H, W, D, 1] nor [H, W, D, 3]", LAYOUTS + "; a lone [3, H, W, D] needs its S axis")
        return 1, shape, (0, 1, 2, 3)
    if len(shape) == 3:
        if min(shape[:2]) <= 4:
            raise ambiguous("channels seem to stand before rows and columns", LAYOUTS)
        if shape[2] in (3, 4):
            remedy = f"save a colour picture as [H, W, 1, 3], {shape[2]} slices as [H, W, {shape[2]}, 1]"
            raise ambiguous(f"a picture of {shape[2]} channels or {shape[2]} slices", remedy)
        return 1, (*shape, 1), (0, 1, 2, 3)
    raise ambiguous(f"{len(shape)} axes", LAYOUTS)


def inspect(path, file: BoundedFile, limits: ScanLimits) -> tuple[Stored, Header]:
    """The array's header against the file's size and the limits. Nothing is executed: object arrays are refused."""
    with blamed(path, "reading the .npy header"):
        version = np.lib.format.read_magic(file)
        readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        if version[0] not in readers:
            raise ScanError(path, f"is .npy of version {version}", "save it again with numpy.save", "unsupported")
        shape, fortran, dtype = readers[version[0]](file, max_header_size=MAX_HEADER)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        what = f"holds {'Python objects' if dtype.hasobject else dtype.name} instead of numbers"
        raise ScanError(path, what, "save uint8, int16, uint16, int32 or float32", "unsupported")
    if any(isinstance(n, bool) or n < 0 for n in shape):
        raise ScanError(path, f"states the shape {shape}", "its header is damaged")
    volumes, hwdc, axes = layout_of(path, shape)
    check_shape(path, hwdc, dtype.itemsize, limits)
    check_volume(path, None, max(volumes, 1), limits, needed=False)
    offset = file.tell()
    asked = offset + math.prod(shape) * dtype.itemsize
    if asked != file.size:
        what = f"has {file.size:,} bytes, but its header asks for {asked:,}"
        raise ScanError(path, what, "it is cut short or its header is damaged: copy it again")
    if volumes < 1:
        raise ScanError(path, "holds no scan", "leave it out")
    head = Header(
        format="npy",
        kind="2d" if hwdc[2] == 1 else "3d",
        modality=None,
        shape=hwdc,
        spacing_mm=None,
        orientation=None,
        dtype=dtype.newbyteorder("=").name,
        volumes=volumes,
    )
    return Stored(shape, fortran, dtype, offset, volumes, hwdc, axes), head


def header(path, *, limits: ScanLimits) -> Header:
    with opened(path, limits) as file:
        return inspect(path, file, limits)[1]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """One volume; of a stack in C order only its own bytes are read.

    A plain read, not a memory map: a mapped file that shrinks on a network disk ends the process.
    """
    with opened(path, limits) as file:
        stored, head = inspect(path, file, limits)
        chosen = check_volume(path, volume, stored.volumes, limits)
        stacked = len(stored.shape) == 5
        one = stored.shape[1:] if stacked else stored.shape
        skipping = stacked and not stored.fortran
        count = math.prod(one if skipping else stored.shape)
        if count * stored.dtype.itemsize > limits.max_bytes:
            what = f"{stored.volumes} scans in Fortran order are beyond the limit of {limits.max_bytes:,} bytes"
            raise ScanError(path, what, "save it in C order, or raise ScanLimits.max_bytes", "limit")
        file.seek(stored.offset + (chosen * count * stored.dtype.itemsize if skipping else 0))
        flat = np.empty(count, stored.dtype)
        view, done = memoryview(flat.view(np.uint8)), 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise ScanError(path, "became shorter while it was read", "read it again when it is complete")
            done += got
    order = "F" if stored.fortran else "C"
    array = flat.reshape(one if skipping else stored.shape, order=order)
    array = array[chosen] if stacked and not skipping else array
    array = array if stacked or array.ndim == 4 else array[..., None]
    voxels = natural(path, array.transpose(stored.axes), limits=limits)
    return voxels, head
