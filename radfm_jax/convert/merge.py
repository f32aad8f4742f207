"""A run with adapters or a base of its own -> an ordinary checkpoint, with W + scale * A B in place of W.

One layer of one linear map is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.convert import inherited
from radfm_jax.convert.report import NO_PROGRESS, Progress, Report
from radfm_jax.convert.weights import BLOCK_BYTES
from radfm_jax.inference import stored
from radfm_jax.models import decoder, lora, quantised, radfm
from radfm_jax.models.radfm import PARTS, RadFMConfig

QUANTISED = ("int8", "nf4")


def merge(src, dst, *, dtype: str = "float32", base=None, progress: Progress = NO_PROGRESS) -> Report:
    """Write the model of a run as one checkpoint without adapters or base.

    Its weights are those that the run computes with: a base that the run held in bfloat16, int8 or nf4 is converted to
    that type and back before the adapters are added.

    Args:
      src: the run, or one of its checkpoints.
      dtype: of all parameters of the new checkpoint: float32, bfloat16 or float16.
      base: checkpoint directory of the base, if it is not where it was during training.
    Raises:
      ValueError: `src` has no base, its base is missing or another one, `dtype` is a quantised type, or weights are not
        finite in `dtype`.
    """
    src, target = run_directory.select_checkpoint(src), _dtype(dtype)
    if Path(dst).exists():
        raise ValueError(f"{dst} exists: choose another name or remove it first")
    progress.stage("verifying", None)
    checkpoint.verify(src)
    description = checkpoint.read_description(src)
    if checkpoint.BASE not in description:
        raise ValueError(f"{src} has no adapters to merge: it is complete, trained without model.lora and model.base")
    params = checkpoint.StoredParams(src, base)
    checkpoint.verify(params.base)
    config = RadFMConfig.from_dict(description["model"])
    lora.check_rank(config.lora, params.shapes, src)
    boxed = _boxed(config, description["part"])
    whole = description["part"] in ("radfm", "llama")  # not some parts of a RadFM
    shapes = {path: (box.value.shape, target) for path, box in boxed.items() if whole or path in params.shapes}
    weights = {path: shape for path, shape in params.shapes.items() if not lora.is_adapter(path)}
    checkpoint.check_shapes({path: shape for path, (shape, _) in shapes.items()}, weights, src)
    checkpoint.require_space(dst, (size := checkpoint.bytes_of(shapes)) * 51 // 50, f"merging {src}")
    merging, lines = _Merging(src, params, config, quantised.hold(boxed, config.base), target), list[str]()
    fields = _fields(src, description, checkpoint.read_description(params.base), lines)
    model = {name: x for name, x in description["model"].items() if name in PARTS}
    progress.stage("merging", size)
    with checkpoint.new_directory(dst) as directory:
        stacked = {path for path in shapes if boxed[path].names[0] == "layers"}
        writer = checkpoint.ParamWriter(directory, shapes, stacked)
        for path in shapes:
            for index, value in merging.slices(path, is_stacked=path in stacked):
                writer.write(path, value, index)
                progress.advance(value.nbytes)
        inherited.copy_files(src, directory)
        inherited.copy_files(params.base, directory, checkpoint.EXTRA_FILES)
        checkpoint.write_description(directory, description["part"], model, **fields)
        progress.stage("hashing", None)
    lines[:0] = merging.lines()
    return Report(sum(math.prod(shape) for shape, _ in shapes.values()), size, (target.name,), lines)


def _boxed(config: RadFMConfig, part: str) -> dict[str, nn.Partitioned]:
    """Return {path: boxed shape} of a model without adapters."""
    if part == "llama":
        tree = {"llama": decoder.abstract_params(dataclasses.replace(config.llama, lora=None))}
    else:
        tree = radfm.abstract_params(dataclasses.replace(config, lora=None, base="float32"))
    return flatten_dict(tree, is_leaf=lambda _, x: isinstance(x, nn.Partitioned), sep="/")


def _fields(src: Path, description: dict, base: dict, lines: list[str]) -> dict[str, Any]:
    """Return the fields of radfm.json: where the weights come from, and the preparation of scans and texts."""
    merged = {"lora": description["model"].get("lora"), "base": description[checkpoint.BASE]["sha256"]}
    source = {"file": src.name, "merged": merged, **inherited.source_fields(description, base)}
    if origin := stored.origin_of(src):
        source[stored.ORIGIN] = origin
    return {"source": source, **inherited.preparation(src, description, lines)}


def _dtype(name: str) -> np.dtype:
    """Return the dtype of the merged weights. Raises ValueError for one that cannot hold an adapter."""
    if name in QUANTISED:
        raise ValueError(
            f"merging into {name} loses the adapters: what they add to a weight is smaller than a step of {name}. "
            f"Merge into bfloat16 or float32; radfm_jax.load(DST, weights={name!r}) then holds the result in {name}"
        )
    if name not in checkpoint.DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(checkpoint.DTYPES)}")
    return checkpoint.DTYPES[name]


class _Merging:
    """Reads the parameters of a run slice by slice, with the adapters added, and measures the rounding."""

    def __init__(self, src: Path, params: checkpoint.StoredParams, config: RadFMConfig, held: dict, dtype: np.dtype):
        self.src, self.params, self.dtype = src, params, dtype
        self.scale = config.lora.scale if config.lora else 0.0
        # dtypes in which the run has its frozen language model; what it learned is float32
        frozen = [path for path, origin in params.origins.items() if origin == params.base and path in held]
        is_held = lambda path: config.base != "float32" and path.startswith(quantised.PART)  # noqa: E731
        self.held = {path: np.dtype(held[path].value.dtype) for path in frozen if is_held(path)}
        self.merged: list[str] = []
        self.added = self.rounded = 0.0  # sums of squares: what the adapters add, and its error in `dtype`

    def slices(self, path: str, *, is_stacked: bool) -> Iterator[tuple[tuple, np.ndarray]]:
        """Yield (index, value) for every part of a parameter. Raises ValueError if a value is not finite."""
        adapter = {leaf: f"{path.removesuffix(lora.KERNEL)}/{leaf}" for leaf in (lora.A, lora.B)}
        has_adapter = path.endswith(lora.KERNEL) and adapter[lora.A] in self.params.shapes
        if has_adapter:
            self.merged.append(path.removesuffix(lora.KERNEL))
        for index in self._indices(path, is_stacked, whole=has_adapter):
            value = self._held(path, self.params.read(path, index))
            if has_adapter:
                a, b = (self.params.read(adapter[leaf], index) for leaf in (lora.A, lora.B))
                value = self._add(value, lora.change(a, b, self.scale))
            with np.errstate(over="ignore"):
                value = value.astype(self.dtype, copy=False)
            if not np.isfinite(value).all():
                raise ValueError(f"{self.src}: {path} is not finite as {self.dtype.name}")
            yield index, value

    def _indices(self, path: str, is_stacked: bool, whole: bool) -> Iterator[tuple]:
        """Yield a layer at a time, or blocks along an axis that the scales of quantised weights do not sum over."""
        shape = self.params.shapes[path]
        if is_stacked:
            yield from ((layer,) for layer in range(shape[0]))
        elif whole:
            yield ()
        else:
            axis = 1 if path == quantised.HEAD else 0
            step = max(1, BLOCK_BYTES * shape[axis] // (4 * math.prod(shape)))
            yield from (
                (slice(None),) * axis + (slice(i, min(i + step, shape[axis])),) for i in range(0, shape[axis], step)
            )

    def _held(self, path: str, value: np.ndarray) -> np.ndarray:
        """Return weights as the run has them: converted to the type of its base and back."""
        dtype = self.held.get(path, value.dtype)
        if not np.issubdtype(dtype, np.integer):
            return value.astype(dtype, copy=False)
        convert = quantised.to_int8 if dtype == np.int8 else quantised.to_nf4
        return quantised.dequantise(path, *convert(value, len(quantised.contraction_axes(path))))

    def _add(self, value: np.ndarray, change: np.ndarray) -> np.ndarray:
        total = value.astype(np.float32) + change
        if self.dtype != np.float32:
            self.added += float(np.vdot(change, change))
            error = total - total.astype(self.dtype).astype(np.float32)
            self.rounded += float(np.vdot(error, error))
        return total

    def lines(self) -> list[str]:
        lines = [f"merged the adapters of {', '.join(self.merged) or 'no linear map: the run trained none'}"]
        if self.added:
            share = math.sqrt(self.rounded / self.added)
            lines.append(
                f"rounding to {self.dtype.name} changes the merged weights by {share:.1%} of what the adapters add "
                "(root mean square); float32 does not"
            )
        return lines
