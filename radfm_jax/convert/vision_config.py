"""Hugging Face's config.json of a vision encoder -> our config, and position tables for another image size.

Every key is used, known not to change the features, or an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from input_pipeline.field_rules import raise_problems, shown
from radfm_jax.models.computation import COMPUTE
from radfm_jax.models.encoders.ctvit import CTViTConfig
from radfm_jax.models.encoders.dinov2 import Dinov2Config
from radfm_jax.models.encoders.kinds import VisionConfig
from radfm_jax.models.encoders.siglip import SiglipConfig
from radfm_jax.models.encoders.slices import SliceConfig

# Models whose config.json describes the encoder in `vision_config`.
WITH_VISION_CONFIG = ("siglip", "gemma3", "paligemma")

# Key -> value if the key is absent, as in transformers. Keys of each encoder that its features depend on.
_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
          "layer_norm_eps": 1e-6, "image_size": 224}  # fmt: skip
_DINOV2 = {**_SIZES, "patch_size": 14, "hidden_act": "gelu", "mlp_ratio": 4, "qkv_bias": True, "use_swiglu_ffn": False}
_CTVIT = {
    "dim": 512, "codebook_size": 8192, "image_size": 480, "patch_size": 20, "temporal_patch_size": 10,
    "spatial_depth": 4, "temporal_depth": 4, "dim_head": 32, "heads": 8, "channels": 1,
}  # fmt: skip
USED: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {**_SIZES, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 3072},
    "dinov2": _DINOV2,
    "dinov2_with_registers": {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
    "ctvit": _CTVIT,
}
SLICE_SIZES = {
    "hidden_size": "width", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "image_size": "image_size", "num_channels": "channels", "layer_norm_eps": "norm_eps",
}  # fmt: skip
SIGLIP_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Keys that the features of patches do not depend on: training, heads, bookkeeping.
IRRELEVANT = frozenset({
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "base_config_key",
    "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "drop_path_rate", "layerscale_value", "vision_use_head", "projection_dim",
    "apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names", "use_mask_token",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_attentions", "output_hidden_states",
    "torchscript", "use_bfloat16", "chunk_size_feed_forward", "is_encoder_decoder", "gradient_checkpointing",
    "codebook_decay", "attn_dropout", "ff_dropout", "use_vgg_and_gan", "num_image_tokens",
})  # fmt: skip
# Keys of older files, with the only value that changes nothing.
PLAIN = {"add_cross_attention": False, "is_decoder": False, "pruned_heads": {}, "tf_legacy_loss": False,
         "cross_attention_hidden_size": None, "tie_encoder_decoder": False, "tie_word_embeddings": True,
         "finetuning_task": None, "task_specific_params": None, "prefix": None, "tokenizer_class": None}  # fmt: skip
GENERATION = frozenset(
    "bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty forced_bos_token_id "
    "forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_scores pad_token_id remove_invalid_values repetition_penalty return_dict_in_generate "
    "sep_token_id suppress_tokens temperature top_k top_p typical_p".split()
)


def read_config(config: Mapping, path, preprocessor: Mapping | None = None) -> VisionConfig:
    """Return the encoder that a config.json describes.

    Args:
      config: the content of config.json. Encoders of CT-CLIP have none: write one with `"model_type": "ctvit"` and the
        arguments of CTViT that differ from CT-CLIP's.
      path: of the file, for messages.
      preprocessor: the content of preprocessor_config.json, with the mean and deviation of the voxels; None keeps
        those of the encoder's family.
    Raises:
      ValueError: an unknown `model_type`, or all keys and values that are not supported.
    """
    kind, fields = config.get("model_type"), config
    if kind in WITH_VISION_CONFIG:
        fields = config.get("vision_config") or {}
        if not isinstance(fields, Mapping):
            raise ValueError(f"{path}: vision_config must be the config of the encoder (got {shown(fields)})")
        kind = fields.get("model_type", "siglip_vision_model")
    if kind not in tuple(USED):  # a tuple, since a wrong value need not be hashable
        more = "; SigLIP 2 with variable resolution (naflex) is not supported" if "siglip2" in str(kind) else ""
        known = ", ".join([*USED, *WITH_VISION_CONFIG])
        raise ValueError(f"{path}: model_type {shown(kind)} is not a supported vision encoder; known: {known}{more}")
    raise_problems(f"{path}: {problem}" for problem in _unsupported(fields, USED[kind]))
    values = {key: fields[key] if fields.get(key) is not None else value for key, value in USED[kind].items()}
    for key in ("image_size", "patch_size"):
        if isinstance(values[key], list | tuple) and values[key] and all(x == values[key][0] for x in values[key]):
            values[key] = values[key][0]
    try:
        result = _READERS[kind](values)
        return result if preprocessor is None else _with_preprocessor(result, preprocessor)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _unsupported(fields: Mapping, used: Mapping):
    for key, value in fields.items():
        if key in used or key in IRRELEVANT or key in GENERATION or key.startswith("_"):
            continue
        if key not in PLAIN:
            yield f"key {key!r} ({shown(value)}) is not known; known: {', '.join(sorted(used))}"
        elif value != PLAIN[key]:
            yield f"key {key!r} must be {PLAIN[key]!r} (got {shown(value)})"


def _slice_sizes(values: Mapping) -> dict[str, Any]:
    sizes = {field: values[key] for key, field in SLICE_SIZES.items()}
    return sizes | {"patch": (values["patch_size"], values["patch_size"], 1)}


def _siglip(values: Mapping) -> SiglipConfig:
    known = SIGLIP_ACTIVATIONS
    if values["hidden_act"] not in known:
        raise ValueError(f"key 'hidden_act' must be one of {', '.join(known)} (got {shown(values['hidden_act'])})")
    mlp = {"mlp": known[values["hidden_act"]], "mlp_width": values["intermediate_size"]}
    return SiglipConfig(**_slice_sizes(values), **mlp)


def _dinov2(values: Mapping) -> Dinov2Config:
    hidden = int(values["hidden_size"] * values["mlp_ratio"])
    if values["use_swiglu_ffn"]:
        mlp = {"mlp": "swiglu", "mlp_width": _swiglu_width(hidden)}
    elif values["hidden_act"] == "gelu":
        mlp = {"mlp": "gelu", "mlp_width": hidden}
    else:
        raise ValueError(f"key 'hidden_act' must be gelu (got {shown(values['hidden_act'])})")
    return Dinov2Config(
        **_slice_sizes(values), **mlp, qkv_bias=values["qkv_bias"], registers=values.get("num_register_tokens", 0)
    )


def _ctvit(values: Mapping) -> CTViTConfig:
    return CTViTConfig(
        width=values["dim"],
        spatial_layers=values["spatial_depth"],
        temporal_layers=values["temporal_depth"],
        num_heads=values["heads"],
        head_dim=values["dim_head"],
        mlp_width=int(4 * (2 / 3) * values["dim"]),
        image_size=values["image_size"],
        patch=(values["patch_size"], values["patch_size"], values["temporal_patch_size"]),
        channels=values["channels"],
        codebook=values["codebook_size"],
    )


_READERS = {
    "siglip_vision_model": _siglip, "dinov2": _dinov2, "dinov2_with_registers": _dinov2, "ctvit": _ctvit,
}  # fmt: skip


def write_config(config: SliceConfig) -> dict[str, Any]:
    """Return the config.json of an encoder in transformers: the inverse of `read_config` but for mean and deviation.

    Raises:
      ValueError: transformers' class cannot have these sizes.
    """
    hf = {key: getattr(config, field) for key, field in SLICE_SIZES.items()} | {"patch_size": config.patch[0]}
    if isinstance(config, SiglipConfig):
        hf |= {"model_type": "siglip_vision_model", "intermediate_size": config.mlp_width, "vision_use_head": False}
        hf["hidden_act"] = {ours: key for key, ours in SIGLIP_ACTIVATIONS.items()}[config.mlp]
    elif isinstance(config, Dinov2Config):
        registers = {"num_register_tokens": config.registers} if config.registers else {}
        kind = "dinov2_with_registers" if registers else "dinov2"
        hf |= {"model_type": kind, "qkv_bias": config.qkv_bias, "use_swiglu_ffn": config.mlp == "swiglu", **registers}
        hf |= {"mlp_ratio": _mlp_ratio(config)} | ({} if registers else {"use_mask_token": False})
    else:
        raise ValueError(f"transformers has no vision encoder of the kind {config.kind}")
    own = {name: getattr(config, name) for name in ("depth_positions", "mean", "std", *COMPUTE)}
    again = dataclasses.replace(read_config(hf, "config.json"), **own)
    assert again == config, (again, config)
    return hf


def _mlp_ratio(config: Dinov2Config) -> int:
    """Return the factor of the MLP's width; transformers' DINOv2 accepts an integer only."""
    for ratio in range(1, 2 * config.mlp_width // config.width + 2):
        hidden = config.width * ratio
        if config.mlp_width == (_swiglu_width(hidden) if config.mlp == "swiglu" else hidden):
            return ratio
    raise ValueError(
        f"transformers' DINOv2 cannot have model.vision.mlp_width {config.mlp_width} with width {config.width}: its "
        "mlp_ratio must be an integer"
    )


def _swiglu_width(hidden: int) -> int:
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _with_preprocessor(config: VisionConfig, preprocessor: Mapping) -> VisionConfig:
    """Return the config with `image_mean` and `image_std`. Sizes and resampling are those of the data pipeline."""
    if not isinstance(config, SliceConfig):
        return config
    if not preprocessor.get("do_normalize", True):
        return dataclasses.replace(config, mean=(0.0,) * config.channels, std=(1.0,) * config.channels)
    if abs(preprocessor.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6 or not preprocessor.get("do_rescale", True):
        raise ValueError("preprocessor_config.json: rescale_factor must be 1/255, which makes voxels 0 to 1")
    stated = {ours: preprocessor.get(key) for ours, key in (("mean", "image_mean"), ("std", "image_std"))}
    return dataclasses.replace(config, **{k: tuple(map(float, v)) for k, v in stated.items() if v is not None})


def resized(
    config: SliceConfig, positions: np.ndarray, image_size: int, interpolate: bool = False
) -> tuple[SliceConfig, np.ndarray]:
    """Return an encoder for another image size, with its table of positions [class token + N, D].

    Args:
      interpolate: interpolate the positions in rows and columns as transformers does (bicubic; with antialiasing for
        encoders with registers).
    Raises:
      ValueError: the sizes differ and `interpolate` is False, or `image_size` is not a multiple of the patch.
    """
    if image_size == config.image_size:
        return config, positions
    if not interpolate:
        raise ValueError(
            f"the encoder has positions for images of {config.image_size} x {config.image_size} pixels, not of "
            f"{image_size} x {image_size}: use that size, or interpolate the positions"
        )
    result = dataclasses.replace(config, image_size=image_size)
    # Only Dinov2WithRegisters interpolates with antialiasing.
    matrix = _bicubic(config.tables[0], result.tables[0], antialias=config.registers > 0)
    first, patches = np.split(positions.astype(np.float32), [int(config.class_token)])
    grid = patches.reshape(*config.tables[:2], -1)
    grid = np.einsum("ai,bj,ijd->abd", matrix, matrix, grid).astype(np.float32)
    return result, np.concatenate([first, grid.reshape(-1, grid.shape[-1])])


def _bicubic(source: int, target: int, antialias: bool) -> np.ndarray:
    """Return PyTorch's bicubic interpolation along an axis, float64[target, source].

    Without antialiasing, the cubic has a = -0.75 and entries beyond the border repeat the last one. With antialiasing,
    a = -0.5, the kernel widens when shrinking, and weights beyond the border are dropped.
    """
    scale = source / target
    a, stretch = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    center = (np.arange(target) + 0.5) * scale - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(center).astype(int)[:, None] + np.arange(-reach, reach + 1)
    x = np.abs(taps - center[:, None]) / stretch
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        weights = np.where((taps >= 0) & (taps < source), weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], np.clip(taps, 0, source - 1)), weights)
    return matrix
