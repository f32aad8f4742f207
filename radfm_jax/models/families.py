"""Sizes and options of published language models: `PRESETS["qwen3-8b"]` is a DecoderConfig.

The values are those of each model's config.json. They describe the base model and its instruction-tuned versions,
which have the same network.
"""

from __future__ import annotations

import functools

from radfm_jax.models.decoder import DecoderConfig, RopeScaling

_llama3 = functools.partial(DecoderConfig, vocab_size=128256, num_kv_heads=8, rope_theta=5e5, norm_eps=1e-5)
_qwen3 = functools.partial(DecoderConfig, vocab_size=151936, num_kv_heads=8, rope_theta=1e6, qk_norm=True)
_gemma = functools.partial(
    DecoderConfig, head_dim=256, tied_head=True, unit_offset=True, post_norms=True, scale_embeddings=True,
    activation="gelu_tanh",
)  # fmt: skip
# Factors for contexts up to 4,096 tokens; those for longer ones are in the model's config.json.
_PHI4_MINI_ROPE = RopeScaling(kind="longrope", factor=32.0, original_context=4096, channel_factors=(1.0,) * 48)

PRESETS: dict[str, DecoderConfig] = {
    "llama-7b": DecoderConfig(width=4096, mlp_width=11008, num_layers=32, num_heads=32, num_kv_heads=32),
    "llama-13b": DecoderConfig(),
    "llama-3.1-8b": _llama3(width=4096, mlp_width=14336, num_layers=32, num_heads=32, rope_scaling=RopeScaling()),
    "mistral-7b-v0.1": DecoderConfig(
        width=4096, mlp_width=14336, num_layers=32, num_heads=32, num_kv_heads=8, norm_eps=1e-5,
        window=4096, sliding_layers=tuple(range(32)),
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49152, width=576, mlp_width=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        rope_theta=1e5, norm_eps=1e-5, tied_head=True,
    ),
    "smollm3-3b": DecoderConfig(
        vocab_size=128256, width=2048, mlp_width=11008, num_layers=36, num_heads=16, num_kv_heads=4, rope_theta=5e6,
        tied_head=True, nope_layers=tuple(range(3, 36, 4)),
    ),
    "qwen2.5-7b": DecoderConfig(
        vocab_size=152064, width=3584, mlp_width=18944, num_layers=28, num_heads=28, num_kv_heads=4, rope_theta=1e6,
        qkv_bias=True,
    ),
    "qwen3-8b": _qwen3(width=4096, mlp_width=12288, num_layers=36, num_heads=32),
    "qwen3-14b": _qwen3(width=5120, mlp_width=17408, num_layers=40, num_heads=40),
    "gemma-2-9b": _gemma(
        vocab_size=256000, width=3584, mlp_width=14336, num_layers=42, num_heads=16, num_kv_heads=8,
        attention_softcap=50.0, logit_softcap=30.0, window=4096, sliding_layers=tuple(range(0, 42, 2)),
    ),
    "gemma-3-4b": _gemma(
        vocab_size=262208, width=2560, mlp_width=10240, num_layers=34, num_heads=8, num_kv_heads=4, qk_norm=True,
        rope_theta=1e6, rope_scaling=RopeScaling(kind="linear", factor=8.0), local_rope_theta=1e4,
        window=1024, sliding_layers=tuple(i for i in range(34) if i % 6 != 5),
    ),
    "phi-4": DecoderConfig(
        vocab_size=100352, width=5120, mlp_width=17920, num_layers=40, num_heads=40, num_kv_heads=10, rope_theta=2.5e5,
        norm_eps=1e-5,
    ),
    "phi-4-mini": DecoderConfig(
        vocab_size=200064, width=3072, mlp_width=8192, num_layers=32, num_heads=24, num_kv_heads=8, norm_eps=1e-5,
        tied_head=True, rotary_share=0.75, rope_scaling=_PHI4_MINI_ROPE,
    ),
}  # fmt: skip
