"""Preference and reward tuning of the quickstart model on questions about lesions of the practice data.

    python -m input_pipeline.prepare --config=configs/preference_practice.py:dpo --out practice/pairs_index --records
    python -m radfm_jax.train --config=configs/preference_practice.py:dpo --workdir=runs/dpo \
        --config.checkpoint.init_from=runs/quickstart/pretrain
    python -m radfm_jax.train --config=configs/preference_practice.py:grpo --workdir=runs/grpo \
        --config.checkpoint.init_from=runs/quickstart/pretrain

`dpo` reads practice/train/pairs.jsonl, `grpo` the index of the quickstart. tests/benchmarks/bench_preference.py writes
the pairs and runs both; docs/preference.md has the results. Hardware: two CPU cores.
"""

from ml_collections import ConfigDict

from configs import quickstart

QUESTIONS = ("*-side", "*-level", "*-size")
STEPS = {"dpo": 60, "grpo": 60}


def source(split: str, table: str = "all.jsonl") -> dict:
    return quickstart.source(split, "lesion") | {"table": f"{split}/{table}", "ids": QUESTIONS}


def get_config(objective: str = "dpo") -> ConfigDict:
    if objective not in STEPS:
        raise ValueError(f"objective {objective!r} is unknown: use one of {', '.join(STEPS)}")
    config = quickstart.get_config("finetune").unlock()
    table = "pairs.jsonl" if objective == "dpo" else "all.jsonl"
    config.data.train = ConfigDict({"lesion": source("train", table)})
    config.data.validation = ConfigDict({"lesion_validation": source("validation", table)})
    config.data.test = ConfigDict({"lesion_test": source("test")})
    config.data.mixture = "epoch"
    config.train.update(objective=objective, steps=STEPS[objective], batch=8, log_every=5, eval_batches=8)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=5, final=0.1)
    if objective == "dpo":
        config.data.index = "practice/pairs_index"
        config.data.text_length = 160  # two pairs
    else:
        # One question in a row: eight times a prompt of at most 34 tokens and the room for its answer. The scan has up
        # to 32 patches.
        config.data.update(text_length=320, patch_length=32, planes=128, scans=2)
        config.grpo.update(group=8, max_new_tokens=4)
    return config.lock()
