"""Saves steps of a training run while it goes on. `run_directory.py` says what is on disk, and reads it.

save()                        held up until the arrays are copied to the host
  `- background thread        Orbax writes  ->  every file is read back, hashed and put on the disk (each process
                              its share)  ->  manifest  ->  renamed: from here on the step exists
                              ->  best.json  ->  steps that need not be kept are deleted
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # before the hook at the end of the program, see _at_exit
import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax._src import distributed

from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.checkpoints.checkpoint import MANIFEST
from radfm_jax.checkpoints.run_directory import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    DATA,
    RUN,
    Warn,
    reason,
    step_directory,
    together,
)
from radfm_jax.models import radfm

PARTIAL, REPLACED, SET_ASIDE = ".partial", ".replaced", ".set-aside"
# Replicas share the copying of an array, each a slice, which is compiled for every shape: not for small ones.
ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=16 * 2**20))
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")

_starts, _saves = itertools.count(), itertools.count()


class SaveError(RuntimeError):
    """A step that should have been saved was not. The steps before it are as they were."""


class Saver:
    """Writes the steps of a run directory; every process of the run has one, and calls it in the same order.

    with Saver(workdir, config=..., model=...) as saver:
        ...
        saver.save(state, rows.get_state(), metrics={"eval/loss": 2.1})

    Nothing that failed stays unsaid: what went wrong in the background is raised by the next `save`, by `wait`, or by
    `close`; if the program ends without any of them, its end waits for the save and becomes exit code 1 if it failed.

    Frozen parameters are written with every step although they do not change: a step needs nothing but itself. In the
    first stage of the paper, where the language model is frozen, that is 52.1 of 53.4 GB (float32).

    Args:
      workdir: made if it does not exist. The lock of run_directory.Lock is held until `close`.
      config: of the run, values of JSON; written to config.json at once, and to every step.
      model: sizes of the model.
      tokenizer: path of the SentencePiece model, copied into every step.
      keep_last: so many of the newest steps are kept; at least 1.
      keep_every: steps divisible by it are kept for good; 0 for none.
      best: name of the metric of which the step with the lowest value is kept; None for none.
      timeout: seconds that processes wait for each other.
      warn: takes lines about what the user should know.
    Raises:
      ValueError: another process writes the directory, or it cannot be written.
    """

    def __init__(
        self,
        workdir,
        *,
        config: Mapping,
        model: radfm.RadFMConfig,
        tokenizer=None,
        keep_last: int = 2,
        keep_every: int = 0,
        best: str | None = None,
        timeout: float = 1800,
        warn: Warn = run_directory.warning,
    ):
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"checkpoint.keep_last is {keep_last} (at least 1), keep_every {keep_every} (at least 0)")
        if tokenizer is not None and not Path(tokenizer).is_file():
            raise ValueError(f"tokenizer {tokenizer} does not exist")
        self.workdir, self.model, self.tokenizer = Path(workdir), model, tokenizer
        self.config = json.loads(json.dumps(dict(config)))
        self.keep_last, self.keep_every, self.best = keep_last, keep_every, best
        self.timeout, self.warn = timeout, warn
        self._lock: run_directory.Lock | None = None
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._closed = False
        together(f"start/{next(_starts)}", self._start, timeout)

    def _start(self) -> None:
        if jax.process_index():
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = run_directory.Lock(self.workdir)
            _write_json(self.workdir / CONFIG, self.config)
            self.sweep()
            for path in self._directory.glob(f"*{REPLACED}"):
                step = path.with_suffix("")
                shutil.rmtree(path) if step.exists() else path.rename(step)
            self._choose_best()
        except OSError as e:
            self._release()
            raise ValueError(f"{e.filename or self.workdir} cannot be written: {e.strerror or e}") from e

    @property
    def _directory(self) -> Path:
        return self.workdir / CHECKPOINTS

    def sweep(self) -> None:
        """Deletes what is half written. As long as the lock is held and no save is under way, that is of no use to
        anybody: it was left by a run that is dead, or by a save that failed."""
        for path in self._directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)  # what resists does so next time, and takes nothing but room

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, state: dict, data_state: dict, *, metrics: Mapping | None = None, wait: bool = False) -> float:
        """Begins to save a state, once the save before it is done.

        Args:
          state: of a training step; it may be donated as soon as this returns. state["step"] names the directory; a
            step of that name is replaced, and newer steps, which the run came not from, are renamed and kept.
          data_state: of the row iterator, belonging to this state.
          metrics: {name: number}.
          wait: return when the step is on the disk.
        Returns:
          Seconds that the caller was held up, which includes waiting for the save before.
        Raises:
          SaveError: the save before failed, or this one could not begin. ValueError: after `close`.
        """
        began = time.perf_counter()
        self.wait()
        if self._closed:
            raise ValueError(f"{self.workdir}: this Saver is closed")
        with jax.transfer_guard("allow"):  # what is copied to the host here is meant to be
            step = int(state["step"])
            metrics = {name: float(value) for name, value in (metrics or {}).items()}
        number, data = next(_saves), json.dumps(data_state)
        facts = {
            "step": step,
            "metrics": metrics,
            "processes": jax.process_count(),
            "mesh": _mesh(state),
            "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
            "config": self.config,
        }
        save = _Save(self, number, step, state)
        try:
            save.begin(data, facts)
        except Exception as e:
            raise save.failed(e) from e
        self._thread = threading.Thread(target=self._finish, args=(save,), name=f"saving step {step}", daemon=True)
        _unfinished.add(self)
        self._thread.start()
        if wait:
            self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Returns when no save is under way. Raises SaveError if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _unfinished.discard(self)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._closed = True
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _, exception: BaseException | None, __) -> None:
        try:
            self.close()
        except SaveError as e:
            if not isinstance(exception, Exception):  # sys.exit(0) must not end as a success
                raise
            exception.add_note(f"Besides, {e}")

    def _finish(self, save: _Save) -> None:
        try:
            save.finish()
        except Exception as e:
            self._failure = save.failed(e)
            self._failure.__cause__ = e
            return
        try:
            save.meet("tidy", lambda: self._tidy(save.step) if jax.process_index() == 0 else None)
        except Exception as e:
            self._failure = SaveError(f"step {save.step} is saved at {save.directory}, but beside it: {reason(e)}")
            self._failure.__cause__ = e

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _tidy(self, step: int) -> None:
        for newer in (s for s in run_directory.steps(self.workdir) if s > step):
            directory = step_directory(self.workdir, newer)
            aside = next(
                p for n in itertools.count(1) if not (p := directory.with_name(f"{newer}{SET_ASIDE}-{n}")).exists()
            )
            directory.rename(aside)
            self.warn(f"step {newer} is not of this run, which has only come to {step}: renamed to {aside}")
        kept = run_directory.steps(self.workdir)
        best = self._choose_best()
        for old in kept[: -self.keep_last]:
            if old == best or (self.keep_every and old % self.keep_every == 0):
                continue
            # First the name: a step that is being deleted must not be seen half.
            doomed = self._directory / f"{old}.deleted{PARTIAL}"
            step_directory(self.workdir, old).rename(doomed)
            shutil.rmtree(doomed)

    def _choose_best(self) -> int | None:
        """Writes best.json. The best of all times is among the steps that there are, since it is kept."""
        values = {}
        for step in run_directory.steps(self.workdir) if self.best else ():
            path = step_directory(self.workdir, step) / RUN
            try:
                value = json.loads(path.read_text())["metrics"].get(self.best, math.nan)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                self.warn(f"{path} cannot be read, so step {step} cannot be the best one: {e}")
                continue
            if math.isfinite(value):
                values[step] = value
        if not values:
            return None
        step = min(values, key=values.get)
        chosen, file = {"step": step, "metric": self.best, "value": values[step]}, self._directory / BEST
        try:
            same = json.loads(file.read_text()) == chosen
        except (OSError, ValueError):
            same = False
        if not same:  # else a start that has nothing to do would look like one that did something
            _write_json(file, chosen)
        return step


class _Save:
    """One step on its way to the disk."""

    def __init__(self, saver: Saver, number: int, step: int, state: dict):
        self.saver, self.number, self.step = saver, number, step
        self.parts = run_directory.parts(state)
        self.shapes = {part: {k: x.shape for k, x in leaves.items()} for part, leaves in self.parts.items()}
        self.bytes = sum(x.nbytes for leaves in self.parts.values() for x in leaves.values())
        self.directory = step_directory(saver.workdir, step)
        self.partial: Path | None = None
        self.handlers: list[ocp.PyTreeCheckpointHandler] = []
        self.futures: list = []

    def meet(self, what: str, work) -> list:
        return together(f"save/{self.number}/{what}", work, self.saver.timeout)

    def begin(self, data: str, facts: dict) -> None:
        """Up to the point from which the state is no longer needed."""
        first = jax.process_index() == 0
        if first and jax.process_count() > 1 and self.number:
            # Everybody has read what was exchanged in the save before, or this one could not begin.
            distributed.global_state.client.key_value_delete(f"radfm_jax/save/{self.number - 1}/")

        def prepare() -> str | None:
            if not first:
                return None
            where = self.saver._directory
            if not where.is_dir():
                raise FileNotFoundError(f"{where} does not exist any more")
            self.saver.sweep()
            checkpoint.require_space(where, self.bytes + self.bytes // 50, f"saving step {self.step}")
            # A name that nobody else ever had: a process of a killed run may still write into an older one.
            partial = where / f"{self.step}.{os.getpid()}-{time.time_ns()}{PARTIAL}"
            for directory in (*self.parts, DATA):
                (partial / directory).mkdir(parents=True)
            if self.saver.tokenizer is not None:
                shutil.copyfile(self.saver.tokenizer, partial / checkpoint.TOKENIZER)
            source = {"training": self.saver.workdir.absolute().name, "step": self.step}
            checkpoint.write_description(partial, "radfm", self.saver.model.to_dict(), source=source)
            _write_json(partial / RUN, facts)
            return partial.name

        self.partial = self.saver._directory / self.meet("prepare", prepare)[0]

        def copy() -> None:
            (self.partial / DATA / f"{jax.process_index()}.json").write_text(data)
            for part, leaves in self.parts.items():
                tree = checkpoint.unflatten(leaves)
                # Uncompressed: float32 noise shrinks by 7 %, for six times the time.
                handler = ocp.PyTreeCheckpointHandler(
                    use_ocdbt=False, use_zarr3=True, use_compression=False, type_handler_registry=ARRAYS
                )
                self.handlers.append(handler)
                args = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=checkpoint.CHUNK_BYTES), tree)
                args = ocp.args.PyTreeSave(tree, save_args=args)
                path = epath.Path(checkpoint.absolute(self.partial / part))
                with jax.transfer_guard("allow"):
                    self.futures += asyncio.run(handler.async_save(path, args=args))
            self.parts = {}

        self.meet("copy", copy)

    def finish(self) -> None:
        """Until the step has its name."""

        def write() -> None:
            for future in self.futures:
                future.result(timeout=self.saver.timeout)
            self._close()

        self.meet("write", write)
        files = self.meet("list", lambda: self._list() if jax.process_index() == 0 else None)[0]
        mine = {name: self.partial / name for name in run_directory.share(files)}
        hashes = {}
        for found in self.meet("hash", lambda: run_directory.settle(mine, sync=True)):
            hashes |= found
        entries = {name: {"bytes": size, "sha256": hashes[name]} for name, size in files.items()}
        self.meet("commit", lambda: self._commit(entries) if jax.process_index() == 0 else None)

    def _list(self) -> dict[str, int]:
        """{name: bytes} of all files. Raises FileNotFoundError unless every chunk of every array is among them: where
        somebody deletes directories, tensorstore makes them anew and goes on."""
        found = {str(p.relative_to(self.partial)): p for p in sorted(self.partial.rglob("*")) if p.is_file()}
        files = {name: p.stat().st_size for name, p in found.items()}
        wanted = [checkpoint.DESCRIPTION, RUN, *(f"{DATA}/{p}.json" for p in range(jax.process_count()))]
        if self.saver.tokenizer is not None:
            wanted.append(checkpoint.TOKENIZER)
        for part, shapes in self.shapes.items():
            wanted.append(f"{part}/_METADATA")
            for path, shape in shapes.items():
                array = f"{part}/{path.replace('/', '.')}"
                wanted.append(f"{array}/zarr.json")
                if wanted[-1] not in files:
                    continue
                chunk = json.loads((self.partial / wanted[-1]).read_text())["chunk_grid"]["configuration"][
                    "chunk_shape"
                ]
                counts = [range(-(-n // c)) for n, c in zip(shape, chunk, strict=True)]
                wanted += ["/".join([array, "c", *map(str, place)]) for place in itertools.product(*counts)]
        if missing := [name for name in wanted if not files.get(name)]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise FileNotFoundError(f"{', '.join(missing[:3])}{more} disappeared while they were written")
        return files

    def _commit(self, entries: dict) -> None:
        _write_json(self.partial / MANIFEST, {"format": checkpoint.FORMAT, "files": entries})
        for path, _, _ in os.walk(self.partial):
            _sync(Path(path))
        replaced = self.directory.with_name(self.directory.name + REPLACED)
        if self.directory.exists():
            self.directory.rename(replaced)
        self.partial.rename(self.directory)
        _sync(self.directory.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    def failed(self, e: Exception) -> SaveError:
        """Clears away what there is of the step, and says what happened."""
        for future in self.futures:  # nobody may be writing there any more
            with contextlib.suppress(Exception):
                future.result(timeout=self.saver.timeout)
        self._close()
        self.parts = {}
        if self.partial is not None and jax.process_index() == 0:
            # Orbax returns at the first failure, and may still be writing the other arrays: what is left after this is
            # removed before the next save, or at the next start.
            for pause in (0.0, 0.1, 0.4):
                time.sleep(pause)
                shutil.rmtree(self.partial, ignore_errors=True)
                if not self.partial.exists():
                    break
        try:
            free = f"{shutil.disk_usage(self.saver.workdir).free / 1e9:.3f} GB are free"
        except OSError as gone:
            free = f"{self.saver.workdir} cannot be read: {gone.strerror}"
        return SaveError(
            f"step {self.step} was not saved at {self.directory} ({self.bytes / 1e9:.3f} GB; {free}): {reason(e)}"
        )

    def _close(self) -> None:
        while self.handlers:
            self.handlers.pop().close()


def _write_json(path: Path, value) -> None:
    """A file that is old or new, never half."""
    partial = path.with_name(f".{path.name}.new")
    with open(partial, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Puts the names in a directory on the disk."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _mesh(state: dict) -> dict[str, int] | None:
    shardings = (x.sharding for x in jax.tree.leaves(state))
    return next((dict(s.mesh.shape) for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)


# --- the end of the program -------------------------------------------------------------------------------------------

_unfinished: set[Saver] = set()


def _at_exit() -> None:
    failed = False
    for saver in list(_unfinished):
        try:
            saver.wait()
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            failed = True
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # nothing else changes the exit code from here


# atexit is too late: thread pools, which Orbax needs to write, have ended by then. These run in the reverse order of
# their registration, so this one runs before that of concurrent.futures, which is imported above.
threading._register_atexit(_at_exit)
assert concurrent.futures.thread
