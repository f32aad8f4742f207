"""Layers shared by the vision encoder, the perceiver and the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from radfm_jax.models.lora import A, B, LoraConfig, product
from radfm_jax.models.quantised import from_nf4

# What a transformer block saves for the backward pass, from least to most memory. The names are those that the blocks
# pass to `checkpoint_name`.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "projections": jax.checkpoint_policies.save_only_these_names("attention", "query", "key", "value"),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
    "none": None,
}


DTYPES = ("float32", "bfloat16", "float16")  # dtypes of parameters and of matrix products


def matmul_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """Return the precision that keeps float32 products exact; TPUs and Ampere GPUs use fewer bits by default."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def scan_blocks(block: type[nn.Module], length: int, remat: str, in_axes=nn.broadcast):
    """Return a stack of `length` blocks as one scanned, rematerialised module.

    Compile time does not grow with depth. The block is called as `block(config)(x, *arguments) -> (x, None)`; its
    parameters get a leading axis `layers`.

    Args:
      in_axes: one entry for all arguments or a tuple with one for each: `nn.broadcast`, or 0 for an array with one
        value per block.
    Raises:
      ValueError: an unknown remat policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat policy {remat!r} is unknown: choose one of {', '.join(REMAT_POLICIES)}")
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


RESIDUAL = 0.5  # gain of a fresh kernel whose outputs are added to the residual stream
NORM_EPS = 1e-5  # PyTorch's


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return cap * tanh(x / cap), which stays below `cap` and is almost x for small x; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


# (initialiser, logical axis names of its parameter) -> initialiser; runtime/sharding.py maps the names to mesh axes.
partitioned: Callable[..., Callable[..., Any]] = nn.with_logical_partitioning


class Dense(nn.DenseGeneral):
    """A linear map whose weights may be int8 or nf4 (quantised.py), plus its adapter if it has one (lora.py)."""

    lora: LoraConfig | None = None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not any(self.has_variable("params", name) for name in ("scale", "absmax", A)):
            return super().__call__(inputs)
        axes = tuple(np.atleast_1d(self.axis))
        kernel: jax.Array = self.get_variable("params", "kernel")
        if self.has_variable("params", "absmax"):
            absmax: jax.Array = self.get_variable("params", "absmax")
            kernel = from_nf4(kernel, absmax, len(axes) - 1, self.dtype or jnp.float32)
        inputs, kernel = (jnp.asarray(x, self.dtype) for x in (inputs, kernel))
        products = matrix_product(inputs, kernel, ((axes, axes), ((), ())), precision=self.precision)
        return self.finished(products, inputs)

    def finished(self, products: jax.Array, inputs: jax.Array) -> jax.Array:
        """Return products with the kernel times `scale`, plus the adapter's, plus `bias`: what there are parameters of.

        Args:
          products: [..., *outputs]; inputs: [..., *inputs].
        """
        scale: jax.Array | None = self.get_variable("params", "scale")
        bias: jax.Array | None = self.get_variable("params", "bias")
        a: jax.Array | None = self.get_variable("params", A)
        if scale is not None:
            products = products * scale.astype(products.dtype)
        if a is not None:
            if self.lora is None:
                raise ValueError(f"{self.name} has an adapter: set model.lora")
            b: jax.Array = self.get_variable("params", B)
            inputs = self._dropped(inputs.astype(products.dtype), self.lora.dropout)
            products = products + product(inputs, a, b, self.lora.scale, self.precision)
        return products if bias is None else products + bias.astype(products.dtype)

    def _dropped(self, x: jax.Array, rate: float) -> jax.Array:
        """Return x with dropout, if the caller passes random numbers for it."""
        if not rate or not self.has_rng("dropout"):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def dense(features, names, config, *, axis=-1, bias=False, gain=1.0, name=None) -> Dense:
    """Return a linear map whose kernel has logical axis names and starts with deviation gain / sqrt(fan in)."""
    bias_names = ("bias",) if isinstance(features, int) else names[-len(features) :]
    init = nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")
    return Dense(
        features=features,
        axis=axis,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        precision=matmul_precision(config.dtype),
        kernel_init=partitioned(init, names),
        bias_init=partitioned(nn.initializers.zeros, bias_names),
        dot_general=matrix_product,
        lora=config.lora,
        name=name,
    )


def matrix_product(x: jax.Array, kernel: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `lax.dot_general` of the last axes of x with the first axes of a kernel as one 2D product.

    The kernel's gradient then sums over one axis. With separate batch and time axes, XLA on a CPU transposes both
    operands first, which takes up to eight times as long as the product.
    """
    (contracted, _), _ = dimensions
    outer, inner = x.shape[: -len(contracted)], kernel.shape[len(contracted) :]
    x, kernel = x.reshape(math.prod(outer), -1), kernel.reshape(-1, math.prod(inner))
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), **options).reshape(*outer, *inner)


def layer_norm(config, name: str, eps: float = NORM_EPS, *, bias: bool = True) -> nn.LayerNorm:
    """Return PyTorch's LayerNorm: float32 statistics and two-pass variance (E[x^2] - E[x]^2 loses digits)."""
    zeros = partitioned(nn.initializers.zeros, ("embed",))
    return _norm(nn.LayerNorm, config, eps, name, use_fast_variance=False, use_bias=bias, bias_init=zeros)


def rms_norm(config, eps: float, name: str | None, *, unit_offset: bool = False) -> nn.Module:
    """Return an RMSNorm that multiplies by its scale, or by 1 + scale with `unit_offset`."""
    if unit_offset:
        return OffsetRMSNorm(eps, config.dtype, config.param_dtype, name=name)
    return _norm(nn.RMSNorm, config, eps, name)


class OffsetRMSNorm(nn.Module):
    """RMSNorm times 1 + scale, in float32: a bfloat16 sum would lose the low bits of a small scale."""

    epsilon: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.zeros, ("embed",))
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * (1 + scale.astype(jnp.float32))).astype(self.dtype)


def _norm(kind, config, eps: float, name: str | None, **options):
    ones = partitioned(nn.initializers.ones, ("embed",))
    return kind(epsilon=eps, dtype=config.dtype, param_dtype=config.param_dtype, scale_init=ones, name=name, **options)


class GeluMlp(nn.Module):
    """Linear, GELU, linear. RadFM's GELU is exact (erf): the tanh approximation changes its logits by 1e-3."""

    config: object
    hidden: int
    bias: bool
    dropout: float = 0.0
    tanh: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        width = x.shape[-1]
        x = dense(self.hidden, ("embed", "mlp"), self.config, bias=self.bias, name="up")(x)
        x = nn.Dropout(self.dropout)(jax.nn.gelu(x, approximate=self.tanh), deterministic)
        x = dense(width, ("mlp", "embed"), self.config, bias=self.bias, gain=RESIDUAL, name="down")(x)
        return nn.Dropout(self.dropout)(x, deterministic)
