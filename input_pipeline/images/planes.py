"""Target sizes of scans, and volumes cut into the patches that the vision encoder reads.

Letters: H W D voxels, C channels, (h, w, d) = patch size, n = (H/h) (W/w) (D/d) patches of a scan, K stored slices,
m stored planes. The patch is that of the vision encoder (`Patches`); the defaults are RadFM's.

All sizes depend only on the header of a scan, so rows can be planned before any pixel is read.
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
ORDERS = {"columns": "i j k", "slabs": "k i j"}  # of patches, by row i, column j and depth k; the last varies fastest
CHANNELS = 3
MODES = ("paper", "released")
FITS = ("stretch", "pad")
STORAGE = ("uint8", "int16", "float32")
MAX_DEPTH = 64


def patch_grid(shape, patch=PATCH, tables=POSITION_TABLES) -> tuple[int, int, int]:
    """Return the number of patches along height, width and depth of a volume of (H, W, D) voxels.

    Raises ValueError if a side is not a multiple of the patch, or has more patches than learned positions.
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


def patch_positions(grid, tables=POSITION_TABLES, order: str = "columns") -> np.ndarray:
    """int32[n, 3], the entries of the three position tables for each patch; by default, depth varies fastest.

    n patches along an axis with N table entries use the entries (i + 1) * (N // n) - 1, which spreads a smaller scan
    over the table (PositionEmbeddingLearned3d of the released code):

        16 rows,  8 patches: 1 3 5 7 9 11 13 15          128 depths, 2 patches: 63 127
    """
    axes = [(np.arange(n, dtype=np.int32) + 1) * (size // n) - 1 for n, size in zip(grid, tables, strict=True)]
    grid_of_entries = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return einops.rearrange(grid_of_entries, f"i j k a -> ({ORDERS[order]}) a")


def to_planes(volumes: np.ndarray, patch=PATCH, order: str = "columns") -> np.ndarray:
    """Cut [..., C, H, W, D] into planes [..., n * d * C, h, w], each one slice of one channel of one patch.

    Plane (patch, slice p, channel c) has the index (patch * d + p) * C + c.
    """
    h, w, d = patch
    pattern = f"... c (i h) (j w) (k d) -> ... ({ORDERS[order]} d c) h w"
    return einops.rearrange(volumes, pattern, h=h, w=w, d=d)


@dataclasses.dataclass(frozen=True)
class Patches:
    """How volumes are cut for a vision encoder."""

    size: tuple[int, int, int] = PATCH
    tables: tuple[int, int, int] = POSITION_TABLES  # numbers of learned row, column and depth positions
    order: str = "columns"  # `columns`: patches above each other are neighbours; `slabs`: patches of equal depth are

    def grid(self, shape) -> tuple[int, int, int]:
        return patch_grid(shape, self.size, self.tables)

    def positions(self, shape) -> np.ndarray:
        return patch_positions(self.grid(shape), self.tables, self.order)


RADFM_PATCHES = Patches()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Target sizes in `paper` mode: the sides of a 2D scan and of a volume, and the maximum depth of a volume."""

    flat: int = 512
    volume: int = 256
    depth: int = MAX_DEPTH
    patches: Patches = RADFM_PATCHES

    def __post_init__(self):
        self.patches.grid((self.flat, self.flat, self.patches.size[2]))
        self.patches.grid((self.volume, self.volume, self.depth))


PAPER_SIZES = Sizes()


def target_shape(shape, mode: str = "paper", sizes: Sizes = PAPER_SIZES) -> tuple[int, int, int]:
    """Return the size (H', W', D') for a scan whose header states (H, W, D). A scan of one slice is 2D.

    `paper` (section 4.2 of the paper): 512 x 512 x 4 in 2D; 256 x 256 in 3D with the depth rounded to the nearest
    multiple of 4, from 4 to 64. The paper does not define ties; they are rounded up, so that no slice is lost:

        D      2   5   6   7   9  10  11  33  62  63  100
        D'     4   4   8   8   8  12  12  32  64  64   64

    These are the numbers of `PAPER_SIZES`. Other `sizes` have their own sides, and the depth of their patch instead of
    4: a 2D scan has the depth of one patch.

    `released`: the size in the released training code if the sample has no other scan (`released_shape`).
    """
    height, width, depth = _checked_shape(shape)
    step = sizes.patches.size[2]
    if mode == "paper":
        if depth == 1:
            return sizes.flat, sizes.flat, step
        return sizes.volume, sizes.volume, min(max((depth + step // 2) // step * step, step), sizes.depth)
    if mode == "released":
        return released_shape([depth])
    raise ValueError(f"mode {mode!r} must be one of {', '.join(MODES)}")


def released_depth(depth: int, maximum: int = MAX_DEPTH) -> int:
    """Round to the nearest of 4, 8 .. `maximum`, ties down: 6 -> 4, 7 -> 8, 10 -> 8, 100 -> 64 (stack_images)."""
    return min(max((depth + 1) // 4 * 4, 4), maximum)


def released_shape(depths: Sequence[int], batch: int = 1, collate: bool = True) -> tuple[int, int, int]:
    """Return the size (H', W', D') to which the released code resizes every scan of a sample.

    Args:
      depths: number of slices of each scan: of the sample, or of all samples of the batch.
      batch: number of samples per training batch.
      collate: False for the released test program, which has no collator and keeps volumes at 512 x 512.
    """
    depth = released_depth(max(4, *depths) if depths else 4)
    if not collate:
        return 512, 512, depth
    depth = released_depth(depth, 32 if batch == 1 and len(depths) > 6 else MAX_DEPTH)
    side = 256 if batch == 1 and depth > 4 else 512
    return side, side, depth


def _checked_shape(shape) -> tuple[int, int, int]:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"a scan's shape must be (height, width, depth) in voxels, got {tuple(shape)}")
    return tuple(int(n) for n in shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """A scan at its final size; value in [0, 1] = voxel * scale + offset."""

    voxels: np.ndarray  # uint8, int16 or float32 [H, W, K, C], C 1 or 3; a 2D scan is stored as one slice (K = 1)
    scale: float = 1.0
    offset: float = 0.0
    depth: int | None = None  # D, slices that the model sees: K, or how often one slice is repeated (None: a patch's)
    source: tuple[int, int, int] | None = None  # (H, W, D) of the scan before it was resized; None in records
    notices: tuple[str, ...] = ()  # contrast and shape that the conversion lost, if they were measured
    patches: Patches = RADFM_PATCHES

    def __post_init__(self):
        v = self.voxels
        if v.ndim != 4 or v.shape[3] not in (1, CHANNELS) or v.dtype.name not in STORAGE:
            expected = f"{' or '.join(STORAGE)} [H, W, slices, 1 or {CHANNELS} channels]"
            raise ValueError(f"a volume must be {expected}, got {v.dtype}{list(v.shape)}")
        depth = self.depth or (self.patches.size[2] if v.shape[2] == 1 else v.shape[2])
        if v.shape[2] not in (1, depth):
            raise ValueError(f"{v.shape[2]} slices cannot fill a depth of {depth}")
        self.patches.grid((*v.shape[:2], depth))
        object.__setattr__(self, "depth", depth)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, D) that the model sees."""
        return (*self.voxels.shape[:2], self.depth)

    @property
    def slices(self) -> np.ndarray:
        """[K, C, H, W], contiguous as in records. `prepare_volume` stores voxels in this order: usually no copy."""
        return np.ascontiguousarray(self.voxels.transpose(2, 3, 0, 1))

    @classmethod
    def from_slices(
        cls,
        slices: np.ndarray,
        scale: float,
        offset: float,
        depth: int | None = None,
        patches: Patches = RADFM_PATCHES,
    ) -> Volume:
        """Return the volume of `slices` [K, C, H, W], sharing their memory."""
        return cls(slices.transpose(2, 3, 0, 1), scale, offset, depth, patches=patches)

    def values(self) -> np.ndarray:
        """float32[H, W, D, 3] that the network sees, with slices and channels repeated as views."""
        x = self.voxels.astype(np.float32) * np.float32(self.scale) + np.float32(self.offset)
        return np.broadcast_to(x, (*self.shape, CHANNELS))


def source_slice(stored: int, count: int, depth: int) -> int:
    """Return the number of the scan's slice, from 1, that is at the center of stored slice `stored`, from 0.

    The scan has `depth` slices and is stored with `count` slices. Example: 120 slices stored as 4 have their centers at
    the slices 16, 46, 76 and 106.
    """
    return min(int((stored + 0.5) * depth / count), depth - 1) + 1


def planes(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct planes of a volume and the index that expands them on the device.

    Planes are ordered by slice, channel, patch row and patch column. A gray 2D scan of 2 x 2 patches (h, w, d = 32, 32,
    4), n = 4, and a gray volume of 1 x 2 x 2 patches:

        slice 0:  plane 0 1      patch 0 = 12 times plane 0        slice 0:  0  1     patch 0 (row 0, column 0, depth 0)
                        2 3      patch 3 = 12 times plane 3        slice 1:  2  3       = slices 0 2 4 6, each 3 times
                                                                   ...                patch 1 (depth 1) = 8 10 12 14
                                                                   slice 7: 14 15     patch 2 (column 1) = 1 3 5 7

    Returns:
      planes: [m, h, w] of the volume's dtype. m = n gray 2D, 3 n colour 2D, 4 n gray 3D, 12 n colour 3D.
      plane_index: int32[n, d, 3] (read-only), the plane of slice p, channel c of patch n;
        `planes[plane_index]` equals `to_planes` of the expanded volume, reshaped.
    """
    _, _, slice_count, channels = volume.voxels.shape
    patches = volume.patches
    h, w, _ = patches.size
    stored_planes = einops.rearrange(volume.slices, "k c (i h) (j w) -> (k c i j) h w", h=h, w=w)
    return stored_planes, _plane_index(patches, patches.grid(volume.shape), slice_count == 1, channels)


@functools.lru_cache(maxsize=64)
def _plane_index(patches: Patches, grid: tuple[int, int, int], one_slice: bool, channels: int) -> np.ndarray:
    (rows, columns, depths), d = grid, patches.size[2]
    i, j, k, p, c = np.ogrid[:rows, :columns, :depths, :d, :CHANNELS]
    slice_ = 0 * (k + p) if one_slice else k * d + p
    channel = c if channels == CHANNELS else 0 * c
    index = ((slice_ * channels + channel) * rows + i) * columns + j
    out = einops.rearrange(index, f"i j k p c -> ({ORDERS[patches.order]}) p c").astype(np.int32)
    out.setflags(write=False)  # cached: all scans of this size share the array
    return out


def patch_count(shape, mode: str = "paper", final=None, sizes: Sizes = PAPER_SIZES) -> int:
    """Return n, the patches of a scan. Pass `final` if the target size depends on the sample (`released_shape`)."""
    return math.prod(sizes.patches.grid(final or target_shape(shape, mode, sizes)))


def plane_count(shape, channels: int, mode: str = "paper", final=None, sizes: Sizes = PAPER_SIZES) -> int:
    """Return m, the number of planes that `planes` returns for a header with (H, W, D) and 1 or 3 channels."""
    if channels not in (1, CHANNELS):
        raise ValueError(f"a scan must have 1 or {CHANNELS} channels, got {channels}")
    rows, columns, depths = sizes.patches.grid(final or target_shape(shape, mode, sizes))
    slices = 1 if _checked_shape(shape)[2] == 1 else depths * sizes.patches.size[2]
    return rows * columns * slices * channels
