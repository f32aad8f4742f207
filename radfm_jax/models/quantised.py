"""Frozen weights of the language model in bfloat16, int8 or nf4 (`model.base`).

    bfloat16   2 bytes a weight
    int8       1 byte: kernel ~ int8 * scale, one scale per output: maximum of |kernel| over the inputs / 127
    nf4        half a byte: kernel ~ CODES[uint4] * absmax, one absmax per 64 inputs of an output

    llama/blocks/query/kernel  [layers, E, H, K]  int8: kernel int8[layers, E, H, K], scale float32[layers, H, K]
                                                  nf4:  kernel uint8[layers, E / 2, H, K],
                                                        absmax float32[layers, E / 64, H, K]
    llama/head                 [E, V]             int8: head int8[E, V], head_scale float32[V]

int8 and nf4 hold the linear maps of the blocks; int8 also the head. All other weights of the language model are
bfloat16. nf4 is the data type of QLoRA (Dettmers et al., 2023, arXiv:2305.14314), whose 16 codes are quantiles of the
normal distribution. Its blocks run along the last input axis, and one byte holds the codes of inputs i (low bits) and
i + half a block (high bits). A block is shorter if 64 does not divide the axis.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from radfm_jax.models import lora
from radfm_jax.models.lora import KERNEL

BASES = ("float32", "bfloat16", "int8", "nf4")
PART, HEAD = "llama/", "llama/head"  # the parameters that `base` applies to
# Linear maps of a decoder block -> the number of input axes of their kernels, not counting the axis `layers`.
INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
MAX = 127
BLOCK = 64
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def is_matrix(path: str) -> bool:
    """Return whether a parameter is one of the matrices of the language model that can be quantised."""
    return path == HEAD or (path.startswith(f"{PART}blocks/") and path.endswith(KERNEL))


def contraction_axes(path: str) -> range:
    """Return the input axes of such a matrix, or stack of matrices."""
    return range(1) if path == HEAD else range(1, 1 + INPUT_AXES[path.split("/")[-2]])


def companion(path: str, dtype: jax.typing.DTypeLike) -> str | None:
    """Return the path of the scales of a weight with this dtype; None if it is not quantised."""
    name = {"int8": "scale", "uint8": "absmax"}.get(np.dtype(dtype).name)
    if name is None:
        return None
    return f"{HEAD}_{name}" if path == HEAD else f"{path.removesuffix(KERNEL)}/{name}"


def hold(boxed: dict[str, nn.Partitioned], base: str) -> dict[str, nn.Partitioned]:
    """Return {path: boxed shape} of parameters with the language model held in `base`; adapters stay as they are."""
    held: dict[str, nn.Partitioned] = {}
    for path, box in boxed.items():
        if base == "float32" or not path.startswith(PART) or lora.is_adapter(path):
            held[path] = box
            continue
        if not is_matrix(path) or base == "bfloat16" or (base == "nf4" and path == HEAD):
            held[path] = box.replace(value=jax.ShapeDtypeStruct(box.value.shape, jnp.bfloat16))
            continue
        inputs = contraction_axes(path)
        shape, names, axis = list(box.value.shape), list(box.names), inputs[-1]
        if base == "int8":
            outputs = [i for i in range(len(shape)) if i not in inputs]
            weights, scales = jax.ShapeDtypeStruct(shape, np.int8), [shape[i] for i in outputs]
            names = [names[i] for i in outputs]
        else:
            scales = [*shape[:axis], shape[axis] // block_size(shape[axis], path), *shape[axis + 1 :]]
            weights = jax.ShapeDtypeStruct((*shape[:axis], shape[axis] // 2, *shape[axis + 1 :]), np.uint8)
        held[path] = box.replace(value=weights)
        scale = box.replace(value=jax.ShapeDtypeStruct(scales, np.float32), names=tuple(names))
        held[str(companion(path, weights.dtype))] = scale
    return held


def block_size(inputs: int, name: str = "a kernel") -> int:
    """Return the number of inputs that share an absmax in nf4. Raises ValueError if they cannot be packed."""
    block = math.gcd(BLOCK, inputs)
    if block < 2:
        raise ValueError(f"{name} has {inputs} inputs along its last input axis: nf4 needs an even number")
    return block


# --- int8 -------------------------------------------------------------------------------------------------------------


def to_int8(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (int8 of the kernel's shape, float32 scales).

    An output whose weights are all zero gets the scale 0.

    Args:
      inputs: number of leading axes that a product sums over; the scales have the shape of the other axes.
    Raises:
      ValueError: weights are not finite.
    """
    kernel = np.asarray(kernel, np.float32)
    largest = np.abs(kernel).max(axis=tuple(range(inputs)))
    check_finite(largest)
    scale = (largest / np.float32(MAX)).astype(np.float32)
    steps = kernel / np.where(scale > 0, scale, np.float32(1))
    return np.rint(steps, out=steps).astype(np.int8), scale


def check_finite(largest: np.ndarray) -> None:
    if not np.isfinite(largest).all():
        raise ValueError("weights that are not finite cannot be quantised")


# --- nf4 --------------------------------------------------------------------------------------------------------------


def to_nf4(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint8, float32 absmax) of a kernel [*inputs, *outputs]; `from_nf4` inverts it.

    The result is the same on every machine. A block of zeros gets the absmax 0.

    Raises:
      ValueError: weights are not finite, or the last input axis is odd.
    """
    block = block_size(kernel.shape[inputs - 1])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        codes, absmax = map(np.asarray, _to_nf4(np.asarray(kernel, np.float32), inputs - 1, block))
    check_finite(absmax)
    return codes, absmax


@functools.partial(jax.jit, static_argnums=(1, 2))
def _to_nf4(kernel: jax.Array, axis: int, block: int) -> tuple[jax.Array, jax.Array]:
    blocks = _in_blocks(kernel, axis, block)
    absmax = jnp.abs(blocks).max(axis + 1, keepdims=True)
    # Bounds are products, which are rounded in the same way everywhere; quotients are not.
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for code, following in itertools.pairwise(CODES):
        codes += blocks > np.float32((code + following) / 2) * absmax
    low, high = jnp.split(codes, 2, axis + 1)
    packed = (low | high << 4).reshape(*kernel.shape[:axis], -1, *kernel.shape[axis + 1 :])
    return packed, absmax.squeeze(axis + 1)


def from_nf4(packed: jax.Array, absmax: jax.Array, axis: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the weights of `to_nf4` in a dtype; `axis` is the last input axis."""
    half = packed.shape[axis] // absmax.shape[axis]
    codes = _in_blocks(packed, axis, half)
    codes = jnp.concatenate([codes & 15, codes >> 4], axis + 1)
    values = _look_up(codes, CODES, jnp.expand_dims(absmax, axis + 1))
    return values.astype(dtype).reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])


def _in_blocks(x: jax.Array, axis: int, block: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def _look_up(codes: jax.Array, table: tuple[float, ...], factor: jax.Array) -> jax.Array:
    """Return table[codes] * factor in float32 by selections, which fuse with their users; a gather does not.

    The table is multiplied first: JAX would move selections between constants out of a scan over layers, and keep 16
    arrays of the size of a kernel.
    """
    if len(table) == 1:
        return jnp.float32(table[0]) * factor
    half = len(table) // 2
    return jnp.where(codes & half, _look_up(codes, table[half:], factor), _look_up(codes, table[:half], factor))


# --- stored weights ---------------------------------------------------------------------------------------------------


def source_shapes(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, tuple[int, ...]]:
    """Return {path: shape} of the weights that leaves hold, as an ordinary checkpoint has them: without scales."""
    quantised = quantised_shapes(leaves)
    scales = {companion(path, leaves[path].dtype) for path in quantised}
    return {path: quantised.get(path, tuple(x.shape)) for path, x in leaves.items() if path not in scales}


def quantised_shapes(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, tuple[int, ...]]:
    """Return {path: shape before quantisation} of the quantised ones of these leaves."""
    shapes = {}
    for path, leaf in leaves.items():
        if companion(path, leaf.dtype) in leaves:
            shapes[path] = tuple(leaf.shape)
            if np.dtype(leaf.dtype) == np.uint8:
                axis = contraction_axes(path)[-1]
                shapes[path] = (*leaf.shape[:axis], 2 * leaf.shape[axis], *leaf.shape[axis + 1 :])
    return shapes


def quantise(
    path: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[tuple[int, ...]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (int8 or uint8 by `dtype`, scales) of a stored matrix or stack of matrices, one layer at a time.

    Args:
      shape: that of the weights; read(index) returns the weights at an index.
    Raises:
      ValueError: weights are not finite, or cannot be packed.
    """
    convert = to_int8 if np.dtype(dtype) == np.int8 else to_nf4
    inputs = contraction_axes(path)
    if path == HEAD:
        return convert(read(()), len(inputs))
    first = convert(read((0,)), len(inputs))
    stacks = [np.empty((shape[0], *x.shape), x.dtype) for x in first]
    for layer in range(shape[0]):
        arrays = first if layer == 0 else convert(read((layer,)), len(inputs))
        for stack, array in zip(stacks, arrays, strict=True):
            stack[layer] = array
    return stacks[0], stacks[1]


def quantise_params(params: dict, base: str) -> dict:
    """Return parameters with the matrices of the language model in int8 or nf4; other weights keep their dtype."""
    leaves = flatten_dict(params, sep="/")
    for path, value in list(leaves.items()):
        if is_matrix(path) and not (base == "nf4" and path == HEAD):
            value, dtype = np.asarray(value), np.dtype(np.int8 if base == "int8" else np.uint8)
            leaves[path], leaves[str(companion(path, dtype))] = map(
                jnp.asarray, quantise(path, value.shape, dtype, value.__getitem__)
            )
    return unflatten_dict(leaves, sep="/")


def dequantise(path: str, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the float32 weights of one matrix (no axis `layers`), given the path of its stack."""
    inputs = len(contraction_axes(path))
    if weights.dtype == np.int8:
        return weights.astype(np.float32) * scales.astype(np.float32)
    return np.asarray(from_nf4(jnp.asarray(weights), jnp.asarray(scales), inputs - 1, np.float32))
