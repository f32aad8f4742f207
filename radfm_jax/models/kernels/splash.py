"""Splash attention for TPUs: blockwise, with segment ids inside the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from radfm_jax.models.kernels.sharded import run_per_device


def splash_attention(
    q, k, v, q_segments, k_segments, *, causal: bool, window=0, scale=None, softcap=None, interpret: bool = False
) -> jax.Array:
    """Apply splash attention per device; `interpret` runs it slowly on any platform, for tests."""
    # Imported late: Pallas takes a second to import and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

    def local(q, k, v, q_segments, k_segments):
        t, h, width = q.shape[1:]
        u, g = k.shape[1:3]
        if window:
            mask = splash_lib.LocalMask((t, u), (window - 1, 0), offset=0)
        else:
            mask = (splash_lib.CausalMask if causal else splash_lib.FullMask)((t, u))
        kv_blocks = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")
        sizes = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), _block_size(t))
        blocks = splash_lib.BlockSizes(**sizes, **dict.fromkeys(kv_blocks, _block_size(u)))
        heads = splash_lib.MultiHeadMask([mask] * h)
        options = {"head_shards": 1, "q_seq_shards": 1, "attn_logits_soft_cap": softcap}
        run = splash_lib.make_splash_mha(heads, block_sizes=blocks, **options, interpret=interpret)
        heads_first = lambda x: jnp.moveaxis(x, 2, 1)  # noqa: E731
        k, v = (jnp.repeat(x, h // g, axis=2) for x in (k, v))
        ids = splash_lib.SegmentIds(q_segments, k_segments)
        q = q * (width**-0.5 if scale is None else scale)
        out = jax.vmap(run)(heads_first(q), heads_first(k), heads_first(v), segment_ids=ids)
        return jnp.moveaxis(out, 1, 2).astype(v.dtype)

    return run_per_device(local, q, k, v, q_segments, k_segments)


def _block_size(length: int) -> int:
    """Return the largest multiple of 128 up to 512 that divides `length`, itself a multiple of 128."""
    return next(size for size in (512, 384, 256, 128) if length % size == 0)
