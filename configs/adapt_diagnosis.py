"""Adapt the released model to the user's own diagnosis set: images with yes/no labels by disease.

    python -m input_pipeline.prepare --config=configs/adapt_diagnosis.py --out data/diagnosis/index
    python -m radfm_jax.train --config=configs/adapt_diagnosis.py --workdir=runs/adapt_diagnosis

Data: data/diagnosis/train.csv and test.csv (`image_path, disease, label`, label 1 or 0; scans of any format and depth).
A twentieth of the training studies is held out for validation. `radfm_jax.evaluate` does not balance the test table.
Training is balanced for each disease. The questions of the family `diagnosis` fit any scan. For questions that name a
body region, use another family: `--config.data.train.diagnosis.family=vindr_mammo`.

Hardware: one H200. Estimated for 20,000 rows:

    memory: 62 GB a device (parameters 52.5, optimizer 0.9, gradients 0.9, batch 1.0, activations 2.2, working set 4.2)
    a step: 2.35 s (116 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H200)
    steps: 367 for 5 x 586 rows of 32 samples, 14 min of arithmetic
"""

from ml_collections import ConfigDict

from configs import adapt, radfm_14b
from radfm_jax.cost.estimate import Source
from radfm_jax.training import variants

resolve = adapt.resolve
SIZES = {"diagnosis": Source(20_000, 60, 256)}


@variants.with_variants
def get_config(root: str = "data") -> ConfigDict:
    train = {"diagnosis": radfm_14b.source(root, "diagnosis", "train.csv", form="yes_no", balance=True)}
    test = {"diagnosis_test": radfm_14b.source(root, "diagnosis", "test.csv", form="yes_no", balance=False)}
    return adapt.adapted(train, test, f"{root}/diagnosis", epochs=5.0)
