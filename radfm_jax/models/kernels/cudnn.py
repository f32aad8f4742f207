"""cuDNN fused attention for NVIDIA GPUs, in bfloat16 and float16."""

from __future__ import annotations

import jax

from radfm_jax.models.kernels.xla import attention_mask


def cudnn_attention(q, k, v, q_segments, k_segments, *, causal: bool) -> jax.Array:
    """Apply cuDNN attention with the segment mask as a bias, since cuDNN takes no segment ids."""
    mask = attention_mask(q_segments, k_segments, causal)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
