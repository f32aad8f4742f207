"""FLOPs of the network, and the peak FLOP/s of devices."""

from __future__ import annotations

import re

import jax

from input_pipeline.batching.plan import RowLimits
from radfm_jax.cost import adapters
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.pooling import PooledMlpConfig
from radfm_jax.models.radfm import RadFMConfig

# Published dense bfloat16 FLOP/s per device, with float32 sums, and the share of it (MFU) that published training runs
# of 13B-class models reach in bfloat16, rounded down (A100: torchtitan 61 %, llm-foundry 52.6 %; H100 40 to 44 %; H200
# 33 to 58 %; TPUs, MaxText: v4 57 to 59 %, v5e 61 to 67 %, v5p 71.5 % for 32B, v6e 45 to 50 %). MFU does not count
# recomputation as work. For the other devices there are no such runs (None).
# Peaks of GPUs: NVIDIA's data sheets of A100, H100, H200, A10, A40, L4, L40S (half of the figures with sparsity);
# whitepapers of the architectures GA102 (RTX 3090, RTX A6000), Ada (RTX 4080, RTX 4090, RTX 6000 Ada) and Blackwell
# (RTX 5090).
_DEVICES: dict[str, tuple[float, float | None]] = {
    "A100": (312e12, 0.5),
    "H100": (989e12, 0.4),
    "H200": (989e12, 0.4),
    "A10": (125e12, None),
    "A40": (149.7e12, None),
    "L4": (121e12, None),
    "L40S": (362e12, None),
    "RTX 3090": (71e12, None),
    "RTX A6000": (154.8e12, None),
    "RTX 4080": (97.5e12, None),
    "RTX 4090": (165.2e12, None),
    "RTX 6000 Ada": (364.2e12, None),
    "RTX 5090": (209.5e12, None),
    "TPU v4": (275e12, 0.55),
    "TPU v5 lite": (197e12, 0.6),
    "TPU v5e": (197e12, 0.6),
    "TPU v5p": (459e12, 0.6),
    "TPU v5": (459e12, 0.6),
    "TPU v6 lite": (918e12, 0.45),
    "TPU v6e": (918e12, 0.45),
}
PEAK = {name: peak for name, (peak, _) in _DEVICES.items()}
ASSUMED = min(share for _, share in _DEVICES.values() if share is not None)  # MFU of devices without published runs
REACHED = {name: share or ASSUMED for name, (_, share) in _DEVICES.items()}
PUBLISHED = frozenset(name for name, (_, share) in _DEVICES.items() if share)  # devices with published runs
# Words after the name of a GPU that make it another one: "RTX 3090 Ti", "RTX 4090 Laptop GPU".
_VARIANTS = r"(?! (?:ti|super|d|laptop|mobile|max-q)\b)"


def known_device(kind: str) -> str | None:
    """Return the key of PEAK for a `device_kind` ("NVIDIA A100-SXM4-80GB" -> "A100"), or None."""
    names = [name for name in PEAK if re.search(rf"\b{re.escape(name.lower())}(?![a-z0-9]){_VARIANTS}", kind.lower())]
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
    counts as frozen only if all of it is in `frozen` (`optimizer.frozen`): `llama/blocks` alone does not count. A
    frozen part with adapters needs the gradients of its inputs, but not those of its weights.
    """
    parts, adapted = forward(config, limits, channels), adapters.forward(config, limits)
    trained = {name: name not in frozen for name in ("vit", "perceiver", "llama", "projection", "image_marks")}
    before = {"vit": (), "perceiver": ("vit",), "llama": ("vit", "perceiver", "projection", "image_marks")}
    before["head"] = (*before["llama"], "llama")
    learns = {name: trained[name] or name in adapted for name in trained}
    total = 3 * sum(adapted.values())
    for name, flops in parts.items():
        own = trained["llama" if name == "head" else name]
        total += flops * (1 + own + (own or name in adapted or any(learns[part] for part in before[name])))
    return total
