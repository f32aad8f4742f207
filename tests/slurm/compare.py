"""Compare two runs bit by bit: the state of a step, and every logged loss.

python tests/slurm/compare.py RUN RUN STEP      exit code 0: equal; 1: different
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from radfm_jax.checkpoints import run_directory, train_state
from radfm_jax.runtime import sharding
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment


def main(argv: list[str]) -> int:
    *runs, step = Path(argv[0]), Path(argv[1]), int(argv[2])
    config = Experiment.from_dict(run_directory.last_config(runs[0]))
    abstract = train_step.abstract_state(config.compute, config.optimizer, sharding.make_mesh())[0]
    states = [train_state.restore(run_directory.step_directory(run, step), abstract) for run in runs]
    leaves = [jax.tree_util.tree_leaves_with_path(state) for state in states]
    different = [
        jax.tree_util.keystr(path) for (path, a), (_, b) in zip(*leaves, strict=True) if not np.array_equal(a, b)
    ]
    logged = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in runs]
    losses = [[(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] for lines in logged]
    count, numbers = len(leaves[0]), sum(x.size for _, x in leaves[0])
    print(f"{count} arrays, {numbers:,} numbers of step {step}: {len(different)} arrays differ {different[:5]}")
    print(f"{len(losses[0])} and {len(losses[1])} losses, {'equal' if losses[0] == losses[1] else 'DIFFERENT'}")
    return int(bool(different) or losses[0] != losses[1] or not losses[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
