"""Metrics of finished steps, the record of samples, and the profiler trace of a run."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from rich.text import Text

from input_pipeline.batching.report import PackingReport, RowInfo
from input_pipeline.samples import TASKS
from radfm_jax.cost import estimate, flops
from radfm_jax.runtime import console
from radfm_jax.training import display
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.length import RunLength

RowInfos = Sequence[RowInfo | None]
SHOWN = ("reward", "preferred", "margin")  # metrics of objectives in the line of a step


class StepMetrics:
    """Records the metrics of finished steps, and stops the run on values that are not finite.

    Reading metrics waits for their step. So `add` reads the metrics of the previous step while the newest step
    computes.
    """

    def __init__(self, config: Experiment, mesh: jax.sharding.Mesh, length: RunLength, screen: display.Display):
        self.train, self.length, self.screen = config.train, length, screen
        self.packing = PackingReport(config.data.text_length)
        self.devices, self.peak = mesh.devices.size, flops.peak(mesh.devices.flat[0])
        self.flops = estimate.row_flops(config) * config.train.batch
        self._pending: tuple[int, dict, RowInfos, Mapping[str, float]] | None = None
        self._logged_one = False
        self.start_interval()

    def start_interval(self) -> None:
        """Restart the speed measurement, after a log line or a pause."""
        self.start_time, self.wait, self.samples, self.tokens, self.steps = time.perf_counter(), 0.0, 0, 0, 0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait += time.perf_counter() - start

    def add(self, step: int, metrics: dict, rows: RowInfos, sampled: Mapping[str, float]) -> None:
        """Add a started step, and record the one before it. Raises ValueError by the policy of train.nonfinite.

        sampled: metrics of the answers that the step generated (rollouts.py).
        """
        self.packing.add(rows)
        self.flush()
        self._pending = (step, metrics, rows, sampled)

    def flush(self) -> None:
        """Wait for the pending step and record it."""
        previous, self._pending = self._pending, None
        if previous:
            self._record(*previous)

    def _record(self, step: int, metrics: dict, rows: RowInfos, sampled: Mapping[str, float]) -> None:
        values, number = jax.device_get(metrics), step + 1
        infos = [info for info in rows if info is not None]
        self.steps += 1
        self.samples += sum(len(info.samples) for info in infos) * jax.process_count()
        self.tokens += sum(info.tokens for info in infos) * jax.process_count()
        names = {"loss": "loss", "weight": "weight", "token_accuracy": "correct", "grad_norm": "grad_norm"}
        recorded = {f"train/{name}": float(values[key]) for name, key in names.items()}
        measures = {name: float(x) for name, x in values.get("measures", {}).items()}
        measures |= sampled
        recorded |= {f"train/{name}": x for name, x in measures.items()}
        recorded["train/learning_rate"] = float(self.length.rate(step))
        recorded["data/real_tokens"] = float(values["real_tokens"])
        recorded |= {
            f"train/{task}/loss": float(loss)
            for task, loss, weight in zip(TASKS, values["task_loss"], values["task_weight"], strict=True)
            if weight
        }
        line = ""
        if number % self.train.log_every == 0 or number == self.length.steps or not self._logged_one:
            self._logged_one = True
            speed = self._speed()
            recorded |= speed
            line = (
                f"loss {recorded['train/loss']:.3f}  "
                + "".join(f"{name} {measures[name]:.3f}  " for name in SHOWN if name in measures)
                + f"{speed['speed/samples_s']:.1f} samples/s  "
                f"{speed['speed/tokens_s_device']:.0f} tokens/s/device  "
                f"{speed['speed/tflops_device']:.3g} TFLOP/s/device  "
                + (f"MFU {speed['speed/mfu']:.1%}  " if self.peak else "")
                + f"data wait {speed['speed/data_wait']:.0%}  real tokens {recorded['data/real_tokens']:.0%}"
            )
            self.start_interval()
        self.screen.record(number, recorded, line)
        if not values["finite"]:
            self._not_finite(number, recorded, infos, int(values["skipped"]))

    def _speed(self) -> dict[str, float]:
        """Return the speed since the start of the interval."""
        seconds = max(time.perf_counter() - self.start_time, 1e-9)
        speed = {
            "speed/step_s": seconds / self.steps,
            "speed/samples_s": self.samples / seconds,
            "speed/tokens_s_device": self.tokens / seconds / self.devices,
            "speed/tflops_device": self.flops * self.steps / seconds / self.devices / 1e12,
            "speed/data_wait": self.wait / seconds,
        }
        if self.peak:
            speed["speed/mfu"] = speed["speed/tflops_device"] * 1e12 / self.peak
        return speed

    def _not_finite(self, step: int, recorded: dict, infos: Sequence[RowInfo], skipped: int) -> None:
        samples = ", ".join(f"{s.source} {s.row_id}" for info in infos for s in info.samples)
        loss, norm = recorded["train/loss"], recorded["train/grad_norm"]
        details = f"step {step}: loss {loss}, gradient norm {norm}; samples: {samples}"
        if self.train.nonfinite == "stop" or skipped > self.train.max_skipped:
            count = f"{skipped} steps in a row were" if skipped > 1 else "a step was"
            raise ValueError(f"{count} not finite (parameters unchanged): {details}")
        console.log(Text.assemble(("not finite, skipped", "red"), f" ({skipped} in a row): {details}"))


class RowLog:
    """rows/PROCESS.jsonl: the samples of each step, to trace a run or to compare two."""

    def __init__(self, workdir: Path, first: int):
        file = workdir / "rows" / f"{jax.process_index()}.jsonl"
        file.parent.mkdir(exist_ok=True)
        display.truncate(file, first - 1)
        if jax.process_index() == 0:  # an earlier start may have had more processes
            for other in file.parent.glob("*.jsonl"):
                if int(other.stem) >= jax.process_count():
                    display.truncate(other, first - 1)
        self._file = open(file, "a", buffering=1)

    def add(self, step: int, rows: RowInfos) -> None:
        samples = lambda row: [[s.source, s.row_id] for s in row.samples]  # noqa: E731
        listed = [None if r is None else [r.epoch, r.window, r.row, samples(r)] for r in rows]
        left_out = [line for r in rows if r is not None for line in r.left_out]
        line = {"step": step, "rows": listed} | ({"left_out": left_out} if left_out else {})
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


class Profile:
    """Traces the steps of a span (first, last), both included, to a directory."""

    def __init__(self, span: Sequence[int], directory: Path):
        self.span, self.directory, self.tracing = span, directory, False

    def before(self, step: int, state: dict) -> None:
        """Start or stop the trace if it is due before a step."""
        if self.tracing and step > self.span[1]:
            jax.block_until_ready(state)
            self.close()
        elif self.span and step == self.span[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.directory))
            self.tracing = True

    def close(self) -> None:
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
