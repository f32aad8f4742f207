"""The config.json of an exported RadFM (code/configuration_radfm.py) <-> RadFMConfig.

`text_config` is the config.json of the language model in transformers, `vision_config` that of the encoder if
transformers has it. Other parts have our sizes. Every key is used, known to change nothing, or an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from input_pipeline.field_rules import as_tuple, errors_of, raise_problems
from radfm_jax import __version__
from radfm_jax.convert import hf_config, vision_config
from radfm_jax.convert.families.irrelevant import PLAIN, REASONS
from radfm_jax.inference import stored
from radfm_jax.models.computation import COMPUTE
from radfm_jax.models.encoders.slices import SliceConfig
from radfm_jax.models.radfm import RadFMConfig

MODEL_TYPE, OWN_VISION, VERSION = "radfm_jax", "radfm_vision", "code_version"
ARCHITECTURE = "RadFMForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_radfm.RadFMConfig",
    "AutoModelForCausalLM": f"modeling_radfm.{ARCHITECTURE}",
    "AutoModelForImageTextToText": f"modeling_radfm.{ARCHITECTURE}",
    "AutoProcessor": "processing_radfm.RadFMProcessor",
}
PARTS = ("text_config", "vision_config", "bridge_config")
SLICE_KEYS = {"depth_positions": "depth_positions", "image_mean": "mean", "image_std": "std"}
IDS = ("vocab_size", "image_start_token_id", "image_end_token_id", "image_token_id")


def is_export(config: Any) -> bool:
    """Return whether a config.json is that of an exported RadFM with code for transformers."""
    return isinstance(config, Mapping) and config.get("model_type") == MODEL_TYPE and "text_config" in config


def write_config(config: RadFMConfig, dtype: str, source: Mapping | None = None) -> dict[str, Any]:
    """Return the config.json of an export, without the preparation and the origin.

    Args:
      source: the config.json of the language model that the weights come from, or some of its keys.
    Raises:
      ValueError: transformers has no class for this language model, or none for this vision encoder.
    """
    text = hf_config.decoder_to_hf(config.llama, dtype, source)
    text.pop("auto_map", None)  # the class of transformers is used, not code of the source
    # Without a tokenizer they are unknown, and the defaults of a class may be beyond the vocabulary.
    text = {**dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), **text}
    size = config.llama.vocab_size
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        VERSION: __version__,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": _write_vision(config),
        "bridge_config": _sizes(config.perceiver, "width"),
        **dict(zip(IDS, (size + 3, size, size + 1, size + 2), strict=True)),
    }


def _write_vision(config: RadFMConfig) -> dict[str, Any]:
    vision = config.vision
    if not isinstance(vision, SliceConfig):
        return {"model_type": OWN_VISION, **_sizes(vision)}
    own = {key: getattr(vision, field) for key, field in SLICE_KEYS.items()}
    return vision_config.write_config(vision) | {k: list(x) if isinstance(x, tuple) else x for k, x in own.items()}


def _sizes(part, *without: str) -> dict[str, Any]:
    """Return the fields of a part of the model that are not settings of the computation."""
    fields = {k: list(x) if isinstance(x, tuple) else x for k, x in part.to_dict().items()}
    return {key: value for key, value in fields.items() if key not in (*COMPUTE, *without)}


def read_config(hf: Mapping, path) -> RadFMConfig:
    """Return the sizes that the config.json of an export states.

    Raises:
      ValueError: a newer version wrote it, a key is missing or unknown, or a value is invalid or not supported. The
        message has the file and the key.
    """
    raise_problems(f"{path}: {problem}" for problem in _problems(hf))
    text, vision, bridge = ({k: as_tuple(v) for k, v in hf[name].items()} for name in PARTS)
    with errors_of(path):
        own = vision.get("model_type") == OWN_VISION
        vision = _without(vision, *REASONS, *PLAIN) if own else _read_slices(vision)
        sizes = {"vision": vision, "perceiver": {**bridge, "width": vision.get("width")}}
        llama = hf_config.decoder_from_hf(text, "text_config")
        config = RadFMConfig.from_dict({**sizes, "llama": llama.to_dict()})
        wanted = {"bridge_config": _sizes(config.perceiver, "width"), "vision_config": _sizes(config.vision)}
        if not own:
            wanted["vision_config"] = SLICE_KEYS
        if missing := [f"{name}.{key}" for name, keys in wanted.items() for key in keys if key not in hf[name]]:
            raise ValueError(f"{', '.join(missing)} are missing: export the model again")
    return config


def _problems(hf: Mapping):
    known = (*PARTS, *IDS, VERSION, stored.KEY, stored.ORIGIN, "auto_map")
    for name in (*PARTS, VERSION):
        if name not in hf:
            yield f"{name} is missing: export the model again"
        elif name in PARTS and not isinstance(hf[name], Mapping):
            yield f"{name} must be a mapping (got {hf[name]!r})"
    if unknown := [key for key in hf if key not in (*known, *REASONS, *PLAIN)]:
        yield f"unknown keys {', '.join(unknown)}: remove them if they do not change the network, or update radfm_jax"
    if _newer(hf.get(VERSION)):
        yield f"{VERSION} is {hf[VERSION]}, but this is radfm_jax {__version__}: update radfm_jax"
    size = hf["text_config"].get("vocab_size") if isinstance(hf.get("text_config"), Mapping) else None
    for name, value in zip(IDS, (3, 0, 1, 2), strict=True):
        if isinstance(size, int) and hf.get(name, size + value) != size + value:
            yield f"{name} is {hf[name]}, but must be {size + value} for text_config.vocab_size {size}"


def _newer(version: Any) -> bool:
    numbers = lambda text: [int(x) for x in str(text).split(".") if x.isdigit()]  # noqa: E731
    return numbers(version) > numbers(__version__)


def _read_slices(fields: Mapping) -> dict[str, Any]:
    own = {field: fields[key] for key, field in SLICE_KEYS.items() if key in fields}
    config = vision_config.read_config(_without(fields, *SLICE_KEYS), "vision_config")
    return dataclasses.replace(config, **own).to_dict()


def _without(fields: Mapping, *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}
