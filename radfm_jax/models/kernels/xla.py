"""Attention in plain XLA: the reference for tests of the other kernels, and the fallback for any shape.

Letters: B rows, T query tokens, U key tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from radfm_jax.models.layers import matmul_precision, soft_cap


def plain_attention(q, k, v, allowed, *, scale: float | None = None, softcap: float | None = None) -> jax.Array:
    """Compute attention as two matrix products around a softmax.

    Args:
      q: float[B, T, H, K].
      k, v: float[B, G, U, K]. Batch axes come first because XLA's CPU products are then twice as fast; other
        platforms choose their own layout.
      allowed: bool[B, T, U].
      scale, softcap: as in `attention.attention`.
    Returns:
      float[B, T, H, K] in v's dtype.
    """
    b, t, h, width = q.shape
    g, u = k.shape[1:3]
    q = jnp.moveaxis(q.reshape(b, t, g, h // g, width), 1, 3).reshape(b, g, -1, width)  # [B, G, M T, K]
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("bgqk,bguk->bgqu", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = soft_cap(scores.reshape(b, h, t, u) * (width**-0.5 if scale is None else scale), softcap)
    scores = jnp.where(allowed[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, g, -1, u)
    out = jnp.einsum("bgqu,bguk->bgqk", weights, v, precision=precision)
    return jnp.moveaxis(out.reshape(b, g, h // g, t, width), 3, 1).reshape(b, t, h, width)


def attention_mask(q_segments: jax.Array, k_segments: jax.Array, causal: bool, window: int = 0) -> jax.Array:
    """Return bool[B, T, U]: which keys each query sees (drawn in `attention`)."""
    allowed = q_segments[:, :, None] == k_segments[:, None, :]
    if causal:
        t, u = allowed.shape[1:]
        allowed &= jnp.arange(u) <= jnp.arange(t)[:, None]
        if window:
            allowed &= jnp.arange(t)[:, None] - jnp.arange(u) < window
    return allowed
