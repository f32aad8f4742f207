"""Scan files -> voxels as in the training of the model. It needs numpy, not PyTorch.

A scan is a path (NIfTI, DICOM file, folder of a DICOM series, PNG, JPEG, .npy), a PIL image, an array [H, W], [H, W, D]
or [H, W, D, 1 or 3], or {"image": one of these, "window": its intensity setting}. Voxels equal those of radfm_jax bit
for bit. A scan that this small reader cannot read exactly is refused. No field that identifies a patient is kept.

Letters: H W D voxels, C channels.
"""

import gzip
import math
import statistics
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

try:
    import nibabel
    import pydicom
    from nibabel import orientations
except ImportError as error:
    raise ImportError(f"{error}: pip install nibabel pydicom") from error

SAME = """
    SeriesInstanceUID SOPClassUID Modality FrameOfReferenceUID Rows Columns SamplesPerPixel PhotometricInterpretation
    BitsAllocated BitsStored PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit ImageType RescaleType Units
    SUVType EchoTime EchoNumbers InversionTime FlipAngle ScanningSequence SequenceName DiffusionBValue KVP TriggerTime
    ConvolutionKernel ContrastBolusAgent CorrectedImage TemporalPositionIdentifier AcquisitionNumber SliceThickness
    ImageOrientationPatient PixelSpacing
""".split()  # attributes that must not be mixed within a volume
PLAIN = "NumberOfFrames ModalityLUTSequence SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence".split()
OTHERS = ("ImagePositionPatient RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction HighBit "
          "ImagerPixelSpacing NominalScannedPixelSpacing PixelData").split()  # fmt: skip
MOSAIC = (0x0019100A, 0x00651050)  # number of images next to each other: Siemens, United Imaging


class Scan(NamedTuple):
    """Voxels [H, W, D, C] in display orientation, and what the file states about them."""

    voxels: np.ndarray
    padding: tuple | None = None  # (low, high) of voxels outside the field of view
    modality: str | None = None
    window: tuple | None = None  # (low, high) to display
    spacing: tuple | None = None  # mm between rows and between columns


def require(condition: Any, reason: str, remedy: str = "prepare it with radfm_jax, or convert it to .nii.gz or PNG"):
    if not condition:
        raise ValueError(f"{reason}: {remedy}")


def read_scan(scan: Any) -> Scan:
    """Read a path, image or array. Raises ValueError with the reason if it cannot be read exactly."""
    try:
        with warnings.catch_warnings(action="ignore"):  # pydicom quotes the header
            read = read_path(Path(scan)) if isinstance(scan, (str, Path)) else read_array(scan)
            require(np.isfinite(read.voxels).all(), "has voxels that are not finite")
            require((read.voxels != read.voxels[:1, :1, :1]).any(), "is constant", "leave it out")
    except FileNotFoundError:
        raise ValueError(f"scan {scan}: there is no such file: check the path") from None
    except Exception as error:
        reason = error if type(error) is ValueError else f"it cannot be read ({type(error).__name__}): copy it again"
        raise ValueError(f"scan {name_of(scan)}: {reason}") from None
    gray = all(np.array_equal(read.voxels[..., 0], read.voxels[..., c]) for c in range(1, read.voxels.shape[3]))
    return read._replace(voxels=read.voxels[..., :1]) if gray else read


def name_of(scan: Any) -> str:
    return str(scan) if isinstance(scan, (str, Path)) else type(scan).__name__


def read_path(path: Path) -> Scan:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        require(not any(file.is_dir() for file in files), "has folders in it", "name the folder of one DICOM series")
        return read_dicom(files)
    data = path.read_bytes()
    if data[128:132] == b"DICM":
        return read_dicom([path])
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        require(data[0] != 0x89 or data[24] < 16 or data[25] == 0, "has 16 bits and several channels")
        return read_array(Image.open(path, formats=("PNG", "JPEG")))
    if data.startswith(b"\x93NUMPY"):
        return read_array(np.load(path, allow_pickle=False))
    data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data  # to its end: the checksum is verified
    kinds = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}
    sizes = [size for size in kinds if data[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big"))]
    require(sizes, "is not NIfTI, DICOM, PNG, JPEG or .npy")
    magic = data[344:347] if sizes[0] == 348 else data[4:7]
    require(magic in (b"n+1", b"n+2"), "is half of a pair of .hdr and .img, or not NIfTI")
    return read_nifti(kinds[sizes[0]], data)


def read_array(array: Any) -> Scan:
    """Read a PIL image, or an array [H, W], [H, W, D] or [H, W, D, C]."""
    if isinstance(array, Image.Image):
        plain = array.mode in ("L", "RGB", "I;16", "I", "F")
        require(plain, f"is {array.mode}", "save it as one gray or RGB image")
        plain = "transparency" not in array.info and getattr(array, "n_frames", 1) == 1
        require(plain, "has a transparent colour, or several images", "save it as one gray or RGB image")
        turn, array = array.getexif().get(0x0112, 1), np.asarray(array)
        array = array.swapaxes(0, 1) if turn in (5, 6, 7, 8) else array  # views, so that the memory order is known
        array = array[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
        array = array[:, :, None] if array.ndim == 3 else array[:, :, None, None]
    array = np.asarray(array)
    array = array[..., None] if array.ndim == 2 else array
    require(array.ndim in (3, 4) and min(array.shape[:2]) > 4, f"has the shape {array.shape}", "pass [H, W, D, C]")
    require(array.ndim == 4 or array.shape[2] not in (3, 4), "is ambiguous", "pass [H, W, 1, 3] or [H, W, D, 1]")
    array = array if array.ndim == 4 else array[..., None]
    require(array.shape[3] in (1, 3) and array.dtype.kind in "iuf", "is not [H, W, D, 1 or 3] of numbers", "convert it")
    return Scan(to_intensities(array))


def read_nifti(kind: Any, data: bytes) -> Scan:
    image, size = kind.from_bytes(data), len(data)
    header, proxy = image.header, image.dataobj
    stored = kind.header_class(data[: header.sizeof_hdr], check=False)  # `header` is corrected
    shape = (*image.shape, 1)[:3]
    require(math.prod(image.shape) == math.prod(shape), "has several volumes", "pass one of them as an array")
    require(proxy.dtype.kind in "iuf" and proxy.dtype.itemsize <= 8, f"has {proxy.dtype} voxels")
    require(size == proxy.offset + math.prod(shape) * proxy.dtype.itemsize, "has not the size that its header states")
    bits = int(stored["bitpix"])
    require(bits == 8 * proxy.dtype.itemsize, f"states {bits} bits for {proxy.dtype} voxels", "copy it again")
    slope, inter = float(stored["scl_slope"]), float(stored["scl_inter"])
    scaled = math.isfinite(slope + inter) or slope == 0 or (math.isnan(slope) and math.isnan(inter))
    require(scaled, f"states the scaling {slope:g} * stored + {inter:g}", "correct scl_slope and scl_inter")
    (s, s_code), (q, q_code) = header.get_sform(coded=True), header.get_qform(coded=True)
    mirrored = s_code and q_code and np.linalg.det(s[:3, :3]) * np.linalg.det(q[:3, :3]) < 0
    require(not mirrored, "its sform and qform disagree on which side is left", "remove the wrong one")
    mm = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    stored = np.asarray(proxy.get_unscaled()).reshape(shape, order="F")
    frames = to_intensities(stored.astype(stored.dtype.newbyteorder("="), copy=False).T, proxy.slope, proxy.inter)
    voxels, spacing = displayed(frames.T[..., None], header.get_best_affine()[:3, :3] * mm)
    window = float(header["cal_min"]), float(header["cal_max"])
    return Scan(voxels, window=window if -math.inf < window[0] < window[1] < math.inf else None, spacing=spacing)


def read_slices(files: list[Path]) -> list[Any]:
    """Return the data sets of gray slices of one series, one a file. Raises ValueError for anything else."""
    require(files, "is an empty folder", "name the folder of one DICOM series")
    slices = [pydicom.dcmread(file, specific_tags=[*SAME, *PLAIN, *OTHERS, *MOSAIC]) for file in files]
    mixed = [tag for tag in SAME if len({repr(s.get(tag)) for s in slices}) > 1]
    require(not mixed, f"its files differ in {', '.join(mixed)}", "give each series its own folder")
    first = slices[0]
    plain = first.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2")
    plain &= all(s.get(tag, 1) == 1 for s in slices for tag in PLAIN) and first.get("Modality") not in ("SEG", "RTDOSE")
    plain &= not any(s.get(tag) for s in slices for tag in MOSAIC) and "MOSAIC" not in str(first.get("ImageType"))
    plain &= first.get("HighBit", first.BitsStored - 1) == first.BitsStored - 1
    require(plain, "has colour, several frames, a lookup table or a mosaic")
    syntaxes = [s.file_meta.TransferSyntaxUID for s in slices]
    lossless = all("Lossless" in u.name and "Lossy" not in u.name for u in syntaxes if u.is_compressed)
    require(lossless, "has a lossy or unknown transfer syntax", "convert it to Explicit VR Little Endian")
    size = first.Rows * first.Columns * first.BitsAllocated // 8
    sizes = {len(s.PixelData) for s, u in zip(slices, syntaxes, strict=True) if not u.is_encapsulated}
    require(sizes <= {size, size + size % 2}, "has not the size that its header states", "copy it again")
    stated = {tag in s for s in slices for tag in ("RescaleSlope", "RescaleIntercept")}
    require(len(stated) == 1, "states a slope or an intercept for some slices only")
    return slices


def read_dicom(files: list[Path]) -> Scan:
    """Read gray slices: rescaled, MONOCHROME1 inverted within the range of its bits, sorted by position."""
    slices = read_slices(files)
    first, bits, inverted = slices[0], slices[0].BitsStored, slices[0].PhotometricInterpretation == "MONOCHROME1"
    for s in slices:
        s.BitsStored = s.BitsAllocated  # otherwise pydicom drops the bits beyond, which may be an overlay or damage
    frames = np.stack([s.pixel_array for s in slices])
    low = -(1 << bits - 1) if first.PixelRepresentation else 0
    high, kind = low + (1 << bits) - 1, np.int16 if first.PixelRepresentation else np.uint16
    pads = [first.get(tag) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    pads = [int(np.uint16(pad & 0xFFFF).astype(kind)) for pad in pads if pad is not None]  # its VR can state no sign
    inside = low <= min(frames.min(), *pads, high) and max(frames.max(), *pads, low) <= high
    require(inside, "has values beyond its BitsStored")
    slopes = np.array([float(s.get("RescaleSlope", 1)) for s in slices])
    intercepts = np.array([float(s.get("RescaleIntercept", 0)) for s in slices])
    total = float(min(*slopes * low + intercepts, *slopes * high + intercepts))
    total += float(max(*slopes * low + intercepts, *slopes * high + intercepts))
    rescaled = (slopes != 1).any() or (intercepts != 0).any()
    slopes, intercepts = (-slopes, total - intercepts) if inverted else (slopes, intercepts)
    padding = np.sort(np.array(pads[:1] + pads[-1:])[:, None] * slopes + intercepts, axis=0)  # [2 or 0, slices]
    require((padding == padding[:, :1]).all(), "has another padding value in every slice")
    order, across, down, step = slice_order(slices)
    if inverted and not rescaled:
        voxels = frames.dtype.type(total) - frames[order]
    else:
        voxels = to_intensities(frames[order], slopes[order], intercepts[order])
    voxels, spacing = voxels.transpose(1, 2, 0)[..., None], positive(first, "PixelSpacing")
    if len(files) == 1:
        spacing = spacing or positive(first, "ImagerPixelSpacing") or positive(first, "NominalScannedPixelSpacing")
    if step is not None:
        mm = spacing or (1.0, 1.0)
        steps = np.stack([down * mm[0], across * mm[1], step], axis=1) * [[-1], [-1], [1]]  # LPS to RAS
        voxels, mm = displayed(voxels, steps, slice_axis=2)
        spacing = mm if spacing else None
    windows = [window for s in slices if (window := stated_window(s))]
    window = tuple(statistics.median(w[i] for w in windows) for i in (0, 1)) if windows else (0, 0)
    window = (total - window[1], total - window[0]) if inverted else window
    window = window if window[0] < window[1] else None
    return Scan(voxels, tuple(padding[:, 0].tolist()) or None, first.get("Modality"), window, spacing)


def positive(dataset: Any, tag: str) -> tuple | None:
    values = dataset.get(tag)
    return tuple(map(float, values)) if values is not None and len(values) == 2 and min(values) > 0 else None


def stated_window(dataset: Any) -> tuple | None:
    """Return (low, high) of the first window of a DICOM file (PS3.3 C.11.2)."""
    center, width = (np.ravel(dataset.get(tag, [])).astype(float) for tag in ("WindowCenter", "WindowWidth"))
    exact = {"LINEAR": 0, "LINEAR_EXACT": 1}.get(dataset.get("VOILUTFunction") or "LINEAR")
    if not len(center) or not len(width) or exact is None or width[0] <= 1 - exact:
        return None
    center, width = (center[0], width[0]) if exact else (center[0] - 0.5, width[0] - 1)
    return float(center - width / 2), float(center + width / 2)


def slice_order(slices: list) -> tuple:
    """Return the order of slices along their normal, their axes and mean step in patient coordinates (None unknown)."""
    direction = slices[0].get("ImageOrientationPatient")
    if len(slices) == 1 and direction is None:
        return [0], None, None, None
    positions = [s.get("ImagePositionPatient") for s in slices]
    require(direction is not None, "has slices without orientation")
    across, down = np.array(direction[:3], float), np.array(direction[3:], float)
    normal = np.cross(across, down)
    if len(slices) == 1:
        return [0], across, down, normal
    require(None not in positions and positive(slices[0], "PixelSpacing"), "has slices without position or spacing")
    positions = np.array(positions, float)
    order = [int(i) for i in np.argsort(positions @ normal, kind="stable")]
    positions = positions[order]
    along = positions @ normal
    distances = np.diff(along)
    even = np.abs(distances - np.median(distances)) <= 0.25 * np.median(distances)
    require((distances >= 1e-3).all() and even.all(), "has slices at equal positions, or a slice is missing")
    line = positions[0] + np.outer((along - along[0]) / (along[-1] - along[0]), positions[-1] - positions[0])
    off = np.abs(np.stack([(positions - line) @ across, (positions - line) @ down])).max(axis=1)
    rows, columns = positive(slices[0], "PixelSpacing")
    require(off[0] <= columns / 2 and off[1] <= rows / 2, "has slices that are shifted against the others")
    return order, across, down, (positions[-1] - positions[0]) / (len(slices) - 1)


def displayed(voxels: np.ndarray, steps: np.ndarray, slice_axis: int | None = None) -> tuple:
    """Return voxels [a, b, c, C] as [H, W, D, C] in radiological display, and the spacing of rows and columns in mm.

    Axial slices show the patient's right at the left and run from feet to head; sagittal and coronal ones have the head
    at the top. steps: [3, 3], column a is the step along array axis a in mm, RAS.
    """
    spacing = np.linalg.norm(steps, axis=0)
    require(((spacing > 1e-6) & (spacing < 1e6)).all(), "has a zero, huge or unknown voxel spacing")
    require(abs(np.linalg.det(steps / spacing)) >= 0.1, "has coplanar voxel axes")
    affine = np.eye(4)
    affine[:3, :3] = steps
    directions = orientations.io_orientation(affine)
    if slice_axis is None:
        single, coarse = [a for a in range(3) if voxels.shape[a] == 1], int(np.argmax(spacing))
        thick = spacing[coarse] > 1.5 * np.delete(spacing, coarse).max()
        slice_axis = single[0] if len(single) == 1 else coarse if thick else int(np.argmax(directions[:, 0] == 2))
    codes = ("IPL", "ILP", "PLS")[int(directions[slice_axis, 0])]
    moves = orientations.ornt_transform(directions, orientations.axcodes2ornt(codes))
    order = [int(np.argmax(moves[:, 0] == axis)) for axis in range(3)]
    flips = tuple(slice(None, None, -1 if moves[a, 1] < 0 else 1) for a in order)
    return voxels.transpose(*order, 3)[flips], tuple(round(float(spacing[a]), 6) for a in order[:2])


def to_intensities(frames: np.ndarray, slopes: Any = 1.0, intercepts: Any = 0.0) -> np.ndarray:
    """Return slope * stored + intercept of frames [F, ...]: exact in int16 or int32 if possible, else float32."""
    shape = (-1, *[1] * (frames.ndim - 1))
    slopes, intercepts = (np.asarray(x, np.float64).reshape(shape) for x in (slopes, intercepts))
    if (slopes == 1).all() and (intercepts == 0).all():
        if frames.dtype.newbyteorder("=").name in ("uint8", "uint16", "int16", "int32", "float32"):
            return frames.astype(frames.dtype.newbyteorder("="), copy=False)
    if frames.dtype.kind in "iu" and (slopes == np.round(slopes)).all() and (intercepts == np.round(intercepts)).all():
        exact = frames.astype(np.int64) * slopes.astype(np.int64) + intercepts.astype(np.int64)
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= exact.min() and exact.max() <= np.iinfo(kind).max:
                return exact.astype(kind)
    return (frames.astype(np.float64) * slopes + intercepts).astype(np.float32)
