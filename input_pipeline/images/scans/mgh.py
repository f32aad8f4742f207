"""FreeSurfer volumes (.mgz, .mgh). nibabel parses the header; the voxels are read as those of NIfTI."""

from __future__ import annotations

import contextlib
import math
import struct
import zlib

import nibabel
import numpy as np

from input_pipeline.images.scans import orientation
from input_pipeline.images.scans.access import as_scan_error, open_scan, read_exactly
from input_pipeline.images.scans.base import Header, ScanError, ScanLimits, limit_error
from input_pipeline.images.scans.checks import check_shape, check_volume, to_intensities
from input_pipeline.images.scans.nifti import CHUNK, GZIP, skip, unpacked

HEADER_BYTES = 284
START = struct.Struct(">6i")  # version, sizes of four axes, type
VOXELS = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
MAX_SIZE = 1 << 20  # voxels along an axis of a plausible header
DAMAGED = "the header is damaged: copy the file again, or convert it again with mri_convert"


def sniff(start: bytes) -> bool:
    """Return whether a file is a FreeSurfer volume, plain or in a gzip stream, from its first bytes."""
    if start[:2] == GZIP:
        with contextlib.suppress(zlib.error):
            return sniff(zlib.decompressobj(31).decompress(start, START.size))
        return False
    if len(start) < START.size:
        return False
    version, *sizes, kind = START.unpack_from(start)
    return version == 1 and kind in VOXELS and all(1 <= size <= MAX_SIZE for size in sizes)


def read_layout(path, stream, limits: ScanLimits):
    """Return (header, sizes of the voxel axes, dtype, display layout) of a stream, which is then at the first voxel."""
    block = bytearray(HEADER_BYTES)
    read_exactly(path, stream, memoryview(block), "header")
    _, a, b, c, volumes, kind = START.unpack_from(block)
    dtype = np.dtype(VOXELS[kind])
    with as_scan_error(path, "reading the FreeSurfer header", hide_message=True):
        header = nibabel.freesurfer.mghformat.MGHHeader(bytes(block), check=False)
        oriented = int(header["goodRASFlag"]) == 1
        affine = header.get_affine()[:3]
    try:
        display = orientation.display_layout(affine, (a, b, c))
    except ValueError as error:
        raise ScanError(path, f"states {error}", DAMAGED) from None
    shape = display.shape((a, b, c))
    check_shape(path, (*shape, 1), dtype.itemsize, limits)
    check_volume(path, None, volumes, limits, needed=False)
    if (size := volumes * a * b * c * dtype.itemsize) > limits.max_file_bytes:
        raise limit_error(path, f"has {size:,} bytes of voxels, more than {limits.max_file_bytes:,}", "max_file_bytes")
    head = Header(
        format="mgh",
        shape=(*shape, 1),
        dtype=dtype.newbyteorder("=").name,
        spacing_mm=tuple(round(s, 6) for s in display.spacing_mm),
        orientation=display.codes if oriented else None,
        volumes=volumes,
        oblique_degrees=display.oblique_degrees if oriented else None,
    )
    return head, (a, b, c), dtype, display


def header(path, *, limits: ScanLimits) -> Header:
    """Return the header. The checksum of a .mgz is not verified."""
    with open_scan(path, limits) as file, unpacked(path, file) as stream:
        return read_layout(path, stream, limits)[0]


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """Read one volume. The stream is read to its end, so the gzip checksum covers every voxel returned."""
    with open_scan(path, limits) as file, unpacked(path, file) as stream:
        head, (a, b, c), dtype, display = read_layout(path, stream, limits)
        chosen = check_volume(path, volume, head.volumes, limits)
        size = math.prod((a, b, c)) * dtype.itemsize
        skip(path, stream, chosen * size, "voxels")
        stored = np.empty(size, np.uint8)
        read_exactly(path, stream, memoryview(stored), "voxels", CHUNK)
        skip(path, stream, (head.volumes - 1 - chosen) * size, "voxels")
        while stream.read(CHUNK):  # the footer: scan parameters and tags, which are not used
            pass
    # The first axis varies fastest in the file, so the C-order array is [c, b, a].
    frames = to_intensities(path, stored.view(dtype).reshape(c, b, a, 1), limits=limits)
    return display.apply(frames.transpose(2, 1, 0, 3)), head
