"""SIGKILL at random moments of training, half of them during saves: the final state equals that of an unbroken run."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from practice import practice
from test_train import MODEL, bits, record

from radfm_jax.checkpoints.step_writer import PARTIAL
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig

STEPS = 30
ROOT = Path(__file__).parents[1]
# Kills per run, runs, and the seed of the first run. The figure in the docs is of
# `KILLS=10 RUNS=20 bash launch/test.sh -m slow tests/test_killed.py`.
KILLS, RUNS = int(os.environ.get("KILLS", 10)), int(os.environ.get("RUNS", 2))
FIRST = int(os.environ.get("FIRST", 0))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts training in a workdir."""
    directory = tmp_path_factory.mktemp("killed")
    data = practice(directory, train=10, test=0, validation=4, num_latents=4, text_length=128)
    config = Experiment(
        dataclasses.replace(MODEL),
        data,
        TrainConfig(steps=STEPS, batch=8, remat="none", log_every=1, eval_every=10, chunk=64),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(save_every=2, keep_last=2),
    )
    file = directory / "config.py"
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({json.dumps(json.dumps(config.to_dict()))})).lock()\n"
    )
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"), "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }  # fmt: skip

    def start_training(workdir, log):
        command = [sys.executable, "-m", "radfm_jax.train", f"--config={file}", f"--workdir={workdir}"]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    return start_training


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """An unbroken run."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    with open(workdir.parent / "log", "w") as log:
        assert start(workdir, log).wait() == 0, (workdir.parent / "log").read_text()
    return workdir


def started_steps(workdir) -> int:
    file = workdir / "rows" / "0.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def saving(workdir) -> bool:
    """Return whether a step is being written."""
    return any((workdir / "checkpoints").glob(f"*{PARTIAL}"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + RUNS))
def test_repeated_kills(start, unbroken, tmp_path, seed):
    rng, workdir, fired, during_saves = random.Random(seed), tmp_path / "run", 0, 0
    with open(tmp_path / "log", "w") as log:
        while fired < KILLS:
            before, child = started_steps(workdir), start(workdir, log)
            # Kill after one to four more steps, at any moment of a step or of the next save.
            target = before + rng.randint(1, 4)
            while child.poll() is None and started_steps(workdir) < min(target, STEPS):
                time.sleep(0.005)
            if fired % 2:
                time.sleep(rng.uniform(0, 0.3))
            else:
                while child.poll() is None and not saving(workdir):
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.03))
            if child.poll() is not None:
                assert child.returncode == 0, (tmp_path / "log").read_text()[-3000:]
                break  # it finished before all kills fired: the earlier ones count
            os.killpg(child.pid, signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            fired += 1
            during_saves += saving(workdir)
        assert start(workdir, log).wait() == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"\nseed {seed}: {fired} kills, {during_saves} of them during a save")
    assert fired
    assert record(workdir) == record(unbroken)
    same = jax.tree.map(np.array_equal, bits(workdir, STEPS), bits(unbroken, STEPS))
    assert all(jax.tree.leaves(same))
