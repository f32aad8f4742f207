"""The 3D vision transformer: packed patches of scans of any depth -> patch tokens (paper, section 4.2).

Letters: B rows, R vision rows per row, P patch tokens per vision row, M planes per row, S scan slots per row,
D vision width. A patch is 32 x 32 pixels of 4 slices in 3 channels; a plane is one slice of one channel of one patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from input_pipeline.field_rules import Size, check_fields, share
from radfm_jax.models.attention import attention
from radfm_jax.models.encoders.base import EncoderConfig, Stack
from radfm_jax.models.layers import (
    NORM_EPS,
    RESIDUAL,
    GeluMlp,
    dense,
    layer_norm,
    matmul_precision,
    partitioned,
    scan_blocks,
)
from radfm_jax.runtime.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """Sizes of the vision encoder; the defaults are RadFM's.

    `tables` are the numbers of learned row, column and depth positions: scans may have up to 16 * 32 = 512 pixels per
    side and 128 * 4 = 512 slices.
    """

    kind: Literal["vit3d"] = "vit3d"
    width: Size = 768
    num_layers: Size = 12
    num_heads: Size = 8
    head_dim: Size = 64
    mlp_width: Size = 2048
    patch: tuple[Size, Size, Size] = (32, 32, 4)
    channels: Size = 3
    tables: tuple[Size, Size, Size] = (16, 16, 128)
    dropout: Annotated[float, share(zero=True, one=False)] = 0.1

    def __post_init__(self):
        check_fields(self, "model.vision", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if self.width % 3:
            yield (
                f"vision width {self.width} is not a multiple of 3: row, column and depth positions take a third each"
            )

    @property
    def data_fields(self) -> dict:
        return {"patch": self.patch, "position_tables": self.tables}

    def stacks(self, patch_length: int) -> tuple[Stack, ...]:
        inner = self.num_heads * self.head_dim
        sizes = (self.width, self.num_heads, inner, self.mlp_width, self.mlp_width)
        return (Stack("blocks", self.num_layers, *sizes, patch_length),)


class PatchEmbedding(nn.Module):
    """Planes to patches, LayerNorm, linear map, LayerNorm, plus position embedding.

    If `plane_index` has one channel, all channels are equal. The kernel is then summed over the channels, which gives
    the same result for a third of the arithmetic.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset):
        c = self.config
        with jax.named_scope("patchify"):
            x = patch_voxels(planes, plane_index, patch_segments, scan_scale, scan_offset)
            x = constrain(einops.rearrange(x, "b r p d c h w -> b r p (d c h w)"), "batch", None, None, None)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + NORM_EPS)
        x = layer_norm(c, "norm")(self.projection(x))
        return x + self.positions(patch_positions).astype(x.dtype)

    def projection(self, x: jax.Array) -> jax.Array:
        """Apply the first norm's scale and bias and the linear map: float32[..., voxels of a patch] -> [..., D].

        Parameters have the released voxel order (rows, columns, slices, channels), and patches have the order of their
        planes. The kernel is transposed, because it is smaller than the patches.
        """
        c = self.config
        h, w, d = c.patch
        # The fsdp mesh axis shards the kernel's long axis, which it always divides.
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
        """int32[..., 3] indices of the row, column and depth tables -> float32[..., D], concatenated."""
        c = self.config
        # Position embeddings have about the magnitude of the normalised projection that they are added to.
        init = partitioned(nn.initializers.normal(1.2), (None, "embed"))
        tables = [
            self.param(f"{axis}_positions", init, (size, c.width // 3), c.param_dtype)
            for axis, size in zip(("row", "column", "depth"), c.tables, strict=True)
        ]
        parts = [table[patch_positions[..., i]] for i, table in enumerate(tables)]
        return jnp.concatenate(parts, axis=-1).astype(jnp.float32)


def patch_voxels(planes, plane_index, patch_segments, scan_scale, scan_offset) -> jax.Array:
    """Return the voxels of all patches, float32[B, R, P, slices, channels, h, w]; those of padding patches are 0."""
    x = gather_rows(planes, plane_index).astype(jnp.float32)
    # Each scan has its own quantisation. Padding patches refer to plane 0 of another scan and are zeroed.
    slot = jnp.maximum(patch_segments - 1, 0)
    shape = (*slot.shape, 1, 1, 1, 1)
    x = x * gather_rows(scan_scale, slot).reshape(shape) + gather_rows(scan_offset, slot).reshape(shape)
    return jnp.where((patch_segments > 0).reshape(shape), x, 0.0)


class AffineParameters(nn.Module):
    """The parameters `first` and `bias` of a norm or linear map, without its computation."""

    config: ViTConfig
    first: str
    shape: tuple[int, ...]
    initialiser: Callable
    bias_axis: str
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        dtype = self.config.param_dtype
        first_init = partitioned(self.initialiser, ("patch", None)[: len(self.shape)])
        first = self.param(self.first, first_init, self.shape, dtype)
        bias = self.param("bias", partitioned(self.bias_init, (self.bias_axis,)), self.shape[-1:], dtype)
        return first, bias


def smooth_filters(config: ViTConfig, cells: int = 4) -> Callable:
    """Return an initialiser of the projection: filters drawn on a cells x cells grid, with equal values in all slices.

    The norm before the projection scales patches of pure noise to the same deviation as patches with content. Smooth
    filters keep the deviation of smooth patches near 1 and make noise small compared with the bias. With independent
    weights, noise patches would initially differ from each other as much as from patches with content.
    """

    def initialise(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
        h, w, d = config.patch
        coarse = jax.random.normal(key, (cells, cells, 1, config.channels, config.width)) * cells
        filters = jax.image.resize(coarse, (h, w, d, config.channels, config.width), "linear")
        return (filters / (h * w * d * config.channels**0.5)).reshape(shape).astype(dtype)

    return initialise


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP.

    Dropout is applied after projections and in the MLP, as in most ViTs, but not to attention weights: fused kernels
    do not support it.
    """

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
    """Packed patches -> patch tokens. There is no final norm: the perceiver normalises its inputs."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self, planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset, *, deterministic=True
    ) -> jax.Array:
        """Return float[B, R, P, D]; `radfm.py` describes the arguments."""
        c = self.config
        # Recomputing 12,288 values per patch from 12 planes is cheap; keeping them for the backward pass is not.
        x = nn.remat(PatchEmbedding, prevent_cse=False)(c, name="embedding")(
            planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset
        )
        b, r, p, width = x.shape
        x = nn.Dropout(c.dropout)(x.reshape(b * r, p, width), deterministic)
        blocks = scan_blocks(EncoderBlock, c.num_layers, c.remat)(c, deterministic, name="blocks")
        x, _ = blocks(x, patch_segments.reshape(b * r, p))
        return x.reshape(b, r, p, width)


def gather_rows(values: jax.Array, index: jax.Array) -> jax.Array:
    """Gather values[B, N, ...] at index[B, ...] within each row: [B, *index, ...].

    No row reads another one, so a row and its scans stay on one device.
    """
    return jax.vmap(lambda v, i: v[i])(values, index)
