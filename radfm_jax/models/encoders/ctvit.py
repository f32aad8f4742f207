"""CT-ViT, the encoder of CT-CLIP (Hamamci et al., arXiv 2403.17834): attention within a slab, then across slabs.

Letters: B rows, R vision rows per row, V = B R, P patch tokens per vision row, G slabs of a vision row, N patch tokens
of a slab (H rows x W columns), D width, K heads, C head width.

A slab is `patch[2]` slices. All slabs have the same side, so a vision row is a sequence of whole slabs, and the slabs
of a scan are neighbours:

    vision row   | slab 1 of scan 1 | slab 2 of scan 1 | slab 1 of scan 2 | padding |
    segments       1                  1                  2                  0
    spatial        [V G, N] tokens attend to each other, with a learned bias of their distance in rows and columns
    temporal       [V N, G] tokens attend to those of the same scan at the same row and column

The networks of the paper are in transformer_maskgit/ctvit.py and attention.py of the released code. Three of its
properties are easy to miss, and are kept because the released weights need them: keys and values come from the input
before the norm; queries and keys have unit length, and scores are multiplied by 8; the convolution of the temporal
stack reads the axes in the order rows, columns, depth, so that it is causal along rows. (The released code folds the
axes of its tokens in another order than it unfolds them; for its 24 x 24 x 24 patches the result is this order.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from input_pipeline.field_rules import Count, Size, above, check_fields
from radfm_jax.models.encoders.base import FixedSideConfig, Stack
from radfm_jax.models.layers import (
    RESIDUAL,
    dense,
    layer_norm,
    matmul_precision,
    partitioned,
    scan_blocks,
)
from radfm_jax.models.vit3d import patch_voxels
from radfm_jax.runtime.sharding import constrain

# Fields of `data` for CT-CLIP: Hounsfield units from -1000 to 1000 in one channel. CT-CLIP also resamples to
# 0.75 x 0.75 x 1.5 mm and crops or pads; here a scan is resized.
DATA = {"intensity": "-1000,1000", "fit": "pad", "storage": "int16", "channels": 1}
SCORE_SCALE = 8.0  # of unit-length queries and keys


@dataclasses.dataclass(frozen=True)
class CTViTConfig(FixedSideConfig):
    """Sizes of CT-ViT; the defaults are those of CT-CLIP.

    `codebook` is the number of codes that features are rounded to; 0 leaves them continuous. Voxels in [0, 1] are
    normalised by `mean` and `std`. `depth` is the maximum number of slabs. `attention` is not used: no fused kernel has
    unit-length queries or a learned bias.
    """

    kind: Literal["ctvit"] = "ctvit"
    width: Size = 512
    spatial_layers: Size = 4
    temporal_layers: Size = 4
    num_heads: Size = 8
    head_dim: Size = 32
    mlp_width: Size = 1365
    image_size: Size = 480
    patch: tuple[Size, Size, Size] = (20, 20, 10)
    depth: Size = 24
    channels: Size = 1
    codebook: Count = 8192
    mean: float = 0.5
    std: Annotated[float, above(0)] = 0.5

    def __post_init__(self):
        check_fields(self, "model.vision", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        yield from self.side_problems()

    @property
    def tables(self) -> tuple[int, int, int]:
        return self.side, self.side, self.depth

    def patch_flops(self, channels: int | None = None) -> float:
        return super().patch_flops(channels) + 2 * self.width * self.codebook

    def stacks(self, patch_length: int) -> tuple[Stack, ...]:
        inner = self.num_heads * self.head_dim
        sizes = (self.width, self.num_heads, inner, 2 * self.mlp_width, self.mlp_width)
        return (
            Stack("spatial", self.spatial_layers, *sizes, self.slab, kernels=False),
            Stack("temporal", self.temporal_layers, *sizes, patch_length // self.slab, kernels=False),
        )


class PatchEmbedding(nn.Module):
    """Voxels of a patch -> LayerNorm, linear map, LayerNorm: float[B, R, P, D]."""

    config: CTViTConfig

    @nn.compact
    def __call__(self, planes, plane_index, patch_segments, scan_scale, scan_offset):
        c = self.config
        with jax.named_scope("patchify"):
            x = patch_voxels(planes, plane_index, patch_segments, scan_scale, scan_offset)
            x = constrain(einops.rearrange(x, "b r p d c h w -> b r p (c d h w)"), "batch", None, None, None)
        x = layer_norm(c, "patch_norm")((x - c.mean) / c.std)
        x = dense(c.width, ("patch", None), c, bias=True, name="projection")(x)
        return layer_norm(c, "norm")(x)


class PositionBias(nn.Module):
    """A learned bias of each head for every distance in rows and columns: float32[K, N, N].

    The network of three layers runs on the (2 H - 1) (2 W - 1) distances, not on the N x N pairs.
    """

    config: CTViTConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        c = dataclasses.replace(self.config, dtype="float32")
        distances = np.arange(-c.side + 1, c.side)
        logs = np.sign(distances) * np.log(np.abs(distances) + 1.0)
        x = jnp.asarray(np.stack(np.meshgrid(logs, logs, indexing="ij"), axis=-1), jnp.float32)
        for number in range(2):
            x = jax.nn.leaky_relu(dense(c.width, (None, "embed"), c, bias=True, name=f"hidden_{number}")(x), 0.1)
        bias = dense(c.num_heads, ("embed", None), c, bias=True, name="out")(x)
        rows, columns = np.divmod(np.arange(c.slab), c.side)
        index = tuple(axis[:, None] - axis[None, :] + c.side - 1 for axis in (rows, columns))
        return einops.rearrange(bias[index], "i j k -> k i j")


class PositionConvolution(nn.Module):
    """A depthwise 3 x 3 x 3 convolution over the slabs of a scan, which gives its tokens positions.

    `depth` and `rows` are the offsets of the kernel's entries along these axes: (-2, -1, 0) is causal.
    """

    config: CTViTConfig
    depth: tuple[int, int, int]
    rows: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """float[V, G, H, W, D], int32[V, G] -> float[V, G, H, W, D]. Outside of the scan everything is 0."""
        v, g, h, w, width = x.shape
        init = nn.initializers.variance_scaling(1 / 27, "fan_in", "truncated_normal", in_axis=(), out_axis=3)
        shape = (3, 3, 3, width)  # depth, rows, columns
        kernel = self.param("taps", partitioned(init, (None, None, None, "embed")), shape, self.config.param_dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("bias",)), (width,), self.config.param_dtype)
        kernel, out = kernel.astype(x.dtype), bias.astype(x.dtype)
        padding = ((-self.rows[0], self.rows[-1]), (1, 1))
        for taps, offset in zip(kernel, self.depth, strict=True):
            index = np.arange(g) + offset
            inside = (index >= 0) & (index < g)
            index = np.clip(index, 0, g - 1)
            same = inside & (segments[:, index] == segments)
            shifted = jnp.where(same[:, :, None, None, None], x[:, index], 0)
            out = out + jax.lax.conv_general_dilated(
                shifted.reshape(v * g, h, w, width), taps[:, :, None], (1, 1), padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=width,
                precision=matmul_precision(x.dtype),
            ).reshape(x.shape)  # fmt: skip
        return out


class CTViTBlock(nn.Module):
    """Convolution, attention within slabs (`spatial`) or across them, and a gated MLP."""

    config: CTViTConfig
    spatial: bool

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array, bias: jax.Array | None):
        """float[V, G, N, D], int32[V, G], bias float32[K, N, N] of the spatial stack."""
        c = self.config
        depth, rows = ((-2, -1, 0), (-1, 0, 1)) if self.spatial else ((-1, 0, 1), (-2, -1, 0))
        grid = x.reshape(*x.shape[:2], c.side, c.side, c.width)
        x = x + PositionConvolution(c, depth, rows, name="positions")(grid, segments).reshape(x.shape)
        fold = "v g n d -> (v g) n d" if self.spatial else "v g n d -> (v n) g d"
        unfold = " -> ".join(reversed(fold.split(" -> ")))
        allowed = None
        if not self.spatial:
            allowed = jnp.repeat(segments[:, None, :, None] == segments[:, None, None, :], c.slab, axis=0)
        h = self.attention(einops.rearrange(x, fold), bias, allowed)
        x = x + einops.rearrange(h, unfold, v=x.shape[0], n=c.slab)
        h = layer_norm(c, "mlp_norm")(x)
        h = dense((2, c.mlp_width), ("embed", None, "mlp"), c, name="gate_up")(h)
        h = jax.nn.gelu(h[..., 1, :], approximate=False) * h[..., 0, :]
        x = x + dense(c.width, ("mlp", "embed"), c, gain=RESIDUAL, name="down")(h)
        return constrain(x, "batch", None, None, None), None

    def attention(self, x: jax.Array, bias: jax.Array | None, allowed: jax.Array | None) -> jax.Array:
        """float[Z, T, D], bias float32[K, T, T] or None, allowed bool[Z, 1, T, T] or None -> float[Z, T, D]."""
        c = self.config
        heads = (c.num_heads, c.head_dim)
        q = dense(heads, ("embed", "heads", "head_dim"), c, name="query")(layer_norm(c, "norm", bias=False)(x))
        kv = dense((2, *heads), ("embed", None, "heads", "head_dim"), c, name="key_value")(x)
        q = checkpoint_name(self.unit(q, "query_scale"), "query")
        k = checkpoint_name(self.unit(kv[..., 0, :, :], "key_scale"), "key")
        v = checkpoint_name(kv[..., 1, :, :], "value")
        precision = matmul_precision(c.dtype)
        scores = SCORE_SCALE * jnp.einsum(
            "ztkc,zukc->zktu", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        scores = scores if bias is None else scores + bias
        scores = scores if allowed is None else jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(c.dtype)
        out = checkpoint_name(jnp.einsum("zktu,zukc->ztkc", weights, v, precision=precision), "attention")
        return dense(c.width, ("heads", "head_dim", "embed"), c, axis=(-2, -1), gain=RESIDUAL, name="out")(out)

    def unit(self, x: jax.Array, name: str) -> jax.Array:
        """Return vectors of unit length times a learned scale of each channel."""
        ones = partitioned(nn.initializers.ones, ("head_dim",))
        scale = self.param(name, ones, x.shape[-1:], self.config.param_dtype)
        return (unit_length(x) * scale.astype(jnp.float32)).astype(x.dtype)


def unit_length(x: jax.Array) -> jax.Array:
    """Divide vectors by their length, in float32; a vector of zeros stays one."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


class CTViT(nn.Module):
    """Packed patches -> features of each patch."""

    config: CTViTConfig

    @nn.compact
    def __call__(
        self, planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset, *, deterministic=True
    ) -> jax.Array:
        """Return float[B, R, P, D]; `radfm.py` describes the arguments. There is no dropout."""
        c = self.config
        x = nn.remat(PatchEmbedding, prevent_cse=False)(c, name="embedding")(
            planes, plane_index, patch_segments, scan_scale, scan_offset
        )
        b, r, p, width = shape = x.shape
        if p % c.slab:
            raise ValueError(
                f"data.patch_length {p} must be a multiple of {c.slab}, the patches of a slab of {c.image_size} x "
                f"{c.image_size} pixels"
            )
        x = x.reshape(b * r, p // c.slab, c.slab, width)
        segments = patch_segments.reshape(b * r, p)[:, :: c.slab]
        bias = PositionBias(c, name="bias")()
        x, _ = scan_blocks(CTViTBlock, c.spatial_layers, c.remat)(c, True, name="spatial")(x, segments, bias)
        x = layer_norm(c, "spatial_norm", bias=False)(x)
        x, _ = scan_blocks(CTViTBlock, c.temporal_layers, c.remat)(c, False, name="temporal")(x, segments, None)
        x = layer_norm(c, "temporal_norm", bias=False)(x)
        if c.codebook:
            init = partitioned(nn.initializers.normal(width**-0.5), (None, "embed"))
            x = nearest_codes(x, self.param("codebook", init, (c.codebook, width), c.param_dtype))
        return x.reshape(shape)


def nearest_codes(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """Return the code [V, D] of unit length that is nearest in direction to each feature float[..., D].

    Gradients pass as if the result were the feature.
    """
    codes = unit_length(codebook)
    scores = jnp.einsum("...d,vd->...v", unit_length(x), codes, precision=jax.lax.Precision.HIGHEST)
    return x + jax.lax.stop_gradient(codes[scores.argmax(axis=-1)].astype(x.dtype) - x)
