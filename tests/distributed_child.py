"""Processes that train, for test_distributed.py: each line of standard input starts one, or asks how one is.

They are forked from this one, which has imported everything: that is most of the time that a start takes.
"""

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

assert matplotlib.pyplot and tensorboardX  # loaded here once, and not in each child


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            pid, status = os.waitpid(job["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            sys.exit(run(**job))
        print(json.dumps(answer), flush=True)


def run(arguments: list[str], devices: int, cache: str, output: str, pace: float) -> int:
    """`python -m radfm_jax.train ARGUMENTS` with simulated devices, its console in a file.

    Args:
      cache: directory of compiled programs. pace: seconds to sleep in each step.
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

    def one_after_the_other(*of):
        """Process 0 compiles, the others find it done: there are fewer cores than processes."""
        mine = compiled(*of) if jax.process_index() == 0 else None
        barrier("compiled")
        return mine or compiled(*of)

    def compared(config, newest, *of):
        """Every bit of the parameters that this process took from a step is that of the step."""
        state = first_state(config, newest, *of)
        if newest is not None:
            stored = checkpoint.ParamReader(newest)
            for path, x in checkpoint.flatten({**state["params"], **state["frozen"]}).items():
                whole = np.asarray(stored.read(path))
                for shard in x.addressable_shards:
                    mine, theirs = np.asarray(shard.data), whole[shard.index]
                    assert mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes(), (path, shard.index)
            print(f"parameters of step {newest.name} are equal in process {jax.process_index()}", flush=True)
        return state

    def devices_of_the_job(hash_object, devices):
        """JAX would hash which of them are this process's, and so find nothing that another process compiled."""
        hash_object.update(f"{len(devices.flat)} in {jax.process_count()} processes".encode())

    cache_key._hash_accelerator_config = devices_of_the_job
    display.curves = lambda _: None
    loop.RowLog.add, loop.Programs.compile, loop.first_state = slowly, one_after_the_other, compared
    return command.main(arguments)


if __name__ == "__main__":
    serve()
