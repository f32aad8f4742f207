"""A group of keys of config.json that give some fields of DecoderConfig together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from radfm_jax.models.decoder import DecoderConfig

Values = Mapping[str, Any]  # keys of a config.json; lists are tuples
Fields = dict[str, Any]  # of DecoderConfig


@dataclasses.dataclass(frozen=True)
class Group:
    """Keys, and how they are read and written.

    read(values): values has all keys of the family. Raises ValueError for a value that the decoder does not implement.
    write(config, source): source has the keys of the folder that the weights come from, or none. Keys that are not
      returned keep the value of the source, or the default.
    """

    keys: Mapping[str, tuple[Any, Any]]  # key -> (default of the class in transformers, type and rule of its values)
    read: Callable[[Values], Fields]
    write: Callable[[DecoderConfig, Values], dict[str, Any]]


def fixed(**fields) -> Group:
    """Return a group without keys: fields that all models of a family share."""
    return Group({}, lambda values: fields, lambda config, source: {})
