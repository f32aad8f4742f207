"""The training loop: an interrupted and resumed run equals an uninterrupted one bit by bit."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from practice import practice
from rich.console import Console
from slurm import compare

from input_pipeline.sources import NoTerms
from radfm_jax import api
from radfm_jax.checkpoints import run_directory
from radfm_jax.evaluate import radbench_build, scoring
from radfm_jax.evaluate.model_answers import RecordedAnswer
from radfm_jax.inference import Request
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.runtime import console
from radfm_jax.training import display, evaluation, length, loop, programs, train_step
from radfm_jax.training.eval_answers import EvalAnswers
from radfm_jax.training.experiment import CheckpointConfig, Experiment, MeshConfig, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig, learning_rates

MODEL = RadFMConfig(
    ViTConfig(width=24, num_layers=1, num_heads=2, head_dim=8, mlp_width=32, dropout=0.1),
    PerceiverConfig(width=24, num_layers=1, num_heads=2, head_dim=8, num_latents=4),
    DecoderConfig(vocab_size=512, width=32, mlp_width=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8),
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Starts with the same model, optimizer and rows share their programs: tracing takes longer than the steps."""
    compiled, init_state, known = programs.Programs.compile, train_step.init_state, {}

    def compile_once(config, *others):
        train = config.train.step, config.train.batch, config.train.accumulation
        rules = dataclasses.replace(config.optimizer, learning_rate=1.0, warmup_steps=0)  # the rate is an argument
        key = repr((config.compute, rules, config.data.limits, config.data.validates, train))
        if key not in known:
            known[key] = compiled(config, *others)
        return known[key]

    def init_once(abstract, model, optimizer, transform, seed, loaded):
        if loaded is not None:
            return init_state(abstract, model, optimizer, transform, seed, loaded)
        key = repr((model, optimizer.frozen, seed))
        if key not in known:
            known[key] = jax.device_get(init_state(abstract, model, optimizer, transform, seed))  # a step donates it
        return jax.device_put(known[key], train_step.shardings_of(abstract))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.Programs, "compile", compile_once)
        patch.setattr(train_step, "init_state", init_once)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = practice(tmp_path_factory.mktemp("train"), train=10, test=0, validation=6, num_latents=4, text_length=128)
    return Experiment(
        MODEL,
        data,
        TrainConfig(
            steps=6, batch=8, accumulation=1, remat="none", log_every=2, eval_every=3, eval_answers=2, chunk=64
        ),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        MeshConfig(data=4, fsdp=2),
        CheckpointConfig(save_every=2, keep_last=9),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert loop.train(config, workdir) == 0
    return workdir


def record(workdir) -> tuple[list, list]:
    """Return (metrics without those that depend on time, samples of every step)."""
    timeless = [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in display.read_metrics(workdir)]
    rows = (workdir / "rows" / "0.jsonl").read_text().splitlines()
    return timeless, [json.loads(line) for line in rows]


def bits(workdir, step):
    model = api.load(run_directory.step_directory(workdir, step))
    return jax.tree.map(np.asarray, model.params)


def test_a_complete_run_is_unchanged(config, whole, monkeypatch, capfd):
    """Another start compiles nothing and writes nothing."""
    before, changed = record(whole), (whole / "checkpoints").stat().st_mtime_ns
    monkeypatch.setattr(loop.Programs, "compile", lambda *_: pytest.fail("compiled again"))
    assert loop.train(config, whole) == 0
    assert record(whole) == before and (whole / "checkpoints").stat().st_mtime_ns == changed
    capfd.readouterr()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=3))
    assert loop.train(longer, whole) == 0 and loop.train(config, whole) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "differ from the last start: train.log_every is 3, was 2" in said and "train.log_every is 2, was 3" in said


SLOW = [pytest.param(at, marks=pytest.mark.slow) for at in (2, 3, 5)]


@pytest.mark.parametrize("at", [*SLOW, "asked"])
def test_interrupted_by_a_signal_and_resumed(config, whole, tmp_path, monkeypatch, at):
    """SIGTERM while step `at` is logged, or while questions are answered after step 3: the run saves and exits with 75.

    The second start ends with the same bits.
    """
    log, check_stop = display.Display.record, evaluation.Evaluation.check_stop

    def signalled(self, step, values, line=""):
        log(self, step, values, line)
        if step == at and "train/loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    def signalled_while_answering(self, activity, watchdog):
        if at == "asked" and activity.startswith("the answers"):
            os.kill(os.getpid(), signal.SIGTERM)
        check_stop(self, activity, watchdog)

    with monkeypatch.context() as patch:
        patch.setattr(display.Display, "record", signalled)
        patch.setattr(evaluation.Evaluation, "check_stop", signalled_while_answering)
        assert loop.train(config, tmp_path / "run") == 75
    at = 3 if at == "asked" else at
    assert run_directory.steps(tmp_path / "run")[-1] in (at, at + 1)
    assert loop.train(config, tmp_path / "run") == 0
    assert record(tmp_path / "run") == record(whole)
    jax.tree.map(np.testing.assert_array_equal, bits(tmp_path / "run", 6), bits(whole, 6))
    assert compare.main([str(whole), str(tmp_path / "run"), "6"]) == 0


def interrupted_after(step: int, monkeypatch):
    """Send SIGTERM to this process when the metrics of a step are logged."""
    log = display.Display.record

    def signalled(self, number, values, *others, **options):
        log(self, number, values, *others, **options)
        if number == step and "train/loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(display.Display, "record", signalled)


@pytest.fixture
def one_second_a_step(monkeypatch):
    """By the timer of train.minutes."""
    monkeypatch.setattr(length.Timer, "elapsed", lambda self: float(self.steps - 1))
    monkeypatch.setattr(length.Timer, "step_seconds", lambda self: 1.0)
    monkeypatch.setattr(display, "draw_curves", lambda _: None)


def test_minutes_patience_and_a_resume(config, tmp_path, monkeypatch, capsys, one_second_a_step):
    """Of 8.5 s for 8 steps, 4 are done: the loss is lowest at step 2, and two evaluations later the run ends.

    It was interrupted between them, after the number of steps had been fixed at step 2.
    """
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: math.nan}
    scripted = lambda self, params, step, watchdog: {length.METRIC: losses[step]}  # noqa: E731
    monkeypatch.setattr(evaluation.Evaluation, "_metrics", scripted)
    train = dataclasses.replace(config.train, steps=0, minutes=8.5 / 60, patience=2, eval_every=1, eval_answers=0)
    policy = dataclasses.replace(config.checkpoint, save_every=9, keep_last=1)
    config = dataclasses.replace(config, train=train, checkpoint=policy)
    with monkeypatch.context() as patch:
        interrupted_after(3, patch)
        assert loop.train(config, tmp_path) == 75
    assert "0.141667 minutes: 8 steps of 1 s" in capsys.readouterr().err
    monkeypatch.setattr(length.Timer, "step_seconds", lambda self: pytest.fail("timed again"))
    assert loop.train(config, tmp_path) == 0
    monkeypatch.setattr(loop, "OpenSplits", lambda *_: pytest.fail("the data were opened"))
    assert loop.train(config, tmp_path) == 0
    reason = "stopped after step 4: 2 evaluations without a lower validation loss than 2.0000 at step 2"
    assert " ".join(capsys.readouterr().err.split()).count(reason) == 2
    assert run_directory.steps(tmp_path) == [2, 4] and run_directory.best(tmp_path).name == "2"
    rates = [line["train/learning_rate"] for line in display.read_metrics(tmp_path) if "train/loss" in line]
    assert rates == [float(rate) for rate in learning_rates(config.optimizer, 8, 2)[:4]]


@pytest.mark.slow
def test_a_run_of_minutes_resumes_bit_exactly(config, tmp_path, monkeypatch, one_second_a_step):
    train = dataclasses.replace(config.train, steps=0, minutes=8.5 / 60, eval_every=0, eval_answers=0)
    config = dataclasses.replace(config, train=train)
    assert loop.train(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupted_after(5, patch)
        assert loop.train(config, tmp_path / "run") == 75
    monkeypatch.setattr(length.Timer, "step_seconds", lambda self: pytest.fail("timed again"))
    assert loop.train(config, tmp_path / "run") == 0
    assert record(tmp_path / "run") == record(tmp_path / "whole")
    assert compare.main([str(tmp_path / "whole"), str(tmp_path / "run"), "8"]) == 0
    # With more minutes the run is longer, without timing its steps again.
    longer = dataclasses.replace(config, train=dataclasses.replace(train, minutes=10.5 / 60))
    assert loop.train(longer, tmp_path / "run") == 0 and run_directory.steps(tmp_path / "run")[-1] == 10


@pytest.mark.parametrize(
    "ending, lost", [('{"step": 6, "eval/all', 0), ("\0" * 40, 0), ('"text"\n', 0), ('{"step": 6, "eval/all', 1)]
)
def test_a_power_failure_damages_the_last_metrics(config, whole, tmp_path, ending, lost):
    """Without the line of the last evaluation, the run evaluates again; a complete run stays complete."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: len(lines) - lost]) + ending)
    assert loop.train(config, run) == 0
    assert record(run) == record(whole)


def test_a_refused_resume_changes_nothing(config, whole, tmp_path, monkeypatch):
    """Other data and other parameters are refused before anything is compiled."""
    monkeypatch.setattr(loop.Programs, "compile", lambda *_: pytest.fail("compiled"))
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = (run / "config.json").read_bytes()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9))
    other_data = dataclasses.replace(longer, data=dataclasses.replace(config.data, seed=7))
    with pytest.raises(ValueError, match="the data differ from those of the saved state: seed is 7, was 0.*another"):
        loop.train(other_data, run)
    slow = dataclasses.replace(longer, optimizer=dataclasses.replace(config.optimizer, warmup_steps=9))
    with pytest.raises(ValueError, match="warmup_steps must be below the 9 steps"):
        loop.train(slow, run)
    wider = dataclasses.replace(config.model, vision=dataclasses.replace(config.model.vision, mlp_width=64))
    with pytest.raises(ValueError, match="does not match this model and optimizer"):
        loop.train(dataclasses.replace(longer, model=wider), run)
    with pytest.raises(ValueError, match="does not match this model and optimizer"):  # not even if no step is left
        loop.train(dataclasses.replace(config, model=wider), run)
    with pytest.raises(ValueError, match="do not fit the model"):
        init_from = dataclasses.replace(config.checkpoint, init_from=str(whole))
        loop.train(dataclasses.replace(config, model=wider, checkpoint=init_from), tmp_path / "new")
    assert (run / "config.json").read_bytes() == before and not (tmp_path / "new" / "config.json").exists()


def test_compare_finds_differences(whole, tmp_path, capsys):
    """tests/slurm/run.sh uses this comparison."""
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[1:]))
    assert compare.main([str(whole), str(other), "6"]) == 1 and "DIFFERENT" in capsys.readouterr().out
    step = run_directory.step_directory(other, 6)
    shutil.rmtree(step)
    shutil.copytree(run_directory.step_directory(other, 4), step)
    assert compare.main([str(whole), str(other), "6"]) == 1
    assert re.search("[1-9][0-9]* arrays differ", capsys.readouterr().out)


def test_a_missing_init_from_is_reported_before_compilation(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "OpenSplits", lambda *_: pytest.fail("the data were opened"))
    absent = dataclasses.replace(config, checkpoint=CheckpointConfig(init_from=str(tmp_path / "nowhere")))
    unread = dataclasses.replace(config.data, tokenizer=str(tmp_path / "of init_from"))
    for data in (config.data, unread):
        with pytest.raises(ValueError, match="checkpoint.init_from .*nowhere is not a directory: pass a checkpoint or"):
            loop.train(dataclasses.replace(absent, data=data), tmp_path / "run")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_narrow_terminal(tmp_path, monkeypatch, terminal):
    """The bar shows the step and cuts off the rest; a log has lines and no bar."""
    said = io.StringIO()
    narrow = Console(file=said, width=60, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(console, "stderr", narrow)
    shown = display.Display(tmp_path, 0, 500)
    shown.record(20, {"train/loss": 0.5}, "loss 0.500  43.7 samples/s  1672 tokens/s/device  data wait 1%")
    shown.close()
    text = said.getvalue()
    if terminal:
        assert "20/500" in text and "loss 0.5" in text and "…" in text and "data wait" not in text
    else:
        assert text == "step 20/500  loss 0.500  43.7 samples/s  1672 tokens/s/device  data wait 1%\n"


def test_tfds_is_imported_before_threads_start(config):
    """During its import, other threads get lazy modules for their imports."""
    data = dataclasses.replace(config.data, records=True, workers=0)
    program = """
import sys, threading
from input_pipeline.config import DataConfig
from radfm_jax.training import data
def rows(*_, **__):
    assert threading.current_thread() is not threading.main_thread()
    return "tensorflow_datasets" in sys.modules
data.Rows = rows
opened = data.OpenSplits(DataConfig.from_dict(eval(sys.argv[1])), {})
print(opened("train"), opened("validation"))
"""
    command = [sys.executable, "-c", program, repr(data.to_dict())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["True"] * 2


def test_files_of_a_run(config, whole):
    metrics, rows = record(whole)
    steps = [line["step"] for line in metrics if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6] and [line["step"] for line in rows] == [0, 1, 2, 3, 4, 5]
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert losses[0] == pytest.approx(np.log(512), rel=0.05) and losses[-1] < losses[0] - 0.1
    held_out = [line for line in metrics if evaluation.METRIC in line]
    assert [line["step"] for line in held_out] == [3, 6]
    assert {k.split("/")[1] for k in held_out[0] if k != "step"} >= {"all", "modality", "vqa", "diagnosis", "rationale"}
    assert (whole / "curves.png").stat().st_size > 10_000 and any((whole / "tensorboard").iterdir())
    assert run_directory.steps(whole) == [2, 3, 4, 6]
    best = min(held_out, key=lambda line: line[evaluation.METRIC])["step"]
    assert run_directory.best(whole).name == str(best)
    logits = api.load(run_directory.step_directory(whole, 6)).logits(np.array([[1, 5, 6]]))
    assert logits.shape == (1, 3, 512)


def test_held_out_questions_are_answered(config, whole):
    """Every evaluation has the same questions, and scores that `evaluate` computes from the saved step."""
    asked = {step: radbench_build.read_questions(whole / "answers" / str(step) / "questions.jsonl") for step in (3, 6)}
    assert asked[3] == asked[6] and {q.task for q in asked[6]} == {"modality", "vqa", "rationale", "diagnosis"}
    assert [q.dataset for q in asked[6]] == [name for name in sorted(config.data.validation) for _ in range(2)]
    step = run_directory.step_directory(whole, 6)
    given = api.load(step).generator.answers([Request(q.prompt, q.scans, q.context) for q in asked[6]])
    answers = [json.loads(line) for line in (whole / "answers/6/answers.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in answers] == [answer.text for answer in given]
    recorded = {q.row_id: RecordedAnswer(a.text) for q, a in zip(asked[6], given, strict=True)}
    scored = scoring.score(asked[6], recorded, NoTerms())
    logged = next(line for line in display.read_metrics(whole) if line["step"] == 6 and evaluation.METRIC in line)
    for task, metric in (("modality", "accuracy"), ("diagnosis", "f1"), ("vqa", "bleu"), ("rationale", "rouge")):
        expected = scoring.intervals(
            [s for s in scored if s.question.task == task], resamples=1, seed=0, by_study=False
        )
        assert logged[f"asked/{task}/{metric}"] == expected[metric].value
    assert 0 <= logged["asked/diagnosis/auc"] <= 1
    lines = [json.loads(line) for line in (whole / "answers/6/scores.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [list(q.references) for q in asked[6]]


def test_missing_questions_are_reported_before_compilation(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Programs, "compile", lambda *_: pytest.fail("compiled"))
    nothing = dataclasses.replace(config, data=dataclasses.replace(config.data, validation={}))
    with pytest.raises(ValueError, match="train.eval_answers: there are no validation rows"):
        loop.train(nothing, tmp_path / "run")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="generation needs a single process and there are 2; set it to 0"):
        EvalAnswers(config, tmp_path, None)


def test_another_run_starts_from_its_parameters(config, whole, tmp_path, capsys):
    """init_from with a frozen language model: only the other parts change, and the data restart.

    Its data.test, without validation, is not evaluated and selects no step.
    """
    stage = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation={}, test=config.data.validation),
        train=dataclasses.replace(config.train, steps=2, eval_every=1, eval_answers=0, profile=(1, 1)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, frozen=("llama",)),
        checkpoint=CheckpointConfig(init_from=str(run_directory.step_directory(whole, 6))),
    )
    assert loop.train(stage, tmp_path / "next") == 0
    before, after = bits(whole, 6), bits(tmp_path / "next", 2)
    jax.tree.map(np.testing.assert_array_equal, before["llama"], after["llama"])
    assert (before["projection"]["kernel"] != after["projection"]["kernel"]).any()
    said = capsys.readouterr().err
    assert "arrays loaded, 0 new" in said and "frozen" in said and "training does not read data.test" in said
    assert not any("all/loss" in name for line in display.read_metrics(tmp_path / "next") for name in line)
    assert run_directory.best(tmp_path / "next") is None
    assert [p.suffixes[-2:] for p in (tmp_path / "next" / "profile").rglob("*.pb")] == [[".xplane", ".pb"]]
    assert not (whole / "profile").exists()


def test_nonfinite_values_stop_a_run(config, tmp_path):
    """A huge learning rate: steps are skipped up to the limit, then an error names the rows."""
    broken = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0),
        train=dataclasses.replace(config.train, max_skipped=1, eval_every=0),
    )
    with pytest.raises(ValueError, match=r"2 steps in a row were not finite \(parameters unchanged\): step .* vqa \d+"):
        loop.train(broken, tmp_path / "run")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": {"num_latents": 8}}, "data.num_latents is 8, but the model has 4 latents per scan"),
        (
            {"model": {"llama": {"vocab_size": 100}}},
            "tokenizer.model has 512 pieces, but model.llama.vocab_size is 100",
        ),
        ({"train": {"batch": 3, "accumulation": 2}}, "train.batch 3 must be a multiple of train.accumulation 2"),
        ({"train": {"accumulation": 0}}, r"train.accumulation must be at least 1 \(got 0\)"),
        ({"train": {"stepz": 3}}, r"unknown fields: train.stepz \(did you mean train.steps\?\)"),
        ({"trian": {}}, r"unknown fields: trian \(did you mean train\?\)"),
    ],
)
def test_config_errors_are_reported_before_compilation(config, tmp_path, change, words):
    fields = config.to_dict()
    for group, values in change.items():
        for name, value in values.items():
            fields.setdefault(group, {})[name] = {**fields[group][name], **value} if isinstance(value, dict) else value
        fields.setdefault(group, {})
    with pytest.raises(ValueError, match=words):
        loop.train(Experiment.from_dict(fields), tmp_path / "run")


def test_experiment_round_trip(config):
    assert Experiment.from_dict(json.loads(json.dumps(config.to_dict(), default=list))) == config
