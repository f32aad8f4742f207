"""Planned memory against the measured memory of the same step on this machine, with 2.7 GB of arrays."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Runs in a child process: the peak is reset after compiling and read after three steps.
RUN = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from configs import quickstart
from radfm_jax.cost import estimate, program
from radfm_jax.cost.topology import parse
from radfm_jax.runtime import sharding
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment

config = Experiment.from_dict(quickstart.get_config())
llama = dataclasses.replace(config.model.llama, vocab_size=32000, width=1024, mlp_width=2816, num_layers=8, num_heads=8,
                            num_kv_heads=8, head_dim=128)
config = dataclasses.replace(config, model=dataclasses.replace(config.model, llama=llama),
                             train=dataclasses.replace(config.train, batch=2),
                             optimizer=dataclasses.replace(config.optimizer, method="adamw"))


def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))


step = program.compile_step(config, parse("cpu:1"))
mesh = sharding.make_mesh()
abstract, transform, _ = train_step.abstract_state(config.compute, config.optimizer, mesh)
make = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract),
               out_shardings=train_step.shardings_of(abstract)).lower().compile()
batch = {k: jax.device_put(jnp.ones(x.shape, x.dtype), train_step.batch_sharding(mesh))
         for k, x in estimate.abstract_batch(config).items()}
rate = train_step.put_rate(np.float32(1e-3), mesh)
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
state = make()
for _ in range(3):
    state, metrics = step(state, batch, rate)
    jax.block_until_ready(metrics)
memory = step.memory_analysis()
planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
print(json.dumps({"planned": planned, "arrays": memory.argument_size_in_bytes,
                  "grown": (kilobytes("VmHWM") - before) * 1024}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_planned_memory_matches_a_run():
    command = [sys.executable, "-W", "ignore", "-c", RUN]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": "/"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout.splitlines()[-1])
    print(result)
    assert result["arrays"] > 2e9
    assert result["planned"] == pytest.approx(result["grown"], rel=0.2)
