"""Samples -> fixed-size rows (the batch of radfm_jax/models/radfm.py)."""

from __future__ import annotations

import numpy as np

from input_pipeline.volumes import PATCH, POSITION_TABLES, patch_grid, patch_positions, to_planes


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
    visual_index = np.where(ids >= vocab_size + 2, ids - vocab_size - 2, -1)
    return {
        "ids": np.where(visual_index >= 0, 0, ids).astype(np.int32),
        "visual_index": visual_index.astype(np.int32),
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
