"""cuDNN fused attention for NVIDIA GPUs, in bfloat16 and float16."""

from __future__ import annotations

import jax

from radfm_jax.models.kernels.xla import attention_mask


def cudnn_attention(q, k, v, q_segments, k_segments, *, causal: bool, window=0, scale=None, softcap=None) -> jax.Array:
    """Apply cuDNN attention with the segment mask as a bias, since cuDNN takes no segment ids.

    Raises ValueError for soft-capped scores, which cuDNN does not support.
    """
    if softcap is not None:
        raise ValueError("cuDNN attention has no soft cap of scores")
    mask = attention_mask(q_segments, k_segments, causal, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
