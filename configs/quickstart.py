"""The practice data at toy size: what a laptop can learn within minutes.

python -m input_pipeline.phantoms --out practice
python -m input_pipeline.prepare --config=configs/quickstart.py --out practice/index
python -m input_pipeline.inspect --config=configs/quickstart.py --out practice/pictures
"""

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.models import radfm


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


def get_config() -> ConfigDict:
    config = ConfigDict({"model": radfm.tiny().to_dict(), "data": data().to_dict()}, convert_dict=True)
    return config.lock()
