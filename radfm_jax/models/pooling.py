"""The MLP bridge: patch features pooled to a fixed grid, then two linear maps (LLaVA 1.5, arXiv 2310.03744).

Letters: B rows, R vision rows, P patch tokens per vision row, S scan slots, L latents, D vision width, E hidden width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from input_pipeline.field_rules import Size, check_fields
from radfm_jax.models.computation import Computation
from radfm_jax.models.layers import dense
from radfm_jax.models.vit3d import gather_rows


@dataclasses.dataclass(frozen=True)
class PooledMlpConfig(Computation):
    """Sizes of the MLP bridge, an alternative to PerceiverConfig in `model.perceiver`.

    `grid` is the number of pooled tokens along rows, columns and depth; their product is `num_latents`. `hidden` is the
    width between the two linear maps: LLaVA's is the language model's. The second map is `projection` of the model.
    `remat` and `attention` are not used: the bridge has no blocks and no attention.
    """

    kind: Literal["mlp"] = "mlp"
    width: Size = 768
    hidden: Size = 5120
    grid: tuple[Size, Size, Size] = (4, 4, 2)

    def __post_init__(self):
        check_fields(self, "model.perceiver")

    @property
    def num_latents(self) -> int:
        return math.prod(self.grid)


class PooledMlp(nn.Module):
    """Patch tokens of the vision rows -> GELU of a linear map of each scan's pooled tokens."""

    config: PooledMlpConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, patch_segments: jax.Array, scan_rows: jax.Array, patch_positions: jax.Array
    ) -> jax.Array:
        """float[B, R, P, D], int32[B, R, P], int32[B, S], int32[B, R, P, 3] -> float[B, S, L, E]."""
        c = self.config
        pooled = pool(tokens, patch_segments, patch_positions, scan_rows.shape[1], c.grid)
        return jax.nn.gelu(dense(c.hidden, ("embed", "mlp"), c, bias=True, name="up")(pooled), approximate=False)


def pool(
    tokens: jax.Array, patch_segments: jax.Array, patch_positions: jax.Array, slots: int, grid: tuple[int, int, int]
) -> jax.Array:
    """Average the tokens of each scan in a grid of cells: float[B, S, L, D], L the product of `grid`.

    Along an axis with n patches and A cells, patch i belongs to part i * m // n of m = min(n, A) parts, and cell a
    shows part a * m // A. A scan with fewer patches than cells, such as a 2D scan along its depth, repeats a part:

        5 patches, 2 cells    parts 0 0 0 1 1    cells 0 1
        1 patch,   2 cells    parts 0            cells 0 0
    """
    b, width = len(tokens), tokens.shape[-1]
    tokens, slot = tokens.reshape(b, -1, width), patch_segments.reshape(b, -1)
    positions = patch_positions.reshape(b, -1, 3)
    # A scan's first entry of a position table is step - 1 and its last one n * step - 1 (planes.patch_positions).
    ends = jax.vmap(
        lambda s, x: (jnp.full((slots + 1, 3), 2**30).at[s].min(x), jnp.zeros((slots + 1, 3), int).at[s].max(x))
    )
    first, last = ends(slot, positions)
    step = jnp.where(last >= first, first + 1, 1)
    count = (last + 1) // step
    parts = jnp.minimum(count, jnp.asarray(grid))
    number = (positions + 1) // gather_rows(step, slot) - 1
    part = number * gather_rows(parts, slot) // jnp.maximum(gather_rows(count, slot), 1)
    cells = math.prod(grid)
    flat = lambda index: (index[..., 0] * grid[1] + index[..., 1]) * grid[2] + index[..., 2]  # noqa: E731
    target = slot * cells + flat(part)  # slot 0 is padding
    size = (slots + 1) * cells
    sums = jax.vmap(lambda t, x: jnp.zeros((size, width), jnp.float32).at[t].add(x))(target, tokens.astype(jnp.float32))
    counts = jax.vmap(lambda t: jnp.zeros(size).at[t].add(1.0))(target)
    means = (sums / jnp.maximum(counts, 1)[..., None]).reshape(b, slots + 1, cells, width)[:, 1:]
    axes = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)
    shown = flat(axes * parts[:, 1:, None] // jnp.asarray(grid))  # [B, S, L]
    return jnp.take_along_axis(means, shown[..., None], axis=2).astype(tokens.dtype)
