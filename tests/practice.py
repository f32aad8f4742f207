"""Practice data at the smallest size, with an index, for tests of the pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from input_pipeline import phantoms
from input_pipeline.config import DataConfig
from input_pipeline.files import read_json, write_json
from input_pipeline.index import index
from input_pipeline.index.prepare import prepare

FAMILIES = {
    "modality": ("rad3d_modality", "modality.csv"),
    "vqa": ("vqa_rad", "vqa.csv"),
    "rationale": ("rad3d_rationale", "rationale.json"),
    "yes_no": ("diagnosis", "diagnosis_yes_no.csv"),
}


def practice(
    directory: Path, train: int = 24, test: int = 8, validation: int = 0, indexed: bool = True, **changes
) -> DataConfig:
    """Write phantoms of 64 x 64 pixels and their index below `directory`. Returns their config."""
    phantoms.write(directory / "data", train=train, test=test, validation=validation, size=64, workers=1)
    source = lambda split, family, table: {  # noqa: E731
        "family": family, "table": f"{split}/{table}", "root": str(directory / "data"), "split": split
    }  # fmt: skip
    config = DataConfig(
        train={name: source("train", *table) for name, table in FAMILIES.items()},
        validation={
            f"{name}_validation": source("validation", *table) for name, table in FAMILIES.items() if validation
        },
        test={f"{name}_test": source("test", *table) for name, table in FAMILIES.items() if test},
        index=str(directory / "index"),
        tokenizer=str(directory / "data" / "tokenizer.model"),
        terms="none",
        size_2d=64,
        size_3d=32,
        depth=16,
        text_length=256,
        vision_rows=2,
        patch_length=16,
        planes=96,
        scans=6,
        window=40,
        workers=0,
    )
    config = dataclasses.replace(config, **changes)
    if indexed:
        write_index(config)
    return config


def write_index(config: DataConfig) -> None:
    """Run `prepare` in this process."""
    prepare(config, config.index, workers=0)


def reseal(directory: Path) -> None:
    """Write index.json again with the digests of files that a test edited."""
    description = read_json(directory / "index.json", kind=dict)
    kept = {name: value for name, value in description.items() if name in index.KEYS}
    write_json(directory / "index.json", index.sealed(directory, kept))
