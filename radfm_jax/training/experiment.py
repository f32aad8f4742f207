"""The config of a run as frozen dataclasses: model, data, train, optimizer, mesh and checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from input_pipeline.config import DataConfig
from input_pipeline.files import nearest
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.training.optimizer import OptimizerConfig
from radfm_jax.training.train_step import NONFINITE, StepConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` group.

    Attributes:
      steps: optimizer steps of the run; 0 uses `epochs` instead.
      batch: rows of a global batch, over all devices and micro-batches. accumulation: micro-batches per step.
      dtype: dtype of matrix products. remat: what the backward pass recomputes (layers.REMAT_POLICIES).
      weighting, normalise, chunk, dropout: train_step.StepConfig.
      seed: seed of fresh parameters and dropout; `data.seed` is separate.
      log_every, eval_every: intervals in steps; eval_every=0 evaluates only at the end.
      eval_batches: batches per evaluation; 0 for all of the test sources.
      eval_answers: questions per test source whose answers each evaluation generates and scores as RadBench does
        (eval_answers.py); 0 for none. Needs a single process. Estimates of memory and time do not include it.
      nonfinite: `skip` steps whose loss or gradient is not finite, at most `max_skipped` in a row; or `stop`.
      step_timeout: seconds without a finished step after which the run ends with a dump of all stacks.
      profile: (first, last) steps to trace to WORKDIR/profile, both included; () for none.
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
        for name, minimum in (("steps", 0), ("batch", 1), ("accumulation", 1), ("log_every", 1), ("eval_every", 0),
                            ("eval_batches", 0), ("eval_answers", 0)):  # fmt: skip
            if getattr(self, name) < minimum:
                problems.append(f"train.{name} must be at least {minimum} (got {getattr(self, name)})")
        if self.accumulation > 0 and self.batch % self.accumulation:
            problems.append(f"train.batch {self.batch} must be a multiple of train.accumulation {self.accumulation}")
        if self.nonfinite not in NONFINITE:
            problems.append(f"train.nonfinite must be one of {', '.join(NONFINITE)} (got {self.nonfinite!r})")
        if not self.steps and not self.epochs > 0:
            problems.append("set train.steps or train.epochs: both are 0 or negative")
        if self.profile and (len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]):
            problems.append(f"train.profile must be (first, last) steps (got {self.profile})")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def step(self) -> StepConfig:
        return StepConfig(self.weighting, self.normalise, self.chunk, self.dropout)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The `mesh` group: arguments of sharding.make_mesh."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` group.

    Attributes:
      init_from: checkpoint directory with the initial parameters of a new run; "" for fresh parameters.
      save_every: interval in steps. keep_last: number of newest steps to keep.
      keep_every: also keep steps that are multiples of it; 0 for none.
      best: also keep the step with the lowest held-out loss.
      allow_older: if the newest checkpoint is damaged, resume from an older one, with a warning.
    """

    init_from: str = ""
    save_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    best: bool = True
    allow_older: bool = False


GROUPS: dict[str, Any] = {
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The full config of a run."""

    model: RadFMConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def to_dict(self) -> dict:
        """Return plain values, as in a config file and in a checkpoint."""
        return {"model": self.model.to_dict(), "data": self.data.to_dict()} | {
            name: _plain(getattr(self, name)) for name in GROUPS if name != "data"
        }

    @classmethod
    def from_dict(cls, fields: Mapping) -> Experiment:
        """Convert a dict or ConfigDict. ValueError lists every unknown field and the nearest known one."""
        fields = fields.to_dict() if hasattr(fields, "to_dict") else dict(fields)
        groups = ["model", *GROUPS]
        unknown = [name + nearest(name, groups) for name in fields if name not in groups]
        for name, kind in GROUPS.items():
            known = [f.name for f in dataclasses.fields(kind)]
            unknown += [
                f"{name}.{key}{nearest(key, known, f'{name}.')}" for key in fields.get(name, {}) if key not in known
            ]
        if unknown:
            raise ValueError(f"unknown fields: {', '.join(unknown)}")
        if "model" not in fields:
            raise ValueError("the config has no group `model`: add one, for instance radfm_14b().to_dict()")
        values: dict[str, Any] = {
            name: kind.from_dict(fields[name]) if kind is DataConfig else kind(**_tuples(fields[name]))
            for name, kind in GROUPS.items()
            if name in fields
        }
        return cls(RadFMConfig.from_dict(fields["model"]), **values)

    @property
    def compute(self) -> RadFMConfig:
        """The model config with this run's dtype and remat policy."""
        return self.model.with_compute(dtype=self.train.dtype, remat=self.train.remat)


def flat(value, path: str = "") -> dict[str, str]:
    """Flatten nested dicts to {"train.steps": "30", ...}, with values as JSON."""
    if not isinstance(value, Mapping) or not value:
        return {path: json.dumps(value)}
    return {k: v for name, x in value.items() for k, v in flat(x, f"{path}.{name}" if path else name).items()}


def changes(before: Mapping, now: Mapping) -> list[str]:
    """Return "train.steps is 60, was 30" for each setting that differs; `before` may be from an older version."""
    old, new = flat(before), flat(now)
    keys = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
    return [f"{key} is {new.get(key, 'missing')}, was {old.get(key, 'missing')}" for key in keys]


def _plain(group) -> dict:
    plain = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()}


def _tuples(fields: Mapping) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
