"""The language model's matrices in int8, with one scale per output: half the memory of bfloat16.

    kernel ~ int8 * scale,   scale = maximum of |kernel| over the inputs / 127

    llama/blocks/*/query/kernel  [layers, E, H, K]  ->  kernel int8[layers, E, H, K], scale float32[layers, H, K]
    llama/head                   [E, V]             ->  head int8[E, V], head_scale float32[V]

Only weights are quantised: a product has the dtype of the computation, and its outputs are multiplied by their scales
(`models.layers.Dense`). Embeddings, norms, image marks and the vision parts are unchanged, and so is a head that is
tied to the embedding. docs/benchmarks.md has the accuracy and speed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from radfm_jax.checkpoints import checkpoint
from radfm_jax.models.decoder import INPUT_AXES

MAX = 127
HEAD = "llama/head"


def scale_paths(paths) -> dict[str, str]:
    """Return {path: path of its scales} for those of `paths` that become int8."""
    blocks = {f"llama/blocks/{name}/kernel": f"llama/blocks/{name}/scale" for name in INPUT_AXES}
    return {path: scale for path, scale in {**blocks, HEAD: f"{HEAD}_scale"}.items() if path in paths}


def quantise(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (int8 of the kernel's shape, float32 scales).

    An output whose weights are all zero gets the scale 0.

    Args:
      inputs: number of leading axes that a product sums over; the scales have the shape of the other axes.
    Raises:
      ValueError: weights are not finite.
    """
    kernel = np.asarray(kernel, np.float32)
    largest = np.abs(kernel).max(axis=tuple(range(inputs)))
    if not np.isfinite(largest).all():
        raise ValueError("weights that are not finite cannot be quantised")
    scale = (largest / np.float32(MAX)).astype(np.float32)
    steps = kernel / np.where(scale > 0, scale, np.float32(1))
    return np.rint(steps, out=steps).astype(np.int8), scale


def quantise_params(params: dict) -> dict:
    """Return parameters with the language model's matrices in int8, on the same device."""
    leaves = checkpoint.flatten(params)
    for path, scale in scale_paths(leaves).items():
        value = np.asarray(leaves[path])
        leaves[path], leaves[scale] = map(jax.numpy.asarray, _quantise_stack(path, value.shape, value.__getitem__))
    return checkpoint.unflatten(leaves)


def restore_params(directory, abstract: dict, shardings: dict | None = None) -> dict:
    """Read parameters like `checkpoint.restore_params`, and quantise each layer of a matrix as it is read.

    Raises:
      ValueError: as `checkpoint.restore_params`, or a parameter has weights that are not finite.
    """
    leaves, reader = checkpoint.with_shardings(abstract, shardings), checkpoint.ParamReader(directory)
    checkpoint.check_shapes(leaves, reader.shapes, directory)
    quantised = scale_paths(leaves)
    unchanged = {path: leaf for path, leaf in leaves.items() if path not in quantised}
    params = checkpoint.read_arrays(Path(directory) / checkpoint.PARAMS, unchanged)
    for path, scale in quantised.items():
        leaf = leaves[path]
        try:
            arrays = _quantise_stack(path, leaf.shape, lambda index, path=path: reader.read(path, index))
        except ValueError as error:
            raise ValueError(f"{directory}: {path}: {error}") from None
        params[path], params[scale] = jax.device_put(arrays, (leaf.sharding, _scale_sharding(path, leaf)))
    return checkpoint.unflatten(params)


def _scale_sharding(path: str, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Return the sharding of a matrix's scales: that of its output axes."""
    if not isinstance(leaf.sharding, NamedSharding):
        return leaf.sharding
    axes = [*leaf.sharding.spec] + [None] * (len(leaf.shape) - len(leaf.sharding.spec))
    outputs = [axis for i, axis in enumerate(axes) if i not in _input_axes(path)]
    return NamedSharding(leaf.sharding.mesh, PartitionSpec(*outputs))


def _input_axes(path: str) -> range:
    """Return the contraction axes of a stored matrix."""
    return range(1) if path == HEAD else range(1, 1 + INPUT_AXES[path.split("/")[-2]])


def _quantise_stack(
    path: str, shape: tuple[int, ...], read: Callable[[tuple[int, ...]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 and scales of a stored matrix or stack of matrices; `read` returns the weights at an index."""
    inputs = _input_axes(path)
    if path == HEAD:
        return quantise(read(()), len(inputs))
    values = np.empty(shape, np.int8)
    scales = np.empty(tuple(n for axis, n in enumerate(shape) if axis not in inputs), np.float32)
    for layer in range(shape[0]):
        values[layer], scales[layer] = quantise(read((layer,)), len(inputs))
    return values, scales
