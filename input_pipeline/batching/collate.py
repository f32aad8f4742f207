"""Collate: build the arrays of a row from its loaded samples, and stack rows to a batch of fixed-size arrays.

radfm_jax/models/radfm.py draws the arrays of a batch. T, R, P, M and S are the sizes of a row (plan.RowLimits).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.batching.plan import RowLimits
from input_pipeline.batching.report import RowInfo
from input_pipeline.images.planes import CHANNELS, PATCH, Volume, planes
from input_pipeline.text.tokens import Encoded


@dataclasses.dataclass(frozen=True)
class ScanPlanes:
    """A scan cut into planes. A voxel is plane * scale + offset."""

    planes: np.ndarray  # [m, h, w], distinct planes
    plane_index: np.ndarray  # int32[n, slices, channels], the planes of each patch
    positions: np.ndarray  # int32[n, 3]
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def of(cls, volume: Volume) -> ScanPlanes:
        return cls(*planes(volume), volume.patches.positions(volume.shape), volume.scale, volume.offset)


@dataclasses.dataclass(frozen=True)
class LoadedRow:
    """The samples and scans of a row. A planned slot without a scan stays empty; its samples lose their weights."""

    samples: Sequence[Encoded] = ()  # in the order of their segments
    slots: Sequence[Sequence[int]] = ()  # for each sample the slots of its `scans`
    vision_rows: Mapping[int, int] = dataclasses.field(default_factory=dict)  # slot -> vision row
    scans: Mapping[int, ScanPlanes] = dataclasses.field(default_factory=dict)  # slot -> scan


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of a global batch on one host."""

    arrays: dict[str, np.ndarray]  # the input of the model, with targets and tasks int32[B, T], weights float32[B, T]
    rows: tuple[RowInfo | None, ...]  # the contents of each row; None for an empty row after the end of the data


def collate_row(
    row: LoadedRow,
    limits: RowLimits,
    *,
    num_latents: int = 32,
    plane_dtype=np.uint8,
    channels: int = CHANNELS,
    patch: tuple[int, int, int] = PATCH,
) -> dict[str, np.ndarray]:
    """Build the arrays of one row, without the batch axis; `planes` has only the planes in use.

    Args:
      channels: last axis of `plane_index`: 1 if all scans are gray, which costs the network a third of the time.
      patch: (h, w, slices) of a row without scans.
    Raises:
      ValueError: a scan has another dtype, more patches or planes than planned, or colour where `channels` is 1.
    """
    scan = next(iter(row.scans.values()), None)
    slices = scan.plane_index.shape[1] if scan else patch[2]
    plane_shape = scan.planes.shape[1:] if scan else patch[:2]
    t, r, p, s = limits.text_length, limits.vision_rows, limits.patch_length, limits.scans
    i32 = np.int32
    arrays = {
        **{name: np.zeros(t, i32) for name in ("ids", "targets", "segments", "positions")},
        "visual_index": np.full(t, -1, i32),
        "weights": np.zeros(t, np.float32),
        "key_ok": np.zeros(t, bool),
        "planes": np.empty((0, *plane_shape), plane_dtype),
        "plane_index": np.zeros((r, p, slices, channels), i32),
        "patch_segments": np.zeros((r, p), i32),
        "patch_positions": np.zeros((r, p, 3), i32),
        "scan_rows": np.full(s, -1, i32),
        "scan_scale": np.ones(s, np.float32),
        "scan_offset": np.zeros(s, np.float32),
    }
    _add_text(arrays, row, num_latents)
    _add_scans(arrays, row, limits, channels)
    return arrays


def _add_text(arrays: dict[str, np.ndarray], row: LoadedRow, num_latents: int) -> None:
    start = segment = 0
    for sample, slots in zip(row.samples, row.slots, strict=True):
        n = len(sample.ids)
        span = slice(start, start + n)
        for name in ("ids", "targets", "weights", "key_ok"):
            arrays[name][span] = getattr(sample, name)
        if all(slot in row.scans for slot in slots):
            scan, latent = sample.visual.T
            slot = np.array(slots or [0], np.int32)[np.maximum(scan, 0)]
            arrays["visual_index"][span] = np.where(scan >= 0, slot * num_latents + latent, -1)
        else:
            arrays["weights"][span] = 0
        for begin, end in itertools.pairwise((*sample.starts, n)):
            segment += 1
            arrays["segments"][start + begin : start + end] = segment
            arrays["positions"][start + begin : start + end] = np.arange(end - begin)
        start += n


def _add_scans(arrays: dict[str, np.ndarray], row: LoadedRow, limits: RowLimits, channels: int) -> None:
    dtype, planes_used = arrays["planes"].dtype, 0
    patches_used: collections.Counter[int] = collections.Counter()
    used_planes = [arrays["planes"]]
    for slot, vision_row in row.vision_rows.items():
        if (scan := row.scans.get(slot)) is None:
            continue
        n, m, start = len(scan.plane_index), len(scan.planes), patches_used[vision_row]
        free_planes, free_patches = limits.planes - planes_used, limits.patch_length - start
        if scan.planes.dtype != dtype or n > free_patches or m > free_planes:
            raise ValueError(
                f"the scan in slot {slot} has {m} planes of {scan.planes.dtype} and {n} patches; the row has room for "
                f"{free_planes} planes of {dtype} and {free_patches} patches: the index is out of date, run prepare"
            )
        if channels == 1 and (scan.plane_index != scan.plane_index[..., :1]).any():
            raise ValueError(
                f"the scan in slot {slot} has colour, but data.channels is 1: make it {CHANNELS}, if the model reads "
                "colour"
            )
        span = slice(start, start + n)
        used_planes.append(scan.planes)
        arrays["plane_index"][vision_row, span] = scan.plane_index[..., :channels] + planes_used
        arrays["patch_segments"][vision_row, span] = slot + 1
        arrays["patch_positions"][vision_row, span] = scan.positions
        arrays["scan_rows"][slot] = vision_row
        arrays["scan_scale"][slot], arrays["scan_offset"][slot] = scan.scale, scan.offset
        planes_used += m
        patches_used[vision_row] += n
    arrays["planes"] = np.concatenate(used_planes)


def collate_batch(rows: Sequence[tuple[dict[str, np.ndarray], RowInfo | None]], planes: int) -> Batch:
    """Stack rows to a batch, their planes padded with zeros to M = `planes`."""
    arrays = {name: np.stack([row[name] for row, _ in rows]) for name in rows[0][0] if name != "planes"}
    first = rows[0][0]["planes"]
    arrays["planes"] = np.zeros((len(rows), planes, *first.shape[1:]), first.dtype)
    for i, (row, _) in enumerate(rows):
        arrays["planes"][i, : len(row["planes"])] = row["planes"]
    return Batch(arrays, tuple(info for _, info in rows))
