"""Practice data at the smallest size, with an index: what the tests of the pipeline run on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from input_pipeline import index, phantoms, scans
from input_pipeline.config import DataConfig
from input_pipeline.sources import open_sources
from input_pipeline.volumes import one_channel_if_gray

FAMILIES = {
    "modality": ("rad3d_modality", "modality.csv"),
    "vqa": ("vqa_rad", "vqa.csv"),
    "rationale": ("rad3d_rationale", "rationale.json"),
    "yes_no": ("diagnosis", "diagnosis_yes_no.csv"),
}


def practice(directory: Path, train: int = 24, test: int = 8, **changes) -> DataConfig:
    """Phantoms of 64 pixels a side below `directory`, their config, and their index."""
    phantoms.write(directory / "data", train=train, test=test, size=64, workers=1)
    source = lambda split, family, table: {  # noqa: E731
        "family": family, "table": f"{split}/{table}", "root": str(directory / "data"), "split": split
    }  # fmt: skip
    config = DataConfig(
        train={name: source("train", *of) for name, of in FAMILIES.items()},
        test={f"{name}_test": source("test", *of) for name, of in FAMILIES.items()},
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
    write_index(config)
    return config


def write_index(config: DataConfig) -> None:
    directory = Path(config.index)
    directory.mkdir(exist_ok=True)
    sources, facts, rows = {}, {}, []
    for split in ("train", "test"):
        for name, dataset in open_sources(config, split).items():
            fields = config.sources(split)[name]
            sources[name] = {
                "family": fields["family"],
                "fields": fields,
                "table": fields["table"],
                "root": str(dataset.root),
                "sha256": index.table_checksum(dataset.file),
                "split": split,
                "rows": len(dataset),
            }
            for i in range(len(dataset)):
                for scan in dataset.scans(i):
                    key = index.scan_key(dataset.root, scan)
                    if key not in facts:
                        facts[key] = name, one_channel_if_gray(scans.read(dataset.root / scan.path)[0]).shape
                rows.append({"source": name, "row": i, "row_id": dataset.row_id(i), "state": "good"})
    lines = [
        dict(
            source=name,
            root=key[0],
            path=key[1],
            volume=key[2],
            window=key[3],
            fault="",
            record=-1,
            **dict(zip(("height", "width", "depth", "channels"), shape, strict=True)),
        )
        for key, (name, shape) in facts.items()
    ]
    fill = lambda line, schema: {f.name: line.get(f.name) for f in schema}  # noqa: E731
    pq.write_table(
        pa.Table.from_pylist([fill(x, index.SCANS) for x in lines], schema=index.SCANS), directory / "scans.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist([fill(x, index.ROWS) for x in rows], schema=index.ROWS), directory / "rows.parquet"
    )
    (directory / "index.json").write_text(
        json.dumps({"version": 1, "sources": sources, "identity": "by hand"}, default=list)
    )
