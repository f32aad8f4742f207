"""A volume -> the patches the vision encoder reads: planes, and which planes make up which patch.

Letters: H W D voxels, C channels, (h, w, d) = patch size, n = (H/h) (W/w) (D/d) patches of a scan.
"""

from __future__ import annotations

import einops
import numpy as np

PATCH = (32, 32, 4)
POSITION_TABLES = (16, 16, 128)


def patch_grid(shape, patch=PATCH, tables=POSITION_TABLES) -> tuple[int, int, int]:
    """Patches along height, width and depth of a volume.

    Args:
      shape: (H, W, D) in voxels.
    Raises:
      ValueError: a side that is not a multiple of the patch, or longer than the table of learned positions.
    """
    problems = []
    for axis, size, step, table in zip(("height", "width", "depth"), shape, patch, tables, strict=True):
        if size % step or size < step:
            problems.append(f"{axis} {size} is not a multiple of {step}")
        elif size // step > table:
            problems.append(f"{axis} {size} is {size // step} patches, but there are {table} learned positions")
    if problems:
        raise ValueError(f"volume of {' x '.join(map(str, shape))} voxels: {'; '.join(problems)}")
    return tuple(size // step for size, step in zip(shape, patch, strict=True))


def patch_positions(grid, tables=POSITION_TABLES) -> np.ndarray:
    """Entries of the three position tables for each patch, int32[n, 3]; patches run h, w, d, depth fastest.

    n patches along an axis whose table has N entries use entries (i + 1) * (N // n) - 1, so a smaller scan is spread
    over the table (the released PositionEmbeddingLearned3d):

        16 rows,  8 patches: 1 3 5 7 9 11 13 15          128 depths, 2 patches: 63 127
    """
    axes = [(np.arange(n, dtype=np.int32) + 1) * (size // n) - 1 for n, size in zip(grid, tables, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def to_planes(volumes: np.ndarray, patch=PATCH) -> np.ndarray:
    """[..., C, H, W, D] -> planes [..., n * d * C, h, w], one slice of one channel of one patch each.

    Plane (patch, slice p, channel c) stands at index (patch * d + p) * C + c.
    """
    h, w, d = patch
    pattern = "... c (i h) (j w) (k d) -> ... (i j k d c) h w"
    return einops.rearrange(volumes, pattern, h=h, w=w, d=d)
