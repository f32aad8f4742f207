"""Save one step: write to a temporary directory, hash the files, write the manifest, and rename the directory."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from rich import filesize

from input_pipeline.files import PARTIAL, fsync, read_json, write_json
from radfm_jax.checkpoints import checkpoint
from radfm_jax.checkpoints.checkpoint import MANIFEST
from radfm_jax.checkpoints.run_directory import CHECKPOINTS, DATA, RUN, own_share, step_directory
from radfm_jax.checkpoints.train_state import Base, split_state
from radfm_jax.models import radfm
from radfm_jax.runtime import faults
from radfm_jax.runtime.barrier import barrier, describe, forget

REPLACED = ".replaced"
# Each replica copies one slice of an array. Slicing compiles for every shape, so small arrays are not sliced.
ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=16 * 2**20))
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")


class SaveError(faults.Explained, RuntimeError):
    """A step was not saved. Earlier steps are unchanged."""


def remove_partial(workdir: Path) -> None:
    """Delete incomplete steps. The caller must have the lock, and no save may be under way."""
    for path in (workdir / CHECKPOINTS).glob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # best effort: leftovers only waste disk space
        else:
            path.unlink(missing_ok=True)


def recover_replaced(workdir: Path) -> None:
    """Finish the replacement of a step that a killed process interrupted."""
    for path in (workdir / CHECKPOINTS).glob(f"*{REPLACED}"):
        step = path.with_suffix("")
        shutil.rmtree(path) if step.exists() else path.rename(step)


class StepWriter:
    """Write one step; every process calls `start`, and then `finish` from a background thread.

    `number` counts the saves of this process and makes the barrier keys unique.
    """

    def __init__(
        self,
        workdir: Path,
        state: dict,
        number: int,
        model: radfm.RadFMConfig,
        tokenizer_files: Mapping[str, bytes],
        timeout: float,
        base: Base | None = None,
    ):
        with jax.transfer_guard("allow"):
            self.step = int(state["step"])
        self.workdir, self.number, self.timeout = workdir, number, timeout
        self.directory = step_directory(workdir, self.step)
        self._model, self._tokenizer_files = model, tokenizer_files
        self._parts, self._base = split_state(state, base), base
        self._shapes = {part: {k: x.shape for k, x in leaves.items()} for part, leaves in self._parts.items()}
        self._bytes = sum(x.nbytes for leaves in self._parts.values() for x in leaves.values())
        shardings = [x.sharding for x in jax.tree.leaves(state)]
        self._mesh = next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)
        self._partial: Path | None = None
        self._handlers: list[ocp.PyTreeCheckpointHandler] = []
        self._futures: list = []

    def barrier(self, phase: str, work) -> list:
        return barrier(f"save/{self.number}/{phase}", work, self.timeout)

    def on_process_0(self, phase: str, work):
        """Run `work` in process 0 and return its result in all processes."""
        return self.barrier(phase, lambda: work() if jax.process_index() == 0 else None)[0]

    def start(self, data_state: dict, metrics: dict, config: dict) -> None:
        """Copy the state to the host; afterwards the caller may donate it."""
        if self.number and jax.process_index() == 0:
            forget(f"save/{self.number - 1}")  # all processes have read it, otherwise they would not start this save
        self._partial = self.directory.parent / self.on_process_0("prepare", lambda: self._prepare(metrics, config))
        self.barrier("copy", lambda: self._copy(json.dumps(data_state)))

    def _prepare(self, metrics: dict, config: dict) -> str:
        checkpoints = self.directory.parent
        if not checkpoints.is_dir():
            raise FileNotFoundError(f"{checkpoints} does not exist any more")
        remove_partial(self.workdir)
        checkpoint.require_space(checkpoints, self._bytes + self._bytes // 50, f"saving step {self.step}")
        # The name is unique, because a process of a killed run may still be writing to an older directory.
        partial = checkpoints / f"{self.step}.{os.getpid()}-{time.time_ns()}{PARTIAL}"
        for directory in (*self._parts, DATA):
            (partial / directory).mkdir(parents=True)
        for name, content in self._tokenizer_files.items():
            (partial / name).write_bytes(content)
        source = {"training": self.workdir.absolute().name, "step": self.step}
        fields = {} if self._base is None else {checkpoint.BASE: self._base.record}
        checkpoint.write_description(partial, "radfm", self._model.to_dict(), source=source, **fields)
        run = {
            "step": self.step, "metrics": metrics,
            "processes": jax.process_count(), "mesh": self._mesh and dict(self._mesh.shape),
            "versions": {p: importlib.metadata.version(p) for p in PACKAGES}, "config": config,
        }  # fmt: skip
        write_json(partial / RUN, run)
        return partial.name

    def _copy(self, data: str) -> None:
        (self._partial / DATA / f"{jax.process_index()}.json").write_text(data)
        for part, leaves in self._parts.items():
            tree = checkpoint.unflatten(leaves)
            # Uncompressed: compression makes float32 weights 7 % smaller and takes six times longer.
            options = {"use_ocdbt": False, "use_zarr3": True, "use_compression": False}
            handler = ocp.PyTreeCheckpointHandler(**options, type_handler_registry=ARRAYS)
            self._handlers.append(handler)
            save_args = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=checkpoint.CHUNK_BYTES), tree)
            args = ocp.args.PyTreeSave(tree, save_args=save_args)
            path = epath.Path(checkpoint.absolute(self._partial / part))
            with jax.transfer_guard("allow"):
                self._futures += asyncio.run(handler.async_save(path, args=args))
        self._parts = {}

    def finish(self) -> None:
        """Write, hash and commit the step; when this returns, the step is visible."""
        self.barrier("write", self._await_writes)
        sizes = self.on_process_0("list", self._list)
        hash_share = lambda: checkpoint.hash_files(self._partial, own_share(sizes), sync=True)  # noqa: E731
        hashes = {name: sha256 for share in self.barrier("hash", hash_share) for name, sha256 in share.items()}
        self.on_process_0("commit", lambda: self._commit(checkpoint.manifest_of(sizes, hashes)))

    def _await_writes(self) -> None:
        for future in self._futures:
            future.result(timeout=self.timeout)
        self._close()

    def _list(self) -> dict[str, int]:
        """Return {name: bytes} of all files. Raises FileNotFoundError if a chunk or another file is missing.

        tensorstore reports no error for directories that are deleted during a save: it creates them again.
        """
        sizes = {name: p.stat().st_size for name, p in checkpoint.list_files(self._partial).items()}
        expected = [checkpoint.DESCRIPTION, RUN, *(f"{DATA}/{p}.json" for p in range(jax.process_count()))]
        expected += self._tokenizer_files
        for part, shapes in self._shapes.items():
            expected.append(f"{part}/_METADATA")
            for path, shape in shapes.items():
                array = f"{part}/{path.replace('/', '.')}"
                expected.append(f"{array}/zarr.json")
                if expected[-1] in sizes:
                    grid = read_json(self._partial / expected[-1])["chunk_grid"]["configuration"]
                    counts = [range(math.ceil(n / c)) for n, c in zip(shape, grid["chunk_shape"], strict=True)]
                    expected += ["/".join([array, "c", *map(str, index)]) for index in itertools.product(*counts)]
        if missing := [name for name in expected if not sizes.get(name)]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise FileNotFoundError(f"{', '.join(missing[:3])}{more} disappeared during the save")
        return sizes

    def _commit(self, manifest: dict) -> None:
        write_json(self._partial / MANIFEST, manifest)
        for path, _, _ in os.walk(self._partial):
            fsync(Path(path))
        replaced = self.directory.with_name(self.directory.name + REPLACED)
        if self.directory.exists():
            self.directory.rename(replaced)
        self._partial.rename(self.directory)
        fsync(self.directory.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    def failed(self, e: Exception) -> SaveError:
        """Delete what was written and return the error to raise."""
        for future in self._futures:  # wait until all writes to it have finished
            with contextlib.suppress(Exception):
                future.result(timeout=self.timeout)
        self._close()
        self._parts = {}
        if self._partial is not None and jax.process_index() == 0:
            # Orbax returns at the first failure and may still write other arrays. What is left after this is deleted
            # before the next save or at the next start.
            for pause in (0.0, 0.1, 0.4):
                time.sleep(pause)
                shutil.rmtree(self._partial, ignore_errors=True)
                if not self._partial.exists():
                    break
        try:
            free = f"{filesize.decimal(shutil.disk_usage(self.workdir).free)} are free"
        except OSError as gone:
            free = f"{self.workdir} cannot be read: {gone.strerror}"
        size = filesize.decimal(self._bytes)
        error = SaveError(f"step {self.step} was not saved at {self.directory} ({size}; {free}): {describe(e)}")
        error.__cause__ = e
        return error

    def _close(self) -> None:
        while self._handlers:
            self._handlers.pop().close()
