"""The sizes a scan is brought to, and a volume cut into the patches the vision encoder reads.

Letters: H W D voxels, C channels, (h, w, d) = patch size, n = (H/h) (W/w) (D/d) patches of a scan, K stored slices,
m stored planes.

All sizes here follow from the header of a scan, so rows are planned before any pixel is read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import einops
import numpy as np

PATCH = (32, 32, 4)
POSITION_TABLES = (16, 16, 128)
CHANNELS = 3
MODES = ("paper", "released")
STORAGE = ("uint8", "int16", "float32")
MAX_DEPTH = 64


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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What scans are brought to in `paper` mode: sides of a 2D scan and of a volume, and a volume's greatest depth."""

    flat: int = 512
    volume: int = 256
    depth: int = MAX_DEPTH

    def __post_init__(self):
        patch_grid((self.flat, self.flat, PATCH[2]))
        patch_grid((self.volume, self.volume, self.depth))


PAPER_SIZES = Sizes()


def target_shape(shape, mode: str = "paper", sizes: Sizes = PAPER_SIZES) -> tuple[int, int, int]:
    """(H, W, D) of a scan as its header gives it -> (H', W', D') that the model reads. A scan of one slice is 2D.

    `paper` (section 4.2 of the paper): 512 x 512 x 4 in 2D; 256 x 256 in 3D, its depth to the nearest multiple of 4,
    at least 4, at most 64. The paper is silent about ties; they go up, so that no slice is lost:

        D      2   5   6   7   9  10  11  33  62  63  100
        D'     4   4   8   8   8  12  12  32  64  64   64

    `released`: what the released training code makes of a scan that is alone in its sample (`released_shape`).
    """
    height, width, depth = _checked_shape(shape)
    if mode == "paper":
        if depth == 1:
            return sizes.flat, sizes.flat, PATCH[2]
        return sizes.volume, sizes.volume, min(max((depth + 2) // 4 * 4, 4), sizes.depth)
    if mode == "released":
        return released_shape([depth])
    raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")


def released_depth(depth: int, longest: int = MAX_DEPTH) -> int:
    """Nearest of 4, 8 .. `longest`, ties down: 6 -> 4, 7 -> 8, 10 -> 8, 100 -> 64 (the released stack_images)."""
    return min(max((depth + 1) // 4 * 4, 4), longest)


def released_shape(depths: Sequence[int], batch: int = 1, collate: bool = True) -> tuple[int, int, int]:
    """(H', W', D') that the released code gives to every scan of a sample.

    Args:
      depths: slices of each scan of the sample, [S]; empty for a sample without a scan, which gets one of zeros.
      batch: samples that the training collator joins. For more than one, `depths` are those of all of them.
      collate: False for the released test program, which has no collator: there a volume stays at 512 x 512.
    """
    depth = released_depth(max(4, *depths) if depths else 4)
    if not collate:
        return 512, 512, depth
    depth = released_depth(depth, 32 if batch == 1 and len(depths) > 6 else MAX_DEPTH)
    side = 256 if batch == 1 and depth > 4 else 512
    return side, side, depth


def _checked_shape(shape) -> tuple[int, int, int]:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"a scan's shape is height, width and depth in voxels, got {tuple(shape)}")
    return tuple(int(n) for n in shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """A scan at its final size; value in [0, 1] = voxel * scale + offset.

    Attributes:
      voxels: uint8, int16 or float32 [H, W, K, C], C 1 or 3. A 2D scan has one slice (K = 1), never four equal ones.
      depth: D, the slices the model sees: K, or for K = 1 how often the one slice stands there (None: 4).
    """

    voxels: np.ndarray
    scale: float = 1.0
    offset: float = 0.0
    depth: int | None = None

    def __post_init__(self):
        v = self.voxels
        if v.ndim != 4 or v.shape[3] not in (1, CHANNELS) or v.dtype.name not in STORAGE:
            raise ValueError(
                f"a volume is {' or '.join(STORAGE)} [H, W, slices, 1 or {CHANNELS} channels], "
                f"got {v.dtype}{list(v.shape)}"
            )
        depth = self.depth or (PATCH[2] if v.shape[2] == 1 else v.shape[2])
        if v.shape[2] not in (1, depth):
            raise ValueError(f"{v.shape[2]} slices cannot stand for a depth of {depth}")
        patch_grid((*v.shape[:2], depth))
        object.__setattr__(self, "depth", depth)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, D) as the model sees it."""
        return (*self.voxels.shape[:2], self.depth)

    @property
    def slices(self) -> np.ndarray:
        """[K, C, H, W], contiguous: the order in which `prepare_volume` leaves the voxels, so usually without a copy.

        Records hold these bytes: `from_slices` and `planes` then touch each voxel once.
        """
        return np.ascontiguousarray(self.voxels.transpose(2, 3, 0, 1))

    @classmethod
    def from_slices(cls, slices: np.ndarray, scale: float, offset: float, depth: int | None = None) -> Volume:
        """The volume of which `slices` [K, C, H, W] was taken; it shares their memory."""
        return cls(slices.transpose(2, 3, 0, 1), scale, offset, depth)

    def values(self) -> np.ndarray:
        """float32[H, W, D, 3] as the network sees it, slices and channels repeated (by views, not copies)."""
        x = self.voxels.astype(np.float32) * np.float32(self.scale) + np.float32(self.offset)
        return np.broadcast_to(x, (*self.shape, CHANNELS))


def planes(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """What the device gets of a volume: each plane once, and where it stands.

    The planes of a scan run slice, channel, patch row, patch column. A gray 2D scan of 2 x 2 patches (h, w, d = 32, 32,
    4), n = 4, and a gray volume of 1 x 2 x 2 patches:

        slice 0:  plane 0 1      patch 0 = 12 times plane 0        slice 0:  0  1     patch 0 (row 0, column 0, depth 0)
                        2 3      patch 3 = 12 times plane 3        slice 1:  2  3       = slices 0 2 4 6, each 3 times
                                                                   ...                patch 1 (depth 1) = 8 10 12 14
                                                                   slice 7: 14 15     patch 2 (column 1) = 1 3 5 7

    Returns:
      planes: [m, h, w] of the volume's dtype. m = n gray 2D, 3 n colour 2D, 4 n gray 3D, 12 n colour 3D.
      plane_index: int32[n, d, 3] (read only), the plane that is slice p, channel c of patch n;
        `planes[plane_index]` is `to_planes` of the expanded volume, reshaped.
    """
    _, _, stored, channels = volume.voxels.shape
    h, w, _ = PATCH
    cut = einops.rearrange(volume.slices, "k c (i h) (j w) -> (k c i j) h w", h=h, w=w)
    return cut, _plane_index(patch_grid(volume.shape), stored == 1, channels)


@functools.lru_cache(maxsize=64)
def _plane_index(grid: tuple[int, int, int], one_slice: bool, channels: int) -> np.ndarray:
    rows, columns, depths = grid
    i, j, k, p, c = np.ogrid[:rows, :columns, :depths, : PATCH[2], :CHANNELS]
    slice_ = 0 * k if one_slice else k * PATCH[2] + p
    channel = c if channels == CHANNELS else 0 * c
    index = ((slice_ * channels + channel) * rows + i) * columns + j
    full = np.broadcast_to(index, (rows, columns, depths, PATCH[2], CHANNELS))
    out = full.reshape(-1, PATCH[2], CHANNELS).astype(np.int32)
    out.setflags(write=False)  # the same array serves every scan of this size
    return out


def patch_count(
    shape, mode: str = "paper", final: tuple[int, int, int] | None = None, sizes: Sizes = PAPER_SIZES
) -> int:
    """n, patches of a scan whose header says (H, W, D).

    final: its target, where the whole sample decides it (`released_shape`).
    """
    return math.prod(patch_grid(final or target_shape(shape, mode, sizes)))


def plane_count(
    shape, channels: int, mode: str = "paper", final: tuple[int, int, int] | None = None, sizes: Sizes = PAPER_SIZES
) -> int:
    """m, planes of a scan whose header says (H, W, D) and 1 or 3 channels; exactly what `planes` returns."""
    if channels not in (1, CHANNELS):
        raise ValueError(f"a scan has 1 or {CHANNELS} channels, not {channels}")
    rows, columns, depths = patch_grid(final or target_shape(shape, mode, sizes))
    slices = 1 if _checked_shape(shape)[2] == 1 else depths * PATCH[2]
    return rows * columns * slices * channels
