"""Resize the slices and the depth of a scan.

Letters: H W D voxels of the scan, H' W' D' of the volume, C channels (1 or 3).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator

import cv2
import numpy as np
import scipy.sparse

# The pipeline runs one process per core. OpenCV's own threads would oversubscribe the cores.
cv2.setNumThreads(1)

# (rows reversed, columns reversed) -> flip code of OpenCV
FLIP_CODES = {(False, False): None, (True, False): 0, (False, True): 1, (True, True): -1}


def resize_volume(
    voxels: np.ndarray, size: tuple[int, int, int], low: float, clip: tuple[float, float] | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (slice, channel, float32[H', W'] of voxel - low) of voxels [H, W, D, C] resized to `size`.

    Every source slice is read once, and an output slice is yielded as soon as its last source is added, so the
    intermediate slices stay in the CPU cache. A yielded plane is valid until the next one. `clip` is None if no voxel
    is outside.
    """
    small_type = voxels.dtype.itemsize <= 2
    depth, out_depth = voxels.shape[2], size[2]
    weights = depth_weights(depth, out_depth)
    outputs = [np.flatnonzero(weight) for weight in weights.T]
    last_source = depth - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)
    sums: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(size[:2], np.float32))
    for k, c, plane in _resize_slices(voxels, size[:2], 0.0 if small_type else low, clip):
        if depth == out_depth:
            yield k, c, np.subtract(plane, np.float32(low), out=plane) if small_type else plane
            continue
        for j in outputs[k]:
            cv2.scaleAdd(plane, float(weights[j, k]), sums[j, c], sums[j, c])
        for j in outputs[k]:
            if last_source[j] == k:
                done = sums.pop((j, c))
                yield j, c, np.subtract(done, np.float32(low), out=done) if small_type else done


def _resize_slices(
    voxels: np.ndarray, size: tuple[int, int], shift: float, clip: tuple[float, float] | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (slice, channel, float32[H', W'] of voxel - shift) of every source slice.

    16-bit integers are exact in float32 and need no shift. Other types are shifted towards zero before the conversion.
    """
    (h, w), (height, width) = voxels.shape[:2], size
    # numpy converts a slice several times faster in memory order; OpenCV flips it afterwards. If whole boxes of 16-bit
    # integers are averaged, sums are exact in any order, so the smaller resized slice is flipped instead.
    code = FLIP_CODES[voxels.strides[0] < 0, voxels.strides[1] < 0]
    voxels = voxels[:: -1 if code in (0, -1) else 1, :: -1 if code in (1, -1) else 1]
    whole_boxes = h % height == 0 and w % width == 0 and h // height * (w // width) <= 256
    flip_resized = whole_boxes and voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2 and clip is None
    plane = np.empty((h, w), np.float32)
    for k, source in enumerate(_slices(voxels)):
        for c in range(source.shape[2]):
            if shift:
                np.subtract(source[..., c], shift, out=plane, casting="same_kind")
            else:
                np.copyto(plane, source[..., c], casting="same_kind")
            if clip is not None:
                np.clip(plane, clip[0] - shift, clip[1] - shift, out=plane)
            upright = plane if code is None or flip_resized else cv2.flip(plane, code)
            resized = resize_plane(upright, size)
            yield k, c, cv2.flip(resized, code) if code is not None and flip_resized else resized


def _slices(voxels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield [H, W, C] of every slice.

    If slices are the fastest axis, one slice touches all memory, so 16 are copied at a time.
    """
    h, w, depth, _ = voxels.shape
    if depth > 1 and abs(voxels.strides[2]) < min(abs(voxels.strides[0]), abs(voxels.strides[1])):
        for start in range(0, depth, 16):
            yield from np.ascontiguousarray(voxels[:, :, start : start + 16].transpose(2, 0, 1, 3))
    else:
        for k in range(depth):
            yield voxels[:, :, k]


def resize_plane(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize [h, w] to `size`, each axis independently: box average when shrinking, linear when growing.

    float32, or also uint8 and int16 if neither axis shrinks.
    """
    (h, w), (height, width) = plane.shape[:2], size
    small = min(h, height), min(w, width)
    if (h, w) != small:
        if h % small[0] == 0 and w % small[1] == 0:
            plane = cv2.resize(plane, small[::-1], interpolation=cv2.INTER_AREA)
        else:  # the same boxes; OpenCV is fast for integer ratios only
            plane = area_weights(h, small[0]) @ plane
            plane = cv2.transpose(area_weights(w, small[1]) @ cv2.transpose(plane))
    if small != size:
        plane = cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)
    return plane


@functools.lru_cache(maxsize=64)
def area_weights(n: int, m: int) -> scipy.sparse.csr_array:
    """float32[m, n], rows of sum 1: box j covers n / m source pixels, each weighted by its overlap.

    5 -> 2:  2/5 2/5 1/5 0   0
             0   0   1/5 2/5 2/5
    """
    j = np.arange(m)
    first, end = j * n // m, -(-(j + 1) * n // m)
    starts = np.concatenate([[0], np.cumsum(end - first)])
    row = np.repeat(j, end - first)
    column = np.arange(starts[-1]) - (starts[:-1] - first)[row]
    overlap = np.minimum((column + 1) * m, (row + 1) * n) - np.maximum(column * m, row * n)
    return scipy.sparse.csr_array(((overlap / n).astype(np.float32), column, starts), shape=(m, n))


def depth_weights(depth: int, out_depth: int) -> np.ndarray:
    """float32[out_depth, depth], rows of sum 1: linear interpolation between slice centres, antialiased when shrinking.

    2 -> 4:  1    0          4 -> 2:  3/7 3/7 1/7 0
             3/4  1/4                 0   1/7 3/7 3/7
             1/4  3/4
             0    1
    """
    ratio = depth / out_depth
    centres = (np.arange(out_depth) + 0.5) * ratio - 0.5
    weights = np.maximum(1 - np.abs(np.arange(depth) - centres[:, None]) / max(ratio, 1.0), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
