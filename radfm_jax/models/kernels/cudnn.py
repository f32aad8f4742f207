"""cuDNN fused attention for NVIDIA GPUs, in bfloat16 and float16."""

from __future__ import annotations

import jax

from radfm_jax.models.kernels.xla import attention_mask


def cudnn_attention(q, k, v, q_segments, k_segments, *, causal: bool) -> jax.Array:
    """cuDNN takes lengths or a bias, not segment ids: the mask of the row becomes a bias of one head."""
    mask = attention_mask(q_segments, k_segments, causal)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
