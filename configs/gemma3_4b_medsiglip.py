"""Gemma 3 4B with the vision encoder MedSigLIP on your own data: the parts of MedGemma.

    python -m radfm_jax.convert from-hf gemma-3-4b-it gemma3_medsiglip --vision medsiglip-448
    python -m input_pipeline.prepare --config=configs/gemma3_4b_medsiglip.py --out my/gemma3_medsiglip_index --records
    python -m radfm_jax.train --config=configs/gemma3_4b_medsiglip.py --workdir=runs/gemma3_medsiglip_align
    python -m radfm_jax.train --config=configs/gemma3_4b_medsiglip.py --workdir=runs/gemma3_medsiglip \
        --config.checkpoint.init_from=runs/gemma3_medsiglip_align --config.optimizer.frozen="()" \
        --config.optimizer.learning_rate=2e-5 --config.train.accumulation=1

The first run trains the vision encoder, the perceiver and the projection; the language model is frozen. The second
run trains all parameters.

Data: as in configs/adapt.py, my/train.jsonl and my/test.jsonl. A volume has up to 16 slices of 448
pixels. CT needs `--config.data.intensity=lung/soft_tissue/bone` (docs/backbones.md).

Hardware: one device with 48 GB. Estimated (radfm_jax/cost/estimate.py):

    memory: 37 GB a device (parameters 17.5, optimizer 4.0, gradients 4.0, batch 0.3, activations 4.8, working set 6.6)
    a step: 2.59 s (128 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H100)

The second run needs 2 devices with 80 GB: 58 GB on each. For other devices see `python -m radfm_jax.plan`. This
config has not been run at this size; docs/backbones.md lists what was run.
"""

from ml_collections import ConfigDict

from configs import qwen3_8b_medsiglip
from radfm_jax.models.families import PRESETS
from radfm_jax.training import variants

NAME = "gemma3_medsiglip"
resolve = qwen3_8b_medsiglip.resolve


@variants.with_variants
def get_config(root: str = "my") -> ConfigDict:
    config = qwen3_8b_medsiglip.get_config(root).unlock()
    decoder = PRESETS["gemma-3-4b"]
    config.model.llama = ConfigDict(decoder.to_dict(), convert_dict=True)
    config.data.update(tokenizer=NAME, vocab_size=decoder.vocab_size, index=f"{root}/{NAME}_index")
    config.checkpoint.init_from = NAME
    return config.lock()
