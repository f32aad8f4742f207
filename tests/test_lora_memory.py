"""Memory of a model of 1.2 billion parameters with adapters: little more than its arrays, also while it is read."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest

from radfm_jax.checkpoints import checkpoint, train_state
from radfm_jax.models import radfm
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.lora import LoraConfig
from radfm_jax.runtime import host_memory, sharding
from radfm_jax.training import train_step
from radfm_jax.training.optimizer import OptimizerConfig

LLAMA = DecoderConfig(
    vocab_size=32000, width=2048, mlp_width=8192, num_layers=16, num_heads=32, num_kv_heads=32, head_dim=64
)
CONFIG = dataclasses.replace(radfm.tiny(), llama=LLAMA)
OPTIMIZER = OptimizerConfig(warmup_steps=1, frozen=("llama",))


def status(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def write_base(directory, config: radfm.RadFMConfig = CONFIG) -> int:
    """Write random weights in bfloat16, layer by layer, and return the number of parameters."""
    shapes = {
        path: (x.shape, np.dtype(ml_dtypes.bfloat16))
        for path, x in checkpoint.flatten(nn.unbox(radfm.abstract_params(config))).items()
    }
    stacked = {path for path in shapes if "blocks/" in path}
    rng = np.random.default_rng(0)
    with checkpoint.new_directory(directory) as partial:
        writer = checkpoint.ParamWriter(partial, shapes, stacked)
        for path, (shape, dtype) in shapes.items():
            for index in [(layer,) for layer in range(shape[0])] if path in stacked else [()]:
                values = rng.standard_normal(shape[len(index) :], np.float32) * 0.02
                writer.write(path, values.astype(dtype), index)
        checkpoint.write_description(partial, "radfm", config.to_dict())
    return sum(int(np.prod(shape)) for shape, _ in shapes.values())


def first_state(directory, config: radfm.RadFMConfig, base: str) -> dict:
    """Return the first state of a run with adapters."""
    config = dataclasses.replace(config, base=base, lora=LoraConfig(rank=16))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    abstract, transform, _ = train_step.abstract_state(config, OPTIMIZER, mesh)
    loaded, _ = train_state.init_from(directory, abstract, config)
    return jax.block_until_ready(train_step.init_state(abstract, config, OPTIMIZER, transform, 0, loaded))


def main(directory: str, base: str) -> None:
    """Print the resident bytes of the first state of a run, those of its arrays, and the peak while it was read."""
    with tempfile.TemporaryDirectory() as small:  # loads the libraries
        write_base(Path(small) / "base", radfm.tiny())
        first_state(Path(small) / "base", radfm.tiny(), base)
    before = status("VmRSS")
    state = first_state(directory, CONFIG, base)
    gc.collect()
    time.sleep(2)  # threads of the runtime free the last inputs of a program after its outputs are ready
    host_memory.release()
    arrays = sum(x.nbytes for x in jax.tree.leaves(state))
    resident, peak = status("VmRSS") - before, status("VmHWM") - before
    print(json.dumps({"arrays": arrays, "resident": resident, "peak": peak, "base": base}))


@pytest.mark.slow
def test_resident_memory_is_that_of_the_arithmetic(tmp_path):
    parameters = write_base(tmp_path / "base")
    assert parameters > 1.2e9
    for base, bits in (("nf4", 4.5), ("int8", 8), ("bfloat16", 16)):
        child = subprocess.run(
            [sys.executable, __file__, str(tmp_path / "base"), base], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        found = json.loads(child.stdout.splitlines()[-1])
        print(found)
        blocks = LLAMA.num_layers * (4 * 2048 * 2048 + 3 * 2048 * 8192)
        assert found["arrays"] > blocks * bits / 8
        assert 0.8 * found["arrays"] < found["resident"] < 1.2 * found["arrays"], found
        # One layer of a matrix in float32 and its quantised copy come on top.
        assert found["peak"] < found["arrays"] + 1.5e9, found


if __name__ == "__main__":
    main(*sys.argv[1:])
