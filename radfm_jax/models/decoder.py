"""The LLaMA decoder: embeddings to hidden states, with or without an explicit key/value cache.

Covers LLaMA 1 to 3.x: grouped key/value heads, RoPE theta and Llama-3.1 RoPE scaling, tied or untied head.

Letters: B rows, T text tokens, E width, F MLP width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from input_pipeline.field_rules import Count, Size, above, at_least, check_fields, one_of, share
from radfm_jax.models.attention import NAMES, attention
from radfm_jax.models.kernels.xla import attention_mask, plain_attention
from radfm_jax.models.layers import (
    DTYPES,
    REMAT_POLICIES,
    RESIDUAL,
    dense,
    matmul_precision,
    partitioned,
    rms_norm,
    scan_blocks,
)
from radfm_jax.runtime.sharding import constrain

ROPE_KINDS = ("llama3", "linear", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """RoPE for contexts `factor` times as long as the `original_context` of pretraining.

    llama3    stretches low frequencies, keeps high ones, interpolates between `low_freq_factor` and `high_freq_factor`
    linear    divides all frequencies by `factor`
    yarn      as llama3 between `beta_slow` and `beta_fast` turns; multiplies cosines and sines by `attention_factor`
    longrope  divides each frequency by its own number of `channel_factors`; `attention_factor` as for yarn

    Published longrope models have two lists of factors, for contexts up to and above `original_context`: use one.
    """

    factor: Annotated[float, at_least(1)] = 8.0
    low_freq_factor: Annotated[float, above(0)] = 1.0
    high_freq_factor: Annotated[float, above(0)] = 4.0
    original_context: Size = 8192
    kind: Annotated[str, one_of(ROPE_KINDS)] = "llama3"
    beta_fast: Annotated[float, above(0)] = 32.0
    beta_slow: Annotated[float, above(0)] = 1.0
    attention_factor: Annotated[float, above(0)] | None = None  # None: as in the papers, from `factor`
    truncate: bool = True  # yarn: round the channels that bound the interpolation
    channel_factors: tuple[Annotated[float, above(0)], ...] = ()

    def __post_init__(self):
        check_fields(self, "model.llama.rope_scaling", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        group = "model.llama.rope_scaling"
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            yield (
                f"{group}.high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                f"({self.low_freq_factor})"
            )
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            yield f"{group}.beta_fast ({self.beta_fast}) must be above beta_slow ({self.beta_slow})"
        if self.kind in ("llama3", "linear") and self.attention_factor is not None:
            yield f"{group}.attention_factor must be unset: kind {self.kind} has none"
        if (self.kind == "longrope") != bool(self.channel_factors):
            yield f"{group}.channel_factors must be set for kind longrope and for no other kind (got {self.kind})"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of the language model; the defaults are those of LLaMA-13B, which RadFM uses."""

    vocab_size: Size = 32000
    width: Size = 5120
    mlp_width: Size = 13824
    num_layers: Size = 40
    num_heads: Size = 40
    num_kv_heads: Size = 40
    head_dim: Size = 128
    rope_theta: Annotated[float, above(1)] = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: Annotated[float, above(0)] = 1e-6
    tied_head: bool = False
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    param_dtype: Annotated[str, one_of(DTYPES)] = "float32"
    remat: Annotated[str, one_of(REMAT_POLICIES)] = "full"
    attention: Annotated[str, one_of(NAMES)] = "auto"
    # What other families change.
    qkv_bias: bool = False  # Qwen2: queries, keys and values have biases
    qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm of each query and key head before RoPE
    unit_offset: bool = False  # Gemma: norms multiply by 1 + scale
    post_norms: bool = False  # Gemma: norms also after the attention and after the MLP
    scale_embeddings: bool = False  # Gemma: embeddings times sqrt(width)
    activation: Annotated[str, one_of(ACTIVATIONS)] = "silu"
    attention_scale: Annotated[float, above(0)] | None = None  # of scores; None: head_dim ** -0.5
    attention_softcap: Annotated[float, above(0)] | None = None  # Gemma 2: scores are cap * tanh(scores / cap)
    logit_softcap: Annotated[float, above(0)] | None = None  # Gemma 2: so are logits
    window: Count = 0  # tokens that a query of a sliding layer sees, itself included; 0: no sliding layers
    sliding_layers: tuple[Count, ...] = ()  # Mistral: all layers; Gemma 2: 0, 2, 4 ...
    local_rope_theta: Annotated[float, above(1)] | None = None  # Gemma 3: unscaled RoPE of the sliding layers
    nope_layers: tuple[Count, ...] = ()  # SmolLM3: layers without RoPE
    rotary_share: Annotated[float, share(zero=False, one=True)] = 1.0  # Phi-4-mini: of a head's channels that RoPE uses

    def __post_init__(self):
        check_fields(self, "model.llama", self._conflicts())

    @property
    def rotary_dim(self) -> int:
        """Number of channels of a head that RoPE rotates."""
        return int(self.head_dim * self.rotary_share)

    def _conflicts(self) -> Iterator[str]:
        if self.num_heads % self.num_kv_heads:
            yield f"llama.num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
        if self.head_dim % 2:
            yield f"llama.head_dim must be even for RoPE (got {self.head_dim})"
        elif self.rotary_dim % 2 or not self.rotary_dim:
            yield (
                f"llama.rotary_share ({self.rotary_share}) of llama.head_dim ({self.head_dim}) is {self.rotary_dim} "
                "channels; RoPE needs an even number"
            )
        factors = self.rope_scaling.channel_factors if self.rope_scaling else ()
        if factors and 2 * len(factors) != self.rotary_dim:
            yield (
                f"llama.rope_scaling.channel_factors has {len(factors)} numbers; RoPE of llama.head_dim "
                f"{self.head_dim} and llama.rotary_share {self.rotary_share} has {self.rotary_dim // 2} frequencies"
            )
        for name in ("sliding_layers", "nope_layers"):
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers)) or any(i >= self.num_layers for i in layers):
                yield f"llama.{name} must be ascending and below llama.num_layers {self.num_layers} (got {layers})"
        if bool(self.window) != bool(self.sliding_layers):
            yield (
                f"llama.window ({self.window}) and llama.sliding_layers ({self.sliding_layers}) must be set together, "
                "or neither"
            )
        if self.local_rope_theta is not None and not self.sliding_layers:
            yield f"llama.local_rope_theta ({self.local_rope_theta}) needs llama.sliding_layers"


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Return float32[K / 2]: radians per position for each channel pair (RoFormer; Llama-3.1 scaling).

    Each step is rounded to float32 as in PyTorch's LLaMA. A difference of one unit in the last place would change
    logits by 3e-4 at position 2,000.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # The float32 power of numpy depends on the CPU and is often not the nearest float32.
    powers = np.power(np.float64(config.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = np.float32(1) / frequencies * np.float32(2 * math.pi)  # PyTorch's order of a scalar over a tensor
    # 1 keeps a frequency (many turns within the original context), 0 divides it by `factor`, others interpolate.
    turns = np.float32(1) / wavelength * np.float32(scaling.original_context)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    keep = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
    stretched = (1 - keep) * frequencies / np.float32(scaling.factor)
    return np.where(keep == 1, frequencies, stretched + keep * frequencies)


def rope_table(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """int32[B, T] -> cosines and sines, float32[B, T, 1, K / 2]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the channel pairs (i, i + K/2) of float[B, T, H, K] by their angles, in float32."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# Linear maps of a block -> the number of input axes of their kernels, not counting the axis `layers`.
INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


class DecoderBlock(nn.Module):
    """Pre-norm attention with RoPE, then a SwiGLU MLP; no biases."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, rope, q_segments: jax.Array, k_segments: jax.Array, cache=None, layer=None, positions=None
    ):
        """Return (x, cache).

        Args:
          x: float[B, T, E].
          cache: None, or a KVCache whose `layer` receives the keys and values of x.
          positions: None: x is the start of each row, and its tokens attend to each other. int32[B]: x is the one token
            of each row at that position (T = 1) and attends to the cache under `k_segments`.
        """
        c = self.config
        h = rms_norm(c, c.norm_eps, "attention_norm")(x)
        q = dense((c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), c, name="query")(h)
        k = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), c, name="key")(h)
        v = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), c, name="value")(h)
        q, k = checkpoint_name(rotate(q, rope), "query"), checkpoint_name(rotate(k, rope), "key")
        v = checkpoint_name(v, "value")
        if cache is not None:
            cache = cache.write(layer, k, v, positions)
        if positions is None:
            h = attention(q, k, v, q_segments, k_segments, causal=True, kernel=c.attention)
        else:
            k, v = cache.read(layer)
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
    """`embed` for token ids, `__call__` for the blocks, `logits` for the head. RadFM adds visual tokens in between."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        vocabulary = partitioned(nn.initializers.normal(0.5), ("vocab", "embed"))
        self.embedding = self.param("embedding", vocabulary, (c.vocab_size, c.width), c.param_dtype)
        self.blocks = scan_blocks(DecoderBlock, c.num_layers, c.remat)(c)
        self.norm = rms_norm(c, c.norm_eps, None)
        if not c.tied_head:
            head = partitioned(nn.initializers.normal(0.02), ("embed", "vocab"))
            self.head = self.param("head", head, (c.width, c.vocab_size), c.param_dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32[B, T], clipped to the vocabulary -> [B, T, E]. A gather: a one-hot product would copy the table."""
        return self.embedding[jnp.clip(ids, 0, self.config.vocab_size - 1)].astype(self.config.dtype)

    def __call__(self, x: jax.Array, positions: jax.Array, segments: jax.Array, key_ok: jax.Array) -> jax.Array:
        """Return the hidden states float[B, T, E] after the final norm.

        Args:
          x: float[B, T, E]; positions: int32[B, T], restarting in every segment.
          segments: int32[B, T], 0 = padding; key_ok: bool[B, T], false for keys that no query may see.
        """
        k_segments = jnp.where(key_ok | (segments == 0), segments, -1)
        x, _ = self.blocks(x.astype(self.config.dtype), rope_table(positions, self.config), segments, k_segments)
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[..., E] -> float32[..., V]."""
        kernel = self.embedding.T if self.config.tied_head else self.head
        return head_logits(hidden, kernel, self.config.dtype, self.get_variable("params", "head_scale"))


def head_logits(hidden: jax.Array, kernel: jax.Array, dtype: str, scale: jax.Array | None = None) -> jax.Array:
    """float[..., E] x [E, V] -> float32[..., V], multiplied in `dtype` and summed in float32.

    `scale` has the factors of an int8 kernel's columns, float32[V]; it is None for other kernels.
    """
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    logits = jnp.matmul(hidden, kernel, precision=matmul_precision(dtype), preferred_element_type=jnp.float32)
    return logits if scale is None else logits * scale


# --- decoding with a cache --------------------------------------------------------------------------------------------


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer, [layers, B, G, length, K] each, in `config.dtype`.

    Rows are sharded over `data` and `fsdp`, heads over `tensor`. Index i of a row holds its position i. Indices past
    a row's last token are never attended to.
    """

    key: Any
    value: Any

    @property
    def length(self) -> int:
        return self.key.shape[-2]

    def write(self, layer, k: jax.Array, v: jax.Array, positions: jax.Array | None) -> KVCache:
        """Write [B, T, G, K] to a layer: from index 0 on, or (T = 1) at each row's index in `positions`."""

        def put(cache, new):
            new = new.astype(cache.dtype)
            if positions is None:
                return jax.lax.dynamic_update_slice(cache, jnp.moveaxis(new, 1, 2)[None], (layer, 0, 0, 0, 0))
            rows = jnp.arange(len(new))
            return cache.at[layer, rows, :, positions].set(new[:, 0], mode="drop", unique_indices=True)

        return self.replace(key=put(self.key, k), value=put(self.value, v))

    def read(self, layer) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values of a layer, [B, G, length, K]."""
        key, value = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.key, self.value))
        return key, value

    def apply_blocks(self, block: Callable, blocks, x: jax.Array) -> tuple[jax.Array, KVCache]:
        """Apply block(params, x, cache, layer) -> (x, cache) layer by layer to the stacked parameters `blocks`."""

        def step(carry, layer_params):
            params, layer = layer_params
            return block(params, *carry, layer), None

        # The cache is part of the carry: as a scanned input and output it would be copied for every token.
        (x, cache), _ = jax.lax.scan(step, (x, self), (blocks, jnp.arange(len(self.key))))
        return x, cache


def empty_cache(config: DecoderConfig, batch: int, length: int) -> KVCache:
    """Return a cache of zeros for `batch` rows of up to `length` tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    heads = None if mesh.empty or config.num_kv_heads % mesh.shape["tensor"] else "kv_heads"
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    zeros = constrain(jnp.zeros(shape, config.dtype), None, "batch", heads, None, None)
    return KVCache(zeros, zeros)


def prefill(
    config: DecoderConfig, params: dict, x: jax.Array, lengths: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Run the prompts and write their keys and values to an empty cache, which has room for T tokens or more.

    Args:
      x: float[B, T, E] embeddings; the first lengths[b] of row b are its prompt.
    Returns:
      Hidden states float[B, T, E] after the final norm, and the cache.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    return _run_blocks(config, params, x, positions, segments, segments, cache, None)


def extend(
    config: DecoderConfig, params: dict, x: jax.Array, positions: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Run one more token of each row: x float[B, 1, E] at positions int32[B] -> (hidden [B, 1, E], cache)."""
    k_segments = jnp.where(jnp.arange(cache.length) <= positions[:, None], 1, -1)
    q_segments = jnp.ones_like(positions)[:, None]
    return _run_blocks(config, params, x, positions[:, None], q_segments, k_segments, cache, positions)


def next_logits(config: DecoderConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """float[B, E] after the final norm -> float32[B, V]."""
    return jnp.asarray(Decoder(config).apply({"params": params}, hidden, method="logits"))


def _run_blocks(config, params, x, rope_positions, q_segments, k_segments, cache, positions):
    rope = rope_table(rope_positions, config)

    def block(block_params, x, cache, layer):
        arguments = (x, rope, q_segments, k_segments, cache, layer, positions)
        return DecoderBlock(config).apply({"params": block_params}, *arguments)

    x, cache = cache.apply_blocks(block, params["blocks"], x.astype(config.dtype))
    return rms_norm(config, config.norm_eps, None).apply({"params": params["norm"]}, x), cache
