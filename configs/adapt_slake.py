"""Adapt the released model to the English part of SLAKE (642 images), with the official split by image.

    python -m input_pipeline.prepare --config=configs/adapt_slake.py --out data/slake/index
    python -m radfm_jax.train --config=configs/adapt_slake.py --workdir=runs/adapt_slake

Data: data/slake/train.csv and test.csv (`img_root_dir, Figure_path, Question, Answer`). Rows whose `q_lang` is zh are
skipped. A tenth of the training images is held out for validation; `radfm_jax.evaluate` reads the test table.

Hardware: one H200. Estimated:

    memory: 62 GB a device (parameters 52.5, optimizer 0.9, gradients 0.9, batch 1.0, activations 2.2, working set 4.2)
    a step: 2.35 s (116 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H200)
    steps: 200 for 10 x 159 rows of 28 samples, 8 min of arithmetic
"""

from ml_collections import ConfigDict

from configs import adapt, radfm_14b
from radfm_jax.cost.estimate import Source
from radfm_jax.training import variants

resolve = adapt.resolve
SIZES = {"slake": Source(4_919, 70, 256)}


@variants.with_variants
def get_config(root: str = "data") -> ConfigDict:
    train = {"slake": radfm_14b.source(root, "slake", "train.csv")}
    test = {"slake_test": radfm_14b.source(root, "slake", "test.csv")}
    return adapt.adapted(train, test, f"{root}/slake", validation_share=0.1, epochs=10.0, eval_every=50)
