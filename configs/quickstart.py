"""The three stages of the paper at toy size on the practice data, on a laptop within minutes.

    bash launch/quickstart.sh                                   # all steps, or one by one:
    python -m input_pipeline.phantoms --out practice
    python -m input_pipeline.prepare --config=configs/quickstart.py --out practice/index --records
    python -m radfm_jax.train --config=configs/quickstart.py:align --workdir=runs/quickstart/align
    python -m radfm_jax.train --config=configs/quickstart.py:pretrain --workdir=runs/quickstart/pretrain \
        --config.checkpoint.init_from=runs/quickstart/align
    python -m radfm_jax.train --config=configs/quickstart.py:finetune --workdir=runs/quickstart/finetune \
        --config.checkpoint.init_from=runs/quickstart/pretrain

Hardware: two CPU cores, 2 GB of memory. docs/quickstart.md has the expected accuracies.
"""

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig

# Stage: steps, learning rate, its final fraction, column of SOURCES, frozen parts.
STAGES = {
    "align": (40, 1e-3, 1.0, 0, ("llama",)),
    "pretrain": (420, 1e-3, 0.5, 0, ()),
    "finetune": (220, 7e-4, 0.02, 1, ()),
}

# Source: ids of its questions, their share in align and pretrain, and in finetune. Position and size of a lesion are
# learned last and apply only to scans with exactly one, so they have the largest share.
SOURCES = {
    "modality": (("*-modality",), 0.06, 0.08),
    "yes_no": (("*-has-*",), 0.26, 0.24),
    "diagnosis": (("*-diagnosis",), 0.05, 0.08),
    "lesion": (("*-side", "*-level", "*-size"), 0.45, 0.30),
    "count": (("*-count",), 0.04, 0.06),
    "report": (("*-report",), 0.09, 0.14),
    "rationale": (("*-rationale",), 0.05, 0.10),
}


def source(split: str, name: str) -> dict:
    return {
        "family": "jsonl",
        "table": f"{split}/all.jsonl",
        "root": "practice",
        "split": split,
        "ids": SOURCES[name][0],
    }


def data(shares: int = 0, evaluated: bool = True) -> DataConfig:
    # 128 pixels per side: a 2D scan is 4 x 4 patches, a volume of 8 slices 4 x 4 x 2. A row has room for three scans.
    return DataConfig(
        train={name: {**source("train", name), "weight": SOURCES[name][1 + shares]} for name in SOURCES},
        validation={f"{name}_validation": source("validation", name) for name in SOURCES} if evaluated else {},
        test={f"{name}_test": source("test", name) for name in SOURCES} if evaluated else {},
        mixture="weights",
        index="practice/index",
        tokenizer="practice/tokenizer.model",
        size_2d=128,
        size_3d=128,
        depth=8,
        channels=1,
        records=True,
        num_latents=model().num_latents,
        text_length=160,
        vision_rows=1,
        patch_length=48,
        planes=192,
        scans=3,
        window=4096,
        crop=1.0,
    )


def model() -> RadFMConfig:
    """Return a model of about 2 million parameters. Its vocabulary is that of the tokenizer of the practice data."""
    return RadFMConfig(
        ViTConfig(width=96, num_layers=2, num_heads=2, head_dim=48, mlp_width=192, dropout=0.0),
        PerceiverConfig(width=96, num_latents=16, num_layers=2, num_heads=2, head_dim=48, mlp_factor=2),
        DecoderConfig(vocab_size=512, width=128, mlp_width=256, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64),
    )


def get_config(stage: str = "finetune") -> ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown: use one of {', '.join(STAGES)}")
    steps, rate, final, shares, frozen = STAGES[stage]
    experiment = Experiment(
        model(),
        data(shares, evaluated=stage == "finetune"),
        TrainConfig(
            steps=steps,
            batch=8,
            remat="attention",
            normalise="sample",  # gives short answers more weight; otherwise reports slow down the learning of lesions
            log_every=20,
            eval_batches=40,
            chunk=128,
        ),
        OptimizerConfig(
            method="muon",
            learning_rate=rate,
            warmup_steps=20,
            b2=0.98,
            final=final,
            frozen=frozen,
            rates={"vit/embedding/projection": 0.07},
        ),
        checkpoint=CheckpointConfig(save_every=500),
    )
    return ConfigDict(experiment.to_dict(), convert_dict=True).lock()
