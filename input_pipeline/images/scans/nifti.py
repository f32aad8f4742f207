"""NIfTI-1 and NIfTI-2 in one file (.nii, .nii.gz).

nibabel parses the header. The voxels are read here, because nibabel does not verify the checksum of a gzip stream,
allocates any size that a header declares, and reads extensions, which can contain a patient's DICOM header.
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
from nibabel.spatialimages import HeaderDataError

from input_pipeline.images.scans import orientation
from input_pipeline.images.scans.access import BoundedFile, as_scan_error, open_scan, read_exactly
from input_pipeline.images.scans.base import WRONG_SIZE, Header, ScanError, ScanLimits, limit_error, other_format
from input_pipeline.images.scans.checks import check_opaque, check_shape, check_volume, to_intensities

GZIP = b"\x1f\x8b"
CHUNK = 1 << 18  # bytes unpacked at a time; they are copied to their destination while in the CPU cache
KINDS = {  # header size -> parser, and position and value of the magic
    348: (nibabel.Nifti1Header, 344, b"n+1\0"),
    540: (nibabel.Nifti2Header, 4, b"n+2\0\r\n\x1a\n"),
}
VOXELS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
COLOURS = {128: 3, 2304: 4}  # channels of uint8
OTHERS = {1: "1-bit", 32: "complex", 1536: "128-bit float", 1792: "complex", 2048: "complex"}
MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: unknown (read as mm by convention), m, mm, micron
CONVERT = "convert it to a plain .nii.gz with nibabel or dcm2niix"
# First bytes of formats that can be read outside a gzip stream only.
READABLE = {b"\x93NUMPY": ".npy", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
QUATERNION_ROUNDING = 1e-2  # tolerated excess length of a quaternion
REPAIR = "the NIfTI header is damaged: copy the file again, or convert it again from DICOM"


def sniff(start: bytes) -> bool:
    """Return whether a file may be NIfTI: a gzip stream, or a NIfTI header size in either byte order."""
    return start[:2] == GZIP or start[:4] in {struct.pack(e + "i", n) for e in "<>" for n in KINDS}


@dataclasses.dataclass(frozen=True)
class NiftiLayout:
    """Position and layout of the voxels in the stream, and the axis order that transposes them to [H, W, D, C]."""

    shape: tuple[int, int, int]
    channels: int
    dtype: np.dtype
    header_bytes: int
    offset: int
    slope: float
    intercept: float
    display: orientation.DisplayLayout
    header: Header

    @property
    def volume_bytes(self) -> int:
        return math.prod(self.shape) * self.channels * self.dtype.itemsize

    @property
    def stream_bytes(self) -> int:
        return self.offset + self.header.volumes * self.volume_bytes


@contextlib.contextmanager
def unpacked(path, file: BoundedFile) -> Iterator[BoundedFile | igzip.IGzipFile]:
    """Yield the voxel stream: the file itself, or its unpacked gzip stream."""
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


def in_gzip(start: bytes) -> tuple[str, str]:
    """Return what a gzip stream without a NIfTI header is, and the remedy, from its first unpacked bytes."""
    kind = "DICOM" if start[128:132] == b"DICM" else next((k for m, k in READABLE.items() if start.startswith(m)), "")
    if kind:
        return f"is {kind} in a gzip stream", "unpack it"
    if (other := other_format(start)) is not None:
        return f"is {other[0]} in a gzip stream", other[1]
    return "is a gzip stream without a NIfTI header", "name a .nii or .nii.gz file"


def skip(path, stream, count: int, content: str) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for start in range(0, count, CHUNK):
        read_exactly(path, stream, buffer[: count - start], content)


def read_layout(path, file: BoundedFile, stream, limits: ScanLimits) -> NiftiLayout:
    """Read the header (348 or 540 bytes) and check it. The size of an uncompressed file must match it."""
    block = bytearray(540)
    read_exactly(path, stream, memoryview(block)[:348], "header")
    endian = next((e for e in "<>" if struct.unpack(e + "i", block[:4])[0] in KINDS), None)
    if endian is None:
        raise ScanError(path, *in_gzip(bytes(block[:348])), "unsupported")
    size = struct.unpack(endian + "i", block[:4])[0]
    kind, start, expected = KINDS[size]
    read_exactly(path, stream, memoryview(block)[348:size], "header")
    magic = bytes(block[start : start + len(expected)])
    if magic != expected:
        if magic[:3] in (b"ni1", b"ni2") or not any(magic):
            raise ScanError(path, "is half of a .hdr/.img pair", CONVERT, "unsupported")
        raise ScanError(path, f"has the NIfTI magic {magic!r} instead of {expected!r}", REPAIR)
    with as_scan_error(path, "reading the NIfTI header"):
        header = kind(bytes(block[:size]), endianness=endian, check=False)
    layout = interpret(path, header, size, endian, limits)
    if stream is file and file.size != layout.stream_bytes:
        reason = f"has {file.size:,} bytes, but its header requires {layout.stream_bytes:,}"
        raise ScanError(path, reason, WRONG_SIZE)
    return layout


def interpret(path, header, size: int, endian: str, limits: ScanLimits) -> NiftiLayout:
    """Check a parsed header of `size` bytes and return its layout."""
    a, b, c, volumes = dimensions(path, header)
    dtype, channels = voxel_type(path, header, endian)
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and offset == int(offset) and size + 4 <= offset < limits.max_file_bytes):
        raise ScanError(path, f"states that voxels start at byte {offset:g}", REPAIR)
    slope, intercept = scaling(path, header) if channels == 1 else (1.0, 0.0)
    rescaled = (slope, intercept) != (1, 0)
    affine, oriented, notices = affine_of(path, header)
    affine, stepless = with_single_steps(affine, (a, b, c))
    try:
        display = orientation.display_layout(affine, (a, b, c))
    except ValueError as error:
        remedy = "its orientation is damaged: set the sform and pixdim fields"
        raise ScanError(path, f"states {error}", remedy) from None
    h, w, d = display.shape((a, b, c))
    check_shape(path, (h, w, d, channels), max(dtype.itemsize, 4 if rescaled else 1), limits)
    check_volume(path, None, volumes, limits, needed=False)
    if stepless:
        notices += ("states no step between slices (harmless for a single slice): set pixdim[3]",)
    low, high = float(header["cal_min"]), float(header["cal_max"])
    head = Header(
        format="nifti",
        shape=(h, w, d, 1 if channels == 1 else 3),
        dtype=dtype.newbyteorder("=").name,
        spacing_mm=tuple(
            None if axis in stepless else round(s, 6) for axis, s in zip(display.order, display.spacing_mm, strict=True)
        ),
        orientation=display.codes if oriented else None,
        volumes=volumes,
        rescaled=rescaled,
        oblique_degrees=display.oblique_degrees if oriented else None,
        window=(low, high) if channels == 1 and math.isfinite(low) and math.isfinite(high) and low < high else None,
        notices=notices,
    )
    layout = NiftiLayout((a, b, c), channels, dtype, size, int(offset), slope, intercept, display, head)
    if layout.stream_bytes > limits.max_file_bytes:
        total = f"{volumes} volumes of {layout.stream_bytes:,} bytes"
        raise limit_error(path, f"has {total}, more than the limit of {limits.max_file_bytes:,}", "max_file_bytes")
    return layout


def dimensions(path, header) -> tuple[int, int, int, int]:
    """Return the sizes of the three voxel axes and the number of volumes."""
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise ScanError(path, f"states the dimensions {dim}", REPAIR)
    if dim[0] < 2 or max([1, *dim[5 : dim[0] + 1]]) > 1:
        reason = f"has {dim[0]} dimensions {dim[1 : dim[0] + 1]}"
        raise ScanError(path, reason, "only 2D, 3D and 4D scans are supported: split the file", "unsupported")
    return tuple(dim[i] if i <= dim[0] else 1 for i in (1, 2, 3, 4))


def voxel_type(path, header, endian: str) -> tuple[np.dtype, int]:
    """Return the dtype and channels of a stored voxel."""
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code in VOXELS:
        dtype, channels = np.dtype(VOXELS[code]).newbyteorder(endian), 1
    elif code in COLOURS:
        dtype, channels = np.dtype("u1"), COLOURS[code]
    elif code in OTHERS:
        raise ScanError(path, f"has {OTHERS[code]} voxels", CONVERT, "unsupported")
    else:
        raise ScanError(path, f"states the data type {code}", CONVERT)
    if bits != dtype.itemsize * channels * 8:
        raise ScanError(path, f"states {bits} bits a voxel for the data type {code}", REPAIR)
    return dtype, channels


def scaling(path, header) -> tuple[float, float]:
    """Return (slope, intercept)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    # "No scaling" is slope 0 in the NIfTI-1 standard. nibabel writes NaN in both fields.
    if slope == 0 or (math.isnan(slope) and math.isnan(intercept)):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        reason = f"states the scaling {slope:g} * stored + {intercept:g}"
        raise ScanError(path, reason, "set scl_slope and scl_inter to the correct values")
    return slope, intercept


def affine_of(path, header) -> tuple[np.ndarray, bool, tuple[str, ...]]:
    """Return the affine in mm, whether the file states an orientation, and notices.

    The sform has priority over the qform, as in the standard. With neither, the array order follows the standard's
    method 1 (ANALYZE: first axis from the patient's right to left, second to anterior, third to superior).
    """
    notices: tuple[str, ...] = ()
    # qfac (pixdim[0]) is the sign of the third axis; the standard reads 0 as 1, but nibabel rejects it.
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    negative = bool((header["pixdim"][1:4] < 0).any())  # as nibabel, which also reads the absolute values
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    with as_scan_error(path, "reading the orientation"):
        s, s_code = header.get_sform(coded=True)
        q, q_code = None, 0
        if int(header["qform_code"]) > 0:
            try:
                normalize_quaternion(header)
                q, q_code = header.get_qform(coded=True)
                if not np.isfinite(q).all():
                    raise ValueError("its quaternion is not finite")
            except (HeaderDataError, ValueError):
                if not s_code:
                    raise
                q, q_code, notices = None, 0, ("has an invalid qform, so its sform is used: remove the qform",)
        units = int(header["xyzt_units"]) & 7
        if units not in MM:
            raise ScanError(path, f"states the unknown length unit {units}", "set xyzt_units to mm")
        base = header.get_base_affine()
    affine = s if s_code else q if q_code else base
    if negative and not s_code:
        notices += ("states a negative voxel size, which is read as positive: check left and right, and set pixdim",)
    with np.errstate(all="ignore"):
        mirrored = s_code and q_code and np.linalg.det(s[:3, :3]) * np.linalg.det(q[:3, :3]) < 0
    if mirrored:
        reason = "its sform and qform disagree on which side is left"
        raise ScanError(path, reason, "find out which is right and remove the other", "ambiguous")
    return affine[:3] * MM[units], bool(s_code or q_code), notices


def normalize_quaternion(header) -> None:
    """Scale a quaternion that is slightly too long to length 1. Raises ValueError if rounding cannot explain it."""
    fields = ("quatern_b", "quatern_c", "quatern_d")
    length = math.sqrt(sum(float(header[field]) ** 2 for field in fields))
    if length > 1 + QUATERNION_ROUNDING:
        raise ValueError(f"its quaternion has the length {length:.4g} instead of 1")
    for field in fields:
        header[field] = float(header[field]) / max(length, 1.0)


def with_single_steps(affine: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Replace a step that is zero or not finite by 1 mm along an axis of one voxel, where it has no effect.

    The new step is perpendicular to the other two axes. Returns the affine and the number of that axis in a tuple.
    """
    lengths = np.linalg.norm(affine[:, :3], axis=0)
    missing = [axis for axis in range(3) if shape[axis] == 1 and not 0 < lengths[axis] < math.inf]
    if len(missing) != 1:
        return affine, ()
    across = np.cross(*(affine[:, axis] for axis in range(3) if axis != missing[0]))
    length = np.linalg.norm(across)
    affine = affine.copy()
    affine[:, missing[0]] = across / length if length else 0
    return affine, tuple(missing)


def header(path, *, limits: ScanLimits) -> Header:
    """Return the header. A .nii.gz is unpacked only up to the end of the header, so its checksum is not verified."""
    with open_scan(path, limits) as file, unpacked(path, file) as stream:
        return read_layout(path, file, stream, limits).header


def read(path, *, volume: int | None, limits: ScanLimits) -> tuple[np.ndarray, Header]:
    """Read one volume. The stream is read to its end, so the gzip checksum covers every voxel returned."""
    with open_scan(path, limits) as file, unpacked(path, file) as stream:
        layout = read_layout(path, file, stream, limits)
        chosen = check_volume(path, volume, layout.header.volumes, limits)
        skip(path, stream, layout.offset - layout.header_bytes, "header extensions")
        skip(path, stream, chosen * layout.volume_bytes, "voxels")
        stored = np.empty(layout.volume_bytes, np.uint8)
        read_exactly(path, stream, memoryview(stored), "voxels", CHUNK)
        skip(path, stream, (layout.header.volumes - 1 - chosen) * layout.volume_bytes, "voxels")
        if stream.read(1):
            reason = f"has data after the {layout.stream_bytes:,} bytes that its header requires"
            raise ScanError(path, reason, "its header is damaged: copy it again, or write it again with nibabel")
    a, b, c = layout.shape
    # The first axis varies fastest in the file, so the C-order array is [c, b, a]; colour channels vary fastest of all.
    frames = stored.view(layout.dtype).reshape(c, b, a, layout.channels)
    frames = to_intensities(path, frames, layout.slope, layout.intercept, limits)
    voxels = layout.display.apply(frames.transpose(2, 1, 0, 3))
    if layout.channels == 4:
        check_opaque(path, voxels[..., 3], 255)
        voxels = voxels[..., :3]
    return voxels, layout.header
