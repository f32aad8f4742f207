"""Attention within segments: the entry point for every part of the model, and the choice of its kernel.

TPUs use splash attention, NVIDIA GPUs cuDNN, CPUs tile attention for long rows. Other platforms, and shapes that a
kernel does not support, use plain XLA.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from radfm_jax.models.kernels.cpu import tiled_attention
from radfm_jax.models.kernels.cudnn import cudnn_attention
from radfm_jax.models.kernels.splash import splash_attention
from radfm_jax.models.kernels.xla import attention_mask, plain_attention

# "blocks" is the name of tile attention in configs.
KERNELS = {"blocks": tiled_attention, "cudnn": cudnn_attention, "splash": splash_attention}
NAMES = ("auto", "xla", *KERNELS)
MIN_TILED_LENGTH = 512  # plain XLA is faster for shorter rows


def choose(kernel: str, q: jax.Array, k: jax.Array, platform: str | None = None, softcap: float | None = None) -> str:
    """Return the kernel to run for q [B, T, H, K] and k [B, U, G, K]. Only `auto` falls back to another kernel.

    Raises:
      ValueError: an unknown name, or shapes, a dtype or a soft cap that the named kernel does not support.
    """
    if kernel not in NAMES:
        raise ValueError(f"attention kernel {kernel!r} is unknown: choose one of {', '.join(NAMES)}")
    t, u, width = q.shape[1], k.shape[1], q.shape[3]
    unsupported = (  # kernel, condition, reason
        ("blocks", t % 128 or u % 128, f"lengths {t} and {u} are not multiples of 128"),
        ("splash", q.dtype != jnp.bfloat16, f"dtype {q.dtype} is not bfloat16"),  # would round float32 to bfloat16
        ("splash", width % 64, f"head width {width} is not a multiple of 64"),
        ("splash", t % 128 or u % 128, f"lengths {t} and {u} are not multiples of 128"),
        ("cudnn", q.dtype not in (jnp.bfloat16, jnp.float16), f"dtype {q.dtype} is not bfloat16 or float16"),
        ("cudnn", width % 8 or width > 128, f"head width {width} is not a multiple of 8 up to 128"),
        ("cudnn", t % 2 or u % 2, f"lengths {t} and {u} are not even"),  # needed by its backward pass with a bias
        ("cudnn", softcap is not None, "it has no soft cap of scores"),
    )
    chosen = kernel
    if kernel == "auto":
        chosen = {"tpu": "splash", "cuda": "cudnn", "cpu": "blocks"}.get(platform or _platform(), "xla")
    reasons = [reason for name, condition, reason in unsupported if name == chosen and condition]
    if kernel == "auto":
        return "xla" if reasons or (chosen == "blocks" and min(t, u) < MIN_TILED_LENGTH) else chosen
    if reasons:
        raise ValueError(f"attention kernel {kernel!r}: {'; '.join(reasons)}")
    return kernel


def _platform() -> str:
    """Return `tpu`, `cpu`, `gpu`, or `cuda` for NVIDIA GPUs that support cuDNN's fused attention (Ampere or newer)."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    device = jax.devices()[0]
    is_nvidia = "cuda" in device.client.platform_version.lower()
    return "cuda" if is_nvidia and float(device.compute_capability) >= 8 else "gpu"


@functools.partial(jax.named_call, name="attention")
def attention(
    q, k, v, q_segments, k_segments, *, causal: bool, window: int = 0, scale: float | None = None,
    softcap: float | None = None, kernel: str = "auto",
) -> jax.Array:  # fmt: skip
    """Compute scaled dot-product attention within segments.

    Query i sees key j if their segments are equal and, when causal, j <= i; with a window, also i - j < window.

        q_segments  1 1 1 2 2 0        key j   1 . . . . .     window=2   1 . . . . .
        k_segments  1 1 1 2 2 0        seen by 1 1 . . . .                1 1 . . . .
        causal                         query i 1 1 1 . . .                . 1 1 . . .
                                               . . . 2 . .                . . . 2 . .
                                               . . . 2 2 .                . . . 2 2 .
                                               . . . . . 0                . . . . . 0
                                               padding sees padding, so no softmax is empty

    Args:
      q: float[B, T, H, K]; k, v: float[B, U, G, K], H a multiple of G.
      q_segments: int32[B, T]; k_segments: int32[B, U], -1 hides a key from every query.
      window: number of keys up to its own that a query sees, for causal attention; 0: all.
      scale: factor of the scores; None: K ** -0.5.
      softcap: scores become softcap * tanh(scores / softcap) after scaling; None: they are not capped.
      kernel: `auto` selects the fastest kernel that supports the platform, dtype and shapes; a name selects that one.
    Returns:
      float[B, T, H, K] in v's dtype. The output of a query that sees no key is finite but depends on the kernel: the
      mean of all values (`xla`, as in the released model), the mean of the visited values (fused kernels) or zeros
      (`blocks`).
    """
    if window and not causal:
        raise ValueError(f"attention with window {window} must be causal")
    chosen = choose(kernel, q, k, softcap=softcap)
    if chosen != "xla":
        run = KERNELS[chosen]
        return run(q, k, v, q_segments, k_segments, causal=causal, window=window, scale=scale, softcap=softcap)
    allowed = attention_mask(q_segments, k_segments, causal, window)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    return plain_attention(q, k, v, allowed, scale=scale, softcap=softcap)
