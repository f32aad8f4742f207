"""Every field of every config is checked: type, range and choice, with the path of the field in the error."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import pytest

from input_pipeline.config import DataConfig
from input_pipeline.curate.llm import Endpoint
from input_pipeline.field_rules import (
    Count,
    Size,
    above,
    at_least,
    check_fields,
    from_mapping,
    one_of,
    share,
    unknown_fields,
)
from radfm_jax.convert import hf_config, model_config
from radfm_jax.evaluate.radbench import Benchmark
from radfm_jax.inference.inputs import Preparation
from radfm_jax.models.decoder import DecoderConfig, RopeScaling
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig, tiny
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.training.experiment import GROUPS, CheckpointConfig, Experiment, MeshConfig, TrainConfig, changes
from radfm_jax.training.optimizer import OptimizerConfig
from radfm_jax.training.train_step import StepConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    sides: tuple[Size, Size] = (1, 2)

    def __post_init__(self):
        check_fields(self, "outer.inner")


@dataclasses.dataclass(frozen=True)
class Outer:
    count: Count = 0
    rate: Annotated[float, above(0)] = 1.0
    part: Annotated[float, share(zero=False, one=True)] = 0.5
    name: Annotated[str, one_of(("paper", "released"))] = "paper"
    limit: Annotated[int, at_least(2)] | None = None
    names: tuple[Annotated[str, one_of(("a", "b"))], ...] = ()
    rates: Mapping[str, Annotated[float, at_least(0)]] = dataclasses.field(default_factory=dict)
    inner: Inner | None = None
    flag: bool = False

    def __post_init__(self):
        check_fields(self, "outer", ["count and rate conflict"] if self.count == self.rate else [])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"count": -1}, "outer.count must be at least 0 (got -1)"),
        ({"count": True}, "outer.count must be an integer (got True)"),
        ({"count": 1.0}, "outer.count must be an integer (got 1.0)"),
        ({"count": 2**31}, "outer.count must be at most 2147483647 (got 2147483648)"),
        ({"count": 10**400}, "outer.count must be an integer (got 1000"),
        ({"rate": math.nan}, "outer.rate must be a finite number (got nan)"),
        ({"rate": math.inf}, "outer.rate must be a finite number (got inf)"),
        ({"rate": 10**400}, "outer.rate must be a finite number (got 1000"),
        ({"rate": "1"}, "outer.rate must be a finite number (got '1')"),
        ({"rate": 0}, "outer.rate must be above 0 (got 0)"),
        ({"part": 0.0}, "outer.part must be above 0 and at most 1 (got 0.0)"),
        ({"name": "realeased"}, "must be one of paper, released (got 'realeased') (did you mean released?)"),
        ({"name": ["paper"]}, "outer.name must be a text (got ['paper'])"),
        ({"limit": 1}, "outer.limit must be at least 2 (got 1)"),
        ({"names": ("a", "c")}, "outer.names[1] must be one of a, b (got 'c')"),
        ({"names": "ab"}, "outer.names must be a list (got 'ab')"),
        ({"rates": {"x": -1}}, "outer.rates.x must be at least 0 (got -1)"),
        ({"rates": 3}, "outer.rates must be a mapping (got 3)"),
        ({"flag": 1}, "outer.flag must be true or false (got 1)"),
        ({"count": 1}, "count and rate conflict"),
    ],
)
def test_a_problem_has_the_path_of_its_field(fields, message):
    with pytest.raises(ValueError) as error:
        Outer(**fields)
    assert message in str(error.value)


def test_all_problems_at_once_and_conflicts_last():
    with pytest.raises(ValueError) as error:
        Outer(count=-1, rate=-1, name=3)
    assert str(error.value).count(";") == 2 and "conflict" not in str(error.value)


def test_from_mapping():
    made = from_mapping(Outer, {"names": ["a"], "inner": {"sides": [3, 4]}, "limit": 5}, "outer")
    assert made == Outer(names=("a",), inner=Inner((3, 4)), limit=5)
    assert from_mapping(Outer, {"inner": None}, "outer") == Outer()
    for fields, message in (
        ({"inner": {"sides": [3]}}, r"outer.inner.sides must have 2 values \(got \(3,\)\)"),
        ({"inner": {"side": [3, 4]}}, r"unknown fields: outer.inner.side \(did you mean outer.inner.sides\?\)"),
        ({"inner": 3}, r"outer.inner must be a mapping of fields \(got 3\)"),
        ([1], r"outer must be a mapping of fields \(got \[1\]\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mapping(Outer, fields, "outer")
    assert unknown_fields(["counts"], Outer) == "counts (did you mean count?)"


CONFIGS = (DataConfig, ViTConfig, PerceiverConfig, DecoderConfig, RopeScaling, TrainConfig, StepConfig, OptimizerConfig,
           MeshConfig, CheckpointConfig, Preparation, Benchmark, Endpoint)  # fmt: skip
# Texts without a rule: paths and names, which are checked where they are opened, and settings with a parser.
FREE_TEXT = {"intensity", "index", "tokenizer", "terms", "init_from", "base_url", "model", "key_variable", "frozen"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_and_choice_has_a_rule(config):
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        plain = [h for h in (hint, *typing.get_args(hint)) if h in (int, float, str)]
        if typing.get_origin(hint) is Annotated or hint is bool or field.name in FREE_TEXT:
            continue
        assert not plain or typing.get_origin(hint) is Mapping or not isinstance(hint, type), (field.name, hint)


HOSTILE = (
    -1,
    0,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    "nope",
    "",
    None,
    [],
    {},
    True,
    [1, 2, 3],
    {"a": 1},
    [[]],
    {1: 2},
    -0.5,
    2**40,
)


def leaves(value: Any, path: tuple = ()):
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    else:
        yield path


def test_hostile_values_in_every_field_of_an_experiment():
    """Every value is accepted, or refused with the name of its field: no other exception."""
    source = {"family": "jsonl", "table": "t", "root": "/data", "intensity": "lung", "weight": 1.0}
    data = DataConfig(train={"a": source}, mixture="weights")
    fields, refused = Experiment(tiny(), data).to_dict(), 0
    for group, kind in {"model": RadFMConfig, **GROUPS}.items():
        for path in leaves(fields[group]):
            for value in HOSTILE:
                try:
                    from_mapping(kind, changed(fields[group], path, value), group)
                except ValueError as error:
                    refused += 1
                    assert path[-1] in str(error), (path, value, error)
    assert refused > 800


def changed(fields: dict, path: tuple, value: Any) -> dict:
    """Return nested dicts with another value at a path."""
    name, *rest = path
    return fields | {name: changed(fields[name], tuple(rest), value) if rest else value}


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.llama.num_layers", -1, "model.llama.num_layers must be at least 1 (got -1)"),
        ("model.llama.dtype", "float33", "model.llama.dtype must be one of float32"),
        ("train.remat", "nope", "train.remat must be one of full, attention"),
        ("train.chunk", 0, "train.chunk must be at least 1 (got 0)"),
        ("checkpoint.save_every", 0, "checkpoint.save_every must be at least 1 (got 0)"),
        ("optimizer.b2", math.inf, "optimizer.b2 must be a finite number (got inf)"),
        ("mesh.fsdp", 0, "mesh.fsdp must be at least 1, or -1 for the remaining devices (got 0)"),
        ("data.train", {"a": {"family": "vqarad"}}, "data.train.a has the family 'vqarad' (did you mean vqa_rad?)"),
    ],
)
def test_hostile_settings_of_the_command_line(path, value, message):
    fields = Experiment(tiny()).to_dict()
    *groups, name = path.split(".")
    group = fields
    for key in groups:
        group = group[key]
    group[name] = value
    with pytest.raises(ValueError) as error:
        Experiment.from_dict(fields)
    assert message in str(error.value)


def test_problems_of_all_groups_are_reported_together():
    fields = Experiment(tiny()).to_dict()
    fields["train"]["chunk"], fields["mesh"]["data"], fields["model"]["vision"]["width"] = 0, 0, -3
    with pytest.raises(ValueError) as error:
        Experiment.from_dict(fields)
    assert all(name in str(error.value) for name in ("train.chunk", "mesh.data", "model.vision.width"))


def test_round_trip_of_an_experiment():
    config = Experiment(tiny(), optimizer=OptimizerConfig(rates={"vit": 0.5}, frozen=("llama",)))
    assert Experiment.from_dict(config.to_dict()) == config
    scaled = dataclasses.replace(tiny(), llama=dataclasses.replace(tiny().llama, rope_scaling=RopeScaling()))
    assert RadFMConfig.from_dict(scaled.to_dict()) == scaled


def test_fields_that_an_older_config_lacks_have_not_changed():
    now, old = Experiment(tiny(), train=TrainConfig(steps=60)).to_dict(), Experiment(tiny()).to_dict()
    old["train"]["steps"] = 30
    del old["model"]["llama"]["window"], old["model"]["llama"]["qkv_bias"]
    assert changes(old, now) == ["train.steps is 60, was 30"]
    old["model"]["llama"]["discontinued"] = 1
    assert "model.llama.discontinued is missing, was 1" in changes(old, now)


@pytest.mark.parametrize(
    "key, value", [("hidden_size", "5120"), ("num_attention_heads", 0), ("num_hidden_layers", -1), ("head_dim", [64]),
                   ("rope_theta", "x"), ("rms_norm_eps", -1e-6), ("rope_scaling", 3), ("tie_word_embeddings", "no")]
)  # fmt: skip
def test_hostile_sizes_of_a_hugging_face_config(tmp_path, key, value):
    import json

    config = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"config.json: {key} must be"):
        hf_config.decoder_from_hf(model_config.read_config(tmp_path / "config.json"), tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": None}))
    assert hf_config.decoder_from_hf(model_config.read_config(tmp_path / "config.json"), "x").head_dim == 8
