"""DPO and GRPO on the practice data: exact match on held-out questions before and after, and with exchanged scans.

    python tests/benchmarks/bench_preference.py --objective grpo --checkpoint runs/quickstart/pretrain [--seeds 3]

Each seed is a run of configs/preference_practice.py. `held out` is the share of test questions whose
greedy answer is the reference (reward `exact`). `scans exchanged` is the same with the scan of another question.
`without scans` is what the best constant answer to each question reaches. The folder above `practice` is the working
directory."""

from __future__ import annotations

import argparse
import collections
import json
import os
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from configs import preference_practice
from input_pipeline.files import write_json, write_json_lines
from input_pipeline.index.prepare import prepare
from radfm_jax import api
from radfm_jax.checkpoints import run_directory
from radfm_jax.evaluate import exact_match
from radfm_jax.training import display, loop, programs
from radfm_jax.training.experiment import Experiment

ANSWERS = (("zero", "one", "two"), ("normal", "nodule", "mass", "multiple lesions"))


def write_pairs(practice: Path) -> None:
    """Write pairs.jsonl of each split: the answer of the data is chosen, another answer to the question rejected."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        pairs = []
        for line in map(json.loads, (practice / split / "all.jsonl").read_text().splitlines()):
            chosen = line.pop("response", None)
            if others := [answer for answers in ANSWERS if chosen in answers for answer in answers if answer != chosen]:
                pairs.append(line | {"chosen": chosen, "rejected": str(rng.choice(others))})
        write_json_lines(practice / split / "pairs.jsonl", pairs)


def experiment(arguments, seed: int) -> Experiment:
    config = preference_practice.get_config(arguments.objective).unlock()
    config.data.seed = config.train.seed = seed
    config.checkpoint.init_from = str(arguments.checkpoint)
    if arguments.steps:
        config.train.steps = arguments.steps
    return Experiment.from_dict(config)


def share_programs() -> None:
    """Compile the step of the first seed only: the seeds have the same shapes, and the seed is an argument."""
    compiled, known = programs.Programs.compile, {}
    programs.Programs.compile = lambda *arguments: known.get("all") or known.setdefault("all", compiled(*arguments))


def score(checkpoint: Path) -> dict[str, float]:
    """Return the accuracies on the test questions."""
    config = Experiment.from_dict(preference_practice.get_config("dpo"))  # rows for single answers suffice
    matches = exact_match.evaluate(config, api.load(checkpoint).params, progress=False)
    references = collections.defaultdict(collections.Counter)
    for match in matches:
        references[match.question][match.reference] += match.scans_of == "own"
    share = lambda kind: float(np.mean([match.exact for match in matches if match.scans_of == kind]))  # noqa: E731
    constant = sum(max(counts.values()) for counts in references.values())
    total = sum(sum(counts.values()) for counts in references.values())
    return {"held_out": share("own"), "exchanged": share("another"), "constant": constant / total, "questions": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--objective", choices=preference_practice.STEPS, required=True)
    parser.add_argument("--practice", type=Path, default=Path("practice"))
    parser.add_argument("--checkpoint", type=Path, required=True, help="the run or step to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/preference"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="default: those of the config")
    arguments = parser.parse_args()
    arguments.checkpoint, arguments.out = arguments.checkpoint.absolute(), arguments.out.absolute()
    os.chdir(arguments.practice.absolute().parent)
    config = experiment(arguments, 0)
    write_pairs(arguments.practice)
    prepare(config.data, config.data.index, workers=2, records=True)
    share_programs()
    runs = {"before": arguments.checkpoint}
    for seed in range(arguments.seeds):
        workdir, start = arguments.out / f"{arguments.objective}_{seed}", time.perf_counter()
        assert loop.train(experiment(arguments, seed), workdir) == 0
        runs[f"seed {seed}"] = run_directory.step_directory(workdir, run_directory.steps(workdir)[-1])
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", [*display.read_metrics(workdir)][-1], flush=True)
    table = Table("run", "held out", "scans exchanged", "without scans", title=arguments.objective)
    results = {}
    for name, checkpoint in runs.items():
        results[name] = scores = score(checkpoint)
        print(name, scores, flush=True)
        table.add_row(name, *(f"{scores[key]:.1%}" for key in ("held_out", "exchanged", "constant")))
        write_json(arguments.out / f"{arguments.objective}.json", results)
    Console().print(table)


if __name__ == "__main__":
    main()
