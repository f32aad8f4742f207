"""radfm_jax.training.length: train.minutes, train.patience, and the learning rates of a run of unknown length."""

import dataclasses
import json
import math

import numpy as np
import pytest

from input_pipeline.config import DataConfig
from radfm_jax.models.radfm import tiny
from radfm_jax.training import length
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.length import Fixed, RunLength, Timer
from radfm_jax.training.optimizer import OptimizerConfig, learning_rates, warmup_rate


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(length, "time", clock)
    return clock


def experiment(warmup: int = 3, **train) -> Experiment:
    source = {"family": "jsonl", "table": "x.jsonl", "root": "."}
    data = DataConfig(train={"a": source}, validation={"v": source}, index="x", tokenizer="t")
    train = {"steps": 0, "eval_every": 50, **train}
    return Experiment(
        tiny(), data, TrainConfig(**train), OptimizerConfig(learning_rate=1.0, warmup_steps=warmup, final=0.1),
        checkpoint=CheckpointConfig(save_every=10),
    )  # fmt: skip


def run(config: Experiment, workdir, clock: Clock, seconds: float, steps: int) -> tuple[RunLength, list, list]:
    """Run steps of `seconds`; return the length, the rates of the steps, and the steps that were waited for."""
    made, rates, waits = RunLength(config, workdir, None), [], []
    for number in range(1, steps + 1):
        rates.append(made.rate(number - 1))
        clock.now += seconds
        made.measure(number, lambda number=number: waits.append(number))
        if number % 10 == 0:
            with made.pause("saving"):
                clock.now += 5.0
    return made, rates, waits


def test_minutes_fix_the_number_of_steps_once(tmp_path, clock, capsys):
    """Steps of 2 s, and 5 s for each tenth: 2.5 s. A twentieth of the hour has passed after step 64."""
    config = experiment(minutes=60.0, warmup=3)
    made, rates, waits = run(config, tmp_path, clock, 2.0, 70)
    assert waits == [1, 2, 4, 8, 16, 32, 64] and made.is_open
    made, rates, waits = run(config, tmp_path, clock, 2.0, 130)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128] and made.steps == 1440
    assert "60 minutes: 1,440 steps of 2.5 s" in capsys.readouterr().err
    stored = json.loads((tmp_path / length.FILE).read_text())
    assert stored == {"minutes": 60.0, "steps": 1440, "step_seconds": pytest.approx(2.5), "after": 128}
    # A resume has the same number and the same rates, before and after the step at which the number was fixed.
    resumed = RunLength(config, tmp_path, tmp_path / "7")
    assert resumed.steps == 1440 and [resumed.rate(step) for step in range(130)] == rates
    assert [resumed.rate(step) for step in range(1440)] == [made.rate(step) for step in range(1440)]
    assert made.is_over(1440) and not made.is_over(1439)
    # Without a saved step, the steps are timed again; with other minutes, they are not.
    assert RunLength(config, tmp_path, None).is_open
    assert RunLength(experiment(minutes=30.0), tmp_path, tmp_path / "7").steps == 720
    assert RunLength(experiment(minutes=1.0), tmp_path, tmp_path / "7").steps == 128
    (tmp_path / length.FILE).write_text('{"minutes": 60.0, "steps": 0, "step_seconds": 1.0, "after": 2}')
    with pytest.raises(ValueError, match=r"length.json is damaged .*: steps must be at least 1 \(got 0\)"):
        RunLength(config, tmp_path, tmp_path / "7")


def test_long_steps_fix_the_number_early(tmp_path, clock):
    made, _, waits = run(experiment(minutes=10.0, warmup=1), tmp_path, clock, 45.0, 3)
    assert made.steps == 13 and waits == [1, 2]
    with pytest.raises(ValueError, match=r"warmup_steps must be below the 13 steps of the run \(got 50\)"):
        run(experiment(minutes=10.0, warmup=50), tmp_path, clock, 45.0, 3)
    # Longer steps than minutes: the run ends at once.
    made, _, _ = run(experiment(minutes=1.0, warmup=1), tmp_path, clock, 45.0, 2)
    assert made.steps == 2 and made.is_over(2) and [made.rate(step) for step in range(2)] == [0, 1]


def test_evaluations_and_saves_are_shared_among_steps(clock):
    timer = Timer(evaluations=1 / 50, saves=1 / 10)
    timer.is_due()
    timer.elapsed()
    for _ in range(8):
        timer.is_due()
        clock.now += 2.0
    for kind, seconds in (("evaluation", 40.0), ("evaluation", 60.0), ("saving", 3.0)):
        with timer.pause(kind):
            clock.now += seconds
    assert timer.step_seconds() == pytest.approx(2.0 + 50 / 50 + 3 / 10)
    assert Fixed.of(60.0, 3.3, 8).steps == 1090


def test_rates_do_not_depend_on_a_number_that_is_not_known_yet():
    config = OptimizerConfig(learning_rate=2e-5, warmup_steps=7, final=0.1)
    early = [warmup_rate(config, step) for step in range(20)]
    assert early[0] == 0 and early[7] == early[19] == np.float32(2e-5)
    # Fixed within the warm-up: the rates of a run with that number of steps.
    np.testing.assert_allclose(learning_rates(config, 40, 5), learning_rates(config, 40), rtol=1e-6)
    rates = learning_rates(config, 40, 20)
    assert len(rates) == 40 and list(rates[:20]) == early
    falling = rates[20:]
    assert falling[0] == np.float32(2e-5) and (np.diff(falling) < 0).all()
    np.testing.assert_allclose(falling[10], 2e-5 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=0)
    assert list(learning_rates(constant, 5, 2)[:3]) == [1, 1, 1] and learning_rates(constant, 5).dtype == np.float32


def test_patience_counts_evaluations_without_a_lower_loss(tmp_path):
    config = experiment(steps=900, patience=2)
    lines = [
        {"step": 50, length.METRIC: 3.0}, {"step": 60, "train/loss": 1.0}, {"step": 100, length.METRIC: 2.0},
        {"step": 150, length.METRIC: "nan"}, {"step": 200, length.METRIC: 2.0}, {"step": 250, length.METRIC: 1.0},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    at = {step: RunLength(config, tmp_path, tmp_path / str(step)) for step in (100, 199, 200)}
    assert [(x.best, x.waited) for x in at.values()] == [((100, 2.0), 0), ((100, 2.0), 1), ((100, 2.0), 2)]
    assert [x.is_over(step) for step, x in at.items()] == [False, False, True] and at[200].is_complete(200)
    assert at[200].ending(200) == (
        "stopped after step 200: 2 evaluations without a lower validation loss than 2.0000 at step 100 (train.patience)"
    )
    at[199].evaluated(200, 1.5)
    assert at[199].waited == 0 and at[199].ending(900) == (
        "all 900 steps are done; lowest validation loss 1.5000 at step 200"
    )
    # Steps after the one that a start resumes from do not count, nor does a new run.
    assert RunLength(config, tmp_path, None).best == (None, math.inf)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, patience=3))
    assert not RunLength(longer, tmp_path, tmp_path / "200").is_over(200)


@pytest.mark.parametrize(
    "train, words",
    [
        ({"steps": 5, "minutes": 2.0}, "train.steps is 5 and train.minutes is 2: set one of them to 0"),
        ({"minutes": -1.0}, r"train.minutes must be at least 0 \(got -1.0\)"),
        ({"epochs": 0.0}, "set train.steps, train.minutes or train.epochs"),
        ({"patience": 2, "eval_every": 0}, "train.patience is 2, but train.eval_every is 0"),
    ],
)
def test_conflicts(train, words):
    with pytest.raises(ValueError, match=words):
        experiment(**train)


def test_patience_needs_validation_rows():
    config = experiment(steps=5, patience=2)
    with pytest.raises(ValueError, match="train.patience is 2, but there are no validation rows: set data.validation"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, validation={}))
