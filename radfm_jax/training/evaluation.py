"""Evaluation on the validation rows during training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator

import jax

from input_pipeline.batching.pipeline import Rows
from input_pipeline.samples import TASKS
from radfm_jax.runtime import console, faults
from radfm_jax.runtime.peers import Peers
from radfm_jax.training import display, eval_answers, train_step
from radfm_jax.training.data import device_batches
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.length import METRIC, RunLength
from radfm_jax.training.progress import RowInfos
from radfm_jax.training.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Computes and logs metrics on the validation rows, and scores of generated answers."""

    config: Experiment
    mesh: jax.sharding.Mesh
    length: RunLength  # the last step is always evaluated
    peers: Peers
    rows: Rows | None  # validation rows; None without any
    program: jax.stages.Compiled | None  # Programs.evaluate
    answers: eval_answers.EvalAnswers | None  # None without `train.eval_answers`
    rollouts: Rollouts | None = None  # with train.objective="grpo": the loss is 1 - the mean reward of greedy answers

    def due(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        every = self.config.train.eval_every
        return self.rows is not None and (step == self.length.steps or bool(every and step % every == 0))

    def __call__(self, state: dict, step: int, screen: display.Display, watchdog: faults.Watchdog) -> dict[str, float]:
        """Return the metrics after logging them, or {} if a signal interrupted the evaluation."""
        params = train_step.params_of(state)
        try:
            metrics = self._metrics(state, step, watchdog)
            summary = self._summary(metrics)
            if self.answers:
                scores = self.answers(params, step, lambda: self.check_stop(f"the answers after step {step}", watchdog))
                metrics |= {f"asked/{name}": value for name, value in scores.items()}
                summary += f"; generated answers: {eval_answers.summary(scores)}"
        except _Stopped:
            return {}
        screen.record(step, metrics, durable=True)
        self.length.evaluated(step, metrics[METRIC])
        console.log(f"step {step}: validation loss {metrics[METRIC]:.4f}; {summary}")
        return metrics

    def _summary(self, metrics: dict[str, float]) -> str:
        """Return the metrics for the log, without the loss."""
        if self.config.objective is not None:
            names = {"reward": "mean reward", "preferred": "chosen answer preferred"}
            values = {title: metrics.get(f"validation/all/{name}") for name, title in names.items()}
            return ", ".join(f"{title} {value:.1%}" for title, value in values.items() if value is not None)
        exact = {task: metrics.get(f"validation/{task}/exact_match") for task in TASKS}
        shares = ", ".join(f"{task} {share:.1%}" for task, share in exact.items() if share is not None)
        return f"every token correct: {shares}"

    def _sums(self, params: dict, reference: dict | None, arrays: dict, rows: RowInfos) -> dict:
        """Return the sums of one batch."""
        if self.rollouts is not None:
            return self.rollouts.held_out(params, arrays, rows)
        assert self.program is not None
        return self.program(params, arrays) if reference is None else self.program(params, arrays, reference)

    def _metrics(self, state: dict, step: int, watchdog: faults.Watchdog) -> dict[str, float]:
        assert self.rows is not None
        params, reference = train_step.params_of(state), train_step.reference_of(state)
        watchdog.alive(f"the evaluation after step {step}")
        totals = None
        with contextlib.closing(device_batches(self.rows, self.mesh, self.config.train.accumulation)) as data:
            for number, (arrays, rows) in enumerate(itertools.islice(data, self.config.train.eval_batches or None)):
                counts = self._sums(params, reference, arrays, rows)
                totals = counts if totals is None else jax.tree.map(operator.add, totals, counts)
                self.check_stop(f"batch {number} of the evaluation after step {step}", watchdog)
        summarise = train_step.summarise if self.config.objective is None else train_step.summarise_objective
        return {
            f"validation/{task}/{name}": value
            for task, values in summarise(jax.device_get(totals)).items()
            for name, value in values.items()
        }

    def check_stop(self, activity: str, watchdog: faults.Watchdog) -> None:
        """Reset the watchdog; raise _Stopped if a stop was requested."""
        watchdog.alive(activity)
        if self.peers.stopping():
            raise _Stopped


class _Stopped(Exception):
    """A signal arrived during the evaluation."""
