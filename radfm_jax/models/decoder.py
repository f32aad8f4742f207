"""LLaMA, the decoder: embeddings in, hidden states out, with or without an explicit cache. Covers LLaMA 1 to 3.x
(grouped key/value heads, RoPE theta and the Llama-3.1 RoPE scaling, tied or untied head).

Letters: B rows, T text tokens, E width, F MLP width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from radfm_jax.models.attention import attention
from radfm_jax.models.kernels.xla import attention_mask, plain_attention
from radfm_jax.models.layers import (
    RESIDUAL,
    dense,
    matmul_precision,
    product_with_rows,
    rms_norm,
    scan_blocks,
)
from radfm_jax.runtime.sharding import constrain


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretching of the slow RoPE frequencies to contexts `factor` times as long."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the language model; the defaults are LLaMA-13B's, which RadFM uses."""

    vocab_size: int = 32000
    width: int = 5120
    mlp_width: int = 13824
    num_layers: int = 40
    num_heads: int = 40
    num_kv_heads: int = 40
    head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_head: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "full"
    attention: str = "auto"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head width {self.head_dim} is odd: RoPE turns pairs")


# --- rotary positions -------------------------------------------------------------------------------------------------


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """float32[K / 2]: radians a position for each pair of channels (RoFormer; scaling as published with Llama 3.1)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1.0 / np.power(np.float32(config.rope_theta), exponents)
    scaling = config.rope_scaling
    if scaling is not None:
        wavelength = 2 * math.pi / frequencies
        # 0: as slow as the whole old context, stretched fully; 1: fast, kept; between, mixed.
        turns = scaling.original_context / wavelength
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rope_table(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """int32[B, T] -> cosines and sines, float32[B, T, 1, K / 2]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (channel i, channel i + K/2) of float[B, T, H, K] by their angles, in float32."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# --- the network ------------------------------------------------------------------------------------------------------


# The linear maps of a block -> how many axes of their kernels are summed over, behind the layers'.
INPUTS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


class DecoderBlock(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, rope, q_segments: jax.Array, k_segments: jax.Array, cache=None, layer=None, starts=None
    ):
        """(x, cache). Without a cache, attention is among the x. With one (`empty_cache`), keys and values of the x go
        into its `layer`, or into all of it where that is None: with `starts` None at the beginning, attention being
        among the x (a prompt); otherwise at starts int32[B], for x of one token, which sees what stands in the cache
        under its own segment."""
        c = self.config
        h = rms_norm(c, c.norm_eps, "attention_norm")(x)
        q = dense((c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), c, name="query")(h)
        k = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), c, name="key")(h)
        v = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), c, name="value")(h)
        q, k = checkpoint_name(rotate(q, rope), "query"), checkpoint_name(rotate(k, rope), "key")
        v = checkpoint_name(v, "value")
        if cache is not None:
            cache = {
                "key": _written(cache["key"], k, layer, starts),
                "value": _written(cache["value"], v, layer, starts),
            }
        if starts is None:
            h = attention(q, k, v, q_segments, k_segments, causal=True, kernel=c.attention)
        else:
            k, v = (_read(cache[name], len(q), layer) for name in ("key", "value"))
            with jax.named_scope("attention"):
                h = plain_attention(q, k, v, attention_mask(q_segments, k_segments, causal=False))
        h = checkpoint_name(h, "attention")
        h = dense(c.width, ("heads", "head_dim", "embed"), c, axis=(-2, -1), gain=RESIDUAL, name="out")(h)
        x = constrain(x + h, "batch", None, None)
        h = rms_norm(c, c.norm_eps, "mlp_norm")(x)
        gate = dense(c.mlp_width, ("embed", "mlp"), c, name="gate")(h)
        up = dense(c.mlp_width, ("embed", "mlp"), c, name="up")(h)
        h = dense(c.width, ("mlp", "embed"), c, gain=RESIDUAL, name="down")(jax.nn.silu(gate) * up)
        return constrain(x + h, "batch", None, None), cache


class Decoder(nn.Module):
    """`embed` ids, `__call__` the trunk, `logits` the head: RadFM puts visual tokens in between."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        vocabulary = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("vocab", "embed"))
        self.embedding = self.param("embedding", vocabulary, (c.vocab_size, c.width), c.param_dtype)
        self.blocks = scan_blocks(DecoderBlock, c.num_layers, c.remat)(c)
        self.norm = rms_norm(c, c.norm_eps, None)
        if not c.tied_head:
            head = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab"))
            self.head = self.param("head", head, (c.width, c.vocab_size), c.param_dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32[B, T], clipped into the vocabulary -> [B, T, E]. A gather: a one-hot product would copy the table."""
        return self.embedding[jnp.clip(ids, 0, self.config.vocab_size - 1)].astype(self.config.dtype)

    def __call__(self, x: jax.Array, positions: jax.Array, segments: jax.Array, key_ok: jax.Array) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          x: float[B, T, E]; positions: int32[B, T], restarting in every segment.
          segments: int32[B, T], 0 = padding; key_ok: bool[B, T], false where a key must not be seen.
        Returns:
          float[B, T, E].
        """
        k_segments = jnp.where(key_ok | (segments == 0), segments, -1)
        x, _ = self.blocks(x.astype(self.config.dtype), rope_table(positions, self.config), segments, k_segments)
        return self.norm(x)

    def head_kernel(self) -> jax.Array:
        """[E, V]."""
        return self.embedding.T if self.config.tied_head else self.head

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[..., E] -> float32[..., V]."""
        scale = self.get_variable("params", "head_scale") if self.has_variable("params", "head_scale") else None
        return head_logits(hidden, self.head_kernel(), self.config.dtype, scale)


def head_logits(
    hidden: jax.Array, kernel: jax.Array, dtype: str, scale: jax.Array | None = None, *, by_rows: bool = False
) -> jax.Array:
    """float[..., E] x [E, V] -> float32[..., V], multiplied in `dtype`, summed in float32; times float32[V] `scale`,
    where the kernel is one of integers. by_rows: the kernel is [V, E] and the hidden states are [T, E]
    (`product_with_rows`)."""
    logits = (product_with_rows if by_rows else jnp.matmul)(
        hidden.astype(dtype),
        kernel.astype(dtype),
        precision=matmul_precision(dtype),
        preferred_element_type=jnp.float32,
    )
    return logits if scale is None else logits * scale


# --- with a cache -----------------------------------------------------------------------------------------------------


def empty_cache(config: DecoderConfig, batch: int, length: int, *, apart: bool = False) -> dict | list[dict]:
    """{"key", "value"}, each [layers, B, G, length, K] in `config.dtype`, as attention reads them: rows over `data` and
    `fsdp`, heads over `tensor`. Place i of a row is its position i; what lies behind a row's last token is never
    seen. apart: a list of the layers, each [B G, length, K], for parameters whose layers are a list; on one device.
    (With more axes, XLA on a CPU writes a cache of one row twice, to keep and to read, and copies it before.)"""
    mesh = jax.sharding.get_abstract_mesh()
    heads = None if mesh.empty or config.num_kv_heads % mesh.shape["tensor"] else "kv_heads"

    if apart:
        zeros = jnp.zeros((batch * config.num_kv_heads, length, config.head_dim), config.dtype)
        return [{"key": zeros, "value": zeros} for _ in range(config.num_layers)]
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    zeros = constrain(jnp.zeros(shape, config.dtype), None, "batch", heads, None, None)
    return {"key": zeros, "value": zeros}


def _written(cache: jax.Array, new: jax.Array, layer, starts) -> jax.Array:
    """A cache with new [B, T, G, K] put into a layer: from place 0 on, or, T = 1, at each row's own."""
    new = new.astype(cache.dtype)
    if layer is None:  # [B G, U, K]
        new = jnp.moveaxis(new, 1, 2).reshape(len(cache), -1, cache.shape[2])
        if starts is None:
            return jax.lax.dynamic_update_slice(cache, new, (0, 0, 0))
        at = jnp.repeat(starts, len(cache) // len(starts))
        return cache.at[jnp.arange(len(cache)), at].set(new[:, 0], mode="drop", unique_indices=True)
    if starts is None:
        return jax.lax.dynamic_update_slice(cache, jnp.moveaxis(new, 1, 2)[None], (layer, 0, 0, 0, 0))
    return cache.at[layer, jnp.arange(len(new)), :, starts].set(new[:, 0], mode="drop", unique_indices=True)


def _read(cache: jax.Array, batch: int, layer) -> jax.Array:
    """The layer of a cache, [B, G, U, K]."""
    if layer is None:
        return cache.reshape(batch, -1, *cache.shape[1:])
    return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)


def prefill(
    config: DecoderConfig, params: dict, x: jax.Array, lengths: jax.Array, cache
) -> tuple[jax.Array, dict | list]:
    """Prompts into an empty cache.

    Args:
      params: of the language model. `blocks` may be a list of the layers instead of their stack: where a slice of a
        stack is copied before it is multiplied, as on CPUs, that halves the time of a token; the cache is apart, too.
      x: float[B, T, E] embeddings, of which the first lengths[b] are row b; T at most the cache's length.
      lengths: int32[B].
    Returns:
      Hidden states float[B, T, E] after the final norm, as `Decoder` gives them, and the cache.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    return _through_blocks(config, params, x, positions, segments, segments, cache, None)


def extend(config: DecoderConfig, params: dict, x: jax.Array, positions: jax.Array, cache):
    """One more token in each row: x float[B, 1, E] at positions int32[B] -> (hidden [B, 1, E], cache)."""
    seen = jnp.arange(jax.tree.leaves(cache)[0].shape[-2]) <= positions[:, None]
    k_segments = jnp.where(seen, 1, -1)
    q_segments = jnp.ones_like(positions)[:, None]
    return _through_blocks(config, params, x, positions[:, None], q_segments, k_segments, cache, positions)


def _through_blocks(config, params, x, positions, q_segments, k_segments, cache, starts) -> tuple[jax.Array, dict]:
    rope = rope_table(positions, config)

    def one(x, cache, block, layer):
        arguments = (x, rope, q_segments, k_segments, cache, layer, starts)
        return DecoderBlock(config).apply({"params": block}, *arguments)

    x, blocks = x.astype(config.dtype), params["blocks"]
    if isinstance(blocks, dict):
        # The cache is carried, not sliced: as a scanned input and output it would be written anew for every token.
        (x, cache), _ = jax.lax.scan(
            lambda carry, of_layer: (one(*carry, *of_layer), None), (x, cache), (blocks, jnp.arange(config.num_layers))
        )
    else:
        cache = list(cache)
        for layer, block in enumerate(blocks):
            x, cache[layer] = one(x, cache[layer], block, None)
    return rms_norm(config, config.norm_eps, None).apply({"params": params["norm"]}, x), cache
