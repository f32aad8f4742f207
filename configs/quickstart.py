"""The practice data at toy size through the three stages of the paper: what a laptop can learn within minutes.

    bash launch/quickstart.sh                                   # all of it, or step by step:
    python -m input_pipeline.phantoms --out practice
    python -m input_pipeline.prepare --config=configs/quickstart.py --out practice/index --records
    python -m radfm_jax.train --config=configs/quickstart.py:align --workdir=runs/quickstart/align
    python -m radfm_jax.train --config=configs/quickstart.py:pretrain --workdir=runs/quickstart/pretrain \
        --config.checkpoint.init_from=runs/quickstart/align
    python -m radfm_jax.train --config=configs/quickstart.py:finetune --workdir=runs/quickstart/finetune \
        --config.checkpoint.init_from=runs/quickstart/pretrain

Hardware: two cores, 2 GB of memory. docs/quickstart.md has the accuracies.
"""

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.models.llama import LlamaConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.optimizer import OptimizerConfig

# Of each stage: steps, frozen parts, learning rate.
STAGES = {
    "align": (60, ("llama",), 7e-4),
    "pretrain": (1500, (), 7e-4),
    "finetune": (400, (), 3e-4),
}
TASKS = ("modality", "diagnosis", "vqa", "report", "rationale")


def questions(split: str, task: str) -> dict:
    """The questions of a task about the scans of a split."""
    return {"family": "jsonl", "table": f"{split}/all.jsonl", "root": "practice", "split": split, "tasks": (task,)}


def data() -> DataConfig:
    # 128 pixels a side: a 2D scan is 4 x 4 patches, a volume of 16 slices 4 x 4 x 4. A row has room for four
    # scans whether they are there or not: with a window of a fifth of the epoch few questions of a step share one.
    return DataConfig(
        train={task: questions("train", task) for task in TASKS},
        test={f"{task}_test": questions("test", task) for task in TASKS},
        index="practice/index",
        tokenizer="practice/tokenizer.model",
        size_2d=128,
        size_3d=128,
        depth=16,
        channels=1,
        records=True,
        text_length=256,
        vision_rows=1,
        patch_length=96,
        planes=384,
        scans=4,
        window=4096,
        crop=1.0,
    )


def model() -> RadFMConfig:
    """About 2 million parameters. The vocabulary is that of the tokenizer that comes with the practice data."""
    return RadFMConfig(
        ViTConfig(width=96, num_layers=2, num_heads=2, head_dim=48, mlp_width=192, dropout=0.0),
        PerceiverConfig(width=96, num_layers=2, num_heads=2, head_dim=48, mlp_factor=2),
        LlamaConfig(vocab_size=512, width=128, mlp_width=256, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64),
    )


def get_config(stage: str = "finetune") -> ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    steps, frozen, rate = STAGES[stage]
    experiment = Experiment(
        model(),
        data(),
        TrainConfig(
            steps=steps, batch=8, remat="attention", normalise="sqrt_sample", log_every=20, eval_batches=40, chunk=128
        ),
        OptimizerConfig(
            learning_rate=rate,
            warmup_steps=50,
            b2=0.98,
            final=0.05,
            frozen=frozen,
            rates={"vit/embedding/projection": 0.07},
        ),
        checkpoint=CheckpointConfig(save_every=250),
    )
    return ConfigDict(experiment.to_dict(), convert_dict=True).lock()
