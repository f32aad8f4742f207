"""The config of a run as frozen dataclasses: model, data, train, optimizer, mesh and checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from input_pipeline.config import DataConfig
from input_pipeline.files import nearest
from radfm_jax.models.radfm import RadFMConfig, tuples
from radfm_jax.training.optimizer import OptimizerConfig
from radfm_jax.training.train_step import NONFINITE, StepConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` group; train_step.StepConfig explains `weighting`, `normalise`, `chunk` and `dropout`."""

    steps: int = 0  # optimizer steps of the run; 0: use `epochs`
    epochs: float = 1.0
    batch: int = 8  # rows of a global batch, over all devices and micro-batches
    accumulation: int = 1  # micro-batches per step
    dtype: str = "float32"  # of matrix products
    remat: str = "full"  # what the backward pass recomputes (layers.REMAT_POLICIES)
    weighting: str = "weighted"
    normalise: str = "token"
    chunk: int = 256
    dropout: bool = True
    seed: int = 0  # of fresh parameters and dropout; `data.seed` is separate
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: evaluate only at the end
    eval_batches: int = 0  # batches per evaluation; 0: all of the test sources
    # Questions per test source whose answers each evaluation generates and scores (eval_answers.py); 0: none. Needs a
    # single process. Estimates of memory and time do not include it.
    eval_answers: int = 0
    nonfinite: str = "skip"  # "skip" steps whose loss or gradient is not finite, or "stop" the run
    max_skipped: int = 3  # in a row
    step_timeout: float = 1800.0  # seconds without a finished step after which the run ends with a dump of all stacks
    profile: tuple[int, ...] = ()  # (first, last) steps to trace to WORKDIR/profile, both included; (): none

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
    """The `checkpoint` group."""

    init_from: str = ""  # checkpoint directory with the initial parameters of a new run; "": fresh parameters
    save_every: int = 500  # steps
    keep_last: int = 2  # number of newest steps to keep
    keep_every: int = 0  # also keep steps that are multiples of it; 0: none
    best: bool = True  # also keep the step with the lowest held-out loss
    allow_older: bool = False  # if the newest checkpoint is damaged, resume from an older one, with a warning


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
            unfamiliar = [key for key in fields.get(name, {}) if key not in known]
            unknown += [f"{name}.{key}{nearest(key, known, f'{name}.')}" for key in unfamiliar]
        if unknown:
            raise ValueError(f"unknown fields: {', '.join(unknown)}")
        if "model" not in fields:
            raise ValueError("the config has no group `model`: add one, for instance radfm_14b().to_dict()")
        values: dict[str, Any] = {
            name: kind.from_dict(fields[name]) if kind is DataConfig else kind(**tuples(fields[name]))
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
    values = ((f.name, getattr(group, f.name)) for f in dataclasses.fields(group))
    return {name: dict(x) if isinstance(x, Mapping) else x for name, x in values}
