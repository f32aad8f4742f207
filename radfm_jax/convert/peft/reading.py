"""A folder of PEFT -> a checkpoint directory with adapters over one of our checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.files import read_json
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.convert import diagnosis, inherited
from radfm_jax.convert.peft import config as peft_config
from radfm_jax.convert.peft import tensors as peft_tensors
from radfm_jax.convert.report import NO_PROGRESS, Progress, Report
from radfm_jax.convert.tensor_files import open_tensors
from radfm_jax.inference import stored
from radfm_jax.models import lora, quantised
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.radfm import RadFMConfig

FILES = ("adapter_model.safetensors", "adapter_model.bin")
RECORD = "radfm_jax.json"  # what an export of ours has in addition: digest of the base, preparation, origin
ADAPTER = "adapter"  # key of `source` in radfm.json: the config that PEFT wrote


def from_peft(
    src,
    dst,
    *,
    base,  # checkpoint directory, or run, whose language model the adapters were trained on
    any_base: bool = False,  # accept a base with another digest than the folder records
    weights: str = "float32",  # how `load` holds the language model of `base`: one of quantised.BASES
    dtype: str | None = None,  # of the adapters; None keeps that of the file
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Convert a folder that `PeftModel.save_pretrained` wrote to a checkpoint with adapters over `base`.

    Raises ValueError, and writes nothing, for a config that is not supported, or with every tensor that does not fit
    the language model of `base`.
    """
    src, dst = Path(src), Path(dst)
    if dst.exists():
        raise ValueError(f"{dst} exists: choose another name or remove it first")
    if weights not in quantised.BASES:
        raise ValueError(f"weights {weights!r} is unknown: choose one of {', '.join(quantised.BASES)}")
    values = peft_config.read(src)
    base = run_directory.select_checkpoint(base)
    checkpoint.verify(base, hashes=False)  # `load` verifies the contents
    description, digest = checkpoint.read_description(base), checkpoint.digest(base)
    config = _language_model(description, base)
    record = _read_record(src)
    _check_digest(record, digest, src, base, any_base)
    progress.stage("converting", None)
    params, adapters = _matched(src, base, config, values, dtype)
    shapes = {path: (x.shape, x.dtype) for path, x in params.items()}
    source = {"file": src.name, ADAPTER: read_json(src / peft_config.FILE), **inherited.source_fields(description)}
    if isinstance(record.get(stored.ORIGIN), dict):
        source[stored.ORIGIN] = record[stored.ORIGIN]
    lines: list[str] = []
    if stored.KEY in record:
        preparation = {stored.KEY: stored.to_record(stored.from_record(record[stored.KEY], src / RECORD))}
    else:
        preparation = inherited.preparation(base, description, lines)
    with checkpoint.new_directory(dst) as directory:
        writer = checkpoint.ParamWriter(directory, shapes, set(shapes))
        for path, x in params.items():
            writer.write(path, x)
        inherited.copy_files(base, directory)
        model = {**description["model"], "lora": dataclasses.asdict(adapters), "base": weights}
        below = {checkpoint.BASE: {"directory": str(checkpoint.absolute(base)), "sha256": digest}}
        checkpoint.write_description(directory, description["part"], model, source=source, **preparation, **below)
    return _report(params, shapes, adapters, [_base_line(values, description), *lines])


def _language_model(description: dict, base: Path) -> RadFMConfig:
    """Return the sizes of the language model of a base, with those of RadFM for other parts."""
    if checkpoint.BASE in description:
        raise ValueError(f"{base} has adapters itself: pass its base, or merge it first (`convert merge`)")
    if "llama" not in description["model"]:
        raise ValueError(f"{base} has only the part {description['part']!r}: there is no language model to adapt")
    return RadFMConfig.from_dict({"llama": description["model"]["llama"]})


def _read_record(src: Path) -> dict:
    try:
        return read_json(src / RECORD, kind=dict)
    except FileNotFoundError:  # not an export of ours
        return {}


def _check_digest(record: dict, digest: str, src: Path, base: Path, any_base: bool) -> None:
    trained_on = record.get(checkpoint.BASE)
    if isinstance(trained_on, str) and trained_on != digest and not any_base:
        raise ValueError(
            f"{src} has adapters of a base with the digest {trained_on}, but {base} has {digest}: pass the base they "
            "were trained on. If both have the same weights, as after a conversion to another dtype, add --any-base"
        )


# --- tensors ----------------------------------------------------------------------------------------------------------


def _matched(
    src: Path, base: Path, config: RadFMConfig, values: dict[str, Any], dtype: str | None
) -> tuple[dict[str, np.ndarray], LoraConfig]:
    """Return {parameter path: adapter} of a folder, and their config. Raises ValueError that lists every mismatch."""
    tensors, file = _read_tensors(src)
    stacked: dict[str, int] = {}
    try:
        if peft_tensors.is_fused(tensors):
            tensors, stacked = peft_tensors.split(tensors, config, values["r"])
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
    maps = peft_tensors.linear_maps(config)
    layers = {peft_tensors.pattern_of(name.rpartition(".lora_")[0]) for name in tensors}
    targets = tuple(path for module, path in maps.items() if module in layers)
    if not targets:
        raise ValueError(f"{file} has no LoRA tensors of the language model ({', '.join(list(tensors)[:3])}, ...)")
    adapters = peft_config.lora_config(values, targets if len(targets) < len(maps) else ("llama/blocks/*",))
    _check_patterns(values, adapters, stacked, src)
    shapes = _shapes(targets, checkpoint.StoredParams(base).shapes, adapters.rank)
    entries = peft_tensors.entries(config, shapes)
    if problems := _mismatches(tensors, {e.name: e.torch_shape for e in entries}, config.llama.num_layers):
        fit = f"{file} does not fit the language model of {base} and r {adapters.rank}:"
        raise ValueError("\n  ".join([fit, *problems]))
    return _stacks(entries, shapes, tensors, dtype, file), adapters


def _shapes(targets: tuple[str, ...], stored: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of the adapters of some linear maps, from the shapes of their kernels."""
    shapes = {}
    for target in targets:
        kernel = stored[target + lora.KERNEL]
        inputs = quantised.contraction_axes(target + lora.KERNEL)
        shapes[f"{target}/{lora.A}"] = (*kernel[: inputs.stop], rank)
        shapes[f"{target}/{lora.B}"] = (*kernel[: inputs.start], rank, *kernel[inputs.stop :])
    return shapes


def _read_tensors(src: Path) -> tuple[dict[str, np.ndarray], Path]:
    """Return the tensors of a folder under the names of a language model, and their file."""
    file = next((src / name for name in FILES if (src / name).is_file()), None)
    if file is None:
        raise ValueError(f"{src} has no {' or '.join(FILES)}: pass the folder that PEFT's save_pretrained wrote")
    with open_tensors(file) as reader:
        original = {name: name.removeprefix(peft_tensors.PREFIX) for name in reader.infos}
        plain, others = diagnosis.plain_names(original.values())
        if others:
            raise ValueError(
                f"{file} has {len(others)} adapters of {', '.join(sorted({diagnosis.module_of(n) for n in others}))}: "
                "only those of the language model can be converted"
            )
        names = collections.Counter(plain[short] for short in original.values())
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"{file} has several tensors of {', '.join(twice[:3])}, with different prefixes")
        tensors = {plain[short]: reader.read(name) for name, short in original.items()}
    wrong = [f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype.name not in checkpoint.DTYPES]
    wrong += [f"{name} (not finite)" for name, x in tensors.items() if not wrong and not np.isfinite(x).all()]
    if wrong:
        raise ValueError(f"{file} has tensors that cannot be converted: {', '.join(wrong)}")
    return tensors, file


def _check_patterns(values: dict[str, Any], adapters: LoraConfig, stacked: dict[str, int], src: Path) -> None:
    """Raise ValueError unless ranks and alphas of single modules are those of stacked fused modules."""
    usual = {"rank_pattern": adapters.rank, "alpha_pattern": adapters.alpha}
    for key, expected in peft_config.patterns(adapters, stacked).items():
        # An entry with the value of all linear maps changes nothing.
        actual = {name: x for name, x in values[key].items() if name in expected or x != usual[key]}
        same = actual.keys() == expected.keys() and all(math.isclose(actual[k], expected[k]) for k in expected)
        if not same:
            raise ValueError(
                f"{src / peft_config.FILE}: {key} {actual} is not supported: all linear maps have the rank "
                f"{adapters.rank} and the alpha {adapters.alpha:g} (expected {key} {expected})"
            )


def _mismatches(tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]], num_layers: int) -> list[str]:
    """Return one line for each kind of difference between the tensors of a file and those of the base."""
    found: collections.Counter[str] = collections.Counter()
    for name in tensors.keys() | expected.keys():
        pattern = peft_tensors.pattern_of(name)
        if name not in expected:
            found[f"unexpected: {pattern} {tensors[name].shape}"] += 1
        elif name not in tensors:
            found[f"missing: {pattern} {expected[name]}"] += 1
        elif tensors[name].shape != expected[name]:
            found[f"{pattern} is {tensors[name].shape}, expected {expected[name]}"] += 1
    lines = [f"{line}, in {count} layers" if ".*." in line else line for line, count in sorted(found.items())]
    return [*lines, f"the base has {num_layers} layers"] if lines else []


def _stacks(entries, shapes, tensors, dtype: str | None, file: Path) -> dict[str, np.ndarray]:
    """Return {path: adapters of all layers}."""
    layers: dict[str, list[np.ndarray]] = {path: [] for path in shapes}
    for entry in entries:
        layers[entry.path].append(entry.to_ours(tensors[entry.name]))
    mixed = [path for path, xs in layers.items() if len({x.dtype for x in xs}) > 1]
    if mixed and dtype is None:
        raise ValueError(f"{file}: layers of {', '.join(mixed)} differ in dtype: pass --dtype")
    wanted = np.dtype(checkpoint.DTYPES[dtype]) if dtype else None
    with np.errstate(over="ignore"):  # an overflow is reported below
        params = {path: np.stack([x.astype(wanted or x.dtype) for x in xs]) for path, xs in layers.items()}
    if wrong := [path for path, x in params.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{file}: not finite as {dtype}: {', '.join(wrong)}")
    return params


# --- report -----------------------------------------------------------------------------------------------------------


def _base_line(values: dict[str, Any], description: dict) -> str:
    trained_on = values[peft_config.NAME] or "a base without a name"
    converted = description.get("source", {}).get("file")
    origin = f"was converted from {converted}" if converted else "was trained here"
    return f"the adapters were trained on {trained_on}; the base {origin}. Other weights would give wrong answers"


def _report(params, shapes, adapters: LoraConfig, lines: list[str]) -> Report:
    maps = ", ".join(dict.fromkeys(path.split("/")[-2] for path in params))
    first = f"rank {adapters.rank}, alpha {adapters.alpha:g}, adapters of {maps}"
    dtypes = tuple(sorted({x.dtype.name for x in params.values()}))
    return Report(sum(x.size for x in params.values()), checkpoint.bytes_of(shapes), dtypes, [first, *lines])
