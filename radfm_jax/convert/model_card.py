"""The model card (README.md) of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping

from radfm_jax.inference.stored import KEY
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.pooling import PooledMlpConfig
from radfm_jax.models.radfm import RadFMConfig

WARNING = """\
**Research only, not for clinical use.** Its wrong answers can sound convincing. The model is not a medical device and
has no regulatory approval. Its answers must not guide the care of any patient."""


RELEASED_USE = """\
`python -m radfm_jax.convert from-torch folder DIR`, then `radfm_jax.load(DIR)`. The tensors have the names of the
released PyTorch RadFM. `transformers` cannot load the model; its AutoTokenizer can load the tokenizer."""
HUB_USE = """\
```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, device_map="auto")
inputs = processor(text="Is there a fracture?", images=["scan.nii.gz"], return_tensors="pt").to(model.device)
answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

`trust_remote_code` runs the Python files of this folder, which need torch and transformers 5. `python -m
radfm_jax.convert from-hf folder DIR` reads the folder back."""


def model_card(
    config: RadFMConfig, part: str, parameters: int, hf: dict, *, training: str = "", scores: str = "", notes: str = ""
) -> str:
    """Return Markdown that describes the weights, their use and their limits.

    Args:
      hf: the config.json of the export.
      training, scores: Markdown about the training (run_facts.training) and the scores of the model.
      notes: Markdown with more on how the folder is used.
    """
    llm = config.llama
    text = (
        f"Language model: {llm.num_layers} layers, width {llm.width}, {llm.num_heads} heads, vocabulary "
        f"{llm.vocab_size}"
    )
    if part == "llama":
        title, sizes = "Language model of a RadFM", [text]
        loaded = f"transformers.{hf['architectures'][0]}.from_pretrained(folder)"
        use = f"`{loaded}`, or `python -m radfm_jax.convert from-hf`."
    else:
        title = "RadFM, generalist radiology vision-language model"
        sizes = [_vision(config), _bridge(config), text]
        if (preparation := hf.get(KEY)) is not None:
            values = ", ".join(f"{name} {value}" for name, value in preparation.items())
            sizes.append(f"Preparation of scans and texts (`preparation` in config.json): {values}")
        use = HUB_USE if part == "hub" else RELEASED_USE
    lines = "\n".join(f"- {line}" for line in sizes)
    library, task = ("transformers", "pipeline_tag: image-text-to-text\n") if part == "hub" else ("radfm_jax", "")
    sections = {"Use": "\n\n".join(filter(None, (use, notes))), "Training": training, "Scores": scores}
    body = "\n\n".join(f"## {name}\n\n{content}" for name, content in sections.items() if content)
    return f"""---
library_name: {library}
{task}tags: [radiology, medical, vision-language]
---

# {title}

{WARNING}

Exported by radfm_jax; {parameters:,} parameters.

{lines}

{body}

## Origin and limits

Architecture: Wu et al., "Towards Generalist Foundation Model for Radiology" (arXiv 2308.02463). Performance depends on
the training data and on how scans are acquired. Measure it on your own data before you rely on any answer. The licences
of the weights and of their base language model apply. This export does not change them.
"""


def _vision(config: RadFMConfig) -> str:
    vision = config.vision
    layers = " + ".join(str(stack.layers) for stack in vision.stacks(1))
    patch = " x ".join(map(str, vision.patch))
    return (
        f"Vision encoder {vision.kind}: {layers} layers, width {vision.width}, patches of {patch} voxels in "
        f"{vision.channels} channels"
    )


def _bridge(config: RadFMConfig) -> str:
    bridge = config.perceiver
    if isinstance(bridge, PooledMlpConfig):
        return f"Pooled MLP: {' x '.join(map(str, bridge.grid))} = {config.num_latents} visual tokens per scan"
    return f"Perceiver resampler: {bridge.num_layers} layers, {config.num_latents} visual tokens per scan"


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
