"""adapter_config.json of PEFT <-> LoraConfig.

Every key of a file is read, is known to change nothing, or must be off: null, false or empty. Versions of PEFT add keys
for new variants, which are off by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from input_pipeline.field_rules import Size, above, as_tuple, errors_of, field_problems, raise_problems, share, shown
from input_pipeline.files import read_json
from radfm_jax.models.lora import LoraConfig

FILE = "adapter_config.json"
NAME = "base_model_name_or_path"
Ratio = Annotated[float, above(0)]
# Keys that are read: default of PEFT, type and rule.
KEYS: dict[str, tuple[Any, Any]] = {
    "r": (8, Size), "lora_alpha": (8, Ratio), "lora_dropout": (0.0, Annotated[float, share(zero=True, one=False)]),
    "use_rslora": (False, bool), "target_modules": (None, tuple[str, ...] | str | None), NAME: (None, str | None),
    "rank_pattern": ({}, dict[str, Size]), "alpha_pattern": ({}, dict[str, Ratio]),
}  # fmt: skip
ONLY = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Other values change the weights of the base when an adapter is made.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
REMEDIES = {"init_lora_weights": "it changes the base: save the adapter with path_initial_model_for_weight_conversion"}
# Keys that must be off, and why.
OFF = {
    "use_dora": "DoRA also trains a magnitude per output",
    "modules_to_save": "the folder has whole trained modules",
    "lora_bias": "B has a bias",
    "fan_in_fan_out": "the base has no Conv1D",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "parameters without a linear layer were adapted",
    "use_qalora": "inputs are pooled",
}
# The tensors show what these select, or they matter only during training.
IRRELEVANT = (
    "auto_mapping", "revision", "peft_version", "inference_mode", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "corda_config", "loftq_config",
    "lora_ga_config", "runtime_config", "ensure_weight_tying",
)  # fmt: skip


def read(folder) -> dict[str, Any]:
    """Return the contents of an adapter's config, with a value for every key of `KEYS`.

    Raises ValueError that lists every key whose value is invalid or not supported.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE}: pass the folder that PEFT's save_pretrained wrote")
    config = read_json(path, kind=dict)
    values = {key: default for key, (default, _) in KEYS.items()}
    values |= {key: value for key, value in config.items() if not (value is None and key in KEYS)}
    with errors_of(path):
        raise_problems(_problems(values))
    return values


def _problems(config: Mapping) -> Iterator[str]:
    for key, value in config.items():
        if key in KEYS:
            yield from field_problems(as_tuple(value), KEYS[key][1], key)
        elif key in ONLY:
            if not any(value is x or (isinstance(x, str) and value == x) for x in ONLY[key]):
                remedy = REMEDIES.get(key) or f"{' and '.join(map(str, ONLY[key]))} supported"
                yield f"{key} {shown(value)} is not supported ({remedy})"
        elif key not in IRRELEVANT and value not in (None, False, [], {}, ""):
            yield f"{key} {shown(value)} is not supported ({OFF.get(key, 'the key is unknown')})"


def lora_config(config: Mapping, targets: tuple[str, ...]) -> LoraConfig:
    """Return the adapters of a config of `read`; `targets` are the linear maps that its tensors adapt."""
    alpha, dropout = float(config["lora_alpha"]), float(config["lora_dropout"])
    return LoraConfig(config["r"], alpha, dropout, targets, config["use_rslora"])


def patterns(lora: LoraConfig, stacked: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return `rank_pattern` and `alpha_pattern` of fused modules: {module: number of adapters that it stacks}.

    PEFT then scales the module by the same factor as its parts.
    """
    growth = math.sqrt if lora.rank_stabilised else float
    return {
        "rank_pattern": {module: count * lora.rank for module, count in stacked.items()},
        "alpha_pattern": {module: number(growth(count) * lora.alpha) for module, count in stacked.items()},
    }


def written(
    lora: LoraConfig, modules: list[str], stacked: Mapping[str, int], base: str | None, source: Mapping
) -> dict[str, Any]:
    """Return the contents of an adapter_config.json.

    Args:
      modules: names of the adapted linear layers, such as q_proj.
      stacked: as in `patterns`.
      base: id or folder of the base on Hugging Face; None if unknown.
      source: the config that the adapters were converted from, whose other keys are kept; {} without one.
    """
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    kept = {"target_modules": modules, NAME: base} | {k: source[k] for k in ("target_modules",) if k in source}
    stated = {"r": lora.rank, "lora_alpha": number(lora.alpha), "lora_dropout": lora.dropout}
    stated |= {"use_rslora": lora.rank_stabilised, **patterns(lora, stacked)}
    return {**fixed, **source, **kept, **stated}


def number(value: float) -> float:
    """Return an integer for a whole number, as PEFT writes alpha."""
    return int(value) if float(value).is_integer() else value
