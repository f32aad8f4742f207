"""The practice data at toy size: what a laptop can learn within minutes.

python -m input_pipeline.phantoms --out practice
python -m input_pipeline.prepare --config=configs/quickstart.py --out practice/index
python -m input_pipeline.inspect --config=configs/quickstart.py --out practice/pictures
"""

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.models.llama import LlamaConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.optimizer import OptimizerConfig


def source(family: str, table: str, split: str, **fields) -> dict:
    return {"family": family, "table": f"{split}/{table}", "root": "practice", "split": split, **fields}


def sources(split: str) -> dict[str, dict]:
    """The five tasks of a split."""
    end = "" if split == "train" else "_test"
    return {
        f"modality{end}": source("rad3d_modality", "modality.csv", split),
        f"yes_no{end}": source("diagnosis", "diagnosis_yes_no.csv", split),
        f"diagnosis{end}": source("diagnosis", "diagnosis.csv", split),
        f"vqa{end}": source("vqa_rad", "vqa.csv", split),
        f"report{end}": source("rad3d_caption", "rationale.json", split),
        f"rationale{end}": source("rad3d_rationale", "rationale.json", split),
        f"questions{end}": source("jsonl", "all.jsonl", split),
    }


def data() -> DataConfig:
    # 128 pixels a side: a 2D scan is 4 x 4 patches, a volume of 32 slices 4 x 4 x 8.
    return DataConfig(
        train=sources("train"),
        test=sources("test"),
        index="practice/index",
        tokenizer="practice/tokenizer.model",
        size_2d=128,
        size_3d=128,
        depth=32,
        text_length=512,
        vision_rows=2,
        patch_length=128,
        planes=1024,
        scans=10,
        window=4096,
    )


def model() -> RadFMConfig:
    """About 3.4 million parameters. The vocabulary is that of the tokenizer that comes with the practice data."""
    return RadFMConfig(
        ViTConfig(width=96, num_layers=2, num_heads=4, head_dim=24, mlp_width=192, dropout=0.0),
        PerceiverConfig(width=96, num_layers=2, num_heads=4, head_dim=24, mlp_factor=2),
        LlamaConfig(vocab_size=512, width=128, mlp_width=352, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32),
    )


def get_config() -> ConfigDict:
    experiment = Experiment(
        model(),
        data(),
        TrainConfig(
            steps=1500, batch=4, remat="none", normalise="sqrt_sample", log_every=20, eval_every=500, chunk=128
        ),
        OptimizerConfig(
            learning_rate=7e-4, warmup_steps=50, b2=0.98, final=0.05, rates={"vit/embedding/projection": 0.2}
        ),
        checkpoint=CheckpointConfig(save_every=250),
    )
    return ConfigDict(experiment.to_dict(), convert_dict=True).lock()
