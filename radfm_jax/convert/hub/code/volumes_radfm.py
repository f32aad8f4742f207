"""Voxels -> patches, with the numbers of the training of the model. It needs numpy, not PyTorch.

    patches, grids = prepare_scans(["ct.nii.gz"], preparation, channels=3)

Letters: H W D voxels, C channels, K stored slices, H' W' the sides of a volume, (h, w, d) a patch, N patches.
"""

import math

import numpy as np
from PIL import Image

from .scans_radfm import Scan, name_of, read_scan, require

try:
    import cv2
    import scipy.sparse
except ImportError as error:
    raise ImportError(f"{error}: pip install scipy opencv-python-headless") from error

CT_WINDOWS = {"lung": (-1350, 150), "mediastinum": (-125, 225), "soft_tissue": (-150, 250), "liver": (-45, 105),
              "bone": (-500, 1300), "brain": (0, 80)}  # fmt: skip
QUANTIZATION = {"uint8": (1 / 255, 0.0), "int16": (1 / 65535, 32768 / 65535), "float32": (1.0, 0.0)}  # scale, offset
ORDERS = {"columns": (3, 5, 0, 1, 2, 4, 6), "slabs": (0, 3, 5, 1, 2, 4, 6)}  # axes of [k, d, C, i, h, j, w]


def intensity_ranges(scan: Scan, low: float, high: float, setting: str) -> list[tuple[float, float]]:
    """Return the intensities that become 0 and 1: one pair, or one for each channel of several windows."""
    require(1e-30 < high - low < 1e30, f"its voxels range from {low:g} to {high:g}, which float32 cannot scale")
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
    keys = {key for item in items for key, value in item.items() if value is not None}
    wrong = ", ".join(map(str, keys - {"image", "window"}))
    require(not wrong, f"a scan has the key {wrong}", 'write {"image": scan, "window": its intensity}')
    require(all("image" in item for item in items), "a scan has no image", 'write {"image": scan}')
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
