"""Records in a checkpoint: the preparation of scans and texts, and the origin of the weights.

A training run records both in run.json. Conversion and `save` write them to radfm.json, an export to its config.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from input_pipeline.field_rules import as_tuple, errors_of, plain_mapping
from input_pipeline.files import parse_json
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.inference.inputs import RELEASED, Preparation
from radfm_jax.models import radfm

KEY = "preparation"  # key of the preparation in radfm.json and config.json
ORIGIN = "origin"  # key of the origin of the weights
REMEDY = (
    "load it with prepared=Preparation(preprocess=..., size_2d=..., ...) (command line: --preprocess paper "
    "--size-2d ... --size-3d ... --depth ...)"
)


def to_record(preparation: Preparation) -> dict:
    """Return all fields of a preparation as JSON values."""
    return parse_json(json.dumps(dataclasses.asdict(preparation)))


def from_record(record, where) -> Preparation:
    """Invert `to_record`. Raises ValueError for an unknown field, because it might change the preparation."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: `{KEY}` is {record!r}, expected the fields of Preparation")
    known = {f.name for f in dataclasses.fields(Preparation)}
    if unknown := [name for name in record if name not in known]:
        raise ValueError(f"{where}: `{KEY}` has unknown fields {', '.join(unknown)}: update radfm_jax")
    try:
        return Preparation(**{name: as_tuple(value) for name, value in record.items()})
    except (ValueError, TypeError) as e:
        raise ValueError(f"{where}: `{KEY}` is invalid: {e}") from None


def released_preparation(config: radfm.RadFMConfig) -> Preparation | None:
    """Return the preparation of the released weights, or None if the model has other sizes."""
    return RELEASED if radfm.has_released_sizes(config) else None


def preparation_of(directory, config: radfm.RadFMConfig) -> Preparation:
    """Return the preparation of scans that a checkpoint records; `RELEASED` for converted weights of released sizes.

    Raises ValueError if the checkpoint does not record it.
    """
    description, path = checkpoint.read_description(directory), Path(directory) / run_directory.RUN
    if (record := description.get(KEY)) is not None:
        return from_record(record, Path(directory) / checkpoint.DESCRIPTION)
    try:
        data = _training_config(directory)["data"]
    except FileNotFoundError:
        data = None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} does not record how scans were prepared ({e!r}): {REMEDY}") from None
    if data is not None:
        with errors_of(path):
            return Preparation.from_data(plain_mapping(data, "config.data"))
    released = released_preparation(config)
    if "file" in description.get("source", {}) and released is not None:
        return released
    raise ValueError(f"{directory} has no {run_directory.RUN} that records how scans were prepared: {REMEDY}")


def origin_of(directory) -> dict:
    """Return name, step and `init_from` of the run that trained the weights of a checkpoint; {} if unknown."""
    source = checkpoint.read_description(directory).get("source", {})
    if ORIGIN in source or "step" not in source:
        return source.get(ORIGIN) or {}
    origin = {"training": source.get("training", ""), "step": source["step"]}
    try:
        origin["init_from"] = _training_config(directory)["checkpoint"]["init_from"]
    except (OSError, ValueError, KeyError, TypeError):  # a record of other versions
        origin["init_from"] = ""
    return origin


def untrained(directory) -> str | None:
    """Return why the weights of a checkpoint may be random; None if they come from training or from a weight file."""
    origin = origin_of(directory)
    if origin.get("step") == 0 and not origin.get("init_from"):
        return f"{directory} has the weights of step 0, before any training: its answers are random"
    if not origin and "file" not in checkpoint.read_description(directory).get("source", {}):
        return f"{directory} does not record a training run or a weight file: its weights may be untrained"
    return None


def _training_config(directory) -> dict:
    return run_directory.read_run(directory)["config"]
