"""Variants of a config that train adapters: `--config=configs/adapt.py:lora` and `--config=configs/adapt.py:qlora`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from radfm_jax.models.lora import LoraConfig

VARIANTS = {"lora": "bfloat16", "qlora": "nf4"}  # variant of a config: how it holds the frozen language model


def with_variants(get_config: Callable[..., ConfigDict]) -> Callable[..., ConfigDict]:
    """Decorate the get_config of a config: FILE:qlora, or FILE:qlora,DIR where FILE:DIR sets its directory."""

    @functools.wraps(get_config)
    def variant(argument: str = "") -> ConfigDict:
        method, _, root = argument.partition(",")
        if method not in VARIANTS:
            method, root = "", argument
        config = get_config(root) if root else get_config()
        return with_adapters(config, VARIANTS[method]) if method else config

    return variant


def with_adapters(config: ConfigDict, base: str, rank: int = 16) -> ConfigDict:
    """Return a config that trains adapters of the language model, which is held in `base` (models/quantised.py).

    Each micro-batch has one row, to save memory. The learning rate of adapters is ten times that of the other parts, as
    is common.
    """
    config = config.copy_and_resolve_references().unlock()
    config.model.base = base
    lora = LoraConfig(rank=rank, alpha=2.0 * rank, dropout=0.05)
    config.model.lora = ConfigDict(dataclasses.asdict(lora), convert_dict=True)
    config.optimizer.frozen = tuple(dict.fromkeys((*config.optimizer.frozen, "llama")))
    config.train.accumulation = config.train.batch
    rate, others = max(config.optimizer.learning_rate, 2e-4), config.optimizer.learning_rate
    config.optimizer.learning_rate = rate
    parts = ("vit", "perceiver", "projection", "image_marks")
    config.optimizer.rates = ConfigDict(dict.fromkeys(parts, others / rate) | config.optimizer.rates.to_dict())
    return config.lock()
