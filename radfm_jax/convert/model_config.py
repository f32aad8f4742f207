"""Model sizes: read off the tensors of a file, off a Hugging Face config.json, or out of a config of ours."""

from __future__ import annotations

import collections
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

from radfm_jax.convert.table import ROTARY
from radfm_jax.models.decoder import DecoderConfig, RopeScaling
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig, radfm_14b
from radfm_jax.models.vit3d import ViTConfig

Shapes = Mapping[str, tuple[int, ...]]


def read_config(path) -> dict:
    """What a user's `--config` says: {"model": sizes of ours} of a configs/*.py or radfm.json, or a Hugging Face
    config.json as it is. Raises ValueError if it is neither."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {path} does not exist")
    if path.suffix == ".py":
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(f"config {path} has no get_config()")
        return {"model": module.get_config().model.to_dict()}
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"config {path} is not JSON: {e}") from None
    if not isinstance(config, dict) or not ({"model", "num_attention_heads", "num_key_value_heads"} & config.keys()):
        raise ValueError(f"config {path} has neither `model` (our sizes) nor `num_attention_heads` (Hugging Face)")
    return config


# --- Hugging Face's LLaMA config --------------------------------------------------------------------------------------


def llama_from_hf(config: dict, where) -> DecoderConfig:
    """config.json of a LLaMA folder, in the old form (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    missing = [k for k in needed if k not in config]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if config.get("model_type", "llama") != "llama":
        raise ValueError(f"{where} describes a {config['model_type']!r}, not a llama")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: activation {config['hidden_act']!r} is not LLaMA's silu")
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        tied_head=config.get("tie_word_embeddings", False),
        **_attention_from_hf(config, config["hidden_size"], where),
    )


def _attention_from_hf(config: dict, width: int, where) -> dict:
    """What no tensor shape tells: heads, RoPE and the norm's epsilon."""
    heads = config["num_attention_heads"]
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "llama3":
        parts = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        absent = [k for k in parts if k not in rope]
        if absent:
            raise ValueError(f"{where}: RoPE scaling llama3 lacks {', '.join(absent)}")
        scaling = RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise ValueError(f"{where}: RoPE scaling {kind!r} is not supported (default and llama3 are)")
    return {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or width // heads,
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "rope_scaling": scaling,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
    }


def llama_to_hf(config: DecoderConfig, dtype: str, source: dict | None = None) -> dict:
    """config.json for transformers, in the form that old and new versions read. `source`: the config.json that the
    model came with; what the network does not read (special tokens, context length) is kept from it."""
    scaling = config.rope_scaling
    rope_scaling = None
    if scaling is not None:
        rope_scaling = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    unread = {
        "max_position_embeddings": 2048 if scaling is None else int(scaling.original_context * scaling.factor),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **{k: v for k, v in (source or {}).items() if k not in ("rope_parameters", "dtype")},
    }
    return {
        **unread,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


# --- a released RadFM file --------------------------------------------------------------------------------------------


def radfm_from_shapes(shapes: Shapes, given: dict | None, where) -> RadFMConfig:
    """Sizes of a RadFM from the shapes of its tensors, completed by what shapes cannot tell.

    The number of heads comes from `given` (a config of ours or a Hugging Face one), from the rotary buffers if the file
    has them, or from the released model if every other size is its.

    Raises ValueError: no source for the heads, sources that disagree, or no tensor to read a size from.
    """
    if given and "model" in given:
        config = RadFMConfig.from_dict(given["model"])
        _check_rotary(shapes, config.llama.num_heads, config.llama.head_dim, where)
        return config
    absent = []

    def size(pattern: str, axis: int) -> int:
        """The commonest size among the layers, so that one misshapen tensor is reported as such."""
        found = [shape[axis] for name, shape in shapes.items() if re.fullmatch(pattern, name) and len(shape) > axis]
        if not found:
            absent.append(pattern.replace("\\", "").replace("d+", "*"))
            return 1
        return collections.Counter(found).most_common(1)[0][0]

    def layers(pattern: str) -> int:
        return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in shapes) if m), default=0)

    llm, vit = r"lang_model\.model\.", r"embedding_layer\.vision_encoder\."
    perceiver, block = r"embedding_layer\.perceiver\.", r"layers\.\d+\."
    embedding = r"(lang_model\.model\.embed_tokens|embedding_layer)\.weight"
    width = size(rf"{llm}({block}input_layernorm|norm)\.weight", 0)
    query_width = size(rf"{llm}{block}self_attn\.q_proj\.weight", 0)
    kv_width = size(rf"{llm}{block}self_attn\.k_proj\.weight", 0)
    sizes = {
        "vocab_size": size(embedding, 0),
        "width": width,
        "mlp_width": size(rf"{llm}{block}mlp\.gate_proj\.weight", 0),
        "num_layers": layers(rf"{llm}layers\.(\d+)\."),
        "tied_head": bool((given or {}).get("tie_word_embeddings", False)),  # a missing head is missing, not tied
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
    if absent:
        raise ValueError(f"{where} is not a RadFM checkpoint: no tensor named {', '.join(absent)}")
    attention = _attention(shapes, given, sizes, query_width, kv_width, where)
    return RadFMConfig(vision, resampler, DecoderConfig(**sizes, **attention))


def _check_rotary(shapes: Shapes, heads: int, head_dim: int, where) -> set[int]:
    """Head widths of the rotary buffers, which a config must not contradict (ValueError)."""
    rotary = {2 * shape[0] for name, shape in shapes.items() if ROTARY.fullmatch(name) and len(shape) == 1}
    if rotary and head_dim and rotary != {head_dim}:
        raise ValueError(
            f"{where}: its rotary buffers are for heads of {sorted(rotary)}, but the config says {heads} heads of "
            f"{head_dim}"
        )
    return rotary


def _attention(shapes, given, sizes, query_width: int, kv_width: int, where) -> dict:
    if given:
        attention = _attention_from_hf(given, sizes["width"], where)
        _check_rotary(shapes, attention["num_heads"], attention["head_dim"], where)
        return attention
    rotary = _check_rotary(shapes, 0, 0, where)
    if len(rotary) == 1:
        head_dim = rotary.pop()
    elif all(getattr(radfm_14b().llama, k) == v for k, v in sizes.items()):
        head_dim = radfm_14b().llama.head_dim
    else:
        raise ValueError(
            f"{where}: shapes cannot tell the number of attention heads. Put the language model's config.json beside "
            "the file, or pass --config with a config.json (num_attention_heads) or a configs/*.py"
        )
    return {"num_heads": query_width // head_dim, "num_kv_heads": kv_width // head_dim, "head_dim": head_dim}
