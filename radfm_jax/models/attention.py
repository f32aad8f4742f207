"""Attention inside segments: the one entry point of every part of the model, and the choice of its kernel.

TPU: splash attention. NVIDIA GPU: cuDNN. CPU: long rows tile by tile, without the tiles between samples.
Everything else, and every shape that a kernel does not take: plain XLA.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from radfm_jax.models.kernels.cpu import tiled_attention
from radfm_jax.models.kernels.cudnn import cudnn_attention
from radfm_jax.models.kernels.splash import splash_attention
from radfm_jax.models.kernels.xla import attention_mask, plain_attention

KERNELS = {"blocks": tiled_attention, "cudnn": cudnn_attention, "splash": splash_attention}
NAMES = ("auto", "xla", "blocks", "cudnn", "splash")
BLOCKS_FROM = 512  # shorter rows are quicker in one product


def choose(kernel: str, q: jax.Array, k: jax.Array, platform: str | None = None) -> str:
    """The kernel that runs: `xla`, `blocks`, `cudnn` or `splash`. One asked for by name is not silently replaced.

    Args:
      q: [B, T, H, K]; k: [B, U, G, K].
    Raises:
      ValueError: an unknown name, or shapes that the kernel asked for does not take.
    """
    if kernel not in NAMES:
        raise ValueError(f"attention kernel {kernel!r} is unknown: choose one of {', '.join(NAMES)}")
    t, u, width = q.shape[1], k.shape[1], q.shape[3]
    refusals = {
        "xla": [],
        "blocks": [f"lengths {t} and {u} are not multiples of 128"] if t % 128 or u % 128 else [],
        "splash": [  # it multiplies float32 in bfloat16, forward and backward
            *([f"dtype {q.dtype} is not bfloat16"] if q.dtype != jnp.bfloat16 else []),
            *([f"head width {width} is not a multiple of 64"] if width % 64 else []),
            *([f"lengths {t} and {u} are not multiples of 128"] if t % 128 or u % 128 else []),
        ],
        "cudnn": [
            *([f"dtype {q.dtype} is not bfloat16 or float16"] if q.dtype not in (jnp.bfloat16, jnp.float16) else []),
            *([f"head width {width} is not a multiple of 8 up to 128"] if width % 8 or width > 128 else []),
            # With a bias its backward pass takes even lengths only.
            *([f"lengths {t} and {u} are not even"] if t % 2 or u % 2 else []),
        ],
    }
    if kernel != "auto":
        if refusals[kernel]:
            raise ValueError(f"attention kernel {kernel!r}: {'; '.join(refusals[kernel])}")
        return kernel
    best = {"tpu": "splash", "cuda": "cudnn", "cpu": "blocks"}.get(platform or _platform(), "xla")
    if best == "blocks" and min(t, u) < BLOCKS_FROM:
        return "xla"
    return best if not refusals[best] else "xla"


def _platform() -> str:
    """`tpu`, `cpu`, or `cuda` for NVIDIA GPUs from Ampere on, which cuDNN's fused attention needs; else `gpu`."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    device = jax.devices()[0]
    is_nvidia = "cuda" in device.client.platform_version.lower()
    return "cuda" if is_nvidia and float(device.compute_capability) >= 8 else "gpu"


@functools.partial(jax.named_call, name="attention")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    *,
    causal: bool,
    kernel: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention inside segments: the one entry point of every part of the model.

    Query i sees key j if their segments are equal and, when causal, j <= i.

        q_segments  1 1 1 2 2 0        key j   1 . . . . .
        k_segments  1 1 1 2 2 0        seen by 1 1 . . . .
        causal                         query i 1 1 1 . . .
                                               . . . 2 . .
                                               . . . 2 2 .
                                               . . . . . 0     padding sees padding, so no softmax is empty

    Args:
      q: float[B, T, H, K].
      k, v: float[B, U, G, K], H a multiple of G.
      q_segments: int32[B, T].
      k_segments: int32[B, U]; a key that nobody may see has segment -1.
      kernel: `auto` takes the fastest kernel that fits platform, dtype and shapes (see radfm_jax.models.attention);
        `xla`, `cudnn`, `splash` ask for one.
    Returns:
      float[B, T, H, K] in v's dtype. A query that sees no key gets something finite: the mean of all values, as a
      masked row of the released model does, of those that a fused kernel visited, or zeros (`blocks`).
    """
    chosen = choose(kernel, q, k)
    if chosen != "xla":
        return KERNELS[chosen](q, k, v, q_segments, k_segments, causal=causal)
    allowed = attention_mask(q_segments, k_segments, causal)
    return plain_attention(q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), allowed)
