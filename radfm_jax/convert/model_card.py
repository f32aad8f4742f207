"""The model card (README.md) of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping

from radfm_jax.inference.stored import KEY
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.radfm import RadFMConfig

WARNING = """\
**Research only, not for clinical use.** Its wrong answers can sound convincing. The model is not a medical device and
has no regulatory approval. Its answers must not guide the care of any patient."""


def model_card(config: RadFMConfig, part: str, parameters: int, hf: dict) -> str:
    """Return Markdown that describes the weights, their use and their limits.

    hf: the config.json of the export.
    """
    llm, preparation = config.llama, hf.get(KEY)
    sizes_of_llm = f"{llm.num_layers} layers, width {llm.width}, {llm.num_heads} heads, vocabulary {llm.vocab_size}"
    text = f"Language model: {sizes_of_llm}"
    if part == "llama":
        title, sizes = "Language model of a RadFM", [text]
        loaded = f"transformers.{hf['architectures'][0]}.from_pretrained(folder)"
        use = f"`{loaded}`, or `python -m radfm_jax.convert from-hf`."
    else:
        title = "RadFM, generalist radiology vision-language model"
        vision = config.vision
        sizes = [
            f"3D vision transformer: {vision.num_layers} layers, width {vision.width}, patches of "
            f"{' x '.join(map(str, vision.patch))} voxels in {vision.channels} channels",
            f"Perceiver resampler: {config.perceiver.num_layers} layers, {config.num_latents} visual tokens per scan",
            text,
        ]
        if preparation is not None:
            values = ", ".join(f"{name} {value}" for name, value in preparation.items())
            sizes.append(f"Preparation of scans and texts (`preparation` in config.json): {values}")
        use = (
            "`python -m radfm_jax.convert from-torch folder DIR`, then `radfm_jax.load(DIR)`. The tensors have the "
            "names of the released PyTorch RadFM. `transformers` cannot load the model; its AutoTokenizer can load the "
            "tokenizer."
        )
    lines = "\n".join(f"- {line}" for line in sizes)
    return f"""---
library_name: radfm_jax
tags: [radiology, medical, vision-language]
---

# {title}

{WARNING}

Exported by radfm_jax; {parameters:,} parameters.

{lines}

## Use

{use}

## Origin and limits

Architecture: Wu et al., "Towards Generalist Foundation Model for Radiology" (arXiv 2308.02463). Performance depends on
the training data, which this export does not record. Measure it on your own data before you rely on any answer. The
licences of the weights and of their base language model apply.
"""


def adapter_card(adapters: LoraConfig, parameters: int, config: Mapping) -> str:
    """Return Markdown that describes a folder of PEFT. `config` is its adapter_config.json."""
    base = config["base_model_name_or_path"]
    named = f"base_model: {base}\n" if base else ""
    return f"""---
library_name: peft
{named}tags: [radiology, medical, lora]
---

# LoRA adapters of the language model of a RadFM

{WARNING}

Exported by radfm_jax; {parameters:,} parameters: rank {adapters.rank}, alpha {adapters.alpha:g}.

## Use

`peft.PeftModel.from_pretrained(base, folder)`, where `base` is {base or "the language model that the run adapted"}.
`python -m radfm_jax.convert from-peft folder DIR --base CHECKPOINT` converts them back.

The folder has no vision encoder: in plain transformers the adapters answer text alone. The licence of the base applies.
"""
