"""A checkpoint directory -> PyTorch weights. One tensor is in memory at a time."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import hf_folder, released_class, run_facts, table
from radfm_jax.convert.families import FAMILIES
from radfm_jax.convert.hub import table as hub_table
from radfm_jax.convert.report import NO_PROGRESS, Progress, Report
from radfm_jax.convert.tensor_files import TensorInfo, open_tensors, write_safetensors, write_torch_bin
from radfm_jax.models.radfm import RadFMConfig

TORCH_SUFFIXES = (".bin", ".pt", ".pth")


def to_torch(
    src,
    dst,
    *,
    part: str = "radfm",  # see above
    layout: str = "4.28",  # `4.28` adds the 41 buffers that the released code's strict load needs; or `plain`
    dtype: str | None = None,
    scores=None,  # output directory of `radfm_jax.evaluate`, for the model card of a folder
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Convert a checkpoint directory to PyTorch weights.

    `dst` is one file in torch's format if its name ends in .bin, else a folder of safetensors, config.json, tokenizer
    and model card. Next to x.bin, x.config.json has the sizes and the preparation of scans. Equal checkpoints give
    equal bytes.

    Args:
      part: what is written, and for which code: `radfm`, the model under the released names; `hub`, the model as a
        folder with its own code for transformers; `llama`, the language model as a folder for transformers.
    Raises:
      ValueError: `src` is damaged or has adapters, `dst` exists, the disk is too small, or transformers has no class
        for the language model or the vision encoder.
    """
    dst = Path(dst)
    if dst.suffix == ".safetensors" or (part != "radfm" and dst.suffix in TORCH_SUFFIXES):
        raise ValueError(f"{dst}: safetensors are written as a folder; use a name without {dst.suffix}")
    as_bin = dst.suffix in TORCH_SUFFIXES
    sidecar = dst.with_suffix(".config.json")
    for path in (dst, sidecar) if as_bin else (dst,):
        if path.exists():
            raise ValueError(f"{path} exists: choose another name or remove it first")
    progress.stage("verifying", None)
    description, config, reader, shapes = _open(src, part)
    override = np.dtype(checkpoint.DTYPES[dtype]) if dtype else None
    dtypes = tuple(sorted({(override or np.dtype(reader.dtypes[path])).name for path in shapes}))
    lines, card = list[str](), {"scores": run_facts.scores(scores) if scores else ""}
    hf = hf_folder.config_json(Path(src), part, config, description, dtypes[0], lines)
    tensors = table.by_tensor(_entries(part, config, hf))
    dtype_of = lambda parts: override or max((np.dtype(reader.dtypes[e.path]) for e in parts), key=_width)  # noqa: E731
    infos = {name: TensorInfo(table.tensor_shape(parts), dtype_of(parts)) for name, parts in tensors.items()}
    extras, ties = {}, {}

    def read(name: str) -> np.ndarray:
        if name in extras:
            return extras[name]()
        return _tensor(src, reader, tensors[ties.get(name, name)], name, infos[name].dtype)

    with contextlib.ExitStack() as resources:
        if part == "radfm":
            infos[table.EMBEDDING_ALIAS] = infos[table.EMBEDDING]
            ties[table.EMBEDDING_ALIAS] = table.EMBEDDING
            extra_infos, extras, notes = released_extras(Path(src), description, config, layout, resources)
            infos |= extra_infos
            needs = released_class.notes(config, layout)
            lines, card["notes"] = [*lines, *needs, *notes], "\n".join(f"- {need}" for need in needs)
        # safetensors cannot share one tensor between two names.
        size = sum(info.nbytes for name, info in infos.items() if not (as_bin and name in ties))
        report = Report(sum(map(math.prod, shapes.values())), size, dtypes, lines)
        checkpoint.require_space(dst, size + size // 50, f"writing {dst}")
        progress.stage("converting", size)
        if as_bin:
            dst.parent.mkdir(parents=True, exist_ok=True)
            with hf_folder.config_next_to(sidecar, hf):
                write_torch_bin(dst, infos, read, ties=ties, progress=progress.advance)
            return report
        with checkpoint.new_directory(dst, manifest=False) as folder:
            write_safetensors(folder, infos, read, max_shard_bytes=max_shard_bytes, progress=progress.advance)
            hf_folder.write_folder(folder, Path(src), part, config, hf, report, **card)
    return report


def _tensor(src, reader: checkpoint.StoredParams, parts: list[table.Entry], name: str, dtype: np.dtype) -> np.ndarray:
    """Return a tensor in the dtype of the export. Raises ValueError if it is not finite in it."""
    rows = []
    for entry in parts:
        value = entry.to_torch(reader.read(entry.path, entry.index))
        with np.errstate(over="ignore"):
            rows.append(value.astype(dtype, copy=False))
        if not np.isfinite(rows[-1]).all():
            raise ValueError(f"{src}: {entry.path} is not finite as {dtype} (tensor {name})")
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _entries(part: str, config: RadFMConfig, hf: dict) -> list[table.Entry]:
    if part == "hub":
        return hub_table.entries(config, fused=FAMILIES[hf["text_config"]["model_type"]].fused)
    return table.entries(config, part, fused=part == "llama" and FAMILIES[hf["model_type"]].fused)


def _width(dtype: np.dtype) -> int:
    return dtype.itemsize


def _open(src, part: str) -> tuple[dict, RadFMConfig, checkpoint.StoredParams, dict[str, tuple[int, ...]]]:
    """Return description, sizes, reader and parameter shapes of a verified checkpoint directory."""
    checkpoint.verify(src)
    description = checkpoint.read_description(src)
    if checkpoint.BASE in description:
        raise ValueError(f"{src} has adapters over a base: merge them first (python -m radfm_jax.convert merge)")
    if part != "llama":
        config = checkpoint.model_config(description, src)
    elif "llama" not in description["model"]:
        raise ValueError(f"{src} has only the part {description['part']!r}: there is no language model to write")
    else:
        config = RadFMConfig.from_dict({"llama": description["model"]["llama"]})
    reader = checkpoint.StoredParams(src)
    shapes = {k: v for k, v in reader.shapes.items() if part != "llama" or k.startswith("llama/")}
    checkpoint.check_shapes(table.param_shapes(config, part), shapes, src)
    return description, config, reader, shapes


def released_extras(
    src: Path, description: dict, config: RadFMConfig, layout: str, resources: contextlib.ExitStack
) -> tuple[dict[str, TensorInfo], dict[str, Callable[[], np.ndarray]], list[str]]:
    """Return infos, readers and notes of the released class's unused tensors and buffers, which are no parameters.

    Tensors that the checkpoint does not have are zeros; buffers that it does not have are computed.
    """
    path, notes = src / checkpoint.UNUSED, []
    if path.is_file():
        kept = resources.enter_context(open_tensors(path))
        infos = dict(kept.infos)
        readers = {name: functools.partial(kept.read, name) for name in infos}
    else:
        shapes = description.get("source", {}).get("unused") or table.unused_shapes(config)
        infos = {n: TensorInfo(tuple(shape), np.dtype(dtype)) for n, (shape, dtype) in shapes.items()}
        readers = {n: functools.partial(np.zeros, info.shape, info.dtype) for n, info in infos.items()}
        notes.append(
            f"{sum(not table.is_buffer(n) for n in infos)} tensors of modules that RadFM never uses are not in the "
            "checkpoint and were filled with zeros (from-torch --unused keep stores the originals)"
        )
    tokens = infos[table.POSITION_IDS].shape[1] if table.POSITION_IDS in infos else 512
    buffers = table.buffers(config, tokens) if layout == "4.28" else {}
    stored = {n for n in infos if table.is_buffer(n)} if path.is_file() else set()
    for name in [n for n in infos if table.is_buffer(n) and (n not in stored or n not in buffers)]:
        del infos[name], readers[name]
    for name in (n for n in buffers if n not in stored):
        infos[name] = TensorInfo(buffers[name].shape, buffers[name].dtype)
        readers[name] = functools.partial(buffers.__getitem__, name)
    return infos, readers, notes
