"""Adapt the released model to VQA-RAD (3,515 questions on 315 radiology images), with the official split.

    python -m input_pipeline.prepare --config=configs/adapt_vqa_rad.py --out data/vqa_rad/index --allow-leaks
    python -m radfm_jax.train --config=configs/adapt_vqa_rad.py --workdir=runs/adapt_vqa_rad

Data: data/vqa_rad/train.csv and test.csv (`img_root_dir, Figure_path, Question, Answer`). `--allow-leaks` is required
because the official split divides questions, not images: many images are in both tables. A tenth of the training images
is held out for validation; `radfm_jax.evaluate` reads the test table.

Hardware: one H200. Estimated:

    memory: 62 GB a device (parameters 52.5, optimizer 0.9, gradients 0.9, batch 1.0, activations 2.2, working set 4.2)
    a step: 2.35 s (116 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H200)
    steps: 125 for 10 x 99 rows of 28 samples, 5 min of arithmetic
"""

from ml_collections import ConfigDict

from configs import adapt, radfm_14b
from radfm_jax.cost.estimate import Source
from radfm_jax.training import variants

resolve = adapt.resolve
SIZES = {"vqa_rad": Source(3_064, 70, 256)}


@variants.with_variants
def get_config(root: str = "data") -> ConfigDict:
    train = {"vqa_rad": radfm_14b.source(root, "vqa_rad", "train.csv")}
    test = {"vqa_rad_test": radfm_14b.source(root, "vqa_rad", "test.csv")}
    return adapt.adapted(train, test, f"{root}/vqa_rad", validation_share=0.1, epochs=10.0, eval_every=35)
