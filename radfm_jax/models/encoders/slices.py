"""A 2D vision transformer applied to each slice of a scan: SigLIP and DINOv2.

Letters: B rows, R vision rows per row, P patch tokens per vision row, N patch tokens of a slice, Z slices of all rows,
X class and register tokens, D width, H heads, K head width.

Every slice has the same side, so that a vision row is a sequence of whole slices:

    vision row      | slice 1 of scan 1 | slice 2 of scan 1 | scan 2, a 2D scan | padding |
    tokens            N                   N                   N                   N

Attention is a batched product over [Z, X + N]. Its cost grows with N, not with P, and slices cannot see each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from input_pipeline.field_rules import Size, above, check_fields
from radfm_jax.models.attention import attention
from radfm_jax.models.encoders.base import FixedSideConfig, Stack
from radfm_jax.models.layers import (
    RESIDUAL,
    GeluMlp,
    dense,
    layer_norm,
    matmul_precision,
    partitioned,
    scan_blocks,
)
from radfm_jax.models.vit3d import patch_voxels
from radfm_jax.runtime.sharding import constrain

DEPTH_DEVIATION = 0.1  # of fresh depth positions, next to features with a deviation of about 1


class SliceOptions(FixedSideConfig):
    """The differences between the encoders. A config sets them, or has fields of these names."""

    class_token: bool = False  # a class token with a position of its own
    registers: int = 0  # register tokens, which have no position
    qkv_bias: bool = True
    layer_scale: bool = False  # each channel of a branch is multiplied by a learned number
    mlp: str = "gelu_tanh"  # gelu, gelu_tanh or swiglu


@dataclasses.dataclass(frozen=True)
class SliceConfig(SliceOptions):
    """Sizes and options of a 2D encoder.

    `image_size` is the side of every scan in pixels. `depth_positions` is the number of learned positions of slices,
    which are added to the features. Voxels in [0, 1] are normalised by `mean` and `std` of each channel.
    """

    width: Size = 768
    num_layers: Size = 12
    num_heads: Size = 12
    mlp_width: Size = 3072
    image_size: Size = 224
    patch: tuple[Size, Size, Size] = (16, 16, 1)
    channels: Size = 3
    depth_positions: Size = 64
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[Annotated[float, above(0)], ...] = (0.5, 0.5, 0.5)
    norm_eps: Annotated[float, above(0)] = 1e-6

    def __post_init__(self):
        check_fields(self, "model.vision", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        yield from self.side_problems()
        if self.patch[2] != 1:
            yield f"model.vision.patch must have a depth of 1: the encoder reads slices (got {self.patch})"
        if self.width % self.num_heads:
            yield f"model.vision.width {self.width} must be a multiple of num_heads {self.num_heads}"
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                yield f"model.vision.{name} must have {self.channels} values, one per channel"

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def prefix(self) -> int:
        """X, the tokens in front of a slice's patches."""
        return self.class_token + self.registers

    @property
    def tables(self) -> tuple[int, int, int]:
        return self.side, self.side, self.depth_positions

    def stacks(self, patch_length: int) -> tuple[Stack, ...]:
        tokens = self.prefix + self.slab
        hidden = self.mlp_width * (2 if self.mlp == "swiglu" else 1)
        return (
            Stack("blocks", self.num_layers, self.width, self.num_heads, self.width, hidden, self.mlp_width, tokens,
                  tokens / self.slab),
        )  # fmt: skip


class PatchEmbedding(nn.Module):
    """Normalise the voxels of patches and apply a linear map: float[B, R, P, D].

    The kernel is divided by each channel's `std` instead of the voxels. If `plane_index` has one channel, all channels
    are equal, and the kernel is summed over them: a third of the arithmetic for the same result.
    """

    config: SliceConfig

    @nn.compact
    def __call__(self, planes, plane_index, patch_segments, scan_scale, scan_offset):
        c = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param(
            "kernel", partitioned(init, (None, None, None, "embed")), (c.channels, *c.patch[:2], c.width), c.param_dtype
        )
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("bias",)), (c.width,), c.param_dtype)
        with jax.named_scope("patchify"):
            x = patch_voxels(planes, plane_index, patch_segments, scan_scale, scan_offset)
            x = constrain(einops.rearrange(x, "b r p 1 c h w -> b r p (c h w)"), "batch", None, None, None)
        # Voxels are centered at the mean of all channels; what a channel differs from it goes into the bias.
        mean, std = jnp.asarray(c.mean, jnp.float32), jnp.asarray(c.std, jnp.float32)
        center = sum(c.mean) / c.channels
        kernel = kernel.astype(jnp.float32) / std[:, None, None, None]
        bias = bias + jnp.einsum("chwd,c->d", kernel, center - mean, precision=jax.lax.Precision.HIGHEST)
        if plane_index.shape[-1] == 1:
            kernel = kernel.sum(axis=0, keepdims=True)
        kernel = einops.rearrange(kernel, "c h w d -> (c h w) d")
        x = jnp.matmul((x - center).astype(c.dtype), kernel.astype(c.dtype), precision=matmul_precision(c.dtype))
        return x + bias.astype(c.dtype)


class SliceBlock(nn.Module):
    """Pre-norm attention and MLP on the tokens of each slice, [Z, X + N, D]."""

    config: SliceConfig

    @nn.compact
    def __call__(self, x: jax.Array):
        c = self.config
        heads = (c.num_heads, c.head_dim)
        h = layer_norm(c, "attention_norm", c.norm_eps)(x)
        q, k, v = (
            checkpoint_name(dense(heads, ("embed", "heads", "head_dim"), c, bias=c.qkv_bias, name=name)(h), name)
            for name in ("query", "key", "value")
        )
        one = jnp.zeros(x.shape[:2], jnp.int32)  # all tokens of a slice see each other
        h = checkpoint_name(attention(q, k, v, one, one, causal=False, kernel=c.attention), "attention")
        h = dense(c.width, ("heads", "head_dim", "embed"), c, axis=(-2, -1), bias=True, gain=RESIDUAL, name="out")(h)
        x = constrain(x + self.scaled(h, "attention_scale"), "batch", None, None)
        h = layer_norm(c, "mlp_norm", c.norm_eps)(x)
        if c.mlp == "swiglu":
            h = SwigluMlp(c, c.mlp_width, name="mlp")(h)
        else:
            h = GeluMlp(c, c.mlp_width, bias=True, tanh=c.mlp == "gelu_tanh", name="mlp")(h)
        return constrain(x + self.scaled(h, "mlp_scale"), "batch", None, None), None

    def scaled(self, x: jax.Array, name: str) -> jax.Array:
        c = self.config
        if not c.layer_scale:
            return x
        ones = partitioned(nn.initializers.ones, ("embed",))
        return x * self.param(name, ones, (c.width,), c.param_dtype).astype(x.dtype)


class SwigluMlp(nn.Module):
    """Linear to a gate and a value, SiLU of the gate times the value, linear; with biases (DINOv2 giant)."""

    config: SliceConfig
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up = dense((2, self.hidden), ("embed", None, "mlp"), self.config, bias=True, name="gate_up")(x)
        x = jax.nn.silu(up[..., 0, :]) * up[..., 1, :]
        return dense(self.config.width, ("mlp", "embed"), self.config, bias=True, gain=RESIDUAL, name="down")(x)


class SliceViT(nn.Module):
    """Packed patches -> features of the final norm plus depth positions."""

    config: SliceConfig

    @nn.compact
    def __call__(
        self, planes, plane_index, patch_segments, patch_positions, scan_scale, scan_offset, *, deterministic=True
    ) -> jax.Array:
        """Return float[B, R, P, D]; `radfm.py` describes the arguments. There is no dropout."""
        c = self.config
        x = nn.remat(PatchEmbedding, prevent_cse=False)(c, name="embedding")(
            planes, plane_index, patch_segments, scan_scale, scan_offset
        )
        shape = x.shape  # [B, R, P, D]
        if shape[2] % c.slab:
            raise ValueError(
                f"data.patch_length {shape[2]} must be a multiple of {c.slab}, the patches of a slice of "
                f"{c.image_size} x {c.image_size} pixels"
            )
        x = self.with_positions(x.reshape(-1, c.slab, c.width))
        x, _ = scan_blocks(SliceBlock, c.num_layers, c.remat)(c, name="blocks")(x)
        x = layer_norm(c, "norm", c.norm_eps)(x[:, c.prefix :]).reshape(shape)
        init = partitioned(nn.initializers.normal(DEPTH_DEVIATION), (None, "embed"))
        depth = self.param("depth_positions", init, (c.depth_positions, c.width), c.param_dtype)
        return x + depth[patch_positions[..., 2]].astype(x.dtype)

    def with_positions(self, x: jax.Array) -> jax.Array:
        """Add learned positions to the patches of slices, and class and register tokens: [Z, N, D] -> [Z, X + N, D]."""
        c = self.config
        init = partitioned(nn.initializers.normal(0.02), (None, "embed"))
        positions = self.param("positions", init, (c.class_token + c.slab, c.width), c.param_dtype)
        x = x + positions[c.class_token :].astype(x.dtype)
        front = []
        if c.class_token:
            front.append(self.param("class_token", init, (1, c.width), c.param_dtype) + positions[:1])
        if c.registers:
            front.append(self.param("registers", init, (c.registers, c.width), c.param_dtype))
        tokens = [jnp.broadcast_to(t.astype(x.dtype), (len(x), *t.shape)) for t in front]
        return jnp.concatenate([*tokens, x], axis=1)
