"""Qwen3-8B with the vision encoder MedSigLIP on your own data.

    python -m radfm_jax.convert from-hf Qwen3-8B qwen3_medsiglip --vision medsiglip-448
    python -m input_pipeline.prepare --config=configs/qwen3_8b_medsiglip.py --out my/qwen3_medsiglip_index --records
    python -m radfm_jax.train --config=configs/qwen3_8b_medsiglip.py --workdir=runs/qwen3_medsiglip_align
    python -m radfm_jax.train --config=configs/qwen3_8b_medsiglip.py --workdir=runs/qwen3_medsiglip \
        --config.checkpoint.init_from=runs/qwen3_medsiglip_align --config.optimizer.frozen="()" \
        --config.optimizer.learning_rate=1e-5 --config.train.accumulation=1

The first run trains the vision encoder, the perceiver and the projection; the language model is frozen. The second
run trains all parameters.

Data: as in configs/adapt.py, my/train.jsonl and my/test.jsonl. A volume has up to 16 slices of 448
pixels. CT needs `--config.data.intensity=lung/soft_tissue/bone` (docs/backbones.md).

Hardware: one device with 80 GB. Estimated (radfm_jax/cost/estimate.py):

    memory: 55 GB a device (parameters 34.7, optimizer 4.0, gradients 4.0, batch 0.3, activations 5.3, working set 6.6)
    a step: 3.23 s (160 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H100)

The second run needs 4 devices with 80 GB: 49 GB on each. For other devices see `python -m radfm_jax.plan`. This
config has not been run at this size; docs/backbones.md lists what was run.
"""

from ml_collections import ConfigDict

from configs import adapt
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.encoders.kinds import VisionConfig, data_preset
from radfm_jax.models.encoders.siglip import medsiglip
from radfm_jax.models.families import PRESETS
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.training import variants

resolve = adapt.resolve


def on_backbone(root: str, name: str, decoder: DecoderConfig, vision: VisionConfig) -> ConfigDict:
    """Return configs/adapt.py with another language model and vision encoder; `name` is their checkpoint directory."""
    config = adapt.get_config(root).unlock()
    model = RadFMConfig(vision, PerceiverConfig(width=vision.width, num_latents=64), decoder)
    config.model = ConfigDict(model.to_dict(), convert_dict=True)
    config.data.update(tokenizer=name, vocab_size=decoder.vocab_size, template="chat", num_latents=model.num_latents)
    config.data.update(data_preset(vision))
    config.data.update(index=f"{root}/{name}_index", records=True)
    config.optimizer.learning_rate = 1e-4
    config.checkpoint.init_from = name
    return config


@variants.with_variants
def get_config(root: str = "my") -> ConfigDict:
    config = on_backbone(root, "qwen3_medsiglip", PRESETS["qwen3-8b"], medsiglip())
    patches = 16 * medsiglip().slab  # of a vision row, in three channels
    config.data.update(depth=16, vision_rows=2, patch_length=patches, planes=2 * 3 * patches, scans=8)
    return config.lock()
