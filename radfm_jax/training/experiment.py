"""The config of a run as frozen dataclasses: model, data, train, optimizer, mesh and checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from input_pipeline.config import DataConfig
from input_pipeline.field_rules import (
    Count,
    Rule,
    Size,
    above,
    at_least,
    check_fields,
    from_mapping,
    one_of,
    plain_mapping,
    raise_problems,
    unknown_fields,
)
from input_pipeline.files import nearest
from radfm_jax.models.layers import DTYPES, REMAT_POLICIES
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.training.losses import NORMALISATIONS, WEIGHTINGS
from radfm_jax.training.objectives import OBJECTIVES, DPOConfig, GRPOConfig, Objective
from radfm_jax.training.optimizer import OptimizerConfig
from radfm_jax.training.train_step import NONFINITE, StepConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` group; train_step.StepConfig explains `weighting`, `normalise`, `chunk` and `dropout`."""

    # What is learned: the answers of the data (`likelihood`), a preference between two answers (`dpo`), or a reward of
    # generated answers (`grpo`); the groups of the same names have the options.
    objective: Annotated[str, one_of(OBJECTIVES)] = "likelihood"
    # The length of a run is `steps`, `minutes` or `epochs`: the first that is not 0. `steps` and `minutes` exclude each
    # other.
    steps: Count = 0  # optimizer steps of the run
    minutes: Annotated[float, at_least(0)] = 0.0  # wall time of the steps, with evaluation and saving (length.py)
    epochs: Annotated[float, at_least(0)] = 1.0
    # Evaluations in a row without a lower validation loss after which the run ends; 0: never. Needs `eval_every`.
    patience: Count = 0
    batch: Size = 8  # rows of a global batch, over all devices and micro-batches
    accumulation: Size = 1  # micro-batches per step
    dtype: Annotated[str, one_of(DTYPES)] = "float32"  # dtype of matrix products
    remat: Annotated[str, one_of(REMAT_POLICIES)] = "full"  # what the backward pass recomputes (layers.REMAT_POLICIES)
    weighting: Annotated[str, one_of(WEIGHTINGS)] = "weighted"
    normalise: Annotated[str, one_of((*NORMALISATIONS, "micro_batch"))] = "token"
    chunk: Size = 256
    dropout: bool = True
    seed: Count = 0  # seed of fresh parameters and dropout; `data.seed` is separate
    log_every: Size = 10  # steps
    eval_every: Count = 0  # steps; 0: evaluate only at the end
    eval_batches: Count = 0  # batches per evaluation; 0: all validation rows
    # Questions per validation source whose answers each evaluation generates and scores (eval_answers.py); 0: none.
    # Needs a single process. Estimates of memory and time do not include it.
    eval_answers: Count = 0
    # Accept a validation source that is a test table: the best step is then selected on test data.
    validate_on_test: bool = False
    nonfinite: Annotated[str, one_of(NONFINITE)] = "skip"  # steps whose loss or gradient is not finite, or "stop"
    max_skipped: Count = 3  # maximum number of such steps in a row
    # Seconds without a finished step after which the run ends with a dump of all stacks.
    step_timeout: Annotated[float, above(0)] = 1800.0
    profile: tuple[Count, ...] = ()  # (first, last) steps to trace to WORKDIR/profile, both included; (): none

    def __post_init__(self):
        check_fields(self, "train", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if self.batch % self.accumulation:
            yield f"train.batch {self.batch} must be a multiple of train.accumulation {self.accumulation}"
        if not self.steps and not self.minutes and not self.epochs > 0:
            yield "set train.steps, train.minutes or train.epochs: all are 0 or negative"
        if self.steps and self.minutes:
            yield f"train.steps is {self.steps} and train.minutes is {self.minutes:g}: set one of them to 0"
        if self.patience and not self.eval_every:
            yield f"train.patience is {self.patience}, but train.eval_every is 0: set it to a number of steps"
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            yield f"train.profile must be (first, last) steps (got {self.profile})"

    @property
    def step(self) -> StepConfig:
        return StepConfig(self.weighting, self.normalise, self.chunk, self.dropout)


Axis = Annotated[int, Rule("at least 1, or -1 for the remaining devices", lambda size: size == -1 or size >= 1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The `mesh` group: arguments of sharding.make_mesh."""

    data: Axis = 1
    fsdp: Axis = -1
    tensor: Axis = 1
    slices: Size = 1

    def __post_init__(self):
        check_fields(self, "mesh")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` group."""

    init_from: str = ""  # checkpoint directory with the initial parameters of a new run; "": fresh parameters
    save_every: Size = 500  # steps
    keep_last: Size = 2  # number of newest steps to keep
    keep_every: Count = 0  # also keep steps that are multiples of this number; 0: none
    best: bool = True  # also keep the step with the lowest validation loss
    allow_older: bool = False  # if the newest checkpoint is damaged, resume from an older one, with a warning

    def __post_init__(self):
        check_fields(self, "checkpoint")


GROUPS: dict[str, Any] = {
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
    "dpo": DPOConfig,
    "grpo": GRPOConfig,
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
    dpo: DPOConfig = DPOConfig()
    grpo: GRPOConfig = GRPOConfig()

    def __post_init__(self):
        raise_problems(self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        ids, vocabulary = self.data.vocab_size, self.model.llama.vocab_size
        if ids not in (0, vocabulary):
            reason = f"data.vocab_size is {ids}, but model.llama.vocab_size is {vocabulary}"
            yield f"{reason}: set both to the same number"
        if self.train.patience and not self.data.validates:
            reason = f"train.patience is {self.train.patience}, but there are no validation rows"
            yield f"{reason}: set data.validation or data.validation_share"
        objective, grpo, length = self.train.objective, self.grpo, self.data.text_length
        if objective != "likelihood" and self.train.normalise == "micro_batch":
            yield f"train.normalise='micro_batch' cannot be combined with train.objective={objective!r}: use 'sample'"
        if objective == "grpo" and length // grpo.group - grpo.max_new_tokens <= self.data.num_latents:
            yield (
                f"data.text_length {length} has no room for grpo.group {grpo.group} prompts with answers of "
                f"grpo.max_new_tokens {grpo.max_new_tokens}: increase data.text_length"
            )

    def to_dict(self) -> dict:
        """Return plain values, as in a config file and in a checkpoint."""
        return {"model": self.model.to_dict(), "data": self.data.to_dict()} | {
            name: _plain(getattr(self, name)) for name in GROUPS if name != "data"
        }

    @classmethod
    def from_dict(cls, fields: Mapping) -> Experiment:
        """Convert a dict or ConfigDict. ValueError lists every unknown field and the nearest known one."""
        fields = plain_mapping(fields, "the config")
        groups = ["model", *GROUPS]
        unknown = [name + nearest(name, groups) for name in fields if name not in groups]
        parts = {name: plain_mapping(fields[name], name) for name in groups if name in fields}
        unknown += [
            u for name in parts if name in GROUPS if (u := unknown_fields(parts[name], GROUPS[name], f"{name}."))
        ]
        if unknown:
            raise ValueError(f"unknown fields: {', '.join(unknown)}")
        if "model" not in parts:
            raise ValueError("the config has no group `model`: add one, for instance radfm_14b().to_dict()")
        made, problems = {}, []
        for name, kind in {"model": RadFMConfig, **GROUPS}.items():
            try:
                made[name] = from_mapping(kind, parts.get(name, {}), name)
            except ValueError as error:  # the other groups may have problems too
                problems.append(str(error))
        raise_problems(problems)
        return cls(**made)

    @property
    def objective(self) -> Objective | None:
        """The options of the objective; None for the likelihood of the answers."""
        return {"likelihood": None, "dpo": self.dpo, "grpo": self.grpo}[self.train.objective]

    @property
    def has_reference(self) -> bool:
        """Whether the state also has the parameters of a reference (train_step.abstract_state)."""
        return self.objective is not None and self.objective.uses_reference

    @property
    def step(self) -> StepConfig:
        """The options of a step, with the objective."""
        return dataclasses.replace(self.train.step, objective=self.objective)

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
    """Return "train.steps is 60, was 30" for each setting that differs.

    `before` may be from an older version: fields that it lacks have their defaults.
    """
    with contextlib.suppress(ValueError):  # a config that this version refuses is compared as it is
        before = Experiment.from_dict(before).to_dict()
    old, new = flat(before), flat(now)
    keys = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
    return [f"{key} is {new.get(key, 'missing')}, was {old.get(key, 'missing')}" for key in keys]


def _plain(group) -> dict:
    values = ((f.name, getattr(group, f.name)) for f in dataclasses.fields(group))
    return {name: dict(x) if isinstance(x, Mapping) else x for name, x in values}
