"""Scan files -> patches of voxels, with the numbers of the training of the model. It needs numpy, not PyTorch.

    patches, grids = prepare_scans(["ct.nii.gz"], preparation, channels=3)

A scan is a path (NIfTI, DICOM file, folder of a DICOM series, PNG, JPEG, .npy), a PIL image, an array [H, W], [H, W, D]
or [H, W, D, 1 or 3], or {"image": one of these, "window": its intensity setting}. Voxels equal those of radfm_jax bit
for bit. A scan that this small reader cannot read exactly is refused. No field that identifies a patient is kept.

Letters: H W D voxels, C channels, K stored slices, (h, w, d) a patch, N patches.
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
    import cv2
    import nibabel
    import pydicom
    import scipy.sparse
    from nibabel import orientations
except ImportError as error:
    raise ImportError(f"{error}: pip install nibabel pydicom scipy opencv-python-headless") from error

CT_WINDOWS = {"lung": (-1350, 150), "mediastinum": (-125, 225), "soft_tissue": (-150, 250), "liver": (-45, 105),
              "bone": (-500, 1300), "brain": (0, 80)}  # fmt: skip
QUANTIZATION = {"uint8": (1 / 255, 0.0), "int16": (1 / 65535, 32768 / 65535), "float32": (1.0, 0.0)}  # scale, offset
ORDERS = {"columns": (3, 5, 0, 1, 2, 4, 6), "slabs": (0, 3, 5, 1, 2, 4, 6)}  # axes of [k, d, C, i, h, j, w]
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


# --- scan files -> voxels ---------------------------------------------------------------------------------------------


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
        return read_dicom(sorted(file for file in path.iterdir() if not file.name.startswith(".")))
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
    return read_nifti(kinds[sizes[0]].from_bytes(data), len(data))


def read_array(array: Any) -> Scan:
    """Read a PIL image, or an array [H, W], [H, W, D] or [H, W, D, C]."""
    if isinstance(array, Image.Image):
        plain = array.mode in ("L", "RGB", "I;16", "I", "F") and "transparency" not in array.info
        require(plain and getattr(array, "n_frames", 1) == 1, f"is {array.mode}", "save it as one gray or RGB image")
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


def read_nifti(image: Any, size: int) -> Scan:
    header, proxy = image.header, image.dataobj
    shape = (*image.shape, 1)[:3]
    require(math.prod(image.shape) == math.prod(shape), "has several volumes", "pass one of them as an array")
    require(proxy.dtype.kind in "iuf" and proxy.dtype.itemsize <= 8, f"has {proxy.dtype} voxels")
    require(size == proxy.offset + math.prod(shape) * proxy.dtype.itemsize, "has not the size that its header states")
    (s, s_code), (q, q_code) = header.get_sform(coded=True), header.get_qform(coded=True)
    mirrored = s_code and q_code and np.linalg.det(s[:3, :3]) * np.linalg.det(q[:3, :3]) < 0
    require(not mirrored, "its sform and qform disagree on which side is left", "remove the wrong one")
    mm = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    stored = np.asarray(proxy.get_unscaled()).reshape(shape, order="F")
    frames = to_intensities(stored.astype(stored.dtype.newbyteorder("="), copy=False).T, proxy.slope, proxy.inter)
    voxels, spacing = displayed(frames.T[..., None], header.get_best_affine()[:3, :3] * mm)
    window = float(header["cal_min"]), float(header["cal_max"])
    return Scan(voxels, window=window if -math.inf < window[0] < window[1] < math.inf else None, spacing=spacing)


def read_dicom(files: list[Path]) -> Scan:
    """Read gray slices, one a file: rescaled, MONOCHROME1 inverted, sorted by position."""
    require(files, "is an empty folder", "name the folder of one DICOM series")
    slices = [pydicom.dcmread(file, specific_tags=[*SAME, *PLAIN, *OTHERS, *MOSAIC]) for file in files]
    mixed = [tag for tag in SAME if len({repr(s.get(tag)) for s in slices}) > 1]
    require(not mixed, f"its files differ in {', '.join(mixed)}", "give each series its own folder")
    first = slices[0]
    bits, inverted = first.BitsStored, first.PhotometricInterpretation == "MONOCHROME1"
    plain = inverted or first.PhotometricInterpretation == "MONOCHROME2"
    plain &= all(s.get(tag, 1) == 1 for s in slices for tag in PLAIN) and first.get("HighBit", bits - 1) == bits - 1
    plain &= not any(s.get(tag) for s in slices for tag in MOSAIC) and "MOSAIC" not in str(first.get("ImageType"))
    require(
        plain and first.get("Modality") not in ("SEG", "RTDOSE"),
        "has colour, several frames, a lookup table or a mosaic",
    )
    names = [s.file_meta.TransferSyntaxUID.name for s in slices if s.file_meta.TransferSyntaxUID.is_compressed]
    lossless = all("Lossless" in name and "Lossy" not in name for name in names)
    require(lossless, "has a lossy or unknown transfer syntax", "convert it to Explicit VR Little Endian")
    size = first.Rows * first.Columns * first.BitsAllocated // 8
    sizes = {len(s.PixelData) for s in slices if not s.file_meta.TransferSyntaxUID.is_encapsulated}
    require(sizes <= {size, size + size % 2}, "has not the size that its header states", "copy it again")
    for s in slices:
        s.BitsStored = s.BitsAllocated  # otherwise pydicom drops the bits beyond, which may be an overlay or damage
    frames = np.stack([s.pixel_array for s in slices])
    low = -(1 << bits - 1) if first.PixelRepresentation else 0
    high, kind = low + (1 << bits) - 1, np.int16 if first.PixelRepresentation else np.uint16
    pads = [first.get(tag) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    pads = [int(np.uint16(pad & 0xFFFF).astype(kind)) for pad in pads if pad is not None]  # its VR can state no sign
    inside = low <= min(frames.min(), *pads, high) and max(frames.max(), *pads, low) <= high
    require(inside, "has values beyond its BitsStored")
    stated = {tag in s for s in slices for tag in ("RescaleSlope", "RescaleIntercept")}
    require(len(stated) == 1, "states a slope or an intercept for some slices only")
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


# --- voxels -> patches ------------------------------------------------------------------------------------------------


def intensity_ranges(scan: Scan, low: float, high: float, setting: str) -> list[tuple[float, float]]:
    """Return the intensities that become 0 and 1: one pair, or one for each channel of several windows."""
    if setting == "minmax":
        return [(low, high)]
    if setting.startswith("percentile"):
        ends = [float(x) for x in (setting + ":0.5,99.5").split(":")[1].split(",")]
        steps = np.ones(3, int)
        sides = np.array(scan.voxels.shape[:3])
        while math.prod(-(-sides // steps)) * scan.voxels.shape[3] > 1 << 16:
            steps[int(np.argmax(-(-sides // steps)))] += 1
        sample = scan.voxels[tuple(slice(step // 2, None, step) for step in steps)]
        sample = sample[sample > low]
        ends = np.percentile(sample, ends) if sample.size else (low, high)
        return [(float(ends[0]), float(ends[1]))] if ends[0] < ends[1] else [(low, high)]
    if setting == "header":
        require(scan.window, "its header states no window", "choose another intensity")
        windows = [scan.window]
    else:
        names = [name.strip() for name in setting.split("/")]
        named = any(name in CT_WINDOWS for name in names)
        try:
            windows = [tuple(map(float, CT_WINDOWS.get(name) or name.split(","))) for name in names]
        except ValueError:
            windows = []
        known = len(windows) in (1, 3) and all(len(window) == 2 and window[0] < window[1] for window in windows)
        require(
            known, f"intensity {setting!r} is unknown", f"use {', '.join(CT_WINDOWS)}, minmax, percentile or LOW,HIGH"
        )
        require(len(windows) == 1 or scan.voxels.shape[3] == 1, "three windows need a gray scan", "use one window")
        ct = scan.modality in (None, "CT")
        hounsfield = (ct and low < 0) if named else (ct or min(windows)[0] >= 0 or low < 0)
        require(hounsfield, f"is not in Hounsfield units ({low:g} to {high:g})", "use minmax or percentile")
    seen = min(w[0] for w in windows) < high and low < max(w[1] for w in windows)
    require(seen, f"all its voxels ({low:g} to {high:g}) are outside the window {setting}", "choose another one")
    return windows


def resized(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a float32 plane, each axis independently: box average when shrinking, linear when growing."""
    (h, w), small = plane.shape, (min(plane.shape[0], height), min(plane.shape[1], width))
    if (h, w) != small and h % small[0] == 0 and w % small[1] == 0:
        plane = cv2.resize(plane, small[::-1], interpolation=cv2.INTER_AREA)
    elif (h, w) != small:
        plane = boxes(h, small[0]) @ plane
        plane = cv2.transpose(boxes(w, small[1]) @ cv2.transpose(plane))
    return plane if small == (height, width) else cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)


def boxes(n: int, m: int) -> scipy.sparse.csr_array:
    """float32[m, n], rows of sum 1: box j covers n / m source pixels, each weighted by its overlap."""
    j, i = np.arange(m)[:, None], np.arange(n)
    overlap = np.minimum((i + 1) * m, (j + 1) * n) - np.maximum(i * m, j * n)
    return scipy.sparse.csr_array((np.maximum(overlap, 0) / n).astype(np.float32))


def depth_weights(depth: int, out: int) -> np.ndarray:
    """float32[out, depth], rows of sum 1: linear between slice centers, antialiased when shrinking."""
    ratio = depth / out
    centers = (np.arange(out) + 0.5) * ratio - 0.5
    weights = np.maximum(1 - np.abs(np.arange(depth) - centers[:, None]) / max(ratio, 1.0), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def paper_slices(scan: Scan, p: dict, setting: str) -> tuple[np.ndarray, int]:
    """Return slices float32[K, C, H', W'] in [0, 1] as in the paper: scaled, resized and quantized; and the depth."""
    voxels, (low, high) = scan.voxels, (float(scan.voxels.min()), float(scan.voxels.max()))
    if scan.padding and ((voxels >= scan.padding[0]) & (voxels <= scan.padding[1])).any():
        padded = (voxels >= scan.padding[0]) & (voxels <= scan.padding[1])
        require(not padded.all(), "is padding only", "leave it out")
        low, high = float(voxels[~padded].min()), float(voxels[~padded].max())
        require(low < high, "is constant apart from padding", "leave it out")
        voxels = voxels.copy(order="K")
        voxels[padded] = low
    ranges = intensity_ranges(scan._replace(voxels=voxels), low, high, setting)
    (rows, columns, depth, channels), step = voxels.shape, p["patch"][2]
    side = p["size_2d"] if depth == 1 else p["size_3d"]
    k = 1 if depth == 1 else min(max((depth + step // 2) // step * step, step), p["depth"])
    height = width = side
    if p["fit"] == "pad":
        mm = scan.spacing or (1.0, 1.0)
        scale = min(side / (rows * mm[0]), side / (columns * mm[1]))
        height, width = max(round(rows * mm[0] * scale), 1), max(round(columns * mm[1] * scale), 1)
    zero = -32768 if p["storage"] == "int16" else 0
    slices = np.full((k, max(channels, len(ranges)), side, side), zero, p["storage"])
    inside = slices[:, :, (side - height) // 2 :, (side - width) // 2 :][:, :, :height, :width]
    swapped = abs(voxels.strides[0]) < abs(voxels.strides[1])  # the memory order decides the order of roundings
    voxels, size = (voxels.swapaxes(0, 1), (width, height)) if swapped else (voxels, (height, width))
    for first, (bottom, top) in enumerate(ranges):
        for c in range(channels):
            for j, plane in enumerate(resized_slices(voxels[..., c], size, k, bottom, top, bottom > low or top < high)):
                plane = quantized(plane, top - bottom, p["storage"])
                inside[j, first + c] = plane.T if swapped else plane
    scale, offset = QUANTIZATION[p["storage"]]
    return slices.astype(np.float32) * np.float32(scale) + np.float32(offset), k if depth > 1 else step


def resized_slices(voxels: np.ndarray, size: tuple, k: int, bottom: float, top: float, clip: bool):
    """Yield k planes float32 of voxels [H, W, D] - bottom. 16-bit integers are exact, and are shifted last."""
    shift, planes = 0.0 if voxels.dtype.itemsize <= 2 else bottom, []
    for source in np.moveaxis(voxels, 2, 0):
        plane = np.empty(source.shape, np.float32)
        np.subtract(source, shift, out=plane, casting="same_kind")
        planes.append(resized(np.clip(plane, bottom - shift, top - shift, out=plane) if clip else plane, *size))
    for weights in depth_weights(len(planes), k) if k != len(planes) else np.eye(k, dtype=np.float32):
        plane = planes[int(np.argmax(weights))]
        if k != len(planes):
            plane = np.zeros(size, np.float32)
            for j in np.flatnonzero(weights):
                cv2.scaleAdd(planes[j], float(weights[j]), plane, plane)
        yield np.subtract(plane, np.float32(bottom - shift), dtype=np.float32)


def quantized(plane: np.ndarray, span: float, storage: str) -> np.ndarray:
    if storage == "uint8":
        return cv2.convertScaleAbs(plane, alpha=255 / span)
    if storage == "int16":
        return np.clip(np.rint(plane * np.float32(65535 / span) - np.float32(32768)), -32768, 32767).astype(np.int16)
    return np.clip(plane / np.float32(span), 0, 1)


def released_slices(scans: list[Scan], size_3d: int) -> list[tuple[np.ndarray, int]]:
    """Return slices [K, C, H', W'] and depth of the scans of a prompt as the released code: nearest neighbour."""

    def rounded(depth: int, most: int) -> int:
        return min(max((depth + 1) // 4 * 4, 4), most)

    def nearest(n: int, m: int) -> np.ndarray:
        return np.minimum(np.floor(np.arange(m, dtype=np.float32) * (np.float32(n) / np.float32(m))).astype(int), n - 1)

    first = rounded(max(4, *(s.voxels.shape[2] for s in scans), 4), 64)
    depth = rounded(first, 32 if len(scans) > 6 else 64) if size_3d == 256 else first
    side = 256 if size_3d == 256 and depth > 4 else 512
    images = [s.voxels.dtype == np.uint8 and s.voxels.shape[2] == 1 for s in scans]
    others = [s.voxels for s, image in zip(scans, images, strict=True) if not image] or [np.array([0.0, 1.0])]
    low, high = min(float(voxels.min()) for voxels in others), max(float(voxels.max()) for voxels in others)
    out = []
    for scan, image in zip(scans, images, strict=True):
        if image:
            pixels = Image.fromarray(np.ascontiguousarray(scan.voxels[:, :, 0].squeeze()))
            pixels = np.asarray(pixels.resize((512, 512), Image.Resampling.BICUBIC)).reshape(512, 512, 1, -1)
            voxels = (pixels / np.float32(255)).astype(np.float32)
        else:
            voxels = (scan.voxels.astype(np.float32) - np.float32(low)) / (np.float32(high) - np.float32(low))
        index = [np.arange(n) for n in voxels.shape[:3]]
        for sizes in ((512, 512, first), (side, side, depth)):
            sizes = (*sizes[:2], 1) if voxels.shape[2] == 1 else sizes
            index = [i[nearest(len(i), n)] for i, n in zip(index, sizes, strict=True)]
        out.append((np.ascontiguousarray(voxels[np.ix_(*index)].transpose(2, 3, 0, 1)), depth))
    return out


def to_patches(slices: np.ndarray, depth: int, p: dict, channels: int) -> tuple[np.ndarray, list[int]]:
    """Cut slices [K, C, H, W] into patches float32[N, d*C*h*w] in the encoder's order. Returns them and their grid."""
    require(slices.shape[1] <= channels, "a scan has colour, but the model reads gray scans", "convert it to gray")
    (h, w, d), (height, width) = p["patch"], slices.shape[2:]
    x = np.broadcast_to(slices, (depth, channels, height, width))
    x = x.reshape(depth // d, d, channels, height // h, h, width // w, w).transpose(ORDERS[p["patch_order"]])
    return x.reshape(-1, d * channels * h * w), [height // h, width // w, depth // d]


def prepare_scans(scans: list, preparation: dict, channels: int) -> tuple[np.ndarray, list[list[int]]]:
    """Return the patches float32[N, d*C*h*w] of the scans of one prompt, one scan after another, and their grids.

    A grid is the number of patches along height, width and depth. preparation: as in processor_config.json.
    """
    p, items = preparation, [scan if isinstance(scan, dict) else {"image": scan} for scan in scans]
    settings = [item.get("window") or (p["intensities"][0] if len(p["intensities"]) == 1 else None) for item in items]
    choices = " and ".join(p["intensities"])
    require(None not in settings, f"the model was trained with {choices}", 'choose one: {"image": scan, "window": ...}')
    read = [read_scan(item["image"]) for item in items]
    if p["preprocess"] == "released":
        require({*settings} <= {"minmax"}, "released mode has no windows", "remove the window")
        volumes = released_slices(read, p["size_3d"])
    else:
        volumes = []
        for scan, setting, item in zip(read, settings, items, strict=True):
            try:
                volumes.append(paper_slices(scan, p, setting))
            except ValueError as error:
                raise ValueError(f"scan {name_of(item['image'])}: {error}") from None
    cut = [to_patches(slices, depth, p, channels) for slices, depth in volumes]
    size = math.prod(p["patch"]) * channels
    patches = np.concatenate([patches for patches, _ in cut]) if cut else np.zeros((0, size), np.float32)
    return patches, [grid for _, grid in cut]
