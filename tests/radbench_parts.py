"""A benchmark on practice data with the names of RadBench's data sets, and a small model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import parity

from input_pipeline.config import DataConfig
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate.radbench import Benchmark
from radfm_jax.inference import inputs
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig

STUDY = r"(p\d+-\w+-\d+)"
MODEL = RadFMConfig(
    ViTConfig(width=24, num_layers=1, num_heads=2, head_dim=8, mlp_width=32, dropout=0.0),
    PerceiverConfig(width=24, num_layers=1, num_heads=2, head_dim=8, num_latents=4),
    DecoderConfig(vocab_size=512, width=32, mlp_width=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8),
)


def sets(root: Path | str) -> dict[str, dict]:
    """Return sets for all five tasks; one of them is missing."""
    of = {"root": str(root), "study": STUDY, "facts": "test/labels.jsonl"}
    return {
        "rad3d_modality": {**of, "family": "rad3d_modality", "table": "test/modality.csv", "judgement": 0.0},
        "cxr_mix": {**of, "family": "cxr_mix", "table": "test/diagnosis_yes_no.csv"},
        "vqa_rad": {**of, "family": "vqa_rad", "table": "test/vqa.csv"},
        "slake": {**of, "family": "slake", "table": "test/none.csv"},
        "rad3d_caption": {**of, "family": "rad3d_caption", "table": "test/rationale.json"},
        "rad3d_rationale": {**of, "family": "rad3d_rationale", "table": "test/rationale.json", "judgement": 0.0},
    }


def benchmark(root: Path | str, **changes) -> Benchmark:
    return Benchmark(**{"sets": sets(root), "terms": "none", "resamples": 50, **changes})


def save_model(data: DataConfig, directory: Path) -> Path:
    """Save an untrained model like a training run, with its tokenizer and the preparation of its scans."""
    params = parity.recipe_params(MODEL)
    with checkpoint.new_directory(directory) as partial:
        checkpoint.save_params(partial, params)
        checkpoint.write_description(partial, "radfm", MODEL.to_dict(), source={"training": "run", "step": 1})
        (partial / "tokenizer.model").write_bytes(Path(data.tokenizer).read_bytes())
        prepared = dataclasses.asdict(inputs.Preparation.from_config(data))
        (partial / "run.json").write_text(json.dumps({"step": 1, "config": {"data": prepared}}))
    return directory


def config_file(found: Benchmark, file: Path) -> Path:
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({json.dumps(json.dumps(found.to_dict()))})).lock()\n"
    )
    return file
