"""The 3D vision transformer: packed patches of scans of any depth -> patch tokens (paper, section 4.2).

Letters: B rows, R vision rows a row, P patch tokens a vision row, M planes a row, S scan slots a row, D vision width.
A patch is 32 x 32 pixels of 4 slices in 3 channels; a plane is one slice of one channel of one patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from radfm_jax.models.attention import attention
from radfm_jax.models.layers import (
    NORM_EPS,
    RESIDUAL,
    GeluMlp,
    dense,
    layer_norm,
    matmul_precision,
    scan_blocks,
)
from radfm_jax.runtime.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of the vision encoder; the defaults are RadFM's. `tables` are the rows, columns and depths with a learned
    position: scans of up to 16 * 32 = 512 pixels a side and 128 * 4 = 512 slices."""

    width: int = 768
    num_layers: int = 12
    num_heads: int = 8
    head_dim: int = 64
    mlp_width: int = 2048
    patch: tuple[int, int, int] = (32, 32, 4)
    channels: int = 3
    tables: tuple[int, int, int] = (16, 16, 128)
    dropout: float = 0.1
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "full"
    attention: str = "auto"

    def __post_init__(self):
        if self.width % 3:
            raise ValueError(f"vision width {self.width} is not a multiple of 3: row, column and depth take a third")

    @property
    def patch_size(self) -> int:
        """Voxels of a patch, channels included: 12288."""
        h, w, d = self.patch
        return h * w * d * self.channels


class PatchEmbedding(nn.Module):
    """Planes -> patches -> LayerNorm -> Linear -> LayerNorm -> + position.

    With one channel in `plane_index` all channels are equal: mean and deviation of a patch are those of its one
    channel, and the kernel is summed over the channels instead of meeting the same numbers three times. It is the same
    function of the same parameters for a third of the arithmetic.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset):
        c = self.config
        with jax.named_scope("patchify"):
            x = gather_rows(planes, plane_index).astype(jnp.float32)  # [B, R, P, slices, channels, h, w]
            # Each scan has its own quantisation; padding patches show plane 0 of somebody else and are zeroed.
            slot = jnp.maximum(patch_segments - 1, 0)
            shape = (*slot.shape, 1, 1, 1, 1)
            x = x * gather_rows(scan_scale, slot).reshape(shape) + gather_rows(scan_offset, slot).reshape(shape)
            x = jnp.where((patch_segments > 0).reshape(shape), x, 0.0)
            x = constrain(einops.rearrange(x, "b r p d c h w -> b r p (d c h w)"), "batch", None, None, None)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + NORM_EPS)
        x = layer_norm(c, "norm")(self.projection(x))
        return x + self.positions(patch_positions).astype(x.dtype)

    def projection(self, x: jax.Array) -> jax.Array:
        """Scale and bias of the first norm, then the linear map: float32[..., voxels of a patch] -> [..., D].

        The parameters have the voxels in the released order (rows, columns, slices, channels), a patch in the order of
        its planes: it is the kernel that is turned, which is smaller than the patches.
        """
        c = self.config
        h, w, d = c.patch
        # One of the kernel's axes takes the fsdp mesh axis; the long one always divides.
        norm = AffineParameters(c, "scale", (c.patch_size,), nn.initializers.ones, "patch", name="patch_norm")
        linear = AffineParameters(c, "kernel", (c.patch_size, c.width), smooth_filters(c), "bias",
                                  bias_init=nn.initializers.normal(0.5), name="projection")  # fmt: skip
        (scale, shift), (kernel, bias) = norm(), linear()
        bias = bias + jnp.matmul(shift, kernel, precision=jax.lax.Precision.HIGHEST)
        channels = x.shape[-1] // (h * w * d)
        kernel = (scale[:, None] * kernel).reshape(h, w, d, channels, -1, c.width).sum(axis=4)
        kernel = einops.rearrange(kernel, "h w d c e -> (d c h w) e")
        x = jnp.matmul(x.astype(c.dtype), kernel.astype(c.dtype), precision=matmul_precision(c.dtype))
        return x + bias.astype(c.dtype)

    def positions(self, patch_positions: jax.Array) -> jax.Array:
        """int32[..., 3] entries of the row, column and depth tables -> float32[..., D], the three side by side."""
        c = self.config
        # About as large as what they are added to, which a norm has just scaled to 1.
        init = nn.with_logical_partitioning(nn.initializers.normal(1.2), (None, "embed"))
        tables = [
            self.param(f"{axis}_positions", init, (size, c.width // 3), c.param_dtype)
            for axis, size in zip(("row", "column", "depth"), c.tables, strict=True)
        ]
        parts = [table[patch_positions[..., i]] for i, table in enumerate(tables)]
        return jnp.concatenate(parts, axis=-1).astype(jnp.float32)


class AffineParameters(nn.Module):
    """The parameters of a norm or a linear map, `first` and `bias`, for whoever computes with them in another way."""

    config: ViTConfig
    first: str
    shape: tuple[int, ...]
    initialiser: Callable
    bias_axis: str
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        axes = ("patch", None)[: len(self.shape)]
        named = nn.with_logical_partitioning
        return (
            self.param(self.first, named(self.initialiser, axes), self.shape, self.config.param_dtype),
            self.param("bias", named(self.bias_init, (self.bias_axis,)), self.shape[-1:], self.config.param_dtype),
        )


def smooth_filters(config: ViTConfig, cells: int = 4) -> Callable:
    """An initialiser of the projection: every filter is drawn on a grid of cells x cells, all slices alike.

    A smooth patch keeps a deviation of about 1, and a patch of nothing but noise, which the norm before has blown up to
    the same deviation, almost vanishes beside the bias. Independent weights let such patches look as different from
    each other as from anything else, until that has been unlearned.
    """

    def initialise(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
        h, w, d = config.patch
        coarse = jax.random.normal(key, (cells, cells, 1, config.channels, config.width)) * cells
        filters = jax.image.resize(coarse, (h, w, d, config.channels, config.width), "linear")
        return (filters / (h * w * d * config.channels**0.5)).reshape(shape).astype(dtype)

    return initialise


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP. Dropout stands where it does in most ViTs (after projections and in the MLP), not on
    attention weights: fused kernels have none."""

    config: ViTConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array):
        c = self.config
        h = layer_norm(c, "attention_norm")(x)
        qkv = dense((3, c.num_heads, c.head_dim), ("embed", None, "heads", "head_dim"), c, name="qkv")(h)
        q, k, v = (checkpoint_name(qkv[..., i, :, :], n) for i, n in enumerate(("query", "key", "value")))
        h = checkpoint_name(attention(q, k, v, segments, segments, causal=False, kernel=c.attention), "attention")
        h = dense(c.width, ("heads", "head_dim", "embed"), c, axis=(-2, -1), bias=True, gain=RESIDUAL, name="out")(h)
        x = constrain(x + nn.Dropout(c.dropout)(h, self.deterministic), "batch", None, None)
        h = layer_norm(c, "mlp_norm")(x)
        h = GeluMlp(c, c.mlp_width, bias=True, dropout=c.dropout, name="mlp")(h, self.deterministic)
        return constrain(x + h, "batch", None, None), None


class ViT3D(nn.Module):
    """Packed patches -> patch tokens. There is no final norm; the perceiver normalises what it reads."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self, planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset, *, deterministic=True
    ) -> jax.Array:
        """See `radfm.py` for the batch; returns float[B, R, P, D]."""
        c = self.config
        # 12,288 numbers a patch are cheap to make again from 12 planes and dear to keep for the backward pass.
        x = nn.remat(PatchEmbedding, prevent_cse=False)(c, name="embedding")(
            planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset
        )
        b, r, p, width = x.shape
        x = nn.Dropout(c.dropout)(x.reshape(b * r, p, width), deterministic)
        blocks = scan_blocks(EncoderBlock, c.num_layers, c.remat)(c, deterministic, name="blocks")
        x, _ = blocks(x, patch_segments.reshape(b * r, p))
        return x.reshape(b, r, p, width)


def gather_rows(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[B, N, ...] taken at index[B, ...], row by row: [B, *index, ...]. Never looks into another row, so a row
    and its scans stay on one device."""
    return jax.vmap(lambda v, i: v[i])(values, index)
