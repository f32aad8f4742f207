"""Stage 1, epoch 1 of pre-training (paper, 4.3.1): align visual tokens with the embeddings of the language model.

The data is MedMD. The language model is MedLLaMA-13B (PMC-LLaMA), frozen, so it needs no gradients and no optimizer
memory. The vision encoder, the perceiver and the projection are initialized randomly and learn.

    python -m radfm_jax.convert from-hf MedLLaMA_13B/ medllama/
    python -m input_pipeline.prepare --config=configs/pretrain_align.py --out data/medmd_index --records
    python -m radfm_jax.train --config=configs/pretrain_align.py --workdir=runs/pretrain_align \
        --config.data.records=True

The published sets share papers and cases between training and test tables. Check leaks.jsonl and correct the tables, or
add `--allow-leaks`.

Hardware: 32 A100 with 80 GB, as in the paper. Estimated (radfm_jax/cost/estimate.py, docs/configs.md):

    memory: 6 GB a device (parameters 1.6, optimizer 0.0, gradients 0.0, batch 0.5, activations 1.1, working set 2.3)
    a step: 2.98 s (116 TFLOP a row x 128 rows at 50 % of 312 TFLOP/s on 32 x A100)
    traffic: 204 GB a step into each device, 8.2 s at 25 GB/s
    steps: 31,500 for 1 x 4,030,000 rows of 2.4 samples, 26 h 5 min of arithmetic

FSDP sends this traffic for all micro-batches. `--config.train.accumulation=1` computes the same step with a quarter of
the traffic, which the arithmetic can hide. It needs 15 GB a device.
"""

from ml_collections import ConfigDict

from configs import radfm_14b

SIZES = radfm_14b.SIZES


def get_config(root: str = "data") -> ConfigDict:
    config = radfm_14b.get_config(root)
    config.train.epochs = 1.0
    config.optimizer.frozen = ("llama",)
    config.checkpoint.init_from = "medllama"
    return config
