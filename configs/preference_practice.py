"""Preference and reward tuning of the quickstart model on two kinds of questions of the practice data.

    python -m input_pipeline.prepare --config=configs/preference_practice.py --out practice/pairs_index --records
    python -m radfm_jax.train --config=configs/preference_practice.py:dpo --workdir=runs/dpo \
        --config.checkpoint.init_from=runs/quickstart/pretrain
    python -m radfm_jax.train --config=configs/preference_practice.py:grpo --workdir=runs/grpo \
        --config.checkpoint.init_from=runs/quickstart/pretrain

Both read pairs.jsonl, which tests/benchmarks/bench_preference.py writes before it runs one of them with three seeds;
`grpo` uses the chosen answer as the reference. docs/preference.md has the results. Hardware: two CPU cores.
"""

from ml_collections import ConfigDict

from configs import quickstart

QUESTIONS = ("*-count", "*-diagnosis")
HELD_OUT = ("*-test-000[0-2]??-count", "*-test-000[0-2]??-diagnosis")  # of 300 studies
STEPS = {"dpo": 60, "grpo": 40}


def source(split: str, table: str = "all.jsonl") -> dict:
    return quickstart.source(split, "count") | {"table": f"{split}/{table}", "ids": QUESTIONS}


def get_config(objective: str = "dpo") -> ConfigDict:
    if objective not in STEPS:
        raise ValueError(f"objective {objective!r} is unknown: use one of {', '.join(STEPS)}")
    config = quickstart.get_config("finetune").unlock()
    config.data.train = ConfigDict({"questions": source("train", "pairs.jsonl")})
    config.data.validation = ConfigDict({"questions_validation": source("validation", "pairs.jsonl")})
    config.data.test = ConfigDict({"questions_test": source("test") | {"ids": HELD_OUT}})
    config.data.mixture = "epoch"
    config.train.update(objective=objective, steps=STEPS[objective], batch=8, log_every=5, eval_batches=8)
    config.optimizer.update(learning_rate=7e-4, warmup_steps=5, final=0.1)
    config.data.index = "practice/pairs_index"
    if objective == "grpo":
        # Two questions in a row: sixteen prompts of at most 27 tokens with the room for their answers. A scan has up to
        # 32 patches.
        config.data.update(text_length=544, patch_length=32, planes=128, scans=2)
        config.grpo.update(group=8, max_new_tokens=6)
    return config.lock()
