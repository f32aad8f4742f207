"""A LLaMA's config.json of Hugging Face <-> DecoderConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from input_pipeline.field_rules import Size, above
from radfm_jax.models.decoder import DecoderConfig, RopeScaling

# Hugging Face's keys -> fields of DecoderConfig, and those of the llama3 RoPE scaling -> fields of RopeScaling.
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "mlp_width",
    "num_hidden_layers": "num_layers",
}  # fmt: skip
ROPE_KEYS = {
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}  # fmt: skip
# Types and limits of Hugging Face's keys; a key may be missing or null.
HF_RULES = {
    **dict.fromkeys((*LLAMA_KEYS, "num_attention_heads", "num_key_value_heads", "head_dim"), Size),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), Annotated[float, above(0)]),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), Mapping[str, Any]),
    "tie_word_embeddings": bool,
}


def llama_from_hf(config: dict, path) -> DecoderConfig:
    """Return the sizes in a LLaMA config.json, with rope_theta and rope_scaling or with the newer rope_parameters."""
    if missing := [k for k in (*LLAMA_KEYS, "num_attention_heads") if k not in config]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return DecoderConfig(
        **{field: config[key] for key, field in LLAMA_KEYS.items()},
        **attention_from_hf(config, config["hidden_size"], path),
    )


def attention_from_hf(config: dict, width: int, path) -> dict:
    """Return the settings that tensor shapes do not show: heads, RoPE, the norm's epsilon, tied or untied head.

    An absent key, as in the files of LLaMA 1, has the default of transformers' LlamaConfig. Raises ValueError if the
    network differs from LLaMA.
    """
    if config.get("model_type", "llama") != "llama":
        raise ValueError(f"{path} describes a {config['model_type']!r}, not a llama")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: activation {config['hidden_act']!r} is not supported (silu is)")
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"{path}: num_attention_heads must be at least 1 (got {heads!r})")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "llama3":
        if missing := [k for k in ROPE_KEYS if k not in rope]:
            raise ValueError(f"{path}: RoPE scaling llama3 lacks {', '.join(missing)}")
        scaling = RopeScaling(**{field: rope[key] for key, field in ROPE_KEYS.items()})
    elif kind != "default":
        raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported (default and llama3 are)")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"{path}: partial_rotary_factor is not supported: RoPE rotates all channels of a head")
    return {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or width // heads,
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "rope_scaling": scaling,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }


def llama_to_hf(config: DecoderConfig, dtype: str, source: dict | None = None) -> dict:
    """Return a config.json that old and new versions of transformers read.

    Values that the network does not use (special tokens, context length) are from `source`, the original config.json.
    """
    scaling, rope = config.rope_scaling, None
    if scaling is not None:
        rope = {"rope_type": "llama3", **{key: getattr(scaling, field) for key, field in ROPE_KEYS.items()}}
    return {
        "max_position_embeddings": 2048 if scaling is None else int(scaling.original_context * scaling.factor),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **{k: v for k, v in (source or {}).items() if k not in ("rope_parameters", "dtype")},
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, field) for key, field in LLAMA_KEYS.items()},
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
