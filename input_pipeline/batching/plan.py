"""The plan: decide which samples share a row. It needs only counts of tokens, patches and planes, and no pixels.

    SampleSizes of a window -> plan_window -> [PlannedRow]

`grain.experimental.BestFitPackIterDataset` does not fit: it packs loaded samples in the order of one stream. Rows here
also share scans, and assign each scan to one of several vision rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# Why a row has padding.
PADDING = ("no sample is that short", "no room for another scan", "end of the window")
PLACEMENT_TRIES = 4  # rows that a group of samples tries before it opens a new one


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """Sizes of a row: T text tokens, R vision rows of P patches, M planes, S scans."""

    text_length: int = 2048
    vision_rows: int = 4
    patch_length: int = 1024
    planes: int = 8192
    scans: int = 24

    def overflow(self, tokens: int, patches: Sequence[int], planes: int) -> str | None:
        """Return why a sample does not fit an empty row, or None if it fits."""
        if tokens > self.text_length:
            return f"{tokens} tokens, a row has {self.text_length}"
        if len(patches) > self.scans:
            return f"{len(patches)} scans, a row has {self.scans}"
        if planes > self.planes:
            return f"{planes} planes, a row has {self.planes}"
        if patches and max(patches) > self.patch_length:
            return f"a scan of {max(patches)} patches, a vision row has {self.patch_length}"
        shares_vision_rows = len(patches) > self.vision_rows
        if shares_vision_rows and _vision_rows(list(patches), [self.patch_length] * self.vision_rows) is None:
            return f"{len(patches)} scans of {sum(patches)} patches do not fit {self.vision_rows} vision rows"
        return None


@dataclasses.dataclass(frozen=True)
class SampleSizes:
    """Sizes of n samples with m scans in total."""

    tokens: np.ndarray  # int32[n]
    counts: np.ndarray  # int32[n], scans of each sample
    scans: np.ndarray  # int64[m], the scan's number in the index
    patches: np.ndarray  # int32[m]
    planes: np.ndarray  # int32[m]

    @classmethod
    def concatenate(cls, parts: Sequence[SampleSizes]) -> SampleSizes:
        """Join the sizes of consecutive parts of a window."""
        return cls(*(np.concatenate([getattr(p, field.name) for p in parts]) for field in dataclasses.fields(cls)))


@dataclasses.dataclass(frozen=True)
class PlannedRow:
    """A row before anything is loaded.

    Samples, in the order of their segments, are indices in the window (`plan_rows`) or numbers in the mixture
    (`plan_window`).
    """

    samples: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]  # for each sample the slots of its scans; a scan of several samples has one slot
    vision_rows: tuple[int, ...]  # the vision row of each slot
    tokens: int  # number of real tokens
    padding: str  # one of PADDING, or "" for a full row


def plan_window(
    samples: np.ndarray, sizes: SampleSizes, limits: RowLimits, rng_key: Sequence[int], *, share_scans: bool, mode: str
) -> list[PlannedRow]:
    """Plan the rows of a window, and shuffle them.

    Args:
      samples: int64[n], the numbers of the samples in the mixture.
      rng_key: (seed, stream, epoch, window); the order of the rows depends on nothing else.
      mode: data.preprocess. The depth of a scan in `released` mode depends on its sample, so samples share no scan.
    """
    if share_scans and mode != "released":
        _, first, ids = np.unique(sizes.scans, return_index=True, return_inverse=True)
    else:
        first = ids = np.arange(len(sizes.scans))
    rows = plan_rows(
        sizes.tokens.tolist(),
        [tuple(part.tolist()) for part in np.split(ids, np.cumsum(sizes.counts)[:-1])],
        sizes.patches[first],
        sizes.planes[first],
        limits,
        share_scans=share_scans,
    )
    order = np.random.Generator(np.random.PCG64(tuple(rng_key))).permutation(len(rows))
    return [dataclasses.replace(rows[i], samples=tuple(samples[list(rows[i].samples)].tolist())) for i in order]


def plan_rows(
    tokens: Sequence[int],
    scans: Sequence[tuple[int, ...]],
    patches: Sequence[int] | np.ndarray,
    planes: Sequence[int] | np.ndarray,
    limits: RowLimits,
    *,
    share_scans: bool = True,
) -> list[PlannedRow]:
    """Pack the samples of a window into as few rows as possible; a pure function of its arguments.

    Best-fit decreasing over text, patches, planes and slots at once. Each sample (with `share_scans`, each group of
    samples about the same scans) goes into the fullest row that has room for it. The largest go first.

        limits 10 tokens        tokens 7 3 6 4 2     ->  rows [0 1] [2 3] [4]

    Args:
      tokens: text tokens of each sample, image tokens included.
      scans: ids of the scans of each sample.
      patches, planes: of each scan, by id.
      share_scans: keep samples about the same scans together, so that a scan is loaded and encoded once. Otherwise,
        samples share a scan only if they are in the same row by chance; different scan ids prevent that.
    Raises:
      ValueError: a sample does not fit an empty row.
    """
    patch_counts, plane_counts = np.asarray(patches).tolist(), np.asarray(planes).tolist()
    sample_needs = []
    for i, ids in enumerate(scans):
        sizes, plane_count = [patch_counts[s] for s in ids], sum(plane_counts[s] for s in ids)
        if problem := limits.overflow(tokens[i], sizes, plane_count):
            raise ValueError(f"sample {i} of the window does not fit a row: {problem}")
        sample_needs.append((tokens[i], sum(sizes), plane_count, len(ids), max(sizes, default=0)))
    if not sample_needs:
        return []
    groups = _groups(tokens, scans, limits) if share_scans else [[i] for i in range(len(tokens))]
    needs = np.array([sample_needs[group[0]] for group in groups], np.int64)  # samples of a group show the same scans
    needs[:, 0] = [sum(tokens[i] for i in group) for group in groups]
    packer = _Packer(limits, patch_counts, plane_counts, needs)
    largest_share = (needs[:, :4] / packer.capacity[:4]).max(axis=1)
    for g in np.argsort(-largest_share, kind="stable").tolist():
        packer.add(groups[g], tuple(dict.fromkeys(scans[groups[g][0]])), needs[g])
    minimum = np.min(sample_needs, axis=0)[:4].tolist()
    return [_planned(row, scans, limits, minimum) for row in packer.rows]


def _groups(tokens, scans, limits: RowLimits) -> list[list[int]]:
    """Group samples about the same scans while their text fits a row; samples without scans stay single."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    free: dict[tuple[int, ...], int] = {}
    single = []
    for i, ids in enumerate(scans):
        if not ids:
            single.append([i])
        elif ids in groups and free[ids] >= tokens[i]:
            groups[ids][-1].append(i)
            free[ids] -= tokens[i]
        else:
            groups.setdefault(ids, []).append([i])
            free[ids] = limits.text_length - tokens[i]
    return single + [group for several in groups.values() for group in several]


@dataclasses.dataclass
class _Row:
    """A row that is being filled: its samples, scan id -> slot, the vision row of each slot, and the free space."""

    free_patches: list[int]  # free patches of each vision row
    samples: list[int] = dataclasses.field(default_factory=list)
    slots: dict[int, int] = dataclasses.field(default_factory=dict)
    vision_rows: list[int] = dataclasses.field(default_factory=list)
    free: list[int] = dataclasses.field(default_factory=list)  # text, patches, planes, slots


class _Packer:
    """Rows that are being filled. Open rows are columns of `free`, so one comparison finds all rows with room."""

    def __init__(self, limits: RowLimits, patches: list[int], planes: list[int], needs: np.ndarray):
        self.limits, self.patches, self.planes = limits, patches, planes
        all_patches = limits.vision_rows * limits.patch_length
        self.capacity = np.array(
            [limits.text_length, all_patches, limits.planes, limits.scans, limits.patch_length], np.int64
        )
        self.minimum = needs.min(axis=0, initial=limits.text_length)
        self.rows: list[_Row] = []  # every row, in the order in which they were opened
        self.open: list[int] = []  # indices of the rows that can take more; `free` and `room` have a column for each
        # Text, patches, planes, slots, and the patches of the emptiest vision row.
        self.free = np.zeros((len(self.capacity), len(needs)), np.int64)
        self.room = np.zeros(len(needs))  # how empty a row is: the free shares of its text and its patches, added

    def add(self, samples: list[int], scans: tuple[int, ...], need: np.ndarray) -> None:
        """Add a group of samples to the fullest row with room, or to a new one."""
        column, new_scans, vision_rows = self._best_fit(scans, need) or self._open_row(scans)
        row = self.rows[self.open[column]]
        row.samples += samples
        for scan, vision_row in zip(new_scans, vision_rows, strict=True):
            row.slots[scan] = len(row.slots)
            row.vision_rows.append(vision_row)
            row.free_patches[vision_row] -= self.patches[scan]
        new_patches, new_planes = (sum(sizes[s] for s in new_scans) for sizes in (self.patches, self.planes))
        self.free[:4, column] -= need[0], new_patches, new_planes, len(new_scans)
        self.free[4, column] = max(row.free_patches)
        self.room[column] = (self.free[:2, column] / self.capacity[:2]).sum()
        row.free = self.free[:4, column].tolist()
        if (self.free[:, column] < self.minimum).any():
            self._close(column)

    def _best_fit(self, scans, need) -> tuple[int, list[int], list[int]] | None:
        """Return the column of the fullest row with room, the scans it lacks and their vision rows, or None."""
        n = len(self.open)
        fits = (self.free[:, :n] >= need[:, None]).all(axis=0)
        room = np.where(fits, self.room[:n], np.inf)
        for _ in range(PLACEMENT_TRIES):  # the total of free patches may suffice while no vision row has room
            column = int(room.argmin()) if n else 0
            if not n or room[column] == np.inf:
                return None
            row = self.rows[self.open[column]]
            new_scans = [s for s in scans if s not in row.slots]
            vision_rows = _vision_rows([self.patches[s] for s in new_scans], row.free_patches)
            if vision_rows is not None:
                return column, new_scans, vision_rows
            room[column] = np.inf
        return None

    def _open_row(self, scans) -> tuple[int, list[int], list[int]]:
        column, row = len(self.open), _Row([self.limits.patch_length] * self.limits.vision_rows)
        vision_rows = _vision_rows([self.patches[s] for s in scans], row.free_patches)
        assert vision_rows is not None, "RowLimits.overflow accepted a sample that does not fit"
        self.open.append(len(self.rows))
        self.rows.append(row)
        self.free[:, column] = self.capacity
        return column, list(scans), vision_rows

    def _close(self, column: int) -> None:
        """Remove a full row: the last open row moves to its column."""
        last = len(self.open) - 1
        for table in (self.free, self.room):
            table[..., column] = table[..., last]
        self.open[column] = self.open[last]
        self.open.pop()


def _vision_rows(sizes: list[int], free: list[int]) -> list[int] | None:
    """Assign scans of these sizes, in patches, to vision rows: best-fit decreasing. Returns None if they do not fit."""
    free, assigned = list(free), [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        best, size = -1, sizes[i]
        for vision_row, room in enumerate(free):
            if room >= size and (best < 0 or room < free[best]):
                best = vision_row
        if best < 0:
            return None
        assigned[i] = best
        free[best] -= size
    return assigned


def _planned(row: _Row, scans, limits: RowLimits, minimum: list[int]) -> PlannedRow:
    """Freeze a filled row. `minimum`: text, patches, planes and scans of the window's smallest samples."""
    free_text = row.free[0]
    if not free_text:
        padding = ""
    elif free_text < minimum[0]:
        padding = PADDING[0]
    else:
        lacks_room = any(free < least for free, least in zip(row.free[1:], minimum[1:], strict=True))
        padding = PADDING[1] if lacks_room else PADDING[2]
    slots = tuple(tuple(row.slots[s] for s in scans[i]) for i in row.samples)
    return PlannedRow(tuple(row.samples), slots, tuple(row.vision_rows), limits.text_length - free_text, padding)
