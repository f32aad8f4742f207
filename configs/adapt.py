"""Adapt the released model to the user's own data, one JSON object per line (docs/data_layouts.md).

The vision encoder, the perceiver and the projection learn; the language model is frozen.

    python -m radfm_jax.convert from-torch pytorch_model.bin radfm/ --tokenizer tokenizer.model
    python -m input_pipeline.prepare --config=configs/adapt.py --out my/index
    python -m radfm_jax.train --config=configs/adapt.py --workdir=runs/adapt

The model, the tokenizer and the preparation of scans are those of `checkpoint.init_from` (default: `radfm/`), unless
an option sets them. configs/adapt_small.py adapts a small model on one machine.

Data: my/train.jsonl and my/test.jsonl, with scans at paths relative to my/. A twentieth of the training studies is held
out for validation; `radfm_jax.evaluate` reads the test table. `--config=configs/adapt.py:DIR` reads the data in DIR.
For tables of another family, copy one of the configs/adapt_*.py.

CT needs a window, because the default `minmax` leaves soft tissue a few gray levels. Run `prepare` and `train` with
`--config.data.intensity=lung/soft_tissue/bone`, or `brain` for heads. Sources of other modalities need their own
`intensity` (docs/data.md).

Hardware: one H200, or two devices with 80 GB. Estimated (radfm_jax/cost/estimate.py):

    memory: 62 GB a device (parameters 52.5, optimizer 0.9, gradients 0.9, batch 1.0, activations 2.2, working set 4.2)
    a step: 2.35 s (116 TFLOP a row x 8 rows at 40 % of 989 TFLOP/s on 1 x H200)

On a smaller card, `configs/adapt.py:lora` (35 GB) and `configs/adapt.py:qlora` (17 GB) train adapters (docs/adapt.md).

On up to 8 devices use `--config.train.accumulation=1`; on more, also a larger `train.batch`. The language model learns
too with `--config.optimizer.frozen="()" --config.optimizer.learning_rate=5e-6`. The state then has a size of
210 GB over all devices, plus activations.
"""

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.models import radfm
from radfm_jax.training import variants
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.follow import follow_checkpoint
from radfm_jax.training.optimizer import OptimizerConfig

resolve = follow_checkpoint


def adapted(
    train: dict[str, dict], test: dict[str, dict], root: str, *, validation_share: float = 0.05, **settings
) -> ConfigDict:
    """Return a config that adapts the released model to some sources.

    Epochs, batch and learning rate are choices of this project, not of the paper.

    `validation_share` of the training studies is held out; `settings` are fields of the group `train`.
    """
    settings = {"epochs": 3.0, "batch": 8, "accumulation": 4, "eval_every": 100} | settings
    experiment = Experiment(
        radfm.radfm_14b(),
        DataConfig(
            train=train,
            validation_share=validation_share,
            test=test,
            index=f"{root}/index",
            tokenizer="radfm/tokenizer.model",
            workers=8,
        ),  # fmt: skip
        TrainConfig(dtype="bfloat16", remat="full", chunk=256, **settings),
        OptimizerConfig(learning_rate=2e-5, warmup_steps=20, frozen=("llama",)),
        checkpoint=CheckpointConfig(init_from="radfm", save_every=200),
    )
    return ConfigDict(experiment.to_dict(), convert_dict=True).lock()


@variants.with_variants
def get_config(root: str = "my") -> ConfigDict:
    own = {"family": "jsonl", "root": root, "fraction": 1.0}
    return adapted({"own": own | {"table": "train.jsonl"}}, {"own_test": own | {"table": "test.jsonl"}}, root)
