"""Arithmetic of the network: FLOPs of a step, and the peak of the devices it runs on."""

from __future__ import annotations

import jax
import numpy as np

from input_pipeline.packing import Limits
from radfm_jax.models.radfm import RadFMConfig

# Dense bfloat16 FLOP/s of a device, published.
PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak(device: jax.Device) -> float | None:
    """bfloat16 FLOP/s of a device, None where it is not known (a CPU)."""
    names = [name for name in PEAK if name.lower() in device.device_kind.lower()]
    return PEAK[max(names, key=len)] if names else None


def forward(config: RadFMConfig, limits: Limits) -> dict[str, float]:
    """FLOPs of one row's forward pass by part; padding counts, as it is computed.

    A product of [m, k] and [k, n] is 2 m k n. Causal attention counts half of its square.
    """
    t, p = limits.text_length, limits.vision_rows * limits.patch_length
    v, q, c = config.vision, config.perceiver, config.llama
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.width * (2 * heads + 2 * kv) + 3 * c.width * c.mlp_width
    llama = c.num_layers * (2 * t * layer + 2 * t * t * heads)
    inner = v.num_heads * v.head_dim
    vit_layer = 4 * v.width * inner + 2 * v.width * v.mlp_width
    patch = int(np.prod(v.patch)) * v.channels
    vit = 2 * p * patch * v.width + v.num_layers * (2 * p * vit_layer + 4 * p * limits.patch_length * inner)
    latents, inner = limits.scans * q.num_latents, q.num_heads * q.head_dim
    mlp = 2 * q.mlp_factor * q.width**2
    keys = p + latents
    attention = 4 * latents * inner * (limits.patch_length + q.num_latents)
    perceiver = (
        q.num_layers * (2 * latents * (2 * q.width * inner + mlp) + 2 * keys * 2 * q.width * inner + attention)
        + 2 * latents * q.width * c.width
    )
    return {"llama": llama, "vit": vit, "perceiver": perceiver, "head": 2 * t * c.width * c.vocab_size}


def training(config: RadFMConfig, limits: Limits, frozen: tuple[str, ...] = ()) -> float:
    """FLOPs that one row of a training step needs: forward, the gradient of what it computes on, and of the weights
    that learn. What remat computes again is not counted, as usual for MFU."""
    parts = forward(config, limits)
    total = 0.0
    for name, flops in parts.items():
        held = ("llama" if name in ("llama", "head") else name) in frozen
        total += flops * (2 if held else 3)
    return total
