"""Training processes for test_distributed.py: each line of standard input starts one or polls one.

They are forked from this process, which has imported everything already; imports are most of the time of a start.
"""

import gc
import json
import os
import sys
import time

import jax
import matplotlib.pyplot
import numpy as np
import tensorboardX
from jax._src import cache_key

from radfm_jax.checkpoints import checkpoint
from radfm_jax.runtime.barrier import barrier
from radfm_jax.training import command, display, loop

assert matplotlib.pyplot and tensorboardX  # import them here once, not in each child


def serve() -> None:
    gc.freeze()  # children neither collect nor copy the objects of the imports
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            pid, status = os.waitpid(job["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            sys.exit(run(**job))
        print(json.dumps(answer), flush=True)


def run(arguments: list[str], devices: int, cache: str, output: str, pace: float) -> int:
    """Run `python -m radfm_jax.train ARGUMENTS` with simulated devices.

    Args:
      cache: directory of compiled programs. output: file for the console. pace: seconds to sleep in each step.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    add, compiled, first_state = loop.RowLog.add, loop.Programs.compile, loop.first_state

    def slowly(self, step, rows):
        time.sleep(pace)
        add(self, step, rows)

    def compile_in_turn(*args):
        """Process 0 compiles, the others read its cache: there are fewer cores than processes."""
        programs = compiled(*args) if jax.process_index() == 0 else None
        barrier("compiled")
        return programs or compiled(*args)

    def compared(config, newest, *args):
        """Check that the parameters of this process are bit-equal to those of the step that it resumes from."""
        state, messages = first_state(config, newest, *args)
        if newest is not None:
            stored = checkpoint.StoredParams(newest)
            for path, x in checkpoint.flatten({**state["params"], **state["frozen"]}).items():
                expected = np.asarray(stored.read(path))
                for shard in x.addressable_shards:
                    actual, part = np.asarray(shard.data), expected[shard.index]
                    assert actual.shape == part.shape and actual.tobytes() == part.tobytes(), (path, shard.index)
            print(f"parameters of step {newest.name} are equal in process {jax.process_index()}", flush=True)
        return state, messages

    def devices_of_the_job(hash_object, devices):
        """Hash only their number: JAX hashes which are local, and would not find programs of other processes."""
        hash_object.update(f"{len(devices.flat)} in {jax.process_count()} processes".encode())

    cache_key._hash_accelerator_config = devices_of_the_job
    display.draw_curves = lambda _: None
    loop.RowLog.add, loop.Programs.compile, loop.first_state = slowly, compile_in_turn, compared
    return command.main(arguments)


if __name__ == "__main__":
    serve()
