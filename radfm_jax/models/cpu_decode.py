"""Decoding on one CPU, two to three times as fast as `decoder` with the stacked layers.

XLA on a CPU copies a layer's slice of a stack before it multiplies it. So here the parameters of the blocks and the
cache are lists of layers, and weight matrices are stored by output and multiplied on the left (`product_with_rows`).
`inference/decoding.py` chooses between this module and `decoder` by `is_split`.

Letters: B rows, E width, G key/value heads, K head width, V vocabulary, N outputs and X inputs of a linear map.
"""

from __future__ import annotations

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from radfm_jax.models.decoder import DecoderConfig, KVCache
from radfm_jax.models.layers import Dense, matmul_precision, soft_cap
from radfm_jax.models.quantised import INPUT_AXES

MAX_BYTES = 8 * 2**30  # split parameters take twice their memory
MAX_LEFT_ROWS = 32  # with more rows, XLA's repacking of the weights is faster


def is_split(params: dict) -> bool:
    """Whether a decoder's parameters come from `split_params`."""
    return isinstance(params["blocks"], list)


def is_worthwhile(params: dict) -> bool:
    """Whether splitting a decoder's parameters is worthwhile: on CPUs, if the copy takes less than MAX_BYTES.

    nf4 weights are not split: they are packed along the inputs.
    """
    leaves = jax.tree.leaves(params)
    is_packed = any(x.dtype == np.uint8 for x in leaves)
    return jax.default_backend() == "cpu" and not is_packed and sum(x.nbytes for x in leaves) < MAX_BYTES


def split_params(config: DecoderConfig, params: dict) -> dict:
    """Return a decoder's parameters with `blocks` as a list of layers, and kernels as `rows` [N, X]."""
    head = params["embedding"] if config.tied_head else params["head"].T
    return params | {"blocks": _split_blocks(params["blocks"]), "head_rows": head}


@jax.jit
def _split_blocks(blocks: dict) -> list[dict]:
    def module(layer: int, name: str, params: dict) -> dict:
        params = {leaf: x[layer] for leaf, x in params.items()}
        if name in INPUT_AXES:
            kernel = params.pop("kernel")
            params["rows"] = kernel.reshape(math.prod(kernel.shape[: INPUT_AXES[name]]), -1).T
        return params

    layers = len(jax.tree.leaves(blocks)[0])
    return [{name: module(i, name, params) for name, params in blocks.items()} for i in range(layers)]


class SplitCache(KVCache):
    """A KVCache whose `key` and `value` are lists with one array [B G, length, K] per layer.

    With separate axes for B and G, XLA on a CPU writes the cache of a one-row batch twice and copies it first.
    """

    batch: int = flax.struct.field(pytree_node=False)

    @property
    def length(self) -> int:
        return self.key[0].shape[1]

    def write(self, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array | None) -> SplitCache:
        def put(caches, new):
            cache = caches[layer]
            new = jnp.moveaxis(new.astype(cache.dtype), 1, 2).reshape(len(cache), -1, cache.shape[2])
            if positions is None:
                cache = jax.lax.dynamic_update_slice(cache, new, (0, 0, 0))
            else:
                indices = jnp.arange(len(cache)), jnp.repeat(positions, len(cache) // self.batch)
                cache = cache.at[indices].set(new[:, 0], mode="drop", unique_indices=True)
            return [*caches[:layer], cache, *caches[layer + 1 :]]

        return self.replace(key=put(self.key, k), value=put(self.value, v))

    def read(self, layer: int) -> tuple[jax.Array, jax.Array]:
        key, value = (x[layer].reshape(self.batch, -1, *x[layer].shape[1:]) for x in (self.key, self.value))
        return key, value

    def apply_blocks(self, block, blocks, x):
        cache = self
        with nn.intercept_methods(multiply_rows):
            for layer, params in enumerate(blocks):
                x, cache = block(params, x, cache, layer)
        return x, cache


def empty_cache(config: DecoderConfig, batch: int, length: int) -> SplitCache:
    """Return a cache of zeros for `batch` rows of up to `length` tokens."""
    zeros = jnp.zeros((batch * config.num_kv_heads, length, config.head_dim), config.dtype)
    return SplitCache([zeros] * config.num_layers, [zeros] * config.num_layers, batch)


def next_logits(config: DecoderConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """float[B, E] after the final norm -> float32[B, V]."""
    hidden, rows = (x.astype(config.dtype) for x in (hidden, params["head_rows"]))
    precision = matmul_precision(config.dtype)
    logits = product_with_rows(hidden, rows, precision=precision, preferred_element_type=jnp.float32)
    return soft_cap(logits * params["head_scale"] if "head_scale" in params else logits, config.logit_softcap)


def product_with_rows(x: jax.Array, rows: jax.Array, **options) -> jax.Array:
    """[B, X] x [N, X] -> [B, N].

    XLA's CPU library repacks the right operand of every product, which for a few rows takes longer than the product.
    With the weights on the left, 8 rows take half the time. The barrier keeps XLA from swapping the operands back.
    """
    few = len(x) <= MAX_LEFT_ROWS
    left, right = (rows, x) if few else (x, rows)
    out = jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), **options)
    return jax.lax.optimization_barrier(out).T if few else out


def multiply_rows(call, args, options, context):
    """Flax method interceptor: multiply by a linear map's `rows` instead of its kernel."""
    layer = context.module
    if context.method_name != "__call__" or not isinstance(layer, Dense) or not layer.has_variable("params", "rows"):
        return call(*args, **options)
    (inputs,) = args
    rows = layer.get_variable("params", "rows").astype(layer.dtype)
    outer = inputs.shape[: inputs.ndim - np.size(layer.axis)]
    x = inputs.astype(layer.dtype).reshape(-1, rows.shape[1])
    out = product_with_rows(x, rows, precision=layer.precision)
    return layer.finished(out.reshape(*outer, *np.atleast_1d(layer.features).tolist()), inputs)
