"""Training: a start, what is compiled for it, the loop of its steps.

A start takes, in this order: the newest step in DIR; else the parameters of `checkpoint.init_from`; else fresh ones.

WORKDIR/config.json, checkpoints/     run_directory.py
WORKDIR/metrics.jsonl, tensorboard/, curves.png     display.py
WORKDIR/rows/PROCESS.jsonl            which samples each step saw
WORKDIR/answers/STEP/                 answers.py, with train.eval_answers
WORKDIR/profile/                      with train.profile
WORKDIR/logs/PROCESS.log              what each process said, if there are several
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.text import Text

from input_pipeline.batching.collate import Batch, collate_batch
from input_pipeline.batching.pipeline import Rows, batches, prefetch
from input_pipeline.batching.report import PackingReport, RowInfo
from input_pipeline.config import DataConfig
from input_pipeline.samples import TASKS
from radfm_jax.checkpoints import checkpoint, run_directory, train_state
from radfm_jax.checkpoints.saver import Saver
from radfm_jax.cost import estimate, flops
from radfm_jax.runtime import faults, host_memory, sharding
from radfm_jax.runtime.barrier import barrier
from radfm_jax.runtime.peers import Peers
from radfm_jax.training import display as shown
from radfm_jax.training import held_out_questions, optimizer, train_step
from radfm_jax.training.experiment import Experiment, changes


def train(config: Experiment, workdir: Path, peers: Peers | None = None) -> int:
    """One start of a run; its exit code.

    Args:
      peers: of distributed.start; None: this process is alone, and signals are its own affair.
    Raises:
      ValueError: mistakes in the config or the data, a checkpoint that cannot be used, values that are not finite.
      SaveError: a step could not be saved.
    """
    with contextlib.ExitStack() as opened:
        peers = peers or Peers(opened.enter_context(faults.Stop()))
        with peers.abort_on_error():
            return _train(config, workdir, peers, opened)


def _train(config: Experiment, workdir: Path, peers: Peers, opened: contextlib.ExitStack) -> int:
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
    before = run_directory.last_config(workdir)
    where = {"batch": config.train.batch, "host": jax.process_index(), "hosts": jax.process_count()}
    saver = opened.enter_context(
        Saver(
            workdir,
            config=config.to_dict(),
            model=config.model,
            tokenizer=config.data.tokenizer,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            best="eval/all/loss" if config.checkpoint.best and config.data.test else None,
        )
    )
    newest = run_directory.latest(workdir, allow_older=config.checkpoint.allow_older, warn=shown.say)

    if newest is None and config.checkpoint.init_from:  # a mistake is said before anything is compiled
        checkpoint.verify(run_directory.select_checkpoint(config.checkpoint.init_from), hashes=False)

    changed = changes(before, config.to_dict()) if newest is not None and before else []
    if changed:
        shown.say(f"settings that differ from the last start: {'; '.join(changed)}")

    def done(steps: int) -> bool:
        if newest != run_directory.step_directory(workdir, steps) or (
            config.data.test and not evaluated(workdir, steps)
        ):
            return False
        shown.say(f"{newest}: all {steps:,} steps are done")
        return True

    if config.train.steps and done(config.train.steps):  # before the data are opened
        return 0
    asked = held_out_questions.HeldOutAnswers(config, workdir, mesh) if config.train.eval_answers else None
    data = opened.enter_context(Opening(config.data, where))
    data_state = None if newest is None else train_state.data_state(newest)
    rows = data("train")
    check_model(config, rows)
    steps = config.train.steps or steps_of(rows, config)
    if not config.train.steps and done(steps):
        return 0
    rows.prefetch_plan(data_state)
    rates = optimizer.learning_rates(config.optimizer, steps)
    abstract, transform, _ = train_step.abstract_state(config.compute, config.optimizer, mesh)
    say, told = shown.say, []
    beginning = functools.partial(first_state, config, newest, abstract, transform, told.append)
    if mesh.devices.flat[0].platform != "gpu":  # whose compiler takes the times of kernels, and wants it to itself
        # A checkpoint is read, or the program of fresh parameters compiled, while the step is compiled.
        threads = opened.enter_context(ThreadPoolExecutor(1, thread_name_prefix="first state"))
        beginning = threads.submit(beginning).result
    say(shown.parameter_table(abstract))
    say(shown.memory_table(estimate.memory(config, mesh), estimate.capacity(mesh)))
    say(shown.data_table(rows.description, len(rows.mixture), rows.windows))
    if asked:
        say(asked.description)
    done_before = 0 if newest is None else int(newest.name)
    say(estimate.time_line(config, steps - done_before, estimate.hardware(list(mesh.devices.flat), config.train.dtype)))
    programs = Programs.compile(config, abstract, transform, rows, mesh, say)
    if peers.stopping():
        say(f"{peers.stopped_by}: told to stop before the first step, there is nothing to save")
        return faults.REQUEUE
    state = beginning()
    for line in told:
        say(line)
    held_out = data("test") if config.data.test else None
    # Compiling takes one host much longer than another, and a collective waits for its peers only so long.
    barrier("ready")
    run = Run(config, workdir, mesh, rates, rows, held_out, programs, saver, peers, asked)
    return run(state, data_state)


class Opening:
    """Opens both splits at once, beside whatever else there is to do: `data("train")` waits for one.

    Raises on the call what opening raised; at its end it closes what was opened.
    """

    def __init__(self, config: DataConfig, where: dict):
        families = {fields.get("family") for fields in config.sources().values()}
        if not config.workers and (config.records or "tfds" in families):
            # While it is imported, every thread of its process gets lazy modules: here, not beside others.
            import tensorflow_datasets  # noqa: F401
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="opening")
        self._futures = {"train": self._threads.submit(Rows, config, "train", **where)}
        if config.test:
            self._futures["test"] = self._threads.submit(Rows, config, "test", **where, epochs=1)

    def __call__(self, split: str) -> Rows:
        return self._futures[split].result()

    def __enter__(self) -> Opening:
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown()
        for future in self._futures.values():
            if future.exception() is None:
                future.result().close()


def check_model(config: Experiment, rows: Rows) -> None:
    """ValueError for data that are made for another model."""
    latents, vocabulary = config.model.num_latents, config.model.llama.vocab_size
    if config.data.num_latents != latents:
        raise ValueError(f"data.num_latents is {config.data.num_latents}, the model makes {latents} latents a scan")
    pieces = rows.description["vocab_size"]
    if pieces != vocabulary:
        raise ValueError(f"{config.data.tokenizer} has {pieces} pieces, model.llama.vocab_size is {vocabulary}")


def steps_of(rows: Rows, config: Experiment) -> int:
    """Steps that `train.epochs` take, from how the first window packs."""
    rows_an_epoch = len(rows.plan(0, 0)) * rows.windows
    return math.ceil(config.train.epochs * rows_an_epoch / config.train.batch)


_asked = itertools.count()


def evaluated(workdir: Path, step: int) -> bool:
    """Whether the record has the evaluation of a step; as process 0, which writes it, finds it."""
    found = lambda: any(x["step"] == step and "eval/all/loss" in x for x in shown.read(workdir))  # noqa: E731
    key = f"evaluated/{step}/{next(_asked)}"  # a meeting has a name of its own
    return barrier(key, lambda: jax.process_index() == 0 and found())[0]


def first_state(config: Experiment, newest: Path | None, abstract: dict, transform, say) -> dict:
    """The state to go on from.

    newest: the run's own newest step, verified.
    """
    if newest is not None:
        say(f"going on from {newest}")
        return train_state.restore(newest, abstract, verified=True)
    given = {}
    if config.checkpoint.init_from:
        given, report = train_state.init_from(config.checkpoint.init_from, abstract, config.model)
        say(str(report))
    return train_step.init_state(abstract, config.model, config.optimizer, transform, config.train.seed, given)


# --- what is compiled -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled before the first step for the one shape that all batches have: nothing of a step can compile later.

    Attributes:
      step: (state, batch, rate) -> (state, metrics). evaluate: (parameters, batch) -> sums.
    """

    step: jax.stages.Compiled
    evaluate: jax.stages.Compiled | None

    @classmethod
    def compile(cls, config: Experiment, abstract: dict, transform, rows: Rows, mesh, say: Callable) -> Programs:
        empty = collate_batch([(rows.empty_row, None)], config.data.planes).arrays
        micro = config.train.batch // config.train.accumulation
        where = train_step.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct((config.train.accumulation, micro, *x.shape[1:]), x.dtype, sharding=where)
            for name, x in empty.items()
        }
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            rate = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
            step = jax.jit(
                train_step.make_train_step(config.compute, transform, config.train.step),
                donate_argnums=0,
                out_shardings=(train_step.shardings_of(abstract), None),
            )
            compiled = step.lower(abstract, batch, rate).compile()
            evaluate = None
            if config.data.test:
                test = jax.jit(train_step.make_eval_step(config.compute, config.train.step))
                evaluate = test.lower(train_step.params_of(abstract), batch).compile()
        host_memory.release()
        memory, device = compiled.memory_analysis(), mesh.devices.flat[0].device_kind
        say(
            f"compiled in {time.perf_counter() - began:.0f} s; memory a device: "
            f"{shown.mb(memory.argument_size_in_bytes)} state and batch, "
            f"{shown.mb(memory.temp_size_in_bytes)} temporary; "
            f"mesh {dict(mesh.shape)} over {mesh.devices.size} {device} devices, {jax.process_count()} processes"
        )
        return cls(compiled, evaluate)


# --- the loop ---------------------------------------------------------------------------------------------------------


class Run:
    """The steps of one start."""

    def __init__(
        self,
        config: Experiment,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        rates: np.ndarray,
        rows: Rows,
        held_out: Rows | None,
        programs: Programs,
        saver: Saver,
        peers: Peers,
        asked: held_out_questions.HeldOutAnswers | None = None,
    ):
        self.config, self.workdir, self.mesh, self.rates, self.steps = config, workdir, mesh, rates, len(rates)
        self.rows, self.held_out, self.programs, self.saver, self.peers = rows, held_out, programs, saver, peers
        self.asked = asked
        self.report = PackingReport(config.data.text_length)
        self.flops = estimate.row_flops(config) * config.train.batch

    def place(self, batch: Batch) -> tuple[dict[str, jax.Array], tuple[RowInfo | None, ...]]:
        return train_step.place(batch.arrays, self.mesh, self.config.train.accumulation), batch.rows

    def __call__(self, state: dict, data_state: dict | None) -> int:
        train = self.config.train
        first = int(state["step"])
        data = iter(prefetch(batches(self.rows), self.place))
        if data_state is not None:
            data.set_state(data_state)
        timeout = faults.Watchdog(train.step_timeout, self.peers.files, self.peers.abort)
        with (
            contextlib.closing(data),
            contextlib.closing(shown.Display(self.workdir, first, self.steps, jax.process_index() == 0)) as display,
            contextlib.closing(RowLog(self.workdir, first)) as log,
            contextlib.closing(Profile(train.profile, self.workdir / "profile")) as profile,
            timeout,
            jax.set_mesh(self.mesh),
        ):
            self.display = display
            timing = Timing(self, display)
            # The last start may have been ended before it could evaluate what it had saved.
            if first and self.due(first) and not evaluated(self.workdir, first):
                if not (found := self.evaluate(state, first, timeout)):
                    return faults.REQUEUE
                self.saver.save(state, data.get_state(), metrics=found)
            waiting: collections.deque = collections.deque()  # steps that are computing: (number, metrics, rows)
            for step in range(first, self.steps):
                timeout.alive(f"step {step}")
                profile.before(step, state)
                began = time.perf_counter()
                arrays, rows = next(data)
                timing.waited(time.perf_counter() - began)
                log.add(step, rows)
                self.report.add(rows)
                rate = train_step.place_rate(self.rates[step], self.mesh)
                with jax.transfer_guard("disallow"):
                    state, metrics = self.programs.step(state, arrays, rate)
                waiting.append((step, metrics, rows))
                if len(waiting) > 1:  # the step before, while this one computes
                    timing.finished(*waiting.popleft())
                number = step + 1
                stopping = self.peers.stopping()
                evaluating = self.due(number) and not stopping
                saving = number == self.steps or stopping or number % self.config.checkpoint.save_every == 0
                if evaluating or saving:
                    while waiting:
                        timing.finished(*waiting.popleft())
                    found = self.evaluate(state, number, timeout) if evaluating else {}
                    stopping = stopping or self.peers.stopping()
                    if saving or stopping or (found and self.config.checkpoint.best):
                        timeout.alive(f"saving step {number}")
                        self.saver.save(state, data.get_state(), metrics=found)
                    timing.restart()
                    if stopping and (number < self.steps or (self.due(number) and not found)):
                        self.saver.wait()
                        display.say(f"{self.peers.stopped_by}: saved step {number}")
                        return faults.REQUEUE
            if first < self.steps:
                display.say(shown.packing_line(self.report))
            self.saver.wait()
        return 0

    def due(self, step: int) -> bool:
        """Whether a step is followed by an evaluation."""
        every = self.config.train.eval_every
        return self.held_out is not None and (step == self.steps or bool(every and step % every == 0))

    def evaluate(self, state: dict, step: int, timeout: faults.Watchdog) -> dict[str, float]:
        """Metrics on the held-out rows, logged; {} if a signal cut it short."""
        timeout.alive(f"the evaluation after step {step}")
        totals = None
        data = iter(prefetch(batches(self.held_out), self.place))
        with contextlib.closing(data):
            for number, (arrays, _) in enumerate(limited(data, self.config.train.eval_batches)):
                counts = self.programs.evaluate(train_step.params_of(state), arrays)
                totals = counts if totals is None else jax.tree.map(lambda a, b: a + b, totals, counts)
                timeout.alive(f"batch {number} of the evaluation after step {step}")
                if self.peers.stopping():
                    return {}
        found = {
            f"eval/{task}/{name}": value
            for task, values in train_step.summarise(jax.device_get(totals)).items()
            for name, value in values.items()
        }
        said = ""
        if self.asked:
            try:
                answered = self.asked(train_step.params_of(state), step, lambda: self.asking(step, timeout))
            except _Stopping:
                return {}
            found |= {f"asked/{name}": value for name, value in answered.items()}
            said = f"; asked: {held_out_questions.line(answered)}"
        self.display.log(step, found)
        exact = ", ".join(
            f"{task} {found[f'eval/{task}/exact_match']:.1%}" for task in TASKS if f"eval/{task}/exact_match" in found
        )
        self.display.say(f"step {step}: held-out loss {found['eval/all/loss']:.4f}; every token right: {exact}{said}")
        return found

    def asking(self, step: int, timeout: faults.Watchdog) -> None:
        timeout.alive(f"the questions asked after step {step}")
        if self.peers.stopping():
            raise _Stopping


class _Stopping(Exception):
    """A signal came while questions were asked."""


class Profile:
    """Traces the steps from the first to the last of a span, both included, into a directory."""

    def __init__(self, span: Sequence[int], directory: Path):
        self.span, self.directory, self.tracing = span, directory, False

    def before(self, step: int, state: dict) -> None:
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


def limited(data: Iterator, count: int) -> Iterator:
    """The first `count` items, all for 0."""
    for number, item in enumerate(data):
        if count and number == count:
            return
        yield item


class Timing:
    """Turns finished steps into log lines, and stops the run on values that are not finite."""

    def __init__(self, run: Run, display: shown.Display):
        self.run, self.display = run, display
        self.devices = run.mesh.devices.size
        self.peak = flops.peak(run.mesh.devices.flat[0])
        self.first = True
        self.restart()

    def restart(self) -> None:
        self.began, self.wait, self.samples, self.tokens, self.steps = time.perf_counter(), 0.0, 0, 0, 0

    def waited(self, seconds: float) -> None:
        self.wait += seconds

    def finished(self, step: int, metrics: dict, rows: Sequence[RowInfo | None]) -> None:
        """Logs a step; called in order. Raises ValueError by the policy of train.nonfinite."""
        train, number = self.run.config.train, step + 1
        values = jax.device_get(metrics)
        placed = [info for info in rows if info is not None]
        self.steps += 1
        self.samples += sum(len(info.samples) for info in placed) * jax.process_count()
        self.tokens += sum(info.tokens for info in placed) * jax.process_count()
        logged = {
            "train/loss": float(values["loss"]),
            "train/weight": float(values["weight"]),
            "train/token_accuracy": float(values["correct"]),
            "train/grad_norm": float(values["grad_norm"]),
            "train/learning_rate": float(self.run.rates[step]),
        }
        logged |= {
            f"train/{task}/loss": float(loss)
            for task, loss, weight in zip(TASKS, values["task_loss"], values["task_weight"], strict=True)
            if weight
        }
        line = ""
        if number % train.log_every == 0 or number == self.run.steps or self.first:
            self.first = False
            seconds = max(time.perf_counter() - self.began, 1e-9)
            speed = {
                "speed/step_s": seconds / self.steps,
                "speed/samples_s": self.samples / seconds,
                "speed/tokens_s_device": self.tokens / seconds / self.devices,
                "speed/tflops_device": self.run.flops * self.steps / seconds / self.devices / 1e12,
                "speed/data_wait": self.wait / seconds,
                "data/real_tokens": self.run.report.as_dict()["real tokens"],
            }
            if self.peak:
                speed["speed/mfu"] = speed["speed/tflops_device"] * 1e12 / self.peak
            logged |= speed
            line = (
                f"loss {logged['train/loss']:.3f}  {speed['speed/samples_s']:.1f} samples/s  "
                f"{speed['speed/tokens_s_device']:.0f} tokens/s/device  "
                f"{speed['speed/tflops_device']:.3g} TFLOP/s/device  "
                + (f"MFU {speed['speed/mfu']:.1%}  " if self.peak else "")
                + f"data wait {speed['speed/data_wait']:.0%}  real tokens {speed['data/real_tokens']:.0%}"
            )
            self.restart()
        self.display.log(number, logged, line)
        if not values["finite"]:
            self.not_finite(number, logged, placed, int(values["skipped"]))

    def not_finite(self, step: int, logged: dict, rows: Sequence[RowInfo], skipped: int) -> None:
        train = self.run.config.train
        samples = ", ".join(f"{s.source} {s.row_id}" for info in rows for s in info.samples)
        loss, norm = logged["train/loss"], logged["train/grad_norm"]
        what = f"step {step}: loss {loss}, gradient norm {norm}; its samples: {samples}"
        if train.nonfinite == "stop" or skipped > train.max_skipped:
            count = f"{skipped} steps in a row" if skipped > 1 else "a step"
            raise ValueError(f"{count} not finite, parameters as they were before: {what}")
        self.display.say(Text.assemble(("not finite, skipped", "red"), f" ({skipped} in a row): {what}"))


class RowLog:
    """rows/PROCESS.jsonl: which samples each step saw, so that a run can be followed and two runs compared."""

    def __init__(self, workdir: Path, first: int):
        path = workdir / "rows" / f"{jax.process_index()}.jsonl"
        path.parent.mkdir(exist_ok=True)
        shown.cut_off(path, first - 1)
        if jax.process_index() == 0:  # of a start with more processes, too
            for other in path.parent.glob("*.jsonl"):
                if int(other.stem) >= jax.process_count():
                    shown.cut_off(other, first - 1)
        self._file = open(path, "a", buffering=1)

    def add(self, step: int, rows: Sequence[RowInfo | None]) -> None:
        listed = [
            None if r is None else [r.epoch, r.window, r.row, [[s.source, s.row_id] for s in r.samples]] for r in rows
        ]
        left_out = [line for r in rows if r is not None for line in r.left_out]
        self._file.write(
            json.dumps({"step": step, "rows": listed} | ({"left_out": left_out} if left_out else {})) + "\n"
        )

    def close(self) -> None:
        self._file.close()
