"""Remove the prefixes of torch's wrappers from tensor names, and find out which kind of model a file has."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Path components that torch's wrappers insert: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LLM, EMBEDDING_LAYER = "lang_model.", "embedding_layer."
# A tensor name that every model of a part has, after the prefix that all its names share.
ANCHORS = ("lang_model.model.norm.weight", "model.norm.weight")


# Vision-language models of transformers: the prefixes of the language model, of old and new versions, and other parts.
LANGUAGE = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."))  # fmt: skip
OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..+")


def plain_names(names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Return {name in the file: name without wrappers}, and the plain names of parts that are no language model.

    The language model of a RadFM or of a vision-language model gets the names of a LLaMA. Raises ValueError if two
    names become equal.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    prefix = _common_prefix(plain.values())
    plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    starts = lambda part: any(name.startswith(part) for name in plain.values())  # noqa: E731
    if starts(LLM) and not starts(EMBEDDING_LAYER):
        plain = {name: short.removeprefix(LLM) for name, short in plain.items()}
    elif any(starts(prefix) for prefix, _ in LANGUAGE):
        plain = {name: _language_name(short) for name, short in plain.items()}
    if len(set(plain.values())) < len(plain):
        first: dict[str, str] = {}
        twice = [f"{first[s]} and {n}" for n, s in plain.items() if first.setdefault(s, n) != n]
        raise ValueError(f"has tensors whose names are equal without the prefixes of wrappers: {', '.join(twice[:5])}")
    return plain, {name for name in plain.values() if OTHER_PARTS.fullmatch(name)}


def _language_name(name: str) -> str:
    for prefix, plain in LANGUAGE:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def module_of(name: str) -> str:
    """Return the module of a tensor of `OTHER_PARTS`."""
    match = OTHER_PARTS.fullmatch(name)
    return match[2] if match else name


def part_of(names: Iterable[str]) -> str:
    """Return which model has these `plain_names`: `llama` for a language model alone, else `radfm`."""
    names = set(names)
    if any(n.startswith((LLM, EMBEDDING_LAYER)) for n in names):
        return "radfm"
    names = {n for n in names if not OTHER_PARTS.fullmatch(n)}
    return "llama" if any(n.startswith("model.layers.") or n == "model.embed_tokens.weight" for n in names) else "radfm"


def _common_prefix(names: Iterable[str]) -> str:
    """Return the prefix that all names share, such as `model.` in checkpoints of Lightning."""
    names = list(names)
    for anchor in ANCHORS:
        for prefix in (n.removesuffix(anchor) for n in names if n.endswith(anchor)):
            if prefix.endswith(".") and not prefix.endswith(LLM) and all(n.startswith(prefix) for n in names):
                return prefix
    return ""
