"""Save the steps of a training run in the background, and delete old ones.

save()                        blocks until the arrays are copied to the host
  `- background thread        Orbax writes -> every file is read back, hashed and synced (each process its share)
                              -> manifest -> rename: from here on the step exists
                              -> best.json -> old steps are deleted

Orbax's CheckpointManager is not used: its steps have no checksums, so a flipped bit restores silently, and it reports
a full disk only if the program waits for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import jax

from input_pipeline.files import fsync, read_json, write_json
from input_pipeline.messages import printable
from input_pipeline.text.tokenizer import read_tokenizer_files
from radfm_jax.checkpoints import run_directory
from radfm_jax.checkpoints.run_directory import BEST, CHECKPOINTS, CONFIG, RUN, Warn, step_directory
from radfm_jax.checkpoints.step_writer import PARTIAL, SaveError, StepWriter, recover_replaced, remove_partial
from radfm_jax.checkpoints.train_state import Base
from radfm_jax.models import radfm
from radfm_jax.runtime import compat
from radfm_jax.runtime.barrier import barrier, describe

SET_ASIDE = ".set-aside"

_starts, _saves = itertools.count(), itertools.count()


@dataclasses.dataclass(eq=False)
class Saver:
    """Write the steps of a run directory. Every process of the run has a Saver and calls it in the same order.

    with Saver(workdir, config=..., model=...) as saver:
        ...
        saver.save(state, rows.get_state(), metrics={"eval/loss": 2.1})

    If a save fails in the background, the next `save`, `wait` or `close` raises its error. If the program ends before
    that, it waits for the save, and exits with code 1 if the save failed.

    Frozen parameters are written with every step, so that each step is complete. In the first stage of the paper, where
    the language model is frozen, they are 52.1 of 53.4 GB (float32). A run that trains adapters leaves them out.

    Raises ValueError if another process writes to the directory, or it cannot be written.
    """

    workdir: Path  # created if it does not exist; locked (run_directory.lock) until `close`
    _: dataclasses.KW_ONLY
    config: Mapping  # config of the run as JSON values; `begin` writes it to config.json, `save` to every step
    model: radfm.RadFMConfig
    tokenizer: str | Path | None = None  # file or folder (load_tokenizer), whose files are copied to every step
    keep_last: int = 2  # number of newest steps to keep, at least 1
    keep_every: int = 0  # also keep steps that are divisible by this; 0 for none
    best: str | None = None  # also keep the step with the lowest value of this metric
    base: Base | None = None  # with the frozen parameters, which steps then leave out (train_state.find_base)
    timeout: float = 1800  # seconds that processes wait for each other
    warn: Warn = run_directory.warning  # called with lines for the user

    def __post_init__(self):
        for name, minimum in (("keep_last", 1), ("keep_every", 0)):
            if (value := getattr(self, name)) < minimum:
                raise ValueError(f"checkpoint.{name} is {value}, but must be at least {minimum}")
        self._tokenizer_files = {} if self.tokenizer is None else read_tokenizer_files(self.tokenizer)
        self.workdir, self.config = Path(self.workdir), json.loads(json.dumps(dict(self.config)))
        self._directory = self.workdir / CHECKPOINTS
        self._lock: TextIO | None = None
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._closed = False
        barrier(f"start/{next(_starts)}", self._start, self.timeout)

    def _start(self) -> None:
        if jax.process_index():
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = run_directory.lock(self.workdir)
            remove_partial(self.workdir)
            recover_replaced(self.workdir)
            self._update_best()
        except OSError as e:
            self._release()
            raise ValueError(f"{e.filename or self.workdir} cannot be written: {e.strerror or e}") from e

    def begin(self, newest: Path | None) -> None:
        """Write config.json, and delete the steps before `newest` that need not be kept any more.

        Call this after all checks of the run. `newest` is the verified step to continue from, or None.
        """
        if jax.process_index() == 0:
            if newest is not None:
                self._delete_old(int(newest.name))  # first, because the disk may be full
            write_json(self.workdir / CONFIG, self.config)
            fsync(self.workdir)

    def save(self, state: dict, data_state: dict, *, metrics: Mapping | None = None, wait: bool = False) -> None:
        """Wait for the previous save, and start to save a state.

        An existing step with the number state["step"] is replaced. Later steps, which this run does not descend from,
        are renamed and kept.

        Args:
          state: state of a training step; the caller may donate it after this returns.
          data_state: state of the row iterator at this step.
          wait: return when the step is on disk.
        Raises:
          SaveError: the previous save failed, or this one could not start. ValueError: after `close`.
        """
        self.wait()
        if self._closed:
            raise ValueError(f"{self.workdir}: this Saver is closed")
        with jax.transfer_guard("allow"):
            metrics = {name: float(value) for name, value in (metrics or {}).items()}
        writer = StepWriter(
            self.workdir, state, next(_saves), self.model, self._tokenizer_files, self.timeout, self.base
        )
        try:
            writer.start(data_state, metrics, self.config)
        except Exception as e:
            raise writer.failed(e) from e
        name = f"saving step {writer.step}"
        self._thread = threading.Thread(target=self._finish, args=(writer,), name=name, daemon=True)
        _unfinished.add(self)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way. Raises SaveError if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _unfinished.discard(self)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the last save and release the lock."""
        try:
            self.wait()
        finally:
            self._closed = True
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _, exception: BaseException | None, __) -> None:
        try:
            self.close()
        except SaveError as e:
            if not isinstance(exception, Exception):  # sys.exit(0) must not hide the failure
                raise
            exception.add_note(f"In addition, {e}")

    def _finish(self, writer: StepWriter) -> None:
        try:
            writer.finish()
        except Exception as e:
            self._failure = writer.failed(e)
            return
        try:
            writer.on_process_0("clean up", lambda: self._clean_up(writer.step))
        except Exception as e:
            self._failure = SaveError(
                f"step {writer.step} is saved at {writer.directory}, but cleaning up failed: {describe(e)}"
            )
            self._failure.__cause__ = e

    def _clean_up(self, step: int) -> None:
        """Set later steps aside, update best.json, and delete steps that need not be kept."""
        for later in (s for s in run_directory.steps(self.workdir) if s > step):
            directory = step_directory(self.workdir, later)
            names = (directory.with_name(f"{later}{SET_ASIDE}-{n}") for n in itertools.count(1))
            renamed = next(name for name in names if not name.exists())
            directory.rename(renamed)
            self.warn(f"this run is at step {step} and does not descend from step {later}: renamed to {renamed}")
        self._delete_old(step)

    def _delete_old(self, newest: int) -> None:
        existing = [step for step in run_directory.steps(self.workdir) if step <= newest]
        best = self._update_best()
        for old in existing[: -self.keep_last]:
            if old == best or (self.keep_every and old % self.keep_every == 0):
                continue
            # Rename first: a step that is being deleted must not be visible.
            deleted = self._directory / f"{old}.deleted{PARTIAL}"
            step_directory(self.workdir, old).rename(deleted)
            shutil.rmtree(deleted)

    def _update_best(self) -> int | None:
        """Write best.json and return the best step. It is the best of the whole run, because the best step is kept."""
        values = {}
        for step in run_directory.steps(self.workdir) if self.best else ():
            path = step_directory(self.workdir, step) / RUN
            try:
                value = run_directory.read_run(path.parent)["metrics"].get(self.best, math.nan)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                self.warn(f"{path} cannot be read, so step {step} is not considered for best.json: {e}")
                continue
            if math.isfinite(value):
                values[step] = value
        if not values:
            return None
        step = min(values, key=values.get)
        best, file = {"step": step, "metric": self.best, "value": values[step]}, self._directory / BEST
        try:
            unchanged = read_json(file) == best
        except (OSError, ValueError):
            unchanged = False
        if not unchanged:  # a resume without changes must not change the file's modification time
            write_json(file, best)
            fsync(self._directory)
        return step


# --- exit of the program ----------------------------------------------------------------------------------------------

_unfinished: set[Saver] = set()


def _finish_saves() -> None:
    failed = False
    for saver in list(_unfinished):
        try:
            saver.wait()
        except BaseException as e:
            print(printable(f"{type(e).__name__}: {e}", keep="\n"), file=sys.stderr)
            failed = True
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # too late for any other way to set the exit code


compat.before_thread_pools_shut_down(_finish_saves)  # Orbax writes with thread pools
