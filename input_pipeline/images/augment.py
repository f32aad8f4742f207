"""Training augmentation: random crops and flips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from input_pipeline.images.planes import Volume
from input_pipeline.images.resize import resize_plane

CROP_AREA = (0.8, 1.0)
FLIPS = {"height": 2, "width": 3, "depth": 0}  # axes of slices [K, C, H, W]


def crop_box(height: int, width: int, rng: np.random.Generator, min_area=CROP_AREA[0]) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a crop of `min_area` to 1.0 of the area; 1.0 is no crop.

    The aspect ratio is drawn relative to that of the image, such that the crop fits. So at most 1 - min_area is lost.
    RandomResizedCrop draws an absolute ratio, so an image wider than 4:3 can lose everything except its 4:3 centre.
    """
    area, aspect, y, x = rng.random(4)
    area = min_area + (1 - min_area) * area
    stretch = area ** (2 * aspect - 1)  # log-uniform in [area, 1 / area]
    h = min(max(round(height * math.sqrt(area / stretch)), 1), height)
    w = min(max(round(width * math.sqrt(area * stretch)), 1), width)
    return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w


def flip_slices(slices: np.ndarray, flips: Sequence[str], rng: np.random.Generator | None) -> np.ndarray:
    """Flip slices [K, C, H, W] along each named axis with probability 0.5."""
    if set(flips) - set(FLIPS) or (flips and rng is None):
        raise ValueError(f"flips {tuple(flips)} must be some of {', '.join(FLIPS)}, and need an rng")
    for axis, number in FLIPS.items():
        if axis in flips and rng.random() < 0.5:
            slices = np.flip(slices, number)
    return slices


def augment(volume: Volume, rng: np.random.Generator, flips: Sequence[str] = (), crop: float = CROP_AREA[0]) -> Volume:
    """Crop and flip a volume of final size (a prepared record), as `prepare_volume` does with a scan.

    The crop is resized to the volume's height and width by linear interpolation in the storage dtype, with an error of
    up to 0.8 steps in uint8 and half a step in int16.
    """
    k, channels, height, width = volume.slices.shape
    top, left, h, w = crop_box(height, width, rng, crop)
    box = volume.slices.reshape(k * channels, height, width)[:, top : top + h, left : left + w]
    slices = np.stack([resize_plane(np.ascontiguousarray(s), (height, width)) for s in box])
    slices = flip_slices(slices.reshape(k, channels, height, width), flips, rng)
    return Volume.from_slices(slices, volume.scale, volume.offset, volume.depth, volume.patches)
