"""The training loop, and the setup before its first step.

A run resumes from the newest step in WORKDIR. Without one, it loads parameters from `checkpoint.init_from`, or
initialises them.

WORKDIR/config.json, checkpoints/                   run_directory.py
WORKDIR/length.json                                 with train.minutes (length.py)
WORKDIR/metrics.jsonl, tensorboard/, curves.png     display.py
WORKDIR/rows/PROCESS.jsonl                          samples of each step (progress.py)
WORKDIR/answers/STEP/                               with train.eval_answers (eval_answers.py)
WORKDIR/profile/                                    with train.profile
WORKDIR/logs/PROCESS.log                            messages of each process, if there are several
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from input_pipeline.batching.pipeline import Rows
from input_pipeline.sources import describe_terms
from radfm_jax.checkpoints import checkpoint, run_directory, train_state
from radfm_jax.checkpoints.saver import Saver
from radfm_jax.cost import estimate
from radfm_jax.runtime import console, faults, sharding
from radfm_jax.runtime.barrier import barrier
from radfm_jax.runtime.peers import Peers
from radfm_jax.training import display, train_step
from radfm_jax.training.data import OpenSplits, check_model, check_validation, device_batches, step_count
from radfm_jax.training.eval_answers import EvalAnswers
from radfm_jax.training.evaluation import Evaluation
from radfm_jax.training.experiment import Experiment, changes
from radfm_jax.training.length import METRIC, RunLength
from radfm_jax.training.programs import Programs
from radfm_jax.training.progress import Profile, RowLog, StepMetrics
from radfm_jax.training.rollouts import Rollouts


def train(config: Experiment, workdir: Path, peers: Peers | None = None) -> int:
    """Start or resume a run and return its exit code.

    Args:
      peers: from distributed.start. None: this is the only process, and it handles signals itself.
    Raises:
      ValueError: an error in the config or the data, an unusable checkpoint, or values that are not finite.
      SaveError: a step could not be saved.
    """
    with contextlib.ExitStack() as stack:
        peers = peers or Peers(stack.enter_context(faults.Stop()))
        with peers.abort_on_error():
            with peers.leaving_on_signal():
                run = _prepare(config, workdir, peers, stack)
            code = run()
            if code == 0 and jax.process_index() == 0:
                console.log(*display.result_lines(workdir), sep="\n")
            return code


def _prepare(config: Experiment, workdir: Path, peers: Peers, stack: contextlib.ExitStack) -> Callable[[], int]:
    """Open the run directory and the data, compile, and read the first state. Return the function that runs the steps.

    A run that cannot start or resume raises an error before anything is compiled, and does not change config.json.
    """
    check_validation(config)
    start = config.checkpoint.init_from
    if start and not run_directory.steps(workdir) and not Path(start).is_dir():
        raise ValueError(f"checkpoint.init_from {start} is not a directory: pass a checkpoint or a training run")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
    previous = run_directory.last_config(workdir)
    saver = stack.enter_context(_saver(config, workdir))
    newest = run_directory.latest(workdir, allow_older=config.checkpoint.allow_older, warn=console.log)
    if changed := changes(previous, config.to_dict()) if newest is not None and previous else []:
        console.log(f"settings that differ from the last start: {'; '.join(changed)}")
    length = RunLength(config, workdir, newest)
    if not changed and _is_complete(length, saver, newest):
        return lambda: 0
    abstract, transform, _ = train_step.abstract_state(
        config.compute, config.optimizer, mesh, reference=config.has_reference
    )
    saver.base = base = _base(config, newest, abstract)
    if newest is not None:
        train_state.check(newest, abstract, base)
    elif config.checkpoint.init_from:
        train_state.check_init(config.checkpoint.init_from, abstract, config.model)
    if changed and _is_complete(length, saver, newest):  # config.json gets only settings that fit the steps
        return lambda: 0
    answers = EvalAnswers(config, workdir, mesh) if config.train.eval_answers else None
    rollouts = Rollouts(config, mesh) if config.train.objective == "grpo" else None
    shard = {"batch": config.train.batch, "host": jax.process_index(), "hosts": jax.process_count()}
    splits = stack.enter_context(contextlib.closing(OpenSplits(config.data, shard, config.objective)))
    data_state = None if newest is None else train_state.data_state(newest)
    rows = splits("train")
    check_model(config, rows)
    if data_state is not None:
        rows.check_state(data_state)
    console.log(describe_terms(config.data.terms, config.data.umls_types))
    if length.is_open and not config.train.minutes:
        length.set_steps(step_count(config, rows))
        if _is_complete(length, saver, newest):
            return lambda: 0
    validation = splits("validation") if config.data.validates else None
    saver.begin(newest)
    rows.prefetch_plan(data_state)
    state_ready = _start_first_state((config, newest, abstract, transform, base), mesh, stack)
    _log_plan(config, abstract, mesh, rows, length, 0 if newest is None else int(newest.name))
    if answers:
        console.log(answers.description)
    programs = Programs.compile(config, abstract, transform, rows, mesh)
    state, messages = state_ready()
    for message in messages:
        console.log(message)
    # Compile times differ between hosts, and a collective waits for its peers only for a limited time.
    barrier("ready")
    evaluation = Evaluation(config, mesh, length, peers, validation, programs.evaluate, answers, rollouts)
    return functools.partial(
        _run, config, workdir, mesh, length, rows, programs, saver, peers, evaluation, rollouts, state, data_state
    )


def _saver(config: Experiment, workdir: Path) -> Saver:
    policy = config.checkpoint
    best = METRIC if policy.best and config.data.validates else None
    return Saver(
        workdir, config=config.to_dict(), model=config.model, tokenizer=config.data.tokenizer,
        keep_last=policy.keep_last, keep_every=policy.keep_every, best=best,
    )  # fmt: skip


def _is_complete(length: RunLength, saver: Saver, newest: Path | None) -> bool:
    """Return whether the last step is saved and (with validation rows) evaluated; if so, log and write the config."""
    if newest is None or not length.is_complete(int(newest.name)):
        return False
    saver.begin(newest)
    console.log(f"{newest}: {length.ending(int(newest.name))}")
    return True


def _base(config: Experiment, newest: Path | None, abstract: dict) -> train_state.Base | None:
    """Return the base of a run that trains adapters. It may have moved to `checkpoint.init_from`."""
    source, moved = newest or config.checkpoint.init_from, None
    if not source and (config.model.lora is not None or config.model.base != "float32"):
        raise ValueError("model.lora and model.base need checkpoint.init_from, the checkpoint with the base")
    if newest is not None and checkpoint.read_description(newest).get(checkpoint.BASE):
        try:
            checkpoint.base_of(newest)
        except ValueError:
            moved = config.checkpoint.init_from or None
    return train_state.find_base(source, abstract, config.model, moved)


def _start_first_state(
    arguments: tuple, mesh: Mesh, stack: contextlib.ExitStack
) -> Callable[[], tuple[dict, list[str]]]:
    """Compute `first_state` in a thread while the step is compiled. Return a function that returns its result."""
    if mesh.devices.flat[0].platform == "gpu":  # GPU autotuning during compilation needs an otherwise idle device
        return lambda: first_state(*arguments)
    threads = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="first state"))
    return threads.submit(first_state, *arguments).result


def first_state(
    config: Experiment,
    newest: Path | None,
    abstract: dict,
    transform: optax.GradientTransformation,
    base: train_state.Base | None = None,
) -> tuple[dict, list[str]]:
    """Return the state to start from, and messages about it. `newest` is the run's newest step, verified, or None."""
    if newest is not None:
        message = f"resuming from {newest}" + (f" and its base {base.directory}" if base else "")
        return train_state.restore(newest, abstract, base=base, verified=True), [message]
    loaded, messages = None, []
    if config.checkpoint.init_from:
        loaded, report = train_state.init_from(config.checkpoint.init_from, abstract, config.model)
        messages = [str(report)]
    state = train_step.init_state(abstract, config.model, config.optimizer, transform, config.train.seed, loaded)
    return state, messages


def _log_plan(config: Experiment, abstract: dict, mesh: Mesh, rows: Rows, length: RunLength, first: int) -> None:
    """Log parameters, estimated memory and time of the steps after `first`, and the data sources."""
    console.log(display.parameter_table(abstract))
    console.log(display.memory_table(estimate.memory(config, mesh), estimate.capacity(mesh)))
    console.log(display.data_table(rows.description, rows.mixture.counts, rows.windows))
    for note in rows.description["notes"]:
        console.log(note)
    if config.data.test and not config.data.validates:
        console.log("training does not read data.test: set data.validation or data.validation_share to evaluate")
    hardware = estimate.hardware(list(mesh.devices.flat), config.train.dtype)
    steps = length.steps
    if steps is None:
        steps = max(first, int(config.train.minutes * 60 / estimate.step_seconds(config, hardware)))
        console.log(f"train.minutes={config.train.minutes:g}: timing the first steps to fix their number")
    console.log(estimate.time_line(config, steps - first, hardware))


def _run(
    config: Experiment, workdir: Path, mesh: Mesh, length: RunLength, rows: Rows, programs: Programs, saver: Saver,
    peers: Peers, evaluation: Evaluation, rollouts: Rollouts | None, state: dict, data_state: dict | None,
) -> int:  # fmt: skip
    """Run the steps after state["step"]. Return 0 when all are done, faults.REQUEUE if a stop was requested."""
    train, save_every = config.train, config.checkpoint.save_every
    first = number = int(state["step"])
    data = device_batches(rows, mesh, train.accumulation)
    if data_state is not None:
        data.set_state(data_state)
    watchdog = faults.Watchdog(train.step_timeout, peers.files, peers.abort)
    with (
        contextlib.closing(data),
        contextlib.closing(display.Display(workdir, first, length.steps, active=jax.process_index() == 0)) as screen,
        contextlib.closing(RowLog(workdir, first)) as row_log,
        contextlib.closing(Profile(train.profile, workdir / "profile")) as profile,
        watchdog,
        jax.set_mesh(mesh),
    ):
        metrics = StepMetrics(config, mesh, length, screen)
        # The last start may have ended between saving a step and evaluating it.
        if first and evaluation.due(first) and not length.was_evaluated(first):
            if not (scores := evaluation(state, first, screen, watchdog)):
                return faults.REQUEUE
            saver.save(state, data.get_state(), metrics=scores)
        while not length.is_over(number):
            step, number = number, number + 1
            watchdog.alive(f"step {step}")
            profile.before(step, state)
            with metrics.waiting_for_data():
                arrays, infos = next(data)
            row_log.add(step, infos)
            sampled: dict[str, float] = {}
            if rollouts is not None:
                arrays, sampled = rollouts.fill(train_step.params_of(state), arrays, infos, step)
            rate = train_step.put_rate(length.rate(step), mesh)
            with jax.transfer_guard("disallow"):
                state, step_metrics = programs.step(state, arrays, rate)
            metrics.add(step, step_metrics, infos, sampled)
            if (fixed := length.measure(number, metrics.flush)) is not None:
                screen.set_steps(fixed)
            stopping = peers.stopping()
            evaluating = evaluation.due(number) and not stopping
            saving = number == length.steps or stopping or number % save_every == 0
            if not evaluating and not saving:
                continue
            metrics.flush()
            with length.pause("evaluation" if evaluating else "saving"):
                scores = evaluation(state, number, screen, watchdog) if evaluating else {}
                stopping = stopping or peers.stopping()
                if saving or stopping or length.is_over(number) or (scores and config.checkpoint.best):
                    watchdog.alive(f"saving step {number}")
                    saver.save(state, data.get_state(), metrics=scores)
            metrics.start_interval()
            if stopping and (not length.is_over(number) or (evaluation.due(number) and not scores)):
                saver.wait()
                console.log(f"{peers.stopped_by}: saved step {number}")
                return faults.REQUEUE
        if first < number:
            console.log(display.packing_line(metrics.packing))
        saver.wait()
        console.log(length.ending(number))
        return 0
