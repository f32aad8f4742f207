"""Processes that save, for test_saver_processes.py to kill, end and start in pairs.

`serve` reads one job a line from standard input and forks for each: no job pays for the imports again, and each begins
and ends as a program of its own.
"""

import errno
import json
import os
import sys
import time

import jax
import ml_dtypes
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from radfm_jax.checkpoints import checkpoint, run_directory, train_state
from radfm_jax.checkpoints.saver import Saver
from radfm_jax.checkpoints.step_writer import SaveError
from radfm_jax.models import radfm
from radfm_jax.runtime import sharding
from radfm_jax.runtime.barrier import barrier

# Parameters, their axes, and whether they learn.
PARAMS = {
    "llama": {"kernel": (np.float32, (64, 96), ("fsdp", "tensor")), "norm": (np.float32, (24,), ())},
    "vit": {"kernel": (ml_dtypes.bfloat16, (2, 16, 8), (None, "fsdp")), "latents": (np.float32, (8, 10), ("fsdp",))},
}
FROZEN = ("llama",)
CONFIG = {"train": {"steps": 10, "parts": ["vit"]}}


def values(step: int) -> dict:
    """A state as numpy arrays in which every bit follows from `step`; shaped like that of train_step.py."""
    rng = np.random.default_rng(step)

    def random(dtype, shape, _) -> np.ndarray:
        return np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)

    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    tree = lambda part: jax.tree.map(lambda x: random(*x), PARAMS[part], is_leaf=is_leaf)  # noqa: E731
    learning = {part: tree(part) for part in PARAMS if part not in FROZEN}
    moments = optax.ScaleByAdamState(np.int32(step), *({part: tree(part) for part in learning} for _ in range(2)))
    return {
        "step": np.int32(step),
        "params": learning,
        "frozen": {part: tree(part) for part in FROZEN},
        "opt": (optax.EmptyState(), moments, optax.EmptyState()),
        "key": rng.integers(0, 2**32, 2, dtype=np.uint32),
        "skipped": np.int32(step % 3),
    }


def abstract(mesh) -> dict:
    """The same as shapes with shardings."""

    def one(path, x):
        where = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)][-2:]
        axes = PARAMS[where[0]][where[1]][2] if where[0] in PARAMS else ()
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(one, values(0))


def state(step: int, mesh) -> dict:
    """The same on the devices of a mesh, which may be those of several processes."""
    put = lambda x, a: jax.make_array_from_callback(x.shape, a.sharding, lambda index: x[index])  # noqa: E731
    return jax.tree.map(put, jax.tree.map(np.asarray, values(step)), abstract(mesh))


def assert_same(found: dict, step: int) -> None:
    """Every bit of what this process holds of a state is that of `values(step)`."""

    def one(path, x, wanted):
        wanted = np.asarray(wanted)
        assert x.dtype == wanted.dtype, path
        for shard in x.addressable_shards:
            mine, theirs = np.asarray(shard.data), wanted[shard.index]
            assert mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes(), (path, shard.index)

    jax.tree_util.tree_map_with_path(one, found, values(step))


def data_state(step: int) -> dict:
    return {"epoch": 0, "window": step, "row": 8 * step, "delivered": 0, "lost": 0, "data": {"seed": 1}}


def saver(workdir, **options) -> Saver:
    return Saver(workdir, **{"config": CONFIG, "model": radfm.tiny(), **options})


# --- jobs -------------------------------------------------------------------------------------------------------------


def say(*words) -> None:
    print(*words, flush=True)


def loop(workdir: str) -> None:
    """Saves without end; says of each step when its save has begun, which means that the one before is done."""
    mesh = sharding.make_mesh(fsdp=2)
    with saver(workdir, keep_last=2) as s:
        found = run_directory.latest(workdir)
        step = int(found.name) if found else 0
        say("from", step)
        while True:
            step += 1
            s.save(state(step, mesh), data_state(step))
            say("begun", step)


def end(workdir: str, how: str, broken: bool = False, closed: bool = False) -> None:
    """Ends right after step 2 began to be saved."""
    mesh = sharding.make_mesh(fsdp=2)
    s = saver(workdir)
    s.save(state(1, mesh), data_state(1), wait=True)
    if broken:
        checkpoint.hash_files = full
    s.save(state(2, mesh), data_state(2))
    if how == "os._exit":
        os._exit(0)
    if closed:
        with s:
            leave(how)
    leave(how)


def full(*_, **__):
    """In place of checkpoint.hash_files: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def leave(how: str) -> None:
    if how == "sys.exit":
        sys.exit(0)
    if how == "exception":
        raise KeyError("something else")


def hold(workdir: str, forked: bool) -> None:
    """Holds the lock; beside it a forked process that does nothing, whose number it says (or 0)."""
    s = saver(workdir)
    grandchild = os.fork() if forked else 0
    if grandchild or not forked:
        say("held", grandchild)
    time.sleep(600)
    s.close()


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", 2)
            {"loop": loop, "end": end, "hold": hold}[job.pop("job")](**job)
            return
        say("pid", child)
        say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def pair(workdir: str, alone: str, port: str, process: str) -> None:
    """One of two processes with two devices each: restores what one process saved in `alone`, saves step 2, fails to
    save step 3 because of the other process's disk, saves step 4, restores it, and finds a damaged file."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    for mesh in (sharding.make_mesh(fsdp=4), sharding.make_mesh(data=2, fsdp=2), sharding.make_mesh(fsdp=2, tensor=2)):
        assert_same(train_state.restore(run_directory.latest(alone), abstract(mesh), verified=True), 5)
    assert train_state.data_state(run_directory.latest(alone)) == data_state(5)
    mesh = sharding.make_mesh(fsdp=4)
    with saver(workdir) as s:
        s.save(state(2, mesh), data_state(2) | {"lost": int(process)})
        s.wait()
        hash_files = checkpoint.hash_files
        if process == "1":
            checkpoint.hash_files = full
        s.save(state(3, mesh), data_state(3))
        try:
            s.wait()
        except SaveError as e:
            assert "No space left" in str(e) and "step 3" in str(e), e
            assert ("process 1: " in str(e)) == (process == "0"), e
        else:
            raise AssertionError("a save that failed in one process is no save")
        checkpoint.hash_files = hash_files
        s.save(state(4, mesh), data_state(4) | {"lost": int(process)})
    found = run_directory.latest(workdir)
    assert found.name == "4", found
    assert_same(train_state.restore(found, abstract(sharding.make_mesh(data=2, tensor=2))), 4)
    assert train_state.data_state(found)["lost"] == int(process)
    damaged = found.parent / "2" / "params" / "llama.kernel" / "c" / "0" / "0"
    barrier("hurt", lambda: damaged.write_bytes(bytes(damaged.stat().st_size)) if process == "0" else 0)
    try:
        run_directory.verify(found.parent / "2")
    except ValueError as e:
        assert f"content differs: {damaged.relative_to(found.parent / '2')}" in str(e), e
    else:
        raise AssertionError("damage in another process's share was not told")
    say("done")


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    {"serve": serve, "pair": pair}[mode](*arguments)
