"""The sizes of a RadFM: from the tensors of a file, from a config.json, or from a config of this project.

Tensor shapes do not show the numbers of attention heads, the sides of a patch, RoPE or the norm's epsilon. A config
states them. Without a config, the released values are used if every other size is the released one.
"""

from __future__ import annotations

import collections
import re
import runpy
from collections.abc import Mapping
from pathlib import Path

from input_pipeline.config import DataConfig
from input_pipeline.files import read_json
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert.hf_config import decoder_from_hf
from radfm_jax.convert.table import ROTARY
from radfm_jax.inference import stored
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.radfm import RadFMConfig, radfm_14b

Shapes = Mapping[str, tuple[int, ...]]

# The sizes of each part that tensor shapes do not show.
HIDDEN_SIZES = {
    "vision": ("num_heads", "head_dim", "patch", "channels"),
    "perceiver": ("num_heads", "head_dim"),
    "llama": ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "norm_eps"),
}
REMEDY = (
    "pass --config with the configs/*.py of the model, or with a config.json that `to-torch` wrote; the language "
    "model's config.json of Hugging Face has only the sizes of llama"
)


def read_config(path) -> dict:
    """Return {"model": sizes, "preparation": ...} of a configs/*.py, or the content of a JSON file.

    JSON files are the config.json of an export, a checkpoint's radfm.json, or a config.json of Hugging Face, whose keys
    `hf_config` checks. Raises ValueError for a file that is missing or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {path} does not exist")
    if path.suffix == ".py":
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise ValueError(f"config {path} has no get_config()")
        config = get_config()
        preparation = stored.to_record(stored.Preparation.from_data(DataConfig.from_dict(config.data).to_dict()))
        return {"model": config.model.to_dict(), stored.KEY: preparation}
    config = read_json(path)
    if not isinstance(config, dict) or not ({"model", "model_type", "num_attention_heads"} & config.keys()):
        raise ValueError(f"config {path} has neither `model` (radfm_jax) nor `model_type` (Hugging Face)")
    return config


def config_next_to(path) -> Path | None:
    """Return the config of a weight file or folder: x.config.json next to x.bin, else config.json; None without one."""
    path = Path(path)
    if path.is_dir():
        candidates = [path / "config.json"]
    else:
        candidates = [path.with_suffix(".config.json"), path.with_name("config.json")]
    return next((p for p in candidates if p.is_file()), None)


def radfm_from_model(model: Mapping, path, parts: tuple[str, ...] = tuple(HIDDEN_SIZES)) -> RadFMConfig:
    """Return the sizes in a config's `model`. Raises ValueError if it lacks one that tensor shapes do not show."""
    if isinstance(model, Mapping):  # PyTorch weights have no adapters and no quantised base
        model = {name: fields for name, fields in model.items() if name not in checkpoint.OPTIONS}
    if not isinstance(model, Mapping) or not all(isinstance(fields, Mapping) for fields in model.values()):
        raise ValueError(f"the config of {path}: `model` must have the parts {', '.join(parts)} with their sizes")
    if missing := [f"{p}.{n}" for p in parts for n in HIDDEN_SIZES[p] if n not in model.get(p, {})]:
        raise ValueError(f"the config of {path} lacks {', '.join(missing)}, which tensor shapes do not give")
    return RadFMConfig.from_dict(model)


def radfm_from_shapes(shapes: Shapes, config: dict | None, path) -> RadFMConfig:
    """Return the sizes of a RadFM from the shapes of its tensors and from `config` (of `read_config`).

    Raises ValueError if a size is in neither of them, or if they disagree.
    """
    if config and "model" in config:
        sizes = radfm_from_model(config["model"], path)
        check_rotary(shapes, sizes.llama, path)
        return sizes
    released = radfm_14b()
    sizes, known = _sizes_of_tensors(shapes, path), _sizes_of_config(released)
    parts = {part: getattr(released, part) for part in HIDDEN_SIZES if sizes[part] == known[part]}
    if not {"vision", "perceiver"} <= parts.keys():  # the two share a width
        parts = {k: v for k, v in parts.items() if k == "llama"}
    if config:
        parts["llama"] = _decoder_of_tensors(sizes["llama"], config, path)
    if unknown := [f"{p}.{n}" for p in HIDDEN_SIZES if p not in parts for n in HIDDEN_SIZES[p]]:
        raise ValueError(
            f"{path}: tensor shapes do not give the number of attention heads and other sizes ({', '.join(unknown)}), "
            f"and this is not a model of the released sizes: {REMEDY}"
        )
    check_rotary(shapes, parts["llama"], path)
    return RadFMConfig(**parts)


def _decoder_of_tensors(sizes: Mapping, config: Mapping, path) -> DecoderConfig:
    """Return the decoder of a config.json, with the sizes that tensors show. Without a model type it is a LLaMA."""
    keys = {"vocab_size": "vocab_size", "width": "hidden_size", "mlp_width": "intermediate_size",
            "num_layers": "num_hidden_layers"}  # fmt: skip
    shown = {key: sizes[field] for field, key in keys.items()}
    return decoder_from_hf({"model_type": "llama", **config, **shown}, path)


def _sizes_of_config(config: RadFMConfig) -> dict[str, dict]:
    """Return those sizes of a config that `_sizes_of_tensors` returns for a file, in the same form."""
    vision, perceiver, llama = config.vision, config.perceiver, config.llama
    return {
        "vision": {
            "width": vision.width, "num_layers": vision.num_layers, "inner": vision.num_heads * vision.head_dim,
            "mlp_width": vision.mlp_width, "patch_size": vision.patch_size, "tables": vision.tables,
        },
        "perceiver": {
            "width": perceiver.width, "num_latents": perceiver.num_latents, "num_layers": perceiver.num_layers,
            "inner": perceiver.num_heads * perceiver.head_dim, "mlp_width": perceiver.mlp_factor * perceiver.width,
        },
        "llama": {
            "vocab_size": llama.vocab_size, "width": llama.width, "mlp_width": llama.mlp_width,
            "num_layers": llama.num_layers, "query_width": llama.num_heads * llama.head_dim,
            "key_width": llama.num_kv_heads * llama.head_dim,
        },
    }  # fmt: skip


def _sizes_of_tensors(shapes: Shapes, path) -> dict[str, dict]:
    """Return the sizes of each part that tensor shapes show. Raises ValueError listing the missing tensors."""
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
    vision_width = size(rf"{vit}(to_patch_embedding\.3|transformer\.{block}0\.norm)\.weight", 0)
    sizes = {
        "vision": {
            "width": vision_width,
            "num_layers": layers(rf"{vit}transformer\.layers\.(\d+)\."),
            "inner": size(rf"{vit}transformer\.{block}0\.fn\.to_out\.0\.weight", 1),
            "mlp_width": size(rf"{vit}transformer\.{block}1\.fn\.net\.0\.weight", 0),
            "patch_size": size(rf"{vit}to_patch_embedding\.1\.weight", 0),
            "tables": tuple(size(rf"{vit}pos_embedding\.{axis}_embed\.weight", 0) for axis in ("row", "col", "dep")),
        },
        "perceiver": {
            "width": vision_width,
            "num_latents": size(rf"{perceiver}latents", 0),
            "num_layers": layers(rf"{perceiver}layers\.(\d+)\."),
            "inner": size(rf"{perceiver}{block}0\.to_q\.weight", 0),
            "mlp_width": size(rf"{perceiver}{block}1\.1\.weight", 0),
        },
        "llama": {
            "vocab_size": size(r"(lang_model\.model\.embed_tokens|embedding_layer)\.weight", 0),
            "width": size(rf"{llm}({block}input_layernorm|norm)\.weight", 0),
            "mlp_width": size(rf"{llm}{block}mlp\.gate_proj\.weight", 0),
            "num_layers": layers(rf"{llm}layers\.(\d+)\."),
            "query_width": size(rf"{llm}{block}self_attn\.q_proj\.weight", 0),
            "key_width": size(rf"{llm}{block}self_attn\.k_proj\.weight", 0),
        },
    }
    if missing:
        raise ValueError(f"{path} is not a RadFM checkpoint: no tensor named {', '.join(missing)}")
    return sizes


def check_rotary(shapes: Shapes, llama: DecoderConfig, path) -> None:
    """Raise ValueError if the rotary buffers of a file do not fit the head width of the config."""
    rotary = {2 * shape[0] for name, shape in shapes.items() if ROTARY.fullmatch(name) and len(shape) == 1}
    if rotary and rotary != {llama.head_dim}:
        raise ValueError(
            f"{path}: its rotary buffers are for heads of {sorted(rotary)}, but the config says {llama.num_heads} "
            f"heads of {llama.head_dim}"
        )
