"""Model sizes: from the tensors of a file, from a Hugging Face config.json, or from a config of this project."""

from __future__ import annotations

import collections
import json
import re
import runpy
from collections.abc import Mapping
from pathlib import Path

from radfm_jax.convert.table import ROTARY
from radfm_jax.models.decoder import DecoderConfig, RopeScaling
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig, radfm_14b
from radfm_jax.models.vit3d import ViTConfig

Shapes = Mapping[str, tuple[int, ...]]

# Hugging Face's keys -> fields of DecoderConfig, and those of the llama3 RoPE scaling -> fields of RopeScaling.
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "mlp_width",
    "num_hidden_layers": "num_layers",
}  # fmt: skip
ROPE_KEYS = {
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}  # fmt: skip


def read_config(path) -> dict:
    """Return {"model": sizes} of a configs/*.py or a checkpoint's radfm.json, or a Hugging Face config.json unchanged.

    Raises ValueError for a file that is missing or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {path} does not exist")
    if path.suffix == ".py":
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise ValueError(f"config {path} has no get_config()")
        return {"model": get_config().model.to_dict()}
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"config {path} is not JSON: {e}") from None
    if not isinstance(config, dict) or not ({"model", "num_attention_heads", "num_key_value_heads"} & config.keys()):
        raise ValueError(f"config {path} has neither `model` (radfm_jax) nor `num_attention_heads` (Hugging Face)")
    return config


def llama_from_hf(config: dict, path) -> DecoderConfig:
    """Return the sizes in a LLaMA config.json, with rope_theta and rope_scaling or with the newer rope_parameters."""
    if missing := [k for k in (*LLAMA_KEYS, "num_attention_heads") if k not in config]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if config.get("model_type", "llama") != "llama":
        raise ValueError(f"{path} describes a {config['model_type']!r}, not a llama")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: activation {config['hidden_act']!r} is not supported (silu is)")
    return DecoderConfig(
        **{field: config[key] for key, field in LLAMA_KEYS.items()},
        tied_head=config.get("tie_word_embeddings", False),
        **_attention_from_hf(config, config["hidden_size"], path),
    )


def _attention_from_hf(config: dict, width: int, path) -> dict:
    """Return what tensor shapes do not give: heads, RoPE and the norm's epsilon."""
    heads = config["num_attention_heads"]
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "llama3":
        if missing := [k for k in ROPE_KEYS if k not in rope]:
            raise ValueError(f"{path}: RoPE scaling llama3 lacks {', '.join(missing)}")
        scaling = RopeScaling(**{field: rope[key] for key, field in ROPE_KEYS.items()})
    elif kind != "default":
        raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported (default and llama3 are)")
    return {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or width // heads,
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "rope_scaling": scaling,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
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


def radfm_from_shapes(shapes: Shapes, config: dict | None, path) -> RadFMConfig:
    """Return the sizes of a RadFM from the shapes of its tensors.

    No shape gives the number of attention heads. It is read from `config` (of this project or of Hugging Face), from
    the rotary buffers, or from the released model if all other sizes are equal.
    Raises ValueError if nothing gives the heads, sources disagree, or no tensor gives a size.
    """
    if config and "model" in config:
        sizes = RadFMConfig.from_dict(config["model"])
        _check_rotary(shapes, sizes.llama.num_heads, sizes.llama.head_dim, path)
        return sizes
    missing = []

    def size(pattern: str, axis: int) -> int:
        """Return the most common size among the layers. A layer that differs is later reported as misshapen."""
        sizes = [shape[axis] for name, shape in shapes.items() if re.fullmatch(pattern, name) and len(shape) > axis]
        if not sizes:
            missing.append(pattern.replace("\\", "").replace("d+", "*"))
            return 1
        return collections.Counter(sizes).most_common(1)[0][0]

    def layers(pattern: str) -> int:
        return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in shapes) if m), default=0)

    llm, vit = r"lang_model\.model\.", r"embedding_layer\.vision_encoder\."
    perceiver, block = r"embedding_layer\.perceiver\.", r"layers\.\d+\."
    embedding = r"(lang_model\.model\.embed_tokens|embedding_layer)\.weight"
    sizes = {
        "vocab_size": size(embedding, 0),
        "width": size(rf"{llm}({block}input_layernorm|norm)\.weight", 0),
        "mlp_width": size(rf"{llm}{block}mlp\.gate_proj\.weight", 0),
        "num_layers": layers(rf"{llm}layers\.(\d+)\."),
        "tied_head": bool((config or {}).get("tie_word_embeddings", False)),  # a missing head is an error, not a tie
    }
    vision_width = size(rf"{vit}(to_patch_embedding\.3|transformer\.{block}0\.norm)\.weight", 0)
    head = ViTConfig().head_dim
    vision = ViTConfig(
        width=vision_width,
        num_layers=layers(rf"{vit}transformer\.layers\.(\d+)\."),
        num_heads=size(rf"{vit}transformer\.{block}0\.fn\.to_out\.0\.weight", 1) // head,
        mlp_width=size(rf"{vit}transformer\.{block}1\.fn\.net\.0\.weight", 0),
        tables=tuple(size(rf"{vit}pos_embedding\.{axis}_embed\.weight", 0) for axis in ("row", "col", "dep")),
    )
    resampler = PerceiverConfig(
        width=vision_width,
        num_latents=size(rf"{perceiver}latents", 0),
        num_layers=layers(rf"{perceiver}layers\.(\d+)\."),
        num_heads=size(rf"{perceiver}{block}0\.to_q\.weight", 0) // head,
        mlp_factor=size(rf"{perceiver}{block}1\.1\.weight", 0) // vision_width,
    )
    query_width, kv_width = (size(rf"{llm}{block}self_attn\.{x}_proj\.weight", 0) for x in "qk")
    if missing:
        raise ValueError(f"{path} is not a RadFM checkpoint: no tensor named {', '.join(missing)}")
    if config:
        attention = _attention_from_hf(config, sizes["width"], path)
        _check_rotary(shapes, attention["num_heads"], attention["head_dim"], path)
        return RadFMConfig(vision, resampler, DecoderConfig(**sizes, **attention))
    rotary = _check_rotary(shapes, 0, 0, path)
    if len(rotary) == 1:
        head_dim = rotary.pop()
    elif all(getattr(radfm_14b().llama, k) == v for k, v in sizes.items()):
        head_dim = radfm_14b().llama.head_dim
    else:
        raise ValueError(
            f"{path}: tensor shapes do not give the number of attention heads. Put the language model's config.json "
            "next to the file, or pass --config with a config.json (num_attention_heads) or a configs/*.py"
        )
    heads = {"num_heads": query_width // head_dim, "num_kv_heads": kv_width // head_dim, "head_dim": head_dim}
    return RadFMConfig(vision, resampler, DecoderConfig(**sizes, **heads))


def _check_rotary(shapes: Shapes, heads: int, head_dim: int, path) -> set[int]:
    """Return the head widths of the rotary buffers. Raises ValueError if they contradict `head_dim`, unless it is 0."""
    rotary = {2 * shape[0] for name, shape in shapes.items() if ROTARY.fullmatch(name) and len(shape) == 1}
    if rotary and head_dim and rotary != {head_dim}:
        raise ValueError(
            f"{path}: its rotary buffers are for heads of {sorted(rotary)}, but the config says {heads} heads of "
            f"{head_dim}"
        )
    return rotary
