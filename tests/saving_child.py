"""Processes that save checkpoints, for test_saver_processes.py to kill, end and start in pairs.

`serve` reads one job per line from standard input and forks for each, so that no job imports everything again but each
starts and ends as its own process.
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

# Part -> parameter -> dtype, shape, mesh axes.
PARAMS = {
    "llama": {"kernel": (np.float32, (64, 96), ("fsdp", "tensor")), "norm": (np.float32, (24,), ())},
    "vit": {"kernel": (ml_dtypes.bfloat16, (2, 16, 8), (None, "fsdp")), "latents": (np.float32, (8, 10), ("fsdp",))},
}
FROZEN = ("llama",)
CONFIG = {"train": {"steps": 10, "parts": ["vit"]}}


def values(step: int) -> dict:
    """Return a state of random bits with seed `step`, as numpy arrays; structured like that of train_step.py."""
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
    """Return shapes and shardings of the same state."""

    def shape_of(path, x):
        part, name = [None, *(k.key for k in path if isinstance(k, jax.tree_util.DictKey))][-2:]
        axes = PARAMS[part][name][2] if part in PARAMS else ()
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(shape_of, values(0))


def state(step: int, mesh) -> dict:
    """Return the same state on the devices of a mesh, which may belong to several processes."""
    put = lambda x, a: jax.make_array_from_callback(x.shape, a.sharding, lambda index: x[index])  # noqa: E731
    return jax.tree.map(put, jax.tree.map(np.asarray, values(step)), abstract(mesh))


def assert_same(restored: dict, step: int) -> None:
    """Assert that this process's shards of a state are bit-equal to `values(step)`."""

    def compare(path, x, expected):
        expected = np.asarray(expected)
        assert x.dtype == expected.dtype, path
        for shard in x.addressable_shards:
            actual, part = np.asarray(shard.data), expected[shard.index]
            assert actual.shape == part.shape and actual.tobytes() == part.tobytes(), (path, shard.index)

    jax.tree_util.tree_map_with_path(compare, restored, values(step))


def data_state(step: int) -> dict:
    return {"epoch": 0, "window": step, "row": 8 * step, "delivered": 0, "lost": 0, "data": {"seed": 1}}


def saver(workdir, **options) -> Saver:
    return Saver(workdir, **{"config": CONFIG, "model": radfm.tiny(), **options})


# --- jobs -------------------------------------------------------------------------------------------------------------


def report(*words) -> None:
    print(*words, flush=True)


def loop(workdir: str) -> None:
    """Save forever; report each step whose save has started, which means that the previous one is done."""
    mesh = sharding.make_mesh(fsdp=2)
    with saver(workdir, keep_last=2) as s:
        newest = run_directory.latest(workdir)
        step = int(newest.name) if newest else 0
        report("from", step)
        while True:
            step += 1
            s.save(state(step, mesh), data_state(step))
            report("started", step)


def end(workdir: str, how: str, broken: bool = False, closed: bool = False) -> None:
    """End right after the save of step 2 has started."""
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
    """A stand-in for checkpoint.hash_files: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def leave(how: str) -> None:
    if how == "sys.exit":
        sys.exit(0)
    if how == "exception":
        raise KeyError("something else")


def hold(workdir: str, forked: bool) -> None:
    """Keep the lock and report the pid of an idle forked process, or 0."""
    s = saver(workdir)
    grandchild = os.fork() if forked else 0
    if grandchild or not forked:
        report("locked", grandchild)
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
        report("pid", child)
        report("exited", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def pair(workdir: str, alone: str, port: str, process: str) -> None:
    """Run one of two processes with two devices each.

    They restore what one process saved in `alone`, save step 2, fail to save step 3 because the disk of process 1 is
    full, save step 4, restore it, and detect a damaged file.
    """
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
            raise AssertionError("a save that failed in one process must fail in all")
        checkpoint.hash_files = hash_files
        s.save(state(4, mesh), data_state(4) | {"lost": int(process)})
    newest = run_directory.latest(workdir)
    assert newest.name == "4", newest
    assert_same(train_state.restore(newest, abstract(sharding.make_mesh(data=2, tensor=2))), 4)
    assert train_state.data_state(newest)["lost"] == int(process)
    damaged = newest.parent / "2" / "params" / "llama.kernel" / "c" / "0" / "0"
    barrier("damage", lambda: damaged.write_bytes(bytes(damaged.stat().st_size)) if process == "0" else 0)
    try:
        run_directory.verify(newest.parent / "2")
    except ValueError as e:
        assert f"content differs: {damaged.relative_to(newest.parent / '2')}" in str(e), e
    else:
        raise AssertionError("damage in the share of another process was not reported")
    report("done")


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    {"serve": serve, "pair": pair}[mode](*arguments)
