"""Stage 2, epochs 2 to 4 of pre-training (paper, 4.3.1): MedMD, all parameters learn.

    python -m radfm_jax.train --config=configs/pretrain.py --workdir=runs/pretrain --config.data.records=True

The run starts from the best step of runs/pretrain_align (`--config.checkpoint.init_from=...`) and uses its index.

Hardware: 32 A100 with 80 GB, as in the paper. Estimated (radfm_jax/cost/estimate.py, docs/configs.md):

    memory: 13 GB a device (parameters 1.6, optimizer 3.3, gradients 3.3, batch 0.5, activations 1.1, working set 2.9)
    a step: 4.38 s (171 TFLOP a row x 128 rows at 50 % of 312 TFLOP/s on 32 x A100)
    traffic: 305 GB a step into each device, 12 s at 25 GB/s
    steps: 94,400 for 3 x 4,030,000 rows of 2.4 samples, 4 d 19 h of arithmetic

FSDP sends this traffic for all micro-batches. `--config.train.accumulation=1` computes the same step with a quarter of
the traffic, which the arithmetic can hide. It needs 20 GB a device.
"""

from ml_collections import ConfigDict

from configs import radfm_14b

SIZES = radfm_14b.SIZES


def get_config(root: str = "data") -> ConfigDict:
    config = radfm_14b.get_config(root)
    config.train.epochs = 3.0
    config.checkpoint.init_from = "runs/pretrain_align"
    # A run counts its epochs from 0. The seed of stage 1 would repeat its samples and crops.
    config.data.seed = 1
    config.train.seed = 1
    return config
