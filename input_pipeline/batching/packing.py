"""Samples -> fixed-size rows (the batch of radfm_jax/models/radfm.py).

`plan_rows` decides from token, patch and plane counts alone, before any pixel is read, which samples share a row and
where their scans lie; `assemble` fills the arrays of one row. `plain_rows` is the special case of one sample a row.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from input_pipeline.images.planes import CHANNELS, PATCH, POSITION_TABLES, patch_grid, patch_positions, to_planes
from input_pipeline.text.tokens import Encoded


def plain_rows(
    ids: np.ndarray,
    vision: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    vocab_size: int,
    num_latents: int = 32,
    patch=PATCH,
    channels: int = 3,
    tables=POSITION_TABLES,
) -> dict[str, np.ndarray]:
    """Rows of one sample each, from arrays in the layout of the released model.

    Args:
      ids: int[B, L]. Below V = vocab_size: text; V `<image>`, V + 1 `</image>`; V + 2 + num_latents * s + j: visual
        token j of scan s of that sample.
      vision: float[B, S, C, H, W, D], every scan of one size.
      attention_mask: bool or int[B, L]; a token whose mask is 0 is seen by nobody. Default: all ones.
    Returns:
      A batch with float32 planes; scan s of a sample lies alone in vision row s.
    Raises:
      ValueError: shapes that do not fit each other, ids out of range, volumes that do not fit the patch or the tables.
    """
    ids, vision = np.asarray(ids), np.asarray(vision, np.float32)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers [B, L], got {ids.dtype}{list(ids.shape)}")
    if vision.ndim != 6:
        raise ValueError(f"vision must be [B, S, C, H, W, D], got {list(vision.shape)}")
    b, length = ids.shape
    s = vision.shape[1]
    if vision.shape[2] != channels:
        raise ValueError(f"vision {list(vision.shape)}: the model reads {channels} channels")
    if len(vision) != b:
        raise ValueError(f"{b} rows of ids but {len(vision)} rows of scans")
    last = vocab_size + 2 + num_latents * s
    if ids.size and not (0 <= ids.min() and ids.max() < last):
        raise ValueError(
            f"ids run from {ids.min()} to {ids.max()}, but the vocabulary of {vocab_size}, 2 image marks and "
            f"{s} scans of {num_latents} visual tokens end at {last - 1}"
        )
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, ids are {list(ids.shape)}")
    grid = patch_grid(vision.shape[3:], patch, tables)
    n, per_patch = int(np.prod(grid)), patch[2] * channels
    everywhere = lambda x, *shape: np.ascontiguousarray(np.broadcast_to(x, (b, *shape)))  # noqa: E731
    planes = to_planes(vision, patch)
    index = np.arange(s * n * per_patch, dtype=np.int32).reshape(s, n, patch[2], channels)
    ids = ids.astype(np.int32)  # in unsigned integers -1 would be a large slot
    visual_index = np.where(ids >= vocab_size + 2, ids - vocab_size - 2, -1)
    return {
        "ids": np.where(visual_index >= 0, 0, ids),
        "visual_index": visual_index,
        "segments": np.ones(ids.shape, np.int32),
        "positions": everywhere(np.arange(length, dtype=np.int32), length),
        "key_ok": mask,
        "planes": planes.reshape(b, s * n * per_patch, *patch[:2]),
        "plane_index": everywhere(index, *index.shape),
        "patch_segments": everywhere(np.arange(1, s + 1, dtype=np.int32)[:, None], s, n),
        "patch_positions": everywhere(patch_positions(grid, tables), s, n, 3),
        "scan_rows": everywhere(np.arange(s, dtype=np.int32), s),
        "scan_scale": np.ones((b, s), np.float32),
        "scan_offset": np.zeros((b, s), np.float32),
    }


# --- planning ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """Sizes of a row: T text tokens, R vision rows of P patches, M planes, S scans."""

    text_length: int = 2048
    vision_rows: int = 4
    patch_length: int = 1024
    planes: int = 8192
    scans: int = 24

    def overflow(self, tokens: int, patches: Sequence[int], planes: int) -> str | None:
        """Why a sample alone does not fit an empty row, or None."""
        if tokens > self.text_length:
            return f"{tokens} tokens, a row has {self.text_length}"
        if len(patches) > self.scans:
            return f"{len(patches)} scans, a row has {self.scans}"
        if planes > self.planes:
            return f"{planes} planes, a row has {self.planes}"
        if patches and max(patches) > self.patch_length:
            return f"a scan of {max(patches)} patches, a vision row has {self.patch_length}"
        crowded = len(patches) > self.vision_rows  # otherwise each can have a vision row of its own
        if crowded and _place(list(patches), [self.patch_length] * self.vision_rows) is None:
            return f"{len(patches)} scans of {sum(patches)} patches do not fit {self.vision_rows} vision rows"
        return None


@dataclasses.dataclass
class Row:
    """A planned row: which samples, and which scan lies in which slot and vision row.

    Attributes:
      samples: indices into the window, in the order in which they stand in the row.
      scans: scan id -> (slot, vision row); a scan that several samples ask about has one slot.
    """

    samples: list[int] = dataclasses.field(default_factory=list)
    scans: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)


def plan_rows(
    tokens: Sequence[int],
    scans: Sequence[tuple[int, ...]],
    patches: Sequence[int] | np.ndarray,
    planes: Sequence[int] | np.ndarray,
    limits: RowLimits,
    *,
    share_scans: bool = True,
) -> list[Row]:
    """Packs the samples of a window into as few rows as it can; a pure function of its arguments.

    Best fit of the largest first, over text, patches, planes and slots at once: each sample (or, with `share_scans`,
    each group of samples about the same scans) goes into the row with the least room left that holds it.

        limits 10 tokens        tokens 7 3 6 4 2     ->  rows [0 1] [2 3] [4]

    Args:
      tokens: text tokens of each sample, image tokens included.
      scans: ids of the distinct scans of each sample.
      patches, planes: of each scan, by id.
      share_scans: bring samples of one scan together, so that it is loaded and encoded once. Without it only samples
        that meet in a row anyway share; give their scans ids of their own where they must not.
    Raises:
      ValueError: a sample that does not fit an empty row, with what exceeds it.
    """
    patches, planes = np.asarray(patches).tolist(), np.asarray(planes).tolist()
    for i, ids in enumerate(scans):
        problem = limits.overflow(tokens[i], [patches[s] for s in ids], sum(planes[s] for s in ids))
        if problem:
            raise ValueError(f"sample {i} of the window does not fit a row: {problem}")
    units = _groups(tokens, scans, limits) if share_scans else [[i] for i in range(len(tokens))]
    wanted = [tuple(dict.fromkeys(s for i in unit for s in scans[i])) for unit in units]
    # What a row has and each unit needs: text, patches, planes, slots, and a vision row free for its largest scan.
    full = np.array(
        [limits.text_length, limits.vision_rows * limits.patch_length, limits.planes, limits.scans, limits.patch_length]
    )
    need = np.zeros((len(units), len(full)), np.int64)
    for u, (unit, ids) in enumerate(zip(units, wanted, strict=True)):
        sizes = [patches[s] for s in ids]
        text = sum(tokens[i] for i in unit)
        need[u] = text, sum(sizes), sum(planes[s] for s in ids), len(ids), max(sizes, default=0)
    smallest = need.min(axis=0, initial=limits.text_length)
    rows: list[Row] = []
    free_patches: list[list[int]] = []  # of each row, by vision row
    numbers: list[int] = []  # of the rows that are still open; the columns of `free` and `left` are theirs
    free = np.zeros((len(full), len(units)), np.int64)
    left = np.zeros(len(units))  # how empty an open row is: the shares of its text and its patches that are free
    for u in np.argsort(-(need[:, :-1] / full[:-1]).max(axis=1, initial=0), kind="stable").tolist():
        n = len(numbers)
        fits = (free[:, :n] >= need[u, :, None]).all(axis=0)
        emptiness = np.where(fits, left[:n], np.inf)
        new, places = wanted[u], None
        for _ in range(4):  # patches may fit by number and yet not by vision row
            column = int(emptiness.argmin()) if n else 0
            if not n or emptiness[column] == np.inf:
                break
            there = rows[numbers[column]].scans
            new = [s for s in wanted[u] if s not in there]
            places = _place([patches[s] for s in new], free_patches[numbers[column]])
            if places is not None:
                break
            emptiness[column] = np.inf
        if places is None:
            column, new = n, wanted[u]
            numbers.append(len(rows))
            rows.append(Row())
            free_patches.append([limits.patch_length] * limits.vision_rows)
            free[:, n] = full
            places = _place([patches[s] for s in new], free_patches[-1])
        number = numbers[column]
        rows[number].samples += units[u]
        for s, vision_row in zip(new, places, strict=True):
            rows[number].scans[s] = (len(rows[number].scans), vision_row)
            free_patches[number][vision_row] -= patches[s]
        sizes = [patches[s] for s in new]
        free[:4, column] -= need[u, 0], sum(sizes), sum(planes[s] for s in new), len(new)
        free[-1, column] = max(free_patches[number])
        left[column] = (free[:2, column] / full[:2]).sum()
        if (free[:, column] < smallest).any():  # nothing fits any more: the last open row takes its column
            last = len(numbers) - 1
            numbers[column], free[:, column], left[column] = numbers[last], free[:, last], left[last]
            numbers.pop()
    return rows


def _groups(tokens, scans, limits: RowLimits) -> list[list[int]]:
    """Samples about the same scans, together as long as their text fits a row; samples without scans stand alone."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    room: dict[tuple[int, ...], int] = {}
    alone = []
    for i, ids in enumerate(scans):
        if not ids:
            alone.append([i])
        elif ids in groups and room[ids] >= tokens[i]:
            groups[ids][-1].append(i)
            room[ids] -= tokens[i]
        else:
            groups.setdefault(ids, []).append([i])
            room[ids] = limits.text_length - tokens[i]
    return alone + [group for several in groups.values() for group in several]


def _place(sizes: list[int], free: list[int]) -> list[int] | None:
    """A vision row for each scan, the largest first into the fullest that has room; None if they do not fit."""
    free, places = list(free), [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        best, size = -1, sizes[i]
        for vision_row, room in enumerate(free):
            if room >= size and (best < 0 or room < free[best]):
                best = vision_row
        if best < 0:
            return None
        places[i] = best
        free[best] -= size
    return places


# --- filling ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planes:
    """A scan as it enters a row: planes [m, h, w], plane_index int32[n, slices, channels] into them, positions
    int32[n, 3], and voxel = plane * scale + offset."""

    planes: np.ndarray
    plane_index: np.ndarray
    positions: np.ndarray
    scale: float = 1.0
    offset: float = 0.0


def assemble(
    row: Row,
    samples: Sequence[Encoded],
    scan_ids: Sequence[Sequence[int]],
    scans: dict[int, Planes],
    limits: RowLimits,
    *,
    num_latents: int = 32,
    plane_dtype=np.uint8,
    channels: int = CHANNELS,
) -> dict[str, np.ndarray]:
    """The arrays of one row, without the batch axis (radfm_jax/models/radfm.py draws them), with targets and weights.

    Args:
      samples: what stands in the row, in the order of `row.samples`.
      scan_ids: for each of them the ids of its `scans`.
      scans: what lies in the row's slots, by id. One of the row that is not here leaves its slot empty, and the samples
        that show it have no visual tokens and no weights.
      channels: of `plane_index`: 1 where all scans are gray, which the network computes in a third of the time.
    Raises:
      ValueError: a scan of another dtype, or with more patches or planes than the plan allowed for, or in colour where
        `channels` is 1.
    """
    t, r, p, s = limits.text_length, limits.vision_rows, limits.patch_length, limits.scans
    of_one = next(iter(scans.values()), None)
    slices = of_one.plane_index.shape[1] if of_one else PATCH[2]
    h, w = of_one.planes.shape[1:] if of_one else PATCH[:2]
    i32 = np.int32
    out = {
        **{k: np.zeros(t, i32) for k in ("ids", "targets", "segments", "positions")},
        "visual_index": np.full(t, -1, i32),
        "weights": np.zeros(t, np.float32),
        "key_ok": np.zeros(t, bool),
        "planes": np.zeros((limits.planes, h, w), plane_dtype),
        "plane_index": np.zeros((r, p, slices, channels), i32),
        "patch_segments": np.zeros((r, p), i32),
        "patch_positions": np.zeros((r, p, 3), i32),
        "scan_rows": np.full(s, -1, i32),
        "scan_scale": np.ones(s, np.float32),
        "scan_offset": np.zeros(s, np.float32),
    }
    at = 0
    for segment, (sample, ids) in enumerate(zip(samples, scan_ids, strict=True), 1):
        n = len(sample.ids)
        here = slice(at, at + n)
        for name in ("ids", "targets", "weights", "key_ok"):
            out[name][here] = getattr(sample, name)
        if all(scan in scans for scan in ids):
            slots = np.array([row.scans[scan][0] for scan in ids] or [0], i32)
            which, latent = sample.visual[:, 0], sample.visual[:, 1]
            out["visual_index"][here] = np.where(which >= 0, slots[np.maximum(which, 0)] * num_latents + latent, -1)
        else:
            out["weights"][here] = 0
        out["segments"][here] = segment
        out["positions"][here] = np.arange(n)
        at += n
    plane_at, patch_at = 0, collections.Counter()
    for scan, (slot, vision_row) in row.scans.items():
        if scan not in scans:
            continue
        value = scans[scan]
        n, m, start = len(value.plane_index), len(value.planes), patch_at[vision_row]
        if value.planes.dtype != plane_dtype or start + n > p or plane_at + m > limits.planes:
            raise ValueError(
                f"scan {scan} has {m} planes of {value.planes.dtype} and {n} patches; the row has room for "
                f"{limits.planes - plane_at} of {np.dtype(plane_dtype)} and {p - start}: the index is out of date"
            )
        if channels == 1 and (value.plane_index != value.plane_index[..., :1]).any():
            raise ValueError(f"scan {scan} is in colour, but data.channels is 1")
        patches = slice(start, start + n)
        out["planes"][plane_at : plane_at + m] = value.planes
        out["plane_index"][vision_row, patches] = value.plane_index[..., :channels] + plane_at
        out["patch_segments"][vision_row, patches] = slot + 1
        out["patch_positions"][vision_row, patches] = value.positions
        out["scan_rows"][slot] = vision_row
        out["scan_scale"][slot], out["scan_offset"][slot] = value.scale, value.offset
        plane_at += m
        patch_at[vision_row] += n
    return out
