"""Rows of one sample each, from arrays in the layout of the released model."""

from __future__ import annotations

import numpy as np

from input_pipeline.images.planes import PATCH, POSITION_TABLES, patch_grid, patch_positions, to_planes


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
    order: str = "columns",
) -> dict[str, np.ndarray]:
    """Build a batch with one sample per row (radfm_jax/models/radfm.py draws its arrays).

    Args:
      ids: int[B, L]. Below V = vocab_size: text; V `<image>`, V + 1 `</image>`; V + 2 + num_latents * s + j: visual
        token j of scan s of that sample.
      vision: float[B, S, C, H, W, D], all scans of one size.
      attention_mask: bool or int[B, L]; no token attends to one whose mask is 0. Default: all ones.
    Returns:
      A batch with float32 planes; each scan has a separate vision row.
    Raises:
      ValueError: shapes do not match, ids are out of range, or volumes do not fit the patch or the position tables.
    """
    ids, vision = np.asarray(ids), np.asarray(vision, np.float32)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    _check(ids, vision, mask, vocab_size, num_latents, channels)
    (b, length), s = ids.shape, vision.shape[1]
    grid = patch_grid(vision.shape[3:], patch, tables)
    n, per_patch = int(np.prod(grid)), patch[2] * channels
    index = np.arange(s * n * per_patch, dtype=np.int32).reshape(s, n, patch[2], channels)
    ids = ids.astype(np.int32)  # unsigned integers would wrap below the vocabulary
    visual_index = np.where(ids >= vocab_size + 2, ids - vocab_size - 2, -1)

    def repeat(x, *shape: int) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(x, (b, *shape)))

    return {
        "ids": np.where(visual_index >= 0, 0, ids),
        "visual_index": visual_index,
        "segments": np.ones(ids.shape, np.int32),
        "positions": repeat(np.arange(length, dtype=np.int32), length),
        "key_ok": mask,
        "planes": to_planes(vision, patch, order).reshape(b, s * n * per_patch, *patch[:2]),
        "plane_index": repeat(index, *index.shape),
        "patch_segments": repeat(np.arange(1, s + 1, dtype=np.int32)[:, None], s, n),
        "patch_positions": repeat(patch_positions(grid, tables, order), s, n, 3),
        "scan_rows": repeat(np.arange(s, dtype=np.int32), s),
        "scan_scale": np.ones((b, s), np.float32),
        "scan_offset": np.zeros((b, s), np.float32),
    }


def _check(ids, vision, mask, vocab_size: int, num_latents: int, channels: int) -> None:
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers [B, L] (got {ids.dtype}{list(ids.shape)})")
    if vision.ndim != 6:
        raise ValueError(f"vision must be [B, S, C, H, W, D] (got {list(vision.shape)})")
    if vision.shape[2] != channels:
        raise ValueError(f"vision must have {channels} channels (got {list(vision.shape)})")
    if len(vision) != len(ids):
        raise ValueError(f"ids has {len(ids)} rows but vision has {len(vision)}")
    scans = vision.shape[1]
    end = vocab_size + 2 + num_latents * scans
    if ids.size and not (ids.min() >= 0 and ids.max() < end):
        raise ValueError(
            f"ids range from {ids.min()} to {ids.max()}, but the maximum is {end - 1} for a vocabulary of "
            f"{vocab_size}, 2 image marks and {scans} scans of {num_latents} visual tokens"
        )
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)} but ids are {list(ids.shape)}")
