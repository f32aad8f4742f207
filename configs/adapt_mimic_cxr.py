"""Adapt the released model to the reports of MIMIC-CXR (227,000 studies).

    python -m input_pipeline.prepare --config=configs/adapt_mimic_cxr.py --out data/mimic_cxr/index --records
    python -m radfm_jax.train --config=configs/adapt_mimic_cxr.py --workdir=runs/adapt_mimic_cxr \
        --config.data.records=True

Data: data/mimic_cxr/train.csv and test.csv (`image_path, label`; image_path is one path, or a list literal of the
images of a study). The `p########` of the paths keeps patients in one split. A hundredth of the training patients is
held out for validation; `radfm_jax.evaluate` reads a quarter of the test table.

Hardware: one H200. Estimated:

    memory: 65 GB a device (parameters 52.5, optimizer 0.9, gradients 0.9, batch 3.8, activations 2.2, working set 4.2)
    a step: 9.42 s (116 TFLOP a row x 32 rows at 40 % of 989 TFLOP/s on 1 x H200)
    steps: 2,060 for 3 x 21,900 rows of 10 samples, 5 h 23 min of arithmetic
"""

from ml_collections import ConfigDict

from configs import adapt, radfm_14b
from radfm_jax.training import variants

resolve = adapt.resolve
SIZES = {"mimic_cxr": radfm_14b.SIZES["mimic_cxr"]}


@variants.with_variants
def get_config(root: str = "data") -> ConfigDict:
    train = {"mimic_cxr": radfm_14b.source(root, "mimic_cxr", "train.csv")}
    test = {"mimic_cxr_test": radfm_14b.source(root, "mimic_cxr", "test.csv", fraction=0.25)}
    settings = {"epochs": 3.0, "batch": 32, "accumulation": 16, "eval_every": 200}
    config = adapt.adapted(train, test, f"{root}/mimic_cxr", validation_share=0.01, **settings)
    config.optimizer.warmup_steps = 100
    return config
