"""The language model's matrices in int8, with one scale for each of their outputs: half the memory of bfloat16.

    kernel ~ int8 * scale,   scale = the largest of |kernel| over the inputs / 127

    llama/blocks/*/query/kernel  [layers, E, H, K]  ->  kernel int8[layers, E, H, K], scale float32[layers, H, K]
    llama/head                   [E, V]             ->  head int8[E, V], head_scale float32[V]

Only weights: a product is of the computation's dtype, and its outputs are multiplied by their scales
(`models.layers.Dense`). Embeddings, norms, marks and the vision parts stay as they are; so does a head that is the
embedding. docs/benchmarks.md has what it costs in accuracy and gains in speed.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from radfm_jax.checkpoints import checkpoint
from radfm_jax.models.decoder import INPUTS

MOST = 127
HEAD = "llama/head"


def matrices(paths) -> dict[str, str]:
    """Those of `paths` that become int8 -> the path of their scales."""
    blocks = {f"llama/blocks/{name}/kernel": f"llama/blocks/{name}/scale" for name in INPUTS}
    return {path: scale for path, scale in {**blocks, HEAD: f"{HEAD}_scale"}.items() if path in paths}


def quantise(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A float kernel whose first `inputs` axes are summed over -> int8 of its shape, float32 of the other axes.

    An output whose weights are all zero gets the scale 0. Raises ValueError for weights that are not finite.
    """
    kernel = np.asarray(kernel, np.float32)
    largest = np.abs(kernel).max(axis=tuple(range(inputs)))
    if not np.isfinite(largest).all():
        raise ValueError("weights that are not finite cannot become int8")
    scale = (largest / np.float32(MOST)).astype(np.float32)
    steps = kernel / np.where(scale > 0, scale, np.float32(1))
    return np.rint(steps, out=steps).astype(np.int8), scale


def quantised(params: dict) -> dict:
    """Parameters with the language model's matrices in int8; arrays of the device they lie on."""
    leaves = checkpoint.flatten(params)
    for path, scale in matrices(leaves).items():
        value = np.asarray(leaves[path])
        leaves[path], leaves[scale] = map(jax.numpy.asarray, _stack(path, value.shape, lambda i, v=value: v[i]))
    return checkpoint.unflatten(leaves)


def restore_params(directory, abstract: dict, shardings: dict | None = None) -> dict:
    """`checkpoint.restore_params`, quantised: matrix by matrix, so that none of them exists whole in float.

    Raises:
      ValueError: as there; weights that are not finite, by their name.
    """
    wanted, reader = checkpoint.flatten(abstract), checkpoint.ParamReader(directory)
    checkpoint.check_shapes({k: v.shape for k, v in wanted.items()}, reader.shapes, directory)
    where = {} if shardings is None else checkpoint.flatten(shardings)
    found = matrices(wanted)
    rest = [path for path in wanted if path not in found]
    pick = lambda tree: checkpoint.unflatten({path: tree[path] for path in rest})  # noqa: E731
    params = checkpoint.flatten(
        checkpoint.restore_params(directory, pick(wanted), pick(where) if where else None, partial=True)
    )
    for path, scale in found.items():
        try:
            values, scales = _stack(path, wanted[path].shape, lambda i, p=path: reader.read(p, i))
        except ValueError as error:
            raise ValueError(f"{directory}: {path}: {error}") from None
        if where:
            axes = [*where[path].spec] + [None] * (values.ndim - len(where[path].spec))
            summed = _summed(path)
            of_scale = NamedSharding(
                where[path].mesh, PartitionSpec(*(a for i, a in enumerate(axes) if i not in summed))
            )
            params[path], params[scale] = jax.device_put((values, scales), (where[path], of_scale))
        else:
            params[path], params[scale] = jax.device_put((values, scales), jax.devices()[0])
    return checkpoint.unflatten(params)


def _summed(path: str) -> range:
    """Axes of the stored matrix that a product sums over."""
    return range(1) if path == HEAD else range(1, 1 + INPUTS[path.split("/")[-2]])


def _stack(path: str, shape: tuple[int, ...], read) -> tuple[np.ndarray, np.ndarray]:
    """A stored matrix, or a stack of them: int8 of its shape, and its scales. read: index -> floats."""
    summed = _summed(path)
    if path == HEAD:
        return quantise(read(()), len(summed))
    values = np.empty(shape, np.int8)
    scales = np.empty(tuple(n for axis, n in enumerate(shape) if axis not in summed), np.float32)
    for layer in range(shape[0]):
        values[layer], scales[layer] = quantise(read((layer,)), len(summed))
    return values, scales
