"""RoPE in config.json: base, scaling and the rotated share of a head, in the old and the new spelling.

Old: `rope_theta`, `rope_scaling` and `partial_rotary_factor` at the top level. New (transformers 5): one mapping
`rope_parameters`, which Gemma 3 has once per type of layer. All versions read the old spelling, so it is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from input_pipeline.field_rules import Size, above, as_tuple, at_least, field_problems, raise_problems, share
from input_pipeline.files import nearest
from radfm_jax.convert.families.group import Fields, Group, Values
from radfm_jax.models.decoder import DecoderConfig, RopeScaling

CONTEXT, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
SCALED = ("linear", "llama3", "yarn")
Theta = Annotated[float, above(1)]
Share = Annotated[float, share(zero=False, one=True)]
Number = Annotated[float, above(0)] | None
Record = Mapping[str, Any] | None
# Keys of rope_scaling or rope_parameters: types, and for each kind the fields of RopeScaling.
TYPES: dict[str, Any] = {
    "rope_type": str, "type": str, "rope_theta": Theta, "partial_rotary_factor": Share,
    "factor": Annotated[float, at_least(1)] | None, ORIGINAL: Size,
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), Number),
    **dict.fromkeys(("mscale", "mscale_all_dim"), Number), "truncate": bool,
    **dict.fromkeys(("short_factor", "long_factor"), tuple[Annotated[float, above(0)], ...]),
}  # fmt: skip
ALL_KINDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        ORIGINAL: "original_context",
    },
    "yarn": {
        "factor": "factor", ORIGINAL: "original_context", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
        "attention_factor": "attention_factor", "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor", ORIGINAL: "original_context", "attention_factor": "attention_factor",
        "short_factor": "channel_factors",
    },
}  # fmt: skip
# Keys of a kind that are not fields: YaRN's other way to state attention_factor; LongRoPE's list for long contexts.
OTHERS = {"yarn": ("mscale", "mscale_all_dim"), "longrope": ("long_factor",)}


def flat_rope(context: int, theta: float = 10000.0) -> Group:
    """Return the group of families whose layers all rotate whole heads with one RoPE.

    Args:
      context: default of max_position_embeddings, the original context of YaRN if no other is stated.
      theta: default base.
    """
    keys = {
        "rope_theta": (theta, Theta), "rope_scaling": (None, Record), "rope_parameters": (None, Record),
        "partial_rotary_factor": (1.0, Share), CONTEXT: (context, Size),
    }  # fmt: skip

    def read(values: Values) -> Fields:
        base, scaling, rotary_share = _read(_record(values), values, SCALED)
        _check_whole(rotary_share)
        return {"rope_theta": base, "rope_scaling": scaling}

    return Group(keys, read, lambda config, source: _written(config, _record(source), source.get(CONTEXT) or context))


def phi_rope(context: int) -> Group:
    """Return the group of Phi: a share of each head may rotate, LongRoPE is the only scaling.

    LongRoPE has two lists of factors. The one for contexts up to the original context is read, since rows are short.
    """
    keys = dict(flat_rope(context).keys)
    keys[ORIGINAL] = (context, Size)

    def record_of(values: Values) -> dict[str, Any]:
        record = _record(values)
        if (kind := _kind(record)) in ("su", "yarn"):  # names of LongRoPE in older files
            record = {**record, "rope_type": "longrope", "type": "longrope"}
        # transformers prefers the original context at the top level
        return record if kind in (None, "default") else {**record, ORIGINAL: values.get(ORIGINAL, context)}

    def read(values: Values) -> Fields:
        base, scaling, rotary_share = _read(record_of(values), values, ("longrope",))
        return {"rope_theta": base, "rope_scaling": scaling, "rotary_share": rotary_share}

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        written = {
            "partial_rotary_factor": config.rotary_share,
            **_written(config, record_of(source), source.get(CONTEXT) or context),
        }
        if (scaling := config.rope_scaling) is not None:
            written[ORIGINAL] = scaling.original_context
            written["rope_scaling"].setdefault("long_factor", list(scaling.channel_factors))
        return written

    return Group(keys, read, write)


def gemma3_rope(context: int, theta: float = 1e6, local_theta: float = 1e4) -> Group:
    """Return the group of Gemma 3: sliding layers have an unscaled RoPE with a base of their own."""
    keys = {
        "rope_theta": (theta, Theta), "rope_local_base_freq": (local_theta, Theta), "rope_scaling": (None, Record),
        "rope_parameters": (None, Record), CONTEXT: (context, Size),
    }  # fmt: skip
    # transformers reads `truncate` of YaRN from another place for nested records.
    kinds = ("linear", "llama3")

    def full_record(values: Values) -> dict[str, Any]:
        nested = _as_record(values.get("rope_parameters"), "rope_parameters")
        full = _as_record(nested.get("full_attention"), "rope_parameters.full_attention")
        return full | _as_record(values.get("rope_scaling"), "rope_scaling")

    def read(values: Values) -> Fields:
        nested = _as_record(values["rope_parameters"], "rope_parameters")
        layer_types = ("full_attention", "sliding_attention")
        if unknown := [key for key in nested if key not in layer_types]:
            raise ValueError(f"rope_parameters has {', '.join(unknown)}: its keys must be {' and '.join(layer_types)}")
        sliding = _as_record(nested.get("sliding_attention"), "rope_parameters.sliding_attention")
        base, scaling, rotary_share = _read(full_record(values), values, kinds)
        local = {**values, "rope_theta": values["rope_local_base_freq"]}
        local_base, _, local_share = _read(sliding, local, ())
        _check_whole(min(rotary_share, local_share))
        is_same = scaling is None and local_base == base
        return {"rope_theta": base, "rope_scaling": scaling, "local_rope_theta": None if is_same else local_base}

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        written = _written(config, full_record(source), source.get(CONTEXT) or context)
        if config.sliding_layers:
            written["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
        return written

    return Group(keys, read, write)


def long_context(config: DecoderConfig, default: int) -> int:
    """Return a value for max_position_embeddings that fits the scaling, if no source states it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return default
    return int(scaling.original_context * scaling.factor)


# --- one record -------------------------------------------------------------------------------------------------------


def _as_record(value: Any, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping (got {value!r})")
    return {} if value is None else dict(value)


def _record(values: Values) -> dict[str, Any]:
    """Return rope_scaling or rope_parameters, whichever is set."""
    old, new = (_as_record(values.get(key), key) for key in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise ValueError("rope_scaling and rope_parameters differ: keep one of them")
    return old or new


def _kind(record: Mapping) -> Any:
    names = [record[key] for key in ("rope_type", "type") if record.get(key) is not None]
    if any(name != names[0] for name in names):
        raise ValueError(f"RoPE scaling has rope_type {record['rope_type']!r} and type {record['type']!r}: keep one")
    return names[0] if names else None


def _read(record: Mapping, values: Values, kinds: Collection[str]) -> tuple[float, RopeScaling | None, float]:
    """Return base, scaling and rotated share of a record; `values` has the keys at the top level."""
    kind = _kind(record) or "default"
    if kind not in ("default", *kinds):
        known = ", ".join(("default", *kinds))
        raise ValueError(f"RoPE scaling {kind!r} is not supported (known for this model type: {known})")
    known = (*ALL_KINDS, *FIELDS[kind], *OTHERS.get(kind, ()))
    if unknown := [f"{key}{nearest(key, known)}" for key in record if key not in known]:
        raise ValueError(f"RoPE scaling {kind!r} has unknown keys {', '.join(unknown)}")
    raise_problems(p for key, x in record.items() for p in field_problems(as_tuple(x), TYPES[key], f"RoPE's {key}"))
    base = float(record.get("rope_theta", values["rope_theta"]))
    rotary_share = float(record.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)))
    return base, None if kind == "default" else _scaling(kind, record, values[CONTEXT]), rotary_share


def _scaling(kind: str, record: Mapping, context: int) -> RopeScaling:
    """Return the scaling of a record. What it does not state has the value that transformers uses."""
    stated = {field: as_tuple(record[key]) for key, field in FIELDS[kind].items() if record.get(key) is not None}
    if "original_context" in FIELDS[kind].values():
        stated.setdefault("original_context", context)
    if kind in ("yarn", "longrope"):
        stated.setdefault("factor", context / stated["original_context"])
    optional = ("original_context", "attention_factor", "beta_fast", "beta_slow", "truncate")
    missing = [key for key, field in FIELDS[kind].items() if field not in stated and field not in optional]
    if kind == "longrope":
        missing += [key for key in OTHERS[kind] if key not in record]
    if missing:
        raise ValueError(f"RoPE scaling {kind!r} lacks {', '.join(missing)}")
    mscales = [record.get(key) for key in OTHERS["yarn"]]
    if kind == "yarn" and "attention_factor" not in stated and all(mscales):
        scales = [0.1 * mscale * math.log(stated["factor"]) + 1 for mscale in mscales]
        stated["attention_factor"] = scales[0] / scales[1]
    return RopeScaling(kind=kind, **stated)


def _written(config: DecoderConfig, record: Mapping, context: int) -> dict[str, Any]:
    """Return rope_theta and rope_scaling. The record of the source is kept if it states the same scaling.

    `context` is the source's max_position_embeddings.
    """
    scaling, written = config.rope_scaling, {"rope_theta": config.rope_theta, "rope_scaling": None}
    if scaling is None:
        return written
    if _kind(record) == scaling.kind and _scaling(scaling.kind, record, context) == scaling:
        stated = {key: x for key, x in record.items() if key not in ("rope_theta", "partial_rotary_factor")}
    else:
        stated = {key: getattr(scaling, field) for key, field in FIELDS[scaling.kind].items()}
        stated = {"rope_type": scaling.kind, **{key: x for key, x in stated.items() if x is not None}}
    values = {key: list(x) if isinstance(x, tuple) else x for key, x in stated.items()}
    return written | {"rope_scaling": values}


def _check_whole(rotary_share: float) -> None:
    if rotary_share != 1:
        raise ValueError(f"partial_rotary_factor {rotary_share:g} is not supported for this model type (1 is)")
