"""Building blocks shared by the vision encoder, the perceiver and LLaMA.

Letters: B rows, T query tokens, U key tokens, H query heads, G key/value heads, M = H / G queries a key head,
K head width, E model width, F hidden width of an MLP.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# --- how a model computes ---------------------------------------------------------------------------------------------

# What the backward pass keeps of a transformer block, from most arithmetic and least memory to the reverse. The names
# are those the blocks give their intermediates with `checkpoint_name`.
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


def matmul_precision(dtype: str) -> jax.lax.Precision:
    """float32 means float32: TPUs and Ampere GPUs would otherwise multiply float32 operands in fewer bits."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def scan_blocks(block: type[nn.Module], length: int, remat: str):
    """A stack of `length` blocks as one scanned, rematerialised module: compile time does not grow with depth.

    The block is called as `block(config)(x, *broadcast) -> (x, None)`; parameters get a leading axis `layers`.
    Raises ValueError for an unknown remat policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat policy {remat!r} is unknown: choose one of {', '.join(REMAT_POLICIES)}")
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


# --- parameters -------------------------------------------------------------------------------------------------------


RESIDUAL = 0.5


class Dense(nn.DenseGeneral):
    """A linear map that also reads integer kernels: with a `scale` beside the kernel (checkpoints.int8), the outputs
    are multiplied by it; and `rows` in place of a kernel, one for each output: [outputs, inputs] (`product_with_rows`).
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if self.has_variable("params", "rows"):
            rows = self.get_variable("params", "rows").astype(self.dtype)
            x = inputs.astype(self.dtype).reshape(-1, rows.shape[1])
            outer = inputs.shape[: inputs.ndim - np.size(self.axis)]
            features = np.atleast_1d(self.features).tolist()
            out = product_with_rows(x, rows, precision=self.precision).reshape(*outer, *features)
        else:
            out = super().__call__(inputs)
        if not self.has_variable("params", "scale"):
            return out
        return out * self.get_variable("params", "scale").astype(out.dtype)


def dense(features, names, config, *, axis=-1, bias=False, gain=1.0, name=None) -> Dense:
    """A linear map whose kernel carries logical axis names (radfm_jax.runtime.sharding says where each one goes).

    A fresh kernel has the deviation gain / sqrt(fan in); half of it (`RESIDUAL`) where its outputs are added to the
    stream.
    """
    init = nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")
    return Dense(
        features=features,
        axis=axis,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        precision=matmul_precision(config.dtype),
        kernel_init=nn.with_logical_partitioning(init, names),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("bias",)),
        dot_general=matrix_product,
        name=name,
    )


def matrix_product(x: jax.Array, kernel: jax.Array, dimensions, **options) -> jax.Array:
    """`lax.dot_general` of the last axes of x with the first of a kernel, as one product of two matrices.

    The same numbers: but the kernel's gradient then sums over one axis, not over batch and time, for which XLA on a CPU
    would turn both operands first (up to eight times the time of the product).
    """
    (contracted, _), _ = dimensions
    outer, inner = x.shape[: -len(contracted)], kernel.shape[len(contracted) :]
    x, kernel = x.reshape(math.prod(outer), -1), kernel.reshape(-1, math.prod(inner))
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), **options).reshape(*outer, *inner)


FEW_ROWS = 32  # beyond, packing the weights is worth its time


def product_with_rows(x: jax.Array, rows: jax.Array, **options) -> jax.Array:
    """[T, K] x [N, K] -> [T, N], for decoding on CPUs.

    XLA's CPU library packs the right operand of a product anew each time: for a few x that takes longer than the
    product. With the weights on the left, 8 x take half the time. The barrier keeps XLA from exchanging the operands.
    """
    few = len(x) <= FEW_ROWS
    left, right = (rows, x) if few else (x, rows)
    out = jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), **options)
    return jax.lax.optimization_barrier(out).T if few else out


NORM_EPS = 1e-5  # PyTorch's


def layer_norm(config, name: str, axis_name: str = "embed") -> nn.LayerNorm:
    """PyTorch's LayerNorm: statistics in float32, the two-pass variance (E[x^2]-E[x]^2 loses digits)."""
    return nn.LayerNorm(
        epsilon=NORM_EPS,
        use_fast_variance=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (axis_name,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axis_name,)),
        name=name,
    )


def rms_norm(config, eps: float, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        name=name,
    )


class GeluMlp(nn.Module):
    """Linear -> exact (erf) GELU -> Linear. A tanh GELU moves RadFM's logits by 1e-3."""

    config: object
    hidden: int
    bias: bool
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        width = x.shape[-1]
        x = dense(self.hidden, ("embed", "mlp"), self.config, bias=self.bias, name="up")(x)
        x = nn.Dropout(self.dropout)(jax.nn.gelu(x, approximate=False), deterministic)
        x = dense(width, ("mlp", "embed"), self.config, bias=self.bias, gain=RESIDUAL, name="down")(x)
        return nn.Dropout(self.dropout)(x, deterministic)
