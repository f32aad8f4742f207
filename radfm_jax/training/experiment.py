"""One ConfigDict -> the frozen dataclasses of its groups: model, data, train, optimizer, mesh, checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping

from input_pipeline.config import DataConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.training.optimizer import OptimizerConfig
from radfm_jax.training.train_step import NONFINITE, StepConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` group.

    Attributes:
      steps: optimizer steps of the run; 0: as many as `epochs` of the data take.
      batch: rows of a global batch, over all devices and micro-batches. accumulation: micro-batches of a step.
      dtype: what matrices are multiplied in. remat: what is recomputed in the backward pass (layers.REMAT_POLICIES).
      weighting, normalise, chunk, dropout: train_step.StepConfig.
      seed: of fresh parameters and dropout; the data have their own.
      log_every, eval_every: steps; eval_every=0: only at the end. eval_batches: 0: all of the test sources.
      eval_answers: questions of each test source that an evaluation also asks in words, scored as RadBench's
        (train/answers.py); 0: none. With one process; neither memory nor time of it is in the estimates.
      nonfinite: `skip` a step whose loss or gradient is not finite, at most `max_skipped` in a row; or `stop` at once.
      step_timeout: seconds without a finished step until the run is ended with a dump of all stacks.
      profile: (first, last) steps to trace into WORKDIR/profile, both included; () for none.
    """

    steps: int = 0
    epochs: float = 1.0
    batch: int = 8
    accumulation: int = 1
    dtype: str = "float32"
    remat: str = "full"
    weighting: str = "weighted"
    normalise: str = "token"
    chunk: int = 256
    dropout: bool = True
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    eval_answers: int = 0
    nonfinite: str = "skip"
    max_skipped: int = 3
    step_timeout: float = 1800.0
    profile: tuple[int, ...] = ()

    def __post_init__(self):
        problems = []
        for name, least in (("steps", 0), ("batch", 1), ("accumulation", 1), ("log_every", 1), ("eval_every", 0),
                            ("eval_batches", 0), ("eval_answers", 0)):  # fmt: skip
            if getattr(self, name) < least:
                problems.append(f"train.{name} is {getattr(self, name)}: at least {least} is needed")
        if self.accumulation > 0 and self.batch % self.accumulation:
            problems.append(f"train.batch {self.batch} is not a multiple of train.accumulation {self.accumulation}")
        if self.nonfinite not in NONFINITE:
            problems.append(f"train.nonfinite is {self.nonfinite!r}; known: {', '.join(NONFINITE)}")
        if not self.steps and not self.epochs > 0:
            problems.append("train.steps is 0 and train.epochs is not above 0: how long?")
        if self.profile and (len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]):
            problems.append(f"train.profile is {self.profile}: give (first, last) steps")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def step(self) -> StepConfig:
        return StepConfig(self.weighting, self.normalise, self.chunk, self.dropout)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The `mesh` group: sharding.make_mesh."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` group.

    Attributes:
      init_from: a checkpoint directory whose parameters a new run starts from; "" starts fresh.
      save_every: steps. keep_last: newest to keep; keep_every: multiples of it stay for ever, 0: none.
      best: keep the step with the lowest held-out loss too.
      allow_older: when the newest checkpoint is damaged, go on from the one before it (with a warning).
    """

    init_from: str = ""
    save_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    best: bool = True
    allow_older: bool = False


GROUPS = {
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is told."""

    model: RadFMConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def to_dict(self) -> dict:
        """Plain values: what a config file puts into its ConfigDict, and what is kept with a checkpoint."""
        return {"model": self.model.to_dict(), "data": self.data.to_dict()} | {
            name: _plain(getattr(self, name)) for name in GROUPS if name != "data"
        }

    @classmethod
    def from_dict(cls, fields: Mapping) -> Experiment:
        """From a dict or a ConfigDict. ValueError names every unknown field, and the nearest known one."""
        fields = fields.to_dict() if hasattr(fields, "to_dict") else dict(fields)
        unknown = [_named(name, ["model", *GROUPS], "") for name in fields if name not in ("model", *GROUPS)]
        for name, kind in GROUPS.items():
            known = [f.name for f in dataclasses.fields(kind)]
            unknown += [_named(key, known, f"{name}.") for key in fields.get(name, {}) if key not in known]
        if unknown:
            raise ValueError(f"unknown fields: {', '.join(unknown)}")
        if "model" not in fields:
            raise ValueError("the config has no group `model`")
        groups = {
            name: kind.from_dict(fields[name]) if kind is DataConfig else kind(**_tuples(fields[name]))
            for name, kind in GROUPS.items()
            if name in fields
        }
        return cls(RadFMConfig.from_dict(fields["model"]), **groups)

    @property
    def compute(self) -> RadFMConfig:
        """The model's sizes with how this run computes."""
        return self.model.with_compute(dtype=self.train.dtype, remat=self.train.remat)


def flat(value, path: str = "") -> dict[str, str]:
    """Nested dicts -> {"train.steps": "30", ...}, values as JSON."""
    if not isinstance(value, Mapping) or not value:
        return {path: json.dumps(value)}
    return {k: v for name, x in value.items() for k, v in flat(x, f"{path}.{name}" if path else name).items()}


def changes(before: Mapping, now: Mapping) -> list[str]:
    """ "train.steps is 60, was 30" for each setting that differs; `before` may be of an older version."""
    old, new = flat(before), flat(now)
    keys = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
    return [f"{key} is {new.get(key, 'not there')}, was {old.get(key, 'not there')}" for key in keys]


def _plain(group) -> dict:
    plain = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()}


def _tuples(fields: Mapping) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _named(key: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.4)
    return f"{prefix}{key}" + (f" (did you mean {prefix}{near[0]}?)" if near else "")
