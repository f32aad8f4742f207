"""Llama-3.1-8B-Instruct with RadFM's own vision encoder, untrained, on your own data.

    python -m radfm_jax.convert from-hf Llama-3.1-8B-Instruct llama31
    python -m input_pipeline.prepare --config=configs/llama31_8b_vit3d.py --out my/llama31_index --records
    python -m radfm_jax.train --config=configs/llama31_8b_vit3d.py --workdir=runs/llama31_align
    python -m radfm_jax.train --config=configs/llama31_8b_vit3d.py --workdir=runs/llama31 \
        --config.checkpoint.init_from=runs/llama31_align --config.optimizer.frozen="()" \
        --config.optimizer.learning_rate=1e-5 --config.train.accumulation=1

The first run trains RadFM's vision encoder, the perceiver and the projection; the language model is frozen. The second
run trains all parameters.

Data: as in configs/adapt.py, my/train.jsonl and my/test.jsonl. CT needs a window, as
described there.

Hardware: one device with 48 GB. Estimated (radfm_jax/cost/estimate.py):

    memory: 41 GB a device (parameters 32.5, optimizer 0.9, gradients 0.9, batch 1.0, activations 1.7, working set 4.2)
    a step: 1.45 s (71.9 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H100)

The second run needs 2 H200: 85 GB on each. For other devices see `python -m radfm_jax.plan`. This
config has not been run at this size; docs/backbones.md lists what was run.
"""

from ml_collections import ConfigDict

from configs import qwen3_8b_medsiglip
from radfm_jax.models.families import PRESETS
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.training import variants

resolve = qwen3_8b_medsiglip.resolve


@variants.with_variants
def get_config(root: str = "my") -> ConfigDict:
    return qwen3_8b_medsiglip.on_backbone(root, "llama31", PRESETS["llama-3.1-8b"], ViTConfig()).lock()
