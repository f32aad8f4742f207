"""config.json of a Hugging Face language model <-> DecoderConfig.

Every key of the file is used by its family (families/families.py), is known to change nothing
(families/irrelevant.py), or is an error. A key that is absent has the default of the family's class in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from input_pipeline.field_rules import as_tuple, errors_of, field_problems, raise_problems, shown
from input_pipeline.files import nearest
from radfm_jax.convert.families import FAMILIES, Family
from radfm_jax.convert.families.irrelevant import NOT_KEPT, PLAIN, REASONS, REMEDIES
from radfm_jax.convert.families.rope import CONTEXT, long_context
from radfm_jax.models.computation import COMPUTE
from radfm_jax.models.decoder import DecoderConfig

# Models of several parts: model type -> (key of the language model's config, its model type, keys of the other parts).
COMPOSITES = {
    "gemma3": (
        "text_config", "gemma3_text",
        ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
    )
}  # fmt: skip
# Spellings that are read but not written.
READ_ONLY = ("rope_parameters",)


def language_model(config: Mapping, path) -> dict:
    """Return the config of the language model: the file's own, or the part of a vision-language model.

    Raises ValueError if the model type is unknown.
    """
    model_type = config.get("model_type")
    known = (*FAMILIES, *COMPOSITES)
    if model_type not in known:  # a tuple, since a wrong value need not be hashable
        raise ValueError(f"{path}: model_type {shown(model_type)} is not supported{nearest(model_type, known)}. "
                         f"Known: {', '.join(known)}")  # fmt: skip
    if model_type in FAMILIES:
        return dict(config)
    key, text_type, others = COMPOSITES[model_type]
    if not isinstance(text := config.get(key), Mapping):
        raise ValueError(f"{path}: {key} must be the config of the language model (got {shown(text)})")
    if text.get("model_type", text_type) != text_type:
        raise ValueError(f"{path}: {key}.model_type must be {text_type} (got {text['model_type']!r})")
    outer = {name: value for name, value in config.items() if name not in (key, *others)}
    tied = outer.pop("tie_word_embeddings", True)
    if text.get("tie_word_embeddings", tied) != tied:
        raise ValueError(f"{path}: tie_word_embeddings is {tied}, but {text['tie_word_embeddings']} in {key}: keep one")
    if unknown := [name for name in outer if name not in REASONS]:
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)} of a {model_type}")
    return {**outer, **text, "tie_word_embeddings": tied, "model_type": text_type}


def decoder_from_hf(config: Mapping, path) -> DecoderConfig:
    """Return the decoder of a config.json.

    Raises ValueError, with the file and the key, for an unknown model type or key, and for a value that is invalid or
    not implemented.
    """
    config = {key: as_tuple(value) for key, value in language_model(config, path).items()}
    family = FAMILIES[config["model_type"]]
    with errors_of(path):
        raise_problems(_problems(config, family))
        return family.read(_values(config, family))


def _values(config: Mapping, family: Family) -> dict[str, Any]:
    """Return the values of all keys that the family reads. Null is the default, unless null has a meaning."""
    values = {key: default for key, (default, _) in family.keys.items()}
    stated = {key: config[key] for key in values if key in config}
    has_meaning = lambda key: not any(field_problems(None, family.keys[key][1], key))  # noqa: E731
    return values | {key: value for key, value in stated.items() if value is not None or has_meaning(key)}


def _problems(config: Mapping, family: Family) -> Iterator[str]:
    """Yield what is wrong with single keys: unknown, of another type, or with a value that is not implemented."""
    only = {**PLAIN, **family.only}
    known = (*family.keys, *only)
    unknown = [key for key in config if key not in (*known, *family.irrelevant, *REASONS)]
    if unknown:
        yield (
            f"unknown keys {', '.join(f'{key}{nearest(key, known)}' for key in unknown)}. Known keys of "
            f"{family.model_type}: {', '.join(known)}. Remove a key only if it does not change the network"
        )
    for key, value in config.items():
        if key in only and value not in only[key]:
            remedy = f": {REMEDIES[key]}" if key in REMEDIES else f" ({' and '.join(map(str, only[key]))} supported)"
            yield f"{key} {shown(value)} is not supported{remedy}"
        elif key in family.keys and value is not None:
            yield from field_problems(value, family.keys[key][1], key)


def decoder_to_hf(config: DecoderConfig, dtype: str, source: Mapping | None = None) -> dict:
    """Return a config.json that old and new versions of transformers read.

    Args:
      source: the config.json that the weights come from, or some of its keys. Its model type is tried first, and its
        values that do not change the network are kept.
    Raises:
      ValueError: no family can state this decoder. The message lists the fields that each of them lacks.
    """
    source = dict(source or {})
    first = source.get("model_type")
    order = sorted(FAMILIES.values(), key=lambda family: family.model_type != first)  # stable
    problems = []
    for family in order:
        hf = _stated(config, family, source if family.model_type == first else {}, dtype)
        if lacking := _lacking(config, hf):
            problems.append(f"{family.model_type}: {lacking}")
            continue
        kept = {key: value for key, value in source.items() if key in REASONS and key not in NOT_KEPT}
        return {**kept, **hf}
    raise ValueError("no model type of transformers has this decoder:\n  " + "\n  ".join(problems))


def _stated(config: DecoderConfig, family: Family, source: Mapping, dtype: str) -> dict[str, Any]:
    """Return a config.json of a family; `source` has the original one of the same family, or nothing."""
    kept = {key: value for key, value in source.items() if key not in (*NOT_KEPT, *READ_ONLY)}
    context = long_context(config, family.keys[CONTEXT][0])
    return {
        CONTEXT: context,
        **kept,
        **family.write(config, source),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
    }


def _lacking(config: DecoderConfig, hf: Mapping) -> str:
    """Return the fields of a decoder that its config.json does not state; "" if it states all of them."""
    try:
        again = decoder_from_hf(hf, "config.json")
    except ValueError as e:
        return str(e)
    fields = [f.name for f in dataclasses.fields(config) if f.name not in COMPUTE]
    differ = [name for name in fields if getattr(again, name) != getattr(config, name)]
    return ", ".join(f"{name} {getattr(config, name)!r} would be {getattr(again, name)!r}" for name in differ)
