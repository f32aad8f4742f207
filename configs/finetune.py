"""Stage 3, domain-specific fine-tuning (paper, 3.2 and 4.3): 2 epochs of RadMD, all parameters learn.

RadMD is MedMD without PMC-Inline, PMC-OA and non-radiologic rows (Table 2). Its filtered tables are `radmd_train` next
to MedMD's `train`. This config removes size phrases from captions and balances the diagnosis sets (Table 2): an epoch
has as many normal as abnormal images of an open table, and as many "yes" as "no" of each disease of a yes/no table.

    python -m input_pipeline.prepare --config=configs/finetune.py --out data/radmd_index --records
    python -m radfm_jax.train --config=configs/finetune.py --workdir=runs/finetune --config.data.records=True

The run starts from the best step of runs/pretrain (`--config.checkpoint.init_from=...`). The published sets share
papers and cases between training and test tables. Check leaks.jsonl and correct the tables, or add `--allow-leaks`.

Hardware: 32 A100 with 80 GB, as in the paper. Estimated (radfm_jax/cost/estimate.py, docs/configs.md):

    memory: 13 GB a device (parameters 1.6, optimizer 3.3, gradients 3.3, batch 0.5, activations 1.1, working set 2.9)
    a step: 4.38 s (171 TFLOP a row x 128 rows at 50 % of 312 TFLOP/s on 32 x A100)
    traffic: 305 GB a step into each device, 12 s at 25 GB/s
    steps: 2,710 for 2 x 174,000 rows of 15 samples, 3 h 18 min of arithmetic

FSDP sends this traffic for all micro-batches. `--config.train.accumulation=1` computes the same step with a quarter of
the traffic, which the arithmetic can hide. It needs 20 GB a device.

Batch and accumulation are those of pre-training, as in the paper. The learning rate, half of the pre-training rate, is
a choice of this project. Samples of RadMD are shorter, so a step has about 1,900 of them.
`--config.train.batch=32 --config.train.accumulation=1` returns to the paper's 128 to 512, in four times the steps.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import radfm_14b

# Rows that remain after Table 2.
FILTERED = {
    "pmc_casereport": (438_000, "csv"),
    "rad3d_caption": (48_000, "json"),
    "rad3d_vqa": (205_000, "csv"),
    "rad3d_modality": (176_000, "csv"),
    "rad3d_rationale": (48_000, "json"),
}
DROPPED = ("pmc_inline", "pmc_oa")
BALANCED = ("cxr_mix", *radfm_14b.VINDR)
SIZES = {name: size for name, size in radfm_14b.SIZES.items() if name not in DROPPED} | {
    name: dataclasses.replace(radfm_14b.SIZES[name], rows=rows) for name, (rows, _) in FILTERED.items()
}


def get_config(root: str = "data") -> ConfigDict:
    config = radfm_14b.get_config(root).unlock()
    for name in DROPPED:
        del config.data.train[name]
    for name, (_, kind) in FILTERED.items():
        config.data.train[name].table = f"radmd_train.{kind}"
    for name in BALANCED:
        config.data.train[name].balance = True
    config.data.train.rad3d_caption.sizes = config.data.test.rad3d_caption_test.sizes = "remove"
    config.data.index = f"{root}/radmd_index"
    config.data.seed = config.train.seed = 2
    config.train.epochs = 2.0
    config.train.eval_every = 200
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 100
    config.checkpoint.init_from = "runs/pretrain"
    return config.lock()
