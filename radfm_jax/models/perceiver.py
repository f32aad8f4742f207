"""The perceiver resampler: any number of patch tokens of a scan -> 32 latents (paper, section 4.2).

Letters: B rows, R vision rows, P patch tokens per vision row, S scan slots, L latents, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from input_pipeline.field_rules import Size, check_fields
from radfm_jax.models.attention import attention
from radfm_jax.models.computation import Computation
from radfm_jax.models.layers import (
    RESIDUAL,
    GeluMlp,
    dense,
    layer_norm,
    partitioned,
    scan_blocks,
)
from radfm_jax.models.vit3d import gather_rows
from radfm_jax.runtime.sharding import constrain


@dataclasses.dataclass(frozen=True)
class PerceiverConfig(Computation):
    """Sizes of the resampler; the defaults are RadFM's. The width equals the vision encoder's."""

    kind: Literal["perceiver"] = "perceiver"
    width: Size = 768
    num_latents: Size = 32
    num_layers: Size = 6
    num_heads: Size = 8
    head_dim: Size = 64
    mlp_factor: Size = 4

    def __post_init__(self):
        check_fields(self, "model.perceiver")


class ResamplerBlock(nn.Module):
    """Each scan's latents attend to the scan's patch tokens and to themselves; then an MLP. No biases."""

    config: PerceiverConfig

    @nn.compact
    def __call__(self, latents: jax.Array, tokens: jax.Array, patch_segments: jax.Array, scan_rows: jax.Array):
        c = self.config
        b, s, n, _ = latents.shape
        token_norm, latent_norm = layer_norm(c, "token_norm")(tokens), layer_norm(c, "latent_norm")(latents)
        q = dense((c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), c, name="query")(latent_norm)
        key_value = dense((2, c.num_heads, c.head_dim), ("embed", None, "heads", "head_dim"), c, name="key_value")
        # Keys and values are projected once per vision row, then gathered by each scan in that row.
        token_kv = gather_rows(key_value(token_norm), scan_rows)  # [B, S, P, 2, H, K]
        kv = jnp.concatenate([token_kv, key_value(latent_norm)], axis=2)
        q_segments = jnp.broadcast_to(jnp.arange(1, s + 1)[None, :, None], (b, s, n))
        k_segments = jnp.concatenate([gather_rows(patch_segments, scan_rows), q_segments], axis=2)
        arrays = (q, kv[..., 0, :, :], kv[..., 1, :, :], q_segments, k_segments)
        x = attention(*(a.reshape(b * s, *a.shape[2:]) for a in arrays), causal=False, kernel=c.attention)
        x = checkpoint_name(x.reshape(q.shape), "attention")
        x = dense(c.width, ("heads", "head_dim", "embed"), c, axis=(-2, -1), gain=RESIDUAL, name="out")(x)
        latents = constrain(latents + x, "batch", None, None, None)
        x = layer_norm(c, "mlp_norm")(latents)
        x = GeluMlp(c, c.mlp_factor * c.width, bias=False, name="mlp")(x)
        return constrain(latents + x, "batch", None, None, None), None


class Perceiver(nn.Module):
    """Patch tokens of the vision rows -> latents of each scan."""

    config: PerceiverConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, patch_segments: jax.Array, scan_rows: jax.Array, patch_positions: jax.Array
    ) -> jax.Array:
        """float[B, R, P, D], int32[B, R, P] (1 + slot, 0 = padding), int32[B, S] (-1 = empty) -> float[B, S, L, D].

        Latents of an empty slot depend on no scan and are not used. Positions are not used: the tokens have them.
        """
        c = self.config
        init = partitioned(nn.initializers.normal(1.0), (None, "embed"))
        latents = self.param("latents", init, (c.num_latents, c.width), c.param_dtype)
        latents = jnp.broadcast_to(latents.astype(c.dtype), (*scan_rows.shape, *latents.shape))
        blocks = scan_blocks(ResamplerBlock, c.num_layers, c.remat)(c, name="blocks")
        latents, _ = blocks(latents, tokens, patch_segments, jnp.maximum(scan_rows, 0))
        return layer_norm(c, "norm")(latents)
