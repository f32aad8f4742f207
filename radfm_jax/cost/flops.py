"""FLOPs of the network, and the peak FLOP/s of devices."""

from __future__ import annotations

import jax

from input_pipeline.batching.plan import RowLimits
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.pooling import PooledMlpConfig
from radfm_jax.models.radfm import RadFMConfig

# Published dense bfloat16 FLOP/s per device, and the share of it (MFU) that published training runs of 13B-class models
# reach in bfloat16, rounded down (A100: torchtitan 61 %, llm-foundry 52.6 %; H100 40 to 44 %; H200 33 to 58 %; TPUs,
# MaxText: v4 57 to 59 %, v5e 61 to 67 %, v5p 71.5 % for 32B, v6e 45 to 50 %). MFU does not count recomputation as work.
_DEVICES = {
    "A100": (312e12, 0.5),
    "H100": (989e12, 0.4),
    "H200": (989e12, 0.4),
    "TPU v4": (275e12, 0.55),
    "TPU v5 lite": (197e12, 0.6),
    "TPU v5e": (197e12, 0.6),
    "TPU v5p": (459e12, 0.6),
    "TPU v5": (459e12, 0.6),
    "TPU v6 lite": (918e12, 0.45),
    "TPU v6e": (918e12, 0.45),
}
PEAK = {name: peak for name, (peak, _) in _DEVICES.items()}
REACHED = {name: share for name, (_, share) in _DEVICES.items()}


def known_device(kind: str) -> str | None:
    """Return the key of PEAK for a `device_kind` ("NVIDIA A100-SXM4-80GB" -> "A100"), or None."""
    names = [name for name in PEAK if name.lower() in kind.lower()]
    return max(names, key=len) if names else None


def peak(device: jax.Device) -> float | None:
    """Return the bfloat16 FLOP/s of a device, or None if unknown (a CPU)."""
    name = known_device(device.device_kind)
    return PEAK[name] if name else None


def forward(config: RadFMConfig, limits: RowLimits, channels: int | None = None) -> dict[str, float]:
    """Return the FLOPs of one row's forward pass by part, including padding.

    A product of [m, k] and [k, n] has 2 m k n. `channels` are those of the embedded patches (`data.channels`);
    default: the model's.
    """
    t, p = limits.text_length, limits.vision_rows * limits.patch_length
    v, q, c = config.vision, config.perceiver, config.llama
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.width * (2 * heads + 2 * kv) + 3 * c.width * c.mlp_width
    llama = c.num_layers * 2 * t * layer + decoder_attention(c, t)
    vit = p * v.patch_flops(channels)
    for stack in v.stacks(limits.patch_length):
        weights = 4 * stack.width * stack.inner + stack.width * (stack.hidden + stack.down)
        vit += stack.layers * stack.tokens * p * (2 * weights + 4 * stack.keys * stack.inner)
    latents = limits.scans * q.num_latents
    if isinstance(q, PooledMlpConfig):
        perceiver = 2 * latents * q.hidden * (q.width + c.width)
    else:
        inner, mlp = q.num_heads * q.head_dim, 2 * q.mlp_factor * q.width**2
        keys = p + latents
        attention = 4 * latents * inner * (limits.patch_length + q.num_latents)
        perceiver = (
            q.num_layers * (2 * latents * (2 * q.width * inner + mlp) + 2 * keys * 2 * q.width * inner + attention)
            + 2 * latents * q.width * c.width
        )
    return {"llama": llama, "vit": vit, "perceiver": perceiver, "head": 2 * t * c.width * c.vocab_size}


def decoder_attention(c: DecoderConfig, tokens: int) -> float:
    """Return the FLOPs of the decoder's attention to rows of `tokens`, without its linear maps.

    Causal attention counts half of its square; of that, a window leaves a band.
    """
    window = min(c.window or tokens, tokens)
    sliding = len(c.sliding_layers)
    pairs = (c.num_layers - sliding) * tokens**2 / 2 + sliding * (tokens**2 - (tokens - window) ** 2) / 2
    return 4 * pairs * c.num_heads * c.head_dim


def training(
    config: RadFMConfig, limits: RowLimits, frozen: tuple[str, ...] = (), channels: int | None = None
) -> float:
    """Return the FLOPs of one row of a training step, without recomputation, as usual for MFU.

    They are the forward pass, the gradients of trained weights, and the gradients of inputs that depend on them. A part
    counts as frozen only if all of it is in `frozen` (`optimizer.frozen`): `llama/blocks` alone does not count.
    """
    parts = forward(config, limits, channels)
    trained = {name: name not in frozen for name in ("vit", "perceiver", "llama", "projection", "image_marks")}
    before = {"vit": (), "perceiver": ("vit",), "llama": ("vit", "perceiver", "projection", "image_marks")}
    before["head"] = (*before["llama"], "llama")
    total = 0.0
    for name, flops in parts.items():
        own = trained["llama" if name == "head" else name]
        total += flops * (1 + own + (own or any(trained[part] for part in before[name])))
    return total
