"""Adapt the released model to PMC-VQA (413,000 questions on figures of papers, paper's Table 1).

    python -m input_pipeline.prepare --config=configs/adapt_pmc_vqa.py --out data/pmc_vqa/index
    python -m radfm_jax.train --config=configs/adapt_pmc_vqa.py --workdir=runs/adapt_pmc_vqa

Data: data/pmc_vqa/train.csv and test.csv (`img_root_dir, Figure_path, Question, Answer`). A hundredth of the
training papers is held out for validation; `radfm_jax.evaluate` reads a twentieth of the test table.

Hardware: one H200. Estimated:

    memory: 65 GB a device (parameters 52.5, optimizer 0.9, gradients 0.9, batch 3.8, activations 2.2, working set 4.2)
    a step: 9.42 s (116 TFLOP a row x 32 rows at 40 % of 989 TFLOP/s on 1 x H200)
    steps: 986 for 2 x 15,800 rows of 26 samples, 2 h 35 min of arithmetic
"""

from ml_collections import ConfigDict

from configs import adapt, radfm_14b
from radfm_jax.training import variants

resolve = adapt.resolve
SIZES = {"pmc_vqa": radfm_14b.SIZES["pmc_vqa"]}


@variants.with_variants
def get_config(root: str = "data") -> ConfigDict:
    train = {"pmc_vqa": radfm_14b.source(root, "pmc_vqa", "train.csv")}
    test = {"pmc_vqa_test": radfm_14b.source(root, "pmc_vqa", "test.csv", fraction=0.05)}
    settings = {"epochs": 2.0, "batch": 32, "accumulation": 16, "eval_every": 200}
    config = adapt.adapted(train, test, f"{root}/pmc_vqa", validation_share=0.01, **settings)
    config.optimizer.warmup_steps = 100
    return config
