"""Rules of config fields, declared next to the field and checked when a config is made.

    @dataclasses.dataclass(frozen=True)
    class TrainConfig:
        batch: Annotated[int, at_least(1)] = 8
        dtype: Annotated[str, one_of(DTYPES)] = "float32"
        frozen: tuple[str, ...] = ()

        def __post_init__(self):
            check_fields(self, "train")

Every value must have the type of its field, numbers must be finite, and integers have at most 63 bits. All configs of
the pipeline and of radfm_jax use this module. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from input_pipeline.files import nearest

MAX_SIZE = 2**31 - 1  # sizes are int32 in XLA


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on a value, and how an error describes it: "must be {text}"."""

    text: str
    is_met: Callable[[Any], bool]
    choices: tuple[str, ...] = ()  # known names; an error suggests the nearest


def at_least(minimum: float) -> Rule:
    return Rule(f"at least {minimum}", lambda value: value >= minimum)


def above(bound: float) -> Rule:
    return Rule(f"above {bound}", lambda value: value > bound)


def at_most(maximum: float) -> Rule:
    return Rule(f"at most {maximum}", lambda value: value <= maximum)


def share(*, zero: bool, one: bool) -> Rule:
    """Return a rule for numbers between 0 and 1. `zero` and `one` decide whether the bounds are valid."""
    text = f"{'at least' if zero else 'above'} 0 and {'at most' if one else 'below'} 1"
    return Rule(text, lambda value: (0 < value < 1) or (zero and value == 0) or (one and value == 1))


def one_of(names: Collection) -> Rule:
    choices = tuple(map(str, names))
    return Rule(f"one of {', '.join(choices)}", lambda value: value in names, choices)


Size = Annotated[int, at_least(1), at_most(MAX_SIZE)]
Count = Annotated[int, at_least(0), at_most(MAX_SIZE)]


def check_fields(config: Any, group: str, conflicts: Iterable[str] = ()) -> None:
    """Check the fields of a config dataclass against their types and rules.

    Args:
      group: prefix of the field names in messages: `train`, `model.llama`; "" for none.
      conflicts: problems between fields. The iterable is consumed only if each single field is valid.
    Raises:
      ValueError: lists every problem: `model.llama.num_layers must be at least 1 (got -1)`.
    """
    raise_problems([*problems_of(config, group)] or conflicts)


def problems_of(config: Any, group: str) -> Iterator[str]:
    """Yield the problems of `check_fields`."""
    return value_problems(type(config), vars(config), group)


def value_problems(cls: type, values: Mapping, group: str) -> Iterator[str]:
    """Yield the problems of values for fields of a dataclass; other names do not matter."""
    for name, hint in _hints(cls).items():
        if name in values:
            yield from field_problems(values[name], hint, _path(group, name))


def raise_problems(problems: Iterable[str]) -> None:
    """Raise ValueError with all problems, if there are any."""
    if problems := list(problems):
        raise ValueError("; ".join(problems))


@contextlib.contextmanager
def errors_of(file: Any) -> Iterator[None]:
    """Put the name of a config file in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _path(group: str, name: str) -> str:
    return f"{group}.{name}" if group else name


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_problems(value: Any, hint: Any, name: str) -> Iterator[str]:
    """Yield each violation of a type hint and its rules by a value."""
    rules: tuple = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rules = typing.get_args(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not types.NoneType]
        if value is None and len(kinds) < len(arguments):
            return
        if len(kinds) == 1:
            yield from field_problems(value, kinds[0], name)
            return
        if all(any(field_problems(value, kind, name)) for kind in kinds):
            yield f"{name} must be {' or '.join(map(_type_name, kinds))} (got {shown(value)})"
        return
    if origin is typing.Literal:
        hint, origin, rules = type(arguments[0]), None, (one_of(arguments), *rules)
    if origin is tuple:
        yield from _tuple_problems(value, arguments, name)
    elif origin in (Mapping, dict) and isinstance(value, Mapping):
        for key, item in value.items():
            if not _has_type(key, arguments[0]):
                yield f"a name in {name} must be {_type_name(arguments[0])} (got {shown(key)})"
            yield from field_problems(item, arguments[1], f"{name}.{key}")
    elif not _has_type(value, origin or hint):
        yield f"{name} must be {_type_name(origin or hint)} (got {shown(value)})"
        return
    for rule in rules:
        if not rule.is_met(value):
            near = nearest(value, rule.choices) if rule.choices else ""
            yield f"{name} must be {rule.text} (got {shown(value)}){near}"


def _tuple_problems(value: Any, arguments: tuple, name: str) -> Iterator[str]:
    if not isinstance(value, tuple):
        yield f"{name} must be a list (got {shown(value)})"
        return
    if arguments[1:] != (...,) and len(value) != len(arguments):
        yield f"{name} must have {len(arguments)} values (got {shown(value)})"
        return
    kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
    for i, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        yield from field_problems(item, kind, f"{name}[{i}]")


def _has_type(value: Any, kind: type) -> bool:
    if kind is Any:
        return True
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max  # False for NaN, infinity and too large integers
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, os.PathLike if kind is Path else kind)


_NAMES = {
    int: "an integer", float: "a finite number", bool: "true or false", str: "a text", Mapping: "a mapping",
    dict: "a mapping", Path: "a path",
}  # fmt: skip


def _type_name(kind: type) -> str:
    return _NAMES.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def shown(value: Any) -> str:
    """Return a value for an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def from_mapping(cls: type, fields: Any, group: str) -> Any:
    """Make a config dataclass from a dict or ConfigDict, with nested dataclasses from nested ones. Lists become tuples.

    Args:
      group: prefix of the field names in messages.
    Raises:
      ValueError: lists all unknown fields with the nearest known one, or all invalid values.
    """
    fields = plain_mapping(fields, group)
    if unknown := list(_all_unknown(fields, cls, group)):
        raise ValueError(f"unknown fields: {', '.join(unknown)}")
    values = {}
    for name, value in fields.items():
        kind = _nested(_hints(cls)[name], value, _path(group, name))
        nested = kind is not None and value is not None and not dataclasses.is_dataclass(value)
        values[name] = from_mapping(kind, value, _path(group, name)) if nested else as_tuple(value)
    return cls(**values)


def _all_unknown(fields: Mapping, cls: type, group: str) -> Iterator[str]:
    """Yield `unknown_fields` of a dataclass and of its nested dataclasses."""
    if unknown := unknown_fields(fields, cls, _path(group, "")):
        yield unknown
    for name, hint in _hints(cls).items():
        if isinstance(fields.get(name), Mapping) and (kind := _nested(hint, fields[name], _path(group, name))):
            yield from _all_unknown(fields[name], kind, _path(group, name))


def plain_mapping(fields: Any, group: str) -> dict:
    """Return a dict or ConfigDict as a dict. Raises ValueError for anything else."""
    if hasattr(fields, "to_dict"):
        fields = fields.to_dict()
    if not isinstance(fields, Mapping):
        raise ValueError(f"{group} must be a mapping of fields (got {shown(fields)})")
    return dict(fields)


def as_tuple(value: Any) -> Any:
    """Convert a list to a tuple, because a frozen config needs hashable values. Return other values unchanged."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def unknown_fields(names: Iterable[str], cls: type, prefix: str = "") -> str:
    """Return the names that are not fields of a dataclass, each with the nearest field; "" if there are none."""
    known = [field.name for field in dataclasses.fields(cls)]
    return ", ".join(f"{prefix}{name}{nearest(name, known, prefix)}" for name in names if name not in known)


def _nested(hint: Any, value: Any, path: str) -> type | None:
    """Return the dataclass that a hint names, directly, as `X | None`, or as one of several that `value.kind` chooses.

    Several dataclasses have a field `kind` with different defaults; without a `kind` the first one is meant.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = tuple(kind for kind in kinds if dataclasses.is_dataclass(kind))
    if len(kinds) < 2 or dataclasses.is_dataclass(value):
        return kinds[0] if kinds else None
    by_name = {kind.kind: kind for kind in kinds}
    name = plain_mapping(value, path).get("kind", next(iter(by_name)))
    if not isinstance(name, str) or name not in by_name:
        raise ValueError(
            f"{path}.kind must be one of {', '.join(by_name)} (got {shown(name)}){nearest(str(name), by_name)}"
        )
    return by_name[name]
