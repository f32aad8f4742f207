"""NIfTI-1 and NIfTI-2 in one file (.nii, .nii.gz).

nibabel interprets the header. The voxels are read here because nibabel stops before the checksum of a gzip stream,
allocates what a header asks for, and reads extensions, which can hold the DICOM header of a patient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
import struct
from collections.abc import Iterator

import nibabel
import numpy as np
from isal import igzip, igzip_lib

from input_pipeline.images.scans import orientation
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

GZIP = b"\x1f\x8b"
CHUNK = 1 << 18  # bytes unpacked at a time: they stay in the cache until they are copied to their place
INTEGERS_AND_FLOATS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8"} | {
    1280: "u8"
}
COLOURS = {128: 3, 2304: 4}
OTHERS = {1: "1-bit", 32: "complex", 1536: "128-bit float", 1792: "complex", 2048: "complex"}
MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: unknown (taken as mm, as every reader does), m, mm, micron
CONVERT = "convert it with nibabel or dcm2niix to a plain .nii.gz"


def sniff(start: bytes) -> bool:
    """Whether a file that starts so may be NIfTI: a gzip stream, or a header's own size in either byte order."""
    return start[:2] == GZIP or start[:4] in {struct.pack(e + "i", n) for e in "<>" for n in (348, 540)}


@dataclasses.dataclass(frozen=True)
class NiftiLayout:
    """Where the voxels stand in the stream, and how they become [H, W, D, C]."""

    shape: tuple[int, int, int]
    channels: int
    volumes: int
    dtype: np.dtype
    header_bytes: int
    offset: int
    slope: float
    intercept: float
    display: orientation.NiftiLayout
    header: Header

    @property
    def volume_bytes(self) -> int:
        return math.prod(self.shape) * self.channels * self.dtype.itemsize

    @property
    def stream_bytes(self) -> int:
        return self.offset + self.volumes * self.volume_bytes


@contextlib.contextmanager
def unpacked(path, file: BoundedFile) -> Iterator[BoundedFile | igzip.IGzipFile]:
    """The stream of voxels: the file, or what its gzip stream holds."""
    start = file.read(2)
    file.seek(0)
    if start != GZIP:
        yield file
        return
    try:
        with igzip.IGzipFile(fileobj=file, mode="rb") as stream:
            yield stream
    except (EOFError, igzip_lib.IsalError, gzip.BadGzipFile) as error:
        raise ScanError(path, f"the gzip stream is damaged: {error}", "copy it again from its source") from error


def read_exactly(path, stream, buffer: memoryview, what: str) -> None:
    done = 0
    while done < len(buffer):
        got = stream.readinto(buffer[done : done + CHUNK])
        if not got:
            raise ScanError(path, f"ends after {done:,} of {len(buffer):,} bytes of {what}", "it is cut short")
        done += got


def skip(path, stream, count: int, what: str) -> None:
    buffer = memoryview(bytearray(CHUNK))
    while count > 0:
        step = min(count, CHUNK)
        read_exactly(path, stream, buffer[:step], what)
        count -= step


def read_layout(path, stream, limits: ScanLimits) -> NiftiLayout:
    """The first 348 or 540 bytes of the stream, checked. Nothing else is read.

    Raises:
      ScanError: a header that is no NIfTI, contradicts itself, or asks for more than the limits.
    """
    block = bytearray(540)
    read_exactly(path, stream, memoryview(block)[:348], "header")
    if block[128:132] == b"DICM":
        raise ScanError(path, "holds DICOM in a gzip stream", "unpack it", "unsupported")
    sizes = {struct.unpack(e + "i", block[:4])[0]: e for e in "<>"}
    known = [(n, e) for n, e in sizes.items() if n in (348, 540)]
    if not known:
        raise ScanError(path, "holds no NIfTI header", "name a .nii or .nii.gz file", "unsupported")
    size, endian = known[0]
    if size == 540:
        read_exactly(path, stream, memoryview(block)[348:], "header")
        magic, good = bytes(block[4:12]), b"n+2\0\r\n\x1a\n"
        kind = nibabel.Nifti2Header
    else:
        magic, good = bytes(block[344:348]), b"n+1\0"
        kind = nibabel.Nifti1Header
    if magic != good:
        pair = magic[:3] in (b"ni1", b"ni2") or not any(magic)
        what = "is half of a .hdr/.img pair" if pair else f"has the NIfTI magic {magic!r}, not {good!r}"
        raise ScanError(path, what, CONVERT if pair else "it is damaged", "unsupported" if pair else "damaged")
    with blamed(path, "reading the NIfTI header"):
        header = kind(bytes(block[:size]), endianness=endian, check=False)
    return interpret(path, header, size, endian, limits)


def interpret(path, header, size: int, endian: str, limits: ScanLimits) -> NiftiLayout:
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise ScanError(path, f"states the dimensions {dim}", "its header is damaged")
    if dim[0] < 2 or max([1, *dim[5 : dim[0] + 1]]) > 1:
        what = f"has {dim[0]} dimensions {dim[1 : dim[0] + 1]}"
        raise ScanError(path, what, "only 2D, 3D and 4D scans are read: split it", "unsupported")
    a, b, c, volumes = (dim[i] if i <= dim[0] else 1 for i in (1, 2, 3, 4))

    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code in INTEGERS_AND_FLOATS:
        dtype, channels = np.dtype(INTEGERS_AND_FLOATS[code]).newbyteorder(endian), 1
    elif code in COLOURS:
        dtype, channels = np.dtype("u1"), COLOURS[code]
    else:
        what = f"holds {OTHERS[code]} voxels" if code in OTHERS else f"states the data type {code}"
        raise ScanError(path, what, CONVERT, "unsupported" if code in OTHERS else "damaged")
    if bits != dtype.itemsize * channels * 8:
        raise ScanError(path, f"states {bits} bits a voxel for the data type {code}", "its header is damaged")

    offset = float(header["vox_offset"])
    first = size + 4
    if not (math.isfinite(offset) and offset == int(offset) and first <= offset < limits.max_file_bytes):
        raise ScanError(path, f"states that voxels start at byte {offset:g}", "its header is damaged")

    slope, intercept = scaling(path, header) if channels == 1 else (1.0, 0.0)
    affine, stated = affine_of(path, header)
    try:
        layout = orientation.display(affine, (a, b, c))
    except ValueError as error:
        raise ScanError(path, f"states {error}", "its orientation is damaged: set sform and pixdim") from None
    h, w, d = layout.shape((a, b, c))
    check_shape(path, (h, w, d, channels), max(dtype.itemsize, 4 if (slope, intercept) != (1, 0) else 1), limits)
    check_volume(path, None, volumes, limits, needed=False)
    total = int(offset) + volumes * a * b * c * channels * dtype.itemsize
    if total > limits.max_file_bytes:
        what = f"{volumes} volumes are {total:,} bytes, more than the limit of {limits.max_file_bytes:,}"
        raise ScanError(path, what, "raise ScanLimits.max_file_bytes if this is right", "limit")
    return NiftiLayout(
        shape=(a, b, c),
        channels=channels,
        volumes=volumes,
        dtype=dtype,
        header_bytes=size,
        offset=int(offset),
        slope=slope,
        intercept=intercept,
        display=layout,
        header=Header(
            format="nifti",
            kind="2d" if d == 1 else "3d",
            modality=None,
            shape=(h, w, d, 1 if channels == 1 else 3),
            spacing_mm=tuple(round(s, 6) for s in layout.spacing_mm),
            orientation=layout.codes if stated else None,
            dtype=dtype.newbyteorder("=").name,
            volumes=volumes,
            rescaled=(slope, intercept) != (1, 0),
            oblique_degrees=layout.oblique_degrees if stated else None,
        ),
    )


def scaling(path, header) -> tuple[float, float]:
    """(slope, intercept). Slope 0 means none (NIfTI-1 standard), and so does NaN in both fields, which is how nibabel
    marks a header without scaling; any other non-finite value leaves the intensities undefined."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or (math.isnan(slope) and math.isnan(intercept)):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        what = f"states the scaling {slope:g} * stored + {intercept:g}"
        raise ScanError(path, what, "set scl_slope and scl_inter to what was meant")
    return slope, intercept


def affine_of(path, header) -> tuple[np.ndarray, bool]:
    """(the affine in mm, whether the file states an orientation).

    sform before qform, as the standard's readers do. With neither, the array order is taken as the standard's method 1
    (ANALYZE: first axis from the patient's right to left, second to anterior, third to superior) and the orientation
    is reported as not stated.
    """
    with blamed(path, "reading the orientation"):
        s, s_code = header.get_sform(coded=True)
        # get_qform raises for a quaternion longer than one: only read where it is declared valid.
        q, q_code = header.get_qform(coded=True) if int(header["qform_code"]) > 0 else (None, 0)
        units = int(header["xyzt_units"]) & 7
        if units not in MM:
            raise ScanError(path, f"states the unit of length {units}", "set xyzt_units to mm")
        base = header.get_base_affine()
    affine = s if s_code else q if q_code else base
    with np.errstate(all="ignore"):
        mirrored = s_code and q_code and np.linalg.det(s[:3, :3]) * np.linalg.det(q[:3, :3]) < 0
    if mirrored:
        what = "its sform and qform disagree on which side is left"
        raise ScanError(path, what, "find out which is right and remove the other", "ambiguous")
    return affine[:3] * MM[units], bool(s_code or q_code)


def header(path, *, limits: ScanLimits) -> Header:
    """The header alone: a .nii.gz is unpacked no further, so its checksum is not checked here.

    The size of an uncompressed file is compared with what its header asks for.
    """
    with opened(path, limits) as file, unpacked(path, file) as stream:
        layout = read_layout(path, stream, limits)
        check_size(path, file, stream, layout)
        return layout.header


def check_size(path, file: BoundedFile, stream, layout: NiftiLayout) -> None:
    if stream is file and file.size != layout.stream_bytes:
        what = f"has {file.size:,} bytes, but its header asks for {layout.stream_bytes:,}"
        raise ScanError(path, what, "it is cut short or its header is damaged: copy it again")


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """One volume. The stream is read to its end, so that the gzip checksum covers every voxel returned."""
    with opened(path, limits) as file, unpacked(path, file) as stream:
        layout = read_layout(path, stream, limits)
        check_size(path, file, stream, layout)
        chosen = check_volume(path, volume, layout.volumes, limits)
        skip(path, stream, layout.offset - layout.header_bytes, "header extensions")
        skip(path, stream, chosen * layout.volume_bytes, "voxels")
        stored = np.empty(layout.volume_bytes, np.uint8)
        read_exactly(path, stream, memoryview(stored), "voxels")
        skip(path, stream, (layout.volumes - 1 - chosen) * layout.volume_bytes, "voxels")
        if stream.read(1):
            what = f"goes on after the {layout.stream_bytes:,} bytes that its header asks for"
            raise ScanError(path, what, "its header is damaged, or write it again with nibabel")
    a, b, c = layout.shape
    # In the file the first axis runs fastest, so in C order the array is [c, b, a]; a colour's channels run fastest.
    frames = stored.view(layout.dtype).reshape(c, b, a, layout.channels)
    frames = natural(path, frames, layout.slope, layout.intercept, limits)
    voxels = layout.display.apply(frames.transpose(2, 1, 0, 3))
    if layout.channels == 4:
        if (voxels[..., 3] != 255).any():
            raise ScanError(path, "has transparent voxels", "blend it with its background first", "ambiguous")
        voxels = voxels[..., :3]
    return voxels, layout.header
