"""scan -> volume: intensity, size, depth and augmentation. Planes and patch geometry: planes.py, reachable from here.

Letters: H W D voxels of the scan, H' W' D' of the volume, C channels (1 or 3), S scans of a sample.

`paper` does what the paper says, done well: min-max over the whole scan, then resize. `released` gives the numbers of
the released code, which released weights expect.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import scipy.sparse
from PIL import Image

from input_pipeline.images.extremes import extremes as extremes_of
from input_pipeline.images.planes import (
    CHANNELS,
    MODES,
    PAPER_SIZES,
    STORAGE,
    Sizes,
    Volume,
    released_shape,
    target_shape,
)

# The pipeline runs a process a core; threads of OpenCV's own would only fight over them.
cv2.setNumThreads(1)

# (low, high) in Hounsfield units: level -+ width / 2. Widths and levels of the table of typical settings in
# radiopaedia.org/articles/windowing-ct; other tables and viewers differ (soft tissue at level 40, bone 2000 wide).
CT_WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-1350.0, 150.0),  # width 1500, level -600
    "mediastinum": (-125.0, 225.0),  # width 350, level 50
    "soft_tissue": (-150.0, 250.0),  # width 400, level 50 (abdomen)
    "liver": (-45.0, 105.0),  # width 150, level 30
    "bone": (-500.0, 1300.0),  # width 1800, level 400 (spine)
    "brain": (0.0, 80.0),  # width 80, level 40
}

CROP_AREA = (0.8, 1.0)
FLIPS = {"height": 2, "width": 3, "depth": 0}  # axes of slices [K, C, H, W]
QUANTA = {"uint8": (1 / 255, 0.0), "int16": (1 / 65535, 32768 / 65535), "float32": (1.0, 0.0)}  # scale, offset
INTENSITIES = ("stack", "scan", "as_is")


def ct_window(window: str | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of a window given by name or by its two ends."""
    if isinstance(window, str):
        if window not in CT_WINDOWS:
            raise ValueError(f"CT window {window!r} is none of {', '.join(CT_WINDOWS)}; give (low, high) for your own")
        return CT_WINDOWS[window]
    low, high = map(float, window)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"CT window {(low, high)}: give two finite intensities, the lower one first")
    return low, high


def one_channel_if_gray(voxels: np.ndarray) -> np.ndarray:
    """[H, W, D, 3] with three equal channels -> a view [H, W, D, 1]; anything else as it is.

    Many gray pictures are saved in colour. For whoever checks scans before planning: the channels found here, not those
    of the header, then count planes.
    """
    if voxels.shape[-1] == CHANNELS and all(np.array_equal(voxels[..., 0], voxels[..., c]) for c in (1, 2)):
        return voxels[..., :1]
    return voxels


def prepare_volume(
    voxels: np.ndarray,
    *,
    mode: str = "paper",
    window: str | tuple[float, float] | None = None,
    storage: str | None = None,
    rng: np.random.Generator | None = None,
    crop: float = CROP_AREA[0],
    flips: Sequence[str] = (),
    sizes: Sizes = PAPER_SIZES,
    padding: tuple[float, float] | None = None,
    extremes: tuple[float, float] | None = None,
) -> Volume:
    """A scan at the size of `target_shape`, its intensities in [0, 1].

    `paper` mode, in this order:
      1. Intensity: the least and the greatest voxel of the whole scan become 0 and 1; with a window, voxels are clipped
         to it and its ends become 0 and 1. Taken on the scan as read, before any crop or resize (which average, and so
         would find a smaller range); being linear, it is applied after the resize, to far fewer voxels. Voxels marked
         as padding (outside the field of view, by custom far darker than air) are no part of the range and become its
         least voxel first.
      2. Crop, with an rng: one box for all slices, `crop` (0.8) to 1.0 of their area, in the plane only.
      3. Height and width: box average (every source voxel counts by the area it shares) where the scan shrinks, linear
         where it grows, each axis by itself.
      4. Depth: linear; where it shrinks the kernel widens with the ratio (antialiased), so no slice is left out.
      5. Flips, with an rng: each axis named in `flips` with probability one half.
      6. Storage. Arithmetic before it is float32.

    Quantisation: `uint8` has scale 1/255 and `int16` 1/65535 (offset 32768/65535); a value differs from that of
    `float32` storage by at most scale / 2. So an 8-bit scan that keeps its size is recovered exactly, and Hounsfield
    units that span up to 65535 are kept to half a unit or better in int16.

    Args:
      voxels: any integer or float dtype [H, W, D, C], in any memory order; D = 1 is a 2D scan.
      window: a name in CT_WINDOWS or (low, high) in the unit of the voxels.
      storage: uint8 (default), int16 or float32; `released` mode is float32 only.
      rng: training only. The same generator state gives the same volume.
      flips: of "height", "width", "depth". Off by default: left and right matter in a report.
      padding: (low, high), both included, that mark padding: pass `Header.padding`. It is left out here and not in
        `scans.read`, which returns what is stored; `released` mode, whose original knows no padding, ignores it.
      extremes: least and greatest of `voxels`, padding included, where they are known: pass `Header.extremes`. They are
        believed, and save `paper` mode one look at every voxel.
    Raises:
      ValueError: voxels that are not finite, all the same, all padding, or all outside the window (with the numbers);
        arrays or options of another form.
    """
    if mode == "released":
        if window is not None or flips or storage not in (None, "float32"):
            raise ValueError("released mode has neither windows nor flips, and its numbers are float32")
        return released_volumes([voxels], rng=rng)[0]
    if mode != "paper":
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    storage = "uint8" if storage is None else storage
    if storage not in STORAGE:
        raise ValueError(f"storage {storage!r} is none of {', '.join(STORAGE)}")
    voxels, least, greatest = without_padding(_checked(voxels), padding, extremes)
    low, high = intensity_range(least, greatest, window)
    height, width, depth = target_shape(voxels.shape[:3], mode, sizes)
    if voxels.shape[2] == 1:
        depth = 1
    if rng is not None:
        top, left, h, w = crop_box(*voxels.shape[:2], rng, crop)
        voxels = voxels[top : top + h, left : left + w]
    clip = None if window is None else (low, high)
    slices = np.empty((depth, voxels.shape[3], height, width), storage)
    # Where the first axis is the fast one, as nibabel reads, slices are worked on transposed.
    swapped = abs(voxels.strides[0]) < abs(voxels.strides[1])
    if swapped:
        resized = _resized(voxels.swapaxes(0, 1), (width, height, depth), low, clip)
    else:
        resized = _resized(voxels, (height, width, depth), low, clip)
    for k, c, plane in resized:
        plane = _stored(plane, high - low, storage)
        slices[k, c] = cv2.transpose(plane) if swapped else plane
    return Volume.from_slices(_flip(slices, flips, rng), *QUANTA[storage])


def crop_box(
    height: int, width: int, rng: np.random.Generator, least: float = CROP_AREA[0]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of `least` to 1.0 of the area; 1.0 is no crop.

    RandomResizedCrop, except that the box's proportions are drawn relative to the picture's own, within what fits:
    there a picture wider than 4:3 can lose up to all but a 4:3 middle of it, here never more than a fifth (1 - least).
    """
    area, at, y, x = rng.random(4)
    area = least + (1 - least) * area
    stretch = area ** (2 * at - 1)  # log-uniform in [area, 1 / area]
    h = min(max(round(height * math.sqrt(area / stretch)), 1), height)
    w = min(max(round(width * math.sqrt(area * stretch)), 1), width)
    return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w


def _checked(voxels: np.ndarray) -> np.ndarray:
    shape = tuple(voxels.shape)
    if voxels.ndim != 4 or 0 in shape or shape[3] not in (1, CHANNELS):
        raise ValueError(f"voxels are [height, width, depth, 1 or {CHANNELS} channels], got {list(shape)}")
    if not (np.issubdtype(voxels.dtype, np.integer) or np.issubdtype(voxels.dtype, np.floating)):
        raise ValueError(f"voxels are integers or floats, got {voxels.dtype}")
    return voxels


def _extremes(voxels: np.ndarray) -> tuple[float, float]:
    """Least and greatest voxel; ValueError unless all are finite and not all the same."""
    low, high = extremes_of(voxels)
    if not (math.isfinite(low) and math.isfinite(high)):
        nan, inf = int(np.isnan(voxels).sum()), int(np.isinf(voxels).sum())
        raise ValueError(f"{nan + inf} of {voxels.size} voxels are not finite ({nan} NaN, {inf} infinite)")
    if low == high:
        raise ValueError(f"every one of the {voxels.size} voxels is {low:g}: nothing to see")
    return low, high


def without_padding(voxels: np.ndarray, padding, extremes) -> tuple[np.ndarray, float, float]:
    """(voxels, a copy with padding set to the least other voxel if there is any; least and greatest of the others)."""
    least, greatest = _extremes(voxels) if extremes is None else extremes
    if padding is None or padding[0] > greatest or padding[1] < least:
        return voxels, least, greatest
    padded = (voxels >= padding[0]) & (voxels <= padding[1])
    if not padded.any():
        return voxels, least, greatest
    seen = voxels[~padded]
    if not seen.size:
        low, high = padding
        raise ValueError(f"every one of the {voxels.size} voxels is padding ({low:g} to {high:g}): nothing to see")
    least, greatest = _extremes(seen)
    voxels = voxels.copy(order="K")
    voxels[padded] = seen.min()
    return voxels, least, greatest


def intensity_range(least: float, greatest: float, window) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    if not 1e-30 < greatest - least < 1e30:
        raise ValueError(f"voxels run from {least:g} to {greatest:g}: float32 cannot scale that range")
    if window is None:
        return least, greatest
    ends = ct_window(window)
    if isinstance(window, str) and 0 <= least and greatest <= 255:
        raise ValueError(
            f"CT window {window!r} is in Hounsfield units, but voxels run from {least:g} to {greatest:g}, as in a "
            "picture: leave the window out, or give (low, high)"
        )
    if greatest <= ends[0] or least >= ends[1]:
        raise ValueError(
            f"voxels run from {least:g} to {greatest:g}, all outside the window {ends[0]:g} to {ends[1]:g}: every one "
            f"would be {'black' if greatest <= ends[0] else 'white'}; is the scan in Hounsfield units?"
        )
    return ends


def _slices(voxels: np.ndarray) -> Iterator[np.ndarray]:
    """[H, W, C] of every slice. Where slices are the fast axis, picking one would walk all memory: 16 at a time."""
    h, w, depth, _ = voxels.shape
    if depth > 1 and abs(voxels.strides[2]) < min(abs(voxels.strides[0]), abs(voxels.strides[1])):
        for start in range(0, depth, 16):
            yield from np.ascontiguousarray(voxels[:, :, start : start + 16].transpose(2, 0, 1, 3))
    else:
        for k in range(depth):
            yield voxels[:, :, k]


def _resized(voxels: np.ndarray, size: tuple[int, int, int], low: float, clip) -> Iterator[tuple[int, int, np.ndarray]]:
    """[H, W, D, C] -> (slice, channel, float32[H', W'] of voxel - low), slice by slice.

    Each source slice is read once, and an output slice leaves when the last of its sources is added, so all the work
    but that reading stays in the cache. A plane is the caller's until the next one.

    clip: (low, high), or None where nothing lies outside.
    """
    small_type = voxels.dtype.itemsize <= 2
    depth, out_depth = voxels.shape[2], size[2]
    shares = depth_weights(depth, out_depth)
    uses = [np.flatnonzero(share) for share in shares.T]
    last = depth - 1 - np.argmax(shares[:, ::-1] > 0, axis=1)  # the last source of each output slice
    sums: dict[tuple[int, int], np.ndarray] = {}
    for k, c, picture in _pictures(voxels, size[:2], 0.0 if small_type else low, clip):
        if depth == out_depth:
            yield k, c, np.subtract(picture, np.float32(low), out=picture) if small_type else picture
            continue
        for j in uses[k]:
            if (j, c) not in sums:
                sums[j, c] = np.zeros(size[:2], np.float32)
            cv2.scaleAdd(picture, float(shares[j, k]), sums[j, c], sums[j, c])
        for j in uses[k]:
            if last[j] == k:
                plane = sums.pop((j, c))
                yield j, c, np.subtract(plane, np.float32(low), out=plane) if small_type else plane


def _pictures(voxels: np.ndarray, size: tuple[int, int], shift: float, clip) -> Iterator[tuple[int, int, np.ndarray]]:
    """[H, W, D, C] -> (slice, channel, float32[H', W'] of voxel - shift), slice by slice.

    float32 holds 16-bit integers exactly, so these need no shift; other types are brought near zero while they are
    exact.
    """
    (h, w), (height, width) = voxels.shape[:2], size
    # numpy converts a picture several times faster the way it lies in memory; OpenCV then turns it round. Sums of few
    # 16-bit integers are exact in any order: where whole boxes are averaged, the small result is turned instead.
    code = {(False, False): None, (True, False): 0, (False, True): 1, (True, True): -1}[
        voxels.strides[0] < 0, voxels.strides[1] < 0
    ]
    voxels = voxels[:: -1 if code in (0, -1) else 1, :: -1 if code in (1, -1) else 1]
    whole = h % height == 0 and w % width == 0 and h // height * (w // width) <= 256
    turn_small = whole and voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2 and clip is None
    picture = np.empty((h, w), np.float32)
    for k, source in enumerate(_slices(voxels)):
        for c in range(source.shape[2]):
            if shift:
                np.subtract(source[..., c], shift, out=picture, casting="same_kind")
            else:
                np.copyto(picture, source[..., c], casting="same_kind")
            if clip is not None:
                np.clip(picture, clip[0] - shift, clip[1] - shift, out=picture)
            upright = picture if code is None or turn_small else cv2.flip(picture, code)
            resized = resize_plane(upright, size)
            yield k, c, cv2.flip(resized, code) if code is not None and turn_small else resized


def resize_plane(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> [H', W'], its `size`: box average where it shrinks, linear where it grows.

    Each axis by itself. float32, or where nothing shrinks also uint8 and int16.
    """
    (h, w), (height, width) = picture.shape[:2], size
    small = min(h, height), min(w, width)
    if (h, w) != small:
        if h % small[0] == 0 and w % small[1] == 0:
            picture = cv2.resize(picture, small[::-1], interpolation=cv2.INTER_AREA)
        else:  # the same boxes; OpenCV is quick for whole ones only
            picture = area_weights(h, small[0]) @ picture
            picture = cv2.transpose(area_weights(w, small[1]) @ cv2.transpose(picture))
    if small != size:
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
    return picture


@functools.lru_cache(maxsize=64)
def area_weights(n: int, m: int) -> scipy.sparse.csr_array:
    """float32[m, n], rows of sum 1: box j covers n / m source pixels and weighs each by the length it shares.

    5 -> 2:  2/5 2/5 1/5 0   0
             0   0   1/5 2/5 2/5
    """
    j = np.arange(m)
    first, end = j * n // m, -(-(j + 1) * n // m)
    starts = np.concatenate([[0], np.cumsum(end - first)])
    row = np.repeat(j, end - first)
    column = np.arange(starts[-1]) - (starts[:-1] - first)[row]
    shared = np.minimum((column + 1) * m, (row + 1) * n) - np.maximum(column * m, row * n)
    return scipy.sparse.csr_array(((shared / n).astype(np.float32), column, starts), shape=(m, n))


def depth_weights(depth: int, out_depth: int) -> np.ndarray:
    """float32[out_depth, depth], rows of sum 1: linear interpolation between slice centres, widened when shrinking.

    2 -> 4:  1    0          4 -> 2:  3/7 3/7 1/7 0
             3/4  1/4                 0   1/7 3/7 3/7
             1/4  3/4
             0    1
    """
    ratio = depth / out_depth
    centres = (np.arange(out_depth) + 0.5) * ratio - 0.5
    weights = np.maximum(1 - np.abs(np.arange(depth) - centres[:, None]) / max(ratio, 1.0), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _stored(plane: np.ndarray, span: float, storage: str) -> np.ndarray:
    """float32[H', W'] from 0 to span, which is overwritten -> the storage dtype, by the scale and offset of QUANTA."""
    if storage == "uint8":
        # Rounds to nearest and saturates in one pass; nothing is negative but rounding noise around 0.
        return cv2.convertScaleAbs(plane, alpha=255 / span)
    if storage == "int16":
        plane *= np.float32(65535 / span)
        plane -= np.float32(32768)
        return np.clip(np.rint(plane, out=plane), -32768, 32767, out=plane).astype(np.int16)
    plane /= np.float32(span)
    return np.clip(plane, 0, 1, out=plane)


def augment(volume: Volume, rng: np.random.Generator, flips: Sequence[str] = (), crop: float = CROP_AREA[0]) -> Volume:
    """Crop and flips of `prepare_volume` for a volume that is already at its final size (a prepared record).

    The crop grows back to the volume's height and width by linear interpolation in the storage dtype: to 0.8 of a step
    in uint8, half a step in int16.
    """
    k, channels, height, width = volume.slices.shape
    top, left, h, w = crop_box(height, width, rng, crop)
    box = volume.slices.reshape(k * channels, height, width)[:, top : top + h, left : left + w]
    slices = np.stack([resize_plane(np.ascontiguousarray(s), (height, width)) for s in box])
    slices = _flip(slices.reshape(k, channels, height, width), flips, rng)
    return Volume.from_slices(slices, volume.scale, volume.offset, volume.depth)


def _flip(slices: np.ndarray, flips: Sequence[str], rng: np.random.Generator | None) -> np.ndarray:
    """slices [K, C, H, W], each named axis turned round with probability one half."""
    if set(flips) - set(FLIPS) or (flips and rng is None):
        raise ValueError(f"flips {tuple(flips)}: give some of {', '.join(FLIPS)}, and an rng to draw them from")
    for axis, number in FLIPS.items():
        if axis in flips and rng.random() < 0.5:
            slices = np.flip(slices, number)
    return slices


# What follows gives the numbers of the released code.


def nearest_index(n_in: int, n_out: int) -> np.ndarray:
    """Which of n_in source slices (rows, columns) each of n_out takes, int64[n_out]: torch's nearest, all in float32.

    min(floor(i * (n_in / n_out)), n_in - 1). Whole-number arithmetic gives others, for instance 26 -> 44 at i = 22.
    """
    ratio = np.float32(n_in) / np.float32(n_out)
    return np.minimum(np.floor(np.arange(n_out, dtype=np.float32) * ratio).astype(np.int64), n_in - 1)


def released_picture(pixels: np.ndarray, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """uint8[h, w, C] -> uint8[512, 512, C]: crop to `box` (top, left, height, width), then Pillow's bicubic resize."""
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    if box is not None:
        top, left, h, w = box
        image = image.crop((left, top, left + w, top + h))
    return np.asarray(image.resize((512, 512), Image.Resampling.BICUBIC)).reshape(512, 512, -1)


def released_crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) by the definition of RandomResizedCrop(scale=(0.8, 1.0)).

    An area of 0.8 to 1.0 and a width-to-height ratio of 3/4 to 4/3 are drawn up to ten times until the box fits; if
    none does, the middle of the picture, its ratio brought to 3/4 or 4/3.
    """
    least, most = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(least), math.log(most)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, max(round(width / least), 1))
    w = min(width, max(round(height * most), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def _released_intensity(scans: Sequence[np.ndarray], intensity: str, rng) -> list[np.ndarray]:
    """The scans as the released data sets hand them to stack_images: float32[H, W, D, C], pictures 512 x 512."""
    if intensity not in INTENSITIES:
        raise ValueError(f"intensity {intensity!r} is none of {', '.join(INTENSITIES)}")
    is_picture = [_checked(v).dtype == np.uint8 and v.shape[2] == 1 for v in scans]
    ranges = [_extremes(v) for v in scans]
    if intensity == "stack":
        own = [r for r, picture in zip(ranges, is_picture, strict=True) if not picture]
        common = (min(low for low, _ in own), max(high for _, high in own)) if own else (0.0, 1.0)
        ranges = [common] * len(scans)
    out = []
    for voxels, picture, (low, high) in zip(scans, is_picture, ranges, strict=True):
        if picture:
            box = None if rng is None else released_crop_box(*voxels.shape[:2], rng)
            out.append((released_picture(voxels[:, :, 0], box)[:, :, None] / np.float32(255)).astype(np.float32))
            continue
        voxels = voxels.astype(np.float32)
        if intensity != "as_is":
            voxels = (voxels - np.float32(low)) / (np.float32(high) - np.float32(low))
        out.append(voxels)
    return out


def _nearest(voxels: np.ndarray, *sizes: tuple[int, int, int]) -> np.ndarray:
    """[H, W, D, C] -> the last of `sizes`, through each of them in turn; indices are composed, voxels taken once."""
    index = [np.arange(n) for n in voxels.shape[:3]]
    for size in sizes:
        index = [i[nearest_index(len(i), n)] for i, n in zip(index, size, strict=True)]
    return voxels[np.ix_(*index)]


def released_volumes(
    scans: Sequence[np.ndarray],
    *,
    intensity: str = "stack",
    collate: bool = True,
    rng: np.random.Generator | None = None,
) -> list[Volume]:
    """The scans of one sample as the released code feeds them, depth equalised, each as a float32 Volume.

    Equal to `released_collate([released_stack(scans)])`, but gray scans keep one channel and 2D scans one slice. A
    sample without scans has no volume here (the released code adds one of zeros that no token refers to).

    Args:
      scans: voxels [H, W, D, C]. uint8 of depth 1 are pictures: cropped with an rng (the released test and demo
        programs crop too), Pillow's bicubic to 512 x 512, divided by 255. All others: nearest neighbour.
      intensity: what becomes of the others: "stack", least and greatest voxel of them all become 0 and 1 (the .npy
        families); "scan", those of each (Rad3D-Modality); "as_is".
      collate: True as in training; False as in the released test program, where volumes stay at 512 x 512.
    Raises:
      ValueError: voxels that are not finite or all the same, which the released code replaces by noise.
    """
    depths = [v.shape[2] for v in scans]
    stacked, final = released_shape(depths, collate=False), released_shape(depths, collate=collate)
    volumes = []
    for voxels in _released_intensity(scans, intensity, rng):
        depth = 1 if voxels.shape[2] == 1 else None
        sizes = [(*size[:2], depth or size[2]) for size in (stacked, final)]
        slices = np.ascontiguousarray(_nearest(voxels, *sizes).transpose(2, 3, 0, 1))
        volumes.append(Volume.from_slices(slices, 1.0, 0.0, final[2]))
    return volumes


def released_stack(
    scans: Sequence[np.ndarray], *, intensity: str = "stack", rng: np.random.Generator | None = None
) -> np.ndarray:
    """float32[S, 3, 512, 512, D']: a sample's scans after the released stack_images. Arguments: `released_volumes`.

    D' is the largest depth to the nearest multiple of 4, ties down. No scan: one of zeros, [1, 3, 512, 512, 4].
    """
    size = released_shape([v.shape[2] for v in scans], collate=False)
    out = np.zeros((max(len(scans), 1), CHANNELS, *size), np.float32)
    for i, voxels in enumerate(_released_intensity(scans, intensity, rng)):
        out[i] = _nearest(voxels, size).transpose(3, 0, 1, 2)
    return out


def released_collate(stacks: Sequence[np.ndarray]) -> np.ndarray:
    """float32[B, S, 3, H', W', D']: samples joined as by the released training collator.

    Args:
      stacks: float32[S_b, 3, 512, 512, D_b] of each sample. Sizes: `released_shape`; a sample with fewer than S scans
        gets zeros in their place.
    """
    count = max(len(s) for s in stacks)
    size = released_shape([max(s.shape[-1] for s in stacks)] * count, batch=len(stacks))
    out = np.zeros((len(stacks), count, CHANNELS, *size), np.float32)
    for b, stack in enumerate(stacks):
        for i, scan in enumerate(stack):
            out[b, i] = _nearest(scan.transpose(1, 2, 3, 0), size).transpose(3, 0, 1, 2)
    return out
