"""The length of a run: its number of steps, the learning rate of each, and its end by `train.patience`.

WORKDIR/length.json    with `train.minutes`: the number of steps, once it is fixed (Fixed)

With `train.minutes`, the first steps are timed. Then the number of steps is fixed, for this and all later starts. Until
then the learning rate does not depend on it: it rises over the warm-up, and stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from input_pipeline.field_rules import Size, above, check_fields, errors_of, from_mapping
from input_pipeline.files import fsync, read_json, write_json
from radfm_jax.runtime import console
from radfm_jax.runtime.barrier import barrier
from radfm_jax.training import display, optimizer
from radfm_jax.training.experiment import Experiment

FILE = "length.json"
METRIC = "validation/all/loss"  # the best step has its lowest value
TIMED_SHARE = 0.05  # share of `train.minutes` that is timed before the number of steps is fixed
_barriers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The number of steps of a run with `train.minutes`, as in length.json."""

    minutes: Annotated[float, above(0)]
    steps: Size
    step_seconds: Annotated[float, above(0)]  # wall time of a step, with its share of evaluation and saving
    after: Size  # the step after which it was fixed; the learning rate does not fall before

    def __post_init__(self):
        check_fields(self, "")

    def __str__(self) -> str:
        return f"{self.minutes:g} minutes: {self.steps:,} steps of {self.step_seconds:.2g} s"

    @classmethod
    def of(cls, minutes: float, step_seconds: float, after: int) -> Fixed:
        """Return the number of whole steps that `minutes` have room for, at least `after`."""
        return cls(minutes, max(after, int(minutes * 60 / step_seconds)), step_seconds, after)


class RunLength:
    """When a run ends. All processes call its methods in the same order.

    Attributes:
      steps: number of steps; None until `set_steps`, or with `train.minutes` until `measure` fixes it.
      best: (step, loss) of the lowest validation loss; (None, inf) without an evaluation.
      waited: number of evaluations since then.

    Args:
      newest: directory of the step that this start resumes from, or None.
    Raises:
      ValueError: length.json is damaged, or the warm-up is as long as the run.
    """

    def __init__(self, config: Experiment, workdir: Path, newest: Path | None):
        self.config, self.workdir = config, workdir
        self.steps: int | None = None
        self._rates: np.ndarray | None = None
        self._timer = Timer(*_pauses_per_step(config))
        first = 0 if newest is None else int(newest.name)
        self.best: tuple[int | None, float] = (None, math.inf)
        self.waited = 0
        self._evaluated: set[int] = set()
        for step, loss in _recorded_losses(workdir, first):
            self.evaluated(step, loss)
        if config.train.steps:
            self.set_steps(config.train.steps)
        elif config.train.minutes and first:
            stored = barrier(f"length/{next(_barriers)}", self._read)[0]
            if stored is not None:
                self._fix(Fixed(**stored))

    @property
    def is_open(self) -> bool:
        """Whether the number of steps is not known yet."""
        return self.steps is None

    def set_steps(self, steps: int, after: int = 0) -> None:
        """Set the number of steps and compute the learning rates; `after` as in Fixed."""
        self._rates = optimizer.learning_rates(self.config.optimizer, steps, after)
        self.steps = steps

    def rate(self, step: int) -> np.float32:
        """Return the learning rate of a step, counted from 0."""
        if self._rates is None:
            return optimizer.warmup_rate(self.config.optimizer, step)
        return self._rates[step]

    def evaluated(self, step: int, loss: float) -> None:
        """Count an evaluation."""
        self._evaluated.add(step)
        self.waited += 1
        if loss < self.best[1]:
            self.best, self.waited = (step, loss), 0

    def was_evaluated(self, number: int) -> bool:
        """Whether metrics.jsonl has the evaluation after step `number`."""
        return number in self._evaluated

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.config.train.patience <= self.waited

    def is_over(self, number: int) -> bool:
        """Whether the run ends after step `number`."""
        return (self.steps is not None and number >= self.steps) or self.out_of_patience

    def is_complete(self, number: int) -> bool:
        """Whether nothing remains to be done after saved step `number`, not even an evaluation."""
        return self.is_over(number) and (not self.config.data.validates or self.was_evaluated(number))

    def ending(self, number: int) -> str:
        """Return why the run ends after step `number`, and its best step."""
        step, loss = self.best
        if not self.out_of_patience:
            best = "" if step is None else f"; lowest validation loss {loss:.4f} at step {step:,}"
            return f"all {self.steps or number:,} steps are done{best}"
        return (
            f"stopped after step {number:,}: {self.waited} evaluations without a lower validation loss than "
            f"{'any' if step is None else f'{loss:.4f} at step {step:,}'} (train.patience)"
        )

    # --- train.minutes ------------------------------------------------------------------------------------------------

    def pause(self, kind: str) -> contextlib.AbstractContextManager:
        """Time an interruption of the steps: "evaluation" (with its save) or "saving"."""
        return self._timer.pause(kind)

    def measure(self, number: int, wait: Callable[[], None]) -> int | None:
        """Fix the number of steps if the first steps have been timed for long enough; return it if it was fixed now.

        Call this after every step. `wait` returns when step `number` is done. It is only called after 1, 2, 4, 8, ...
        steps of this start, because waiting interrupts the devices.
        """
        if not self.is_open or not self._timer.is_due():
            return None
        wait()
        fixed = barrier(f"length/{next(_barriers)}", lambda: self._measured(number))[0]
        if fixed is not None:
            self._fix(Fixed(**fixed))
        return self.steps

    def _measured(self, number: int) -> dict | None:
        """In process 0, store and return the number of steps if it is time to fix it."""
        train = self.config.train
        if jax.process_index() or self._timer.elapsed() < TIMED_SHARE * train.minutes * 60:
            return None
        fixed = dataclasses.asdict(Fixed.of(train.minutes, self._timer.step_seconds(), number))
        write_json(self.workdir / FILE, fixed)
        fsync(self.workdir)
        return fixed

    def _read(self) -> dict | None:
        """In process 0, return the content of length.json, for the minutes of this config; None if there is none."""
        file = self.workdir / FILE
        if jax.process_index() or not file.exists():
            return None
        with errors_of(f"{file} is damaged (remove it to time the steps again)"):
            stored = from_mapping(Fixed, read_json(file, kind=dict), "")
        if stored.minutes != self.config.train.minutes:
            stored = Fixed.of(self.config.train.minutes, stored.step_seconds, stored.after)
        return dataclasses.asdict(stored)

    def _fix(self, fixed: Fixed) -> None:
        console.log(str(fixed))
        self.set_steps(fixed.steps, fixed.after)


def _recorded_losses(workdir: Path, last: int) -> list:
    """Return [step, validation loss] of the evaluations in metrics.jsonl up to a step. Process 0 reads the file."""

    def read() -> list:
        metrics = display.read_metrics(workdir) if last and jax.process_index() == 0 else []
        losses = {line["step"]: float(line[METRIC]) for line in metrics if METRIC in line and line["step"] <= last}
        return [list(pair) for pair in losses.items()]

    return barrier(f"evaluated/{next(_barriers)}", read)[0]


class Timer:
    """Wall time of a step, from the end of the first step of this start on.

    Args:
      evaluations, saves: their number per step.
    """

    def __init__(self, evaluations: float, saves: float):
        self.per_step: Mapping[str, float] = {"evaluation": evaluations, "saving": saves}
        self.pauses: dict[str, list[float]] = {kind: [] for kind in self.per_step}
        self.steps, self.start = 0, math.nan

    def is_due(self) -> bool:
        """Count a step, and return whether their number is a power of two."""
        self.steps += 1
        return not self.steps & (self.steps - 1)

    def elapsed(self) -> float:
        """Return the seconds since the first call, which is 0."""
        now = time.perf_counter()
        if math.isnan(self.start):
            self.start = now
        return now - self.start

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.pauses[kind].append(time.perf_counter() - start)

    def step_seconds(self) -> float:
        """Return the wall time of a step and of its share of the pauses, as far as any have been timed."""
        busy = self.elapsed() - sum(itertools.chain(*self.pauses.values()))
        shares = (self.per_step[kind] * statistics.fmean(times) for kind, times in self.pauses.items() if times)
        return max(busy / (self.steps - 1), 1e-6) + sum(shares)


def _pauses_per_step(config: Experiment) -> tuple[float, float]:
    """Return the number of evaluations, and of saves without an evaluation, per step."""
    every = config.train.eval_every if config.data.validates else 0
    return (1 / every if every else 0.0), 1 / config.checkpoint.save_every
