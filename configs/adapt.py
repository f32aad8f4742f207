"""A user's own data, one JSON object a line (docs/data_layouts.md), learned by the released model.

The language model is frozen; vision encoder, perceiver and projection learn.

    python -m radfm_jax.convert from-torch pytorch_model.bin radfm/ --tokenizer tokenizer.model
    python -m input_pipeline.prepare --config=configs/adapt.py --out my/index
    python -m radfm_jax.train --config=configs/adapt.py --workdir=runs/adapt

reads my/train.jsonl and my/test.jsonl, and scans by paths relative to my/. For data that lie elsewhere:
`--config.data.train.own.root=DIR --config.data.test.own_test.root=DIR --config.data.index=DIR/index`. For tables of
another family, copy one of the configs/adapt_*.py.

Hardware: one H200, or two devices with 80 GB: when a run starts, fresh and loaded parameters are there side by side. By
arithmetic (radfm_jax/cost/estimate.py):

    memory: 62 GB a device (parameters 52.5, optimizer 0.9, gradients 0.9, batch 1.0, activations 2.2, working set 4.2)
    a step: 2.35 s (116 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H200)

On up to 8 devices `--config.train.accumulation=1`; on more, a larger `train.batch` too. To train the language model as
well: `--config.optimizer.frozen="()" --config.optimizer.learning_rate=5e-6`; its state is 210 GB over all devices,
activations come on top.
"""

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.models import radfm
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig


def adapted(train: dict[str, dict], test: dict[str, dict], root: str, **settings) -> ConfigDict:
    """An adaptation to some sources; `settings` are fields of the group `train`. Epochs, batch and rates are ours: of
    the adaptations of the paper's journal version only the abstract is known here."""
    settings = {"epochs": 3.0, "batch": 8, "accumulation": 4, "eval_every": 100} | settings
    experiment = Experiment(
        radfm.radfm_14b(),
        DataConfig(train=train, test=test, index=f"{root}/index", tokenizer="radfm/tokenizer.model", workers=8),
        TrainConfig(dtype="bfloat16", remat="full", chunk=256, **settings),
        OptimizerConfig(learning_rate=2e-5, warmup_steps=20, frozen=("llama",)),
        checkpoint=CheckpointConfig(init_from="radfm", save_every=200),
    )
    return ConfigDict(experiment.to_dict(), convert_dict=True).lock()


def get_config(root: str = "my") -> ConfigDict:
    own = {"family": "jsonl", "root": root, "fraction": 1.0}
    return adapted({"own": own | {"table": "train.jsonl"}}, {"own_test": own | {"table": "test.jsonl"}}, root)
