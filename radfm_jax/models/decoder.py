"""The decoder: embeddings to hidden states, with or without an explicit key/value cache.

It is LLaMA with options for what other families change: Mistral, SmolLM, Qwen, Gemma and Phi. `families.py` has the
sizes of published models.

Letters: B rows, T text tokens, E width, F MLP width, H query heads, G key/value heads, K head width, D <= K channels
that RoPE rotates, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from input_pipeline.field_rules import Count, Size, above, check_fields, one_of, share
from radfm_jax.models import rotary
from radfm_jax.models.attention import attention
from radfm_jax.models.computation import Computation
from radfm_jax.models.kernels.xla import attention_mask, plain_attention
from radfm_jax.models.layers import (
    RESIDUAL,
    dense,
    matmul_precision,
    partitioned,
    rms_norm,
    scan_blocks,
    soft_cap,
)
from radfm_jax.models.rotary import RopeScaling, rotate
from radfm_jax.runtime.sharding import constrain

ACTIVATIONS: dict[str, Callable] = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Computation):
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
    # What other families change.
    qkv_bias: bool = False  # Qwen2: queries, keys and values have biases
    qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm of each query and key head before RoPE
    unit_offset: bool = False  # Gemma: norms multiply by 1 + scale
    post_norms: bool = False  # Gemma: norms also after the attention and after the MLP
    scale_embeddings: bool = False  # Gemma: embeddings times sqrt(width)
    activation: Annotated[str, one_of(ACTIVATIONS)] = "silu"
    attention_scale: Annotated[float, above(0)] | None = None  # of scores; None: head_dim ** -0.5
    attention_softcap: Annotated[float, above(0)] | None = None  # Gemma 2: scores are cap * tanh(scores / cap)
    logit_softcap: Annotated[float, above(0)] | None = None  # Gemma 2: the same for logits
    window: Count = 0  # tokens that a query of a sliding layer sees, itself included; 0: no sliding layers
    sliding_layers: tuple[Count, ...] = ()  # Mistral: all layers; Gemma 2: 0, 2, 4 ...
    local_rope_theta: Annotated[float, above(1)] | None = None  # Gemma 3: unscaled RoPE of the sliding layers
    nope_layers: tuple[Count, ...] = ()  # SmolLM3: layers without RoPE
    rotary_share: Annotated[float, share(zero=False, one=True)] = 1.0  # Phi-4-mini: share of channels with RoPE

    def __post_init__(self):
        check_fields(self, "model.llama", self._conflicts())

    @property
    def rotary_dim(self) -> int:
        """Number of channels of a head that RoPE rotates."""
        return int(self.head_dim * self.rotary_share)

    @property
    def layer_slides(self) -> list[bool]:
        """Whether each layer has the window."""
        return [layer in self.sliding_layers for layer in range(self.num_layers)]

    @property
    def layer_ropes(self) -> list[str]:
        """RoPE of each layer: `none`, `local` (that of sliding layers, if they have their own) or `global`."""
        local = self.sliding_layers if self.local_rope_theta is not None else ()
        kinds = {**dict.fromkeys(local, "local"), **dict.fromkeys(self.nope_layers, "none")}
        return [kinds.get(layer, "global") for layer in range(self.num_layers)]

    @property
    def rope_kinds(self) -> list[str]:
        """Distinct kinds of `layer_ropes`, in the order of `rope_table`."""
        return sorted(set(self.layer_ropes))

    @property
    def has_equal_layers(self) -> bool:
        return len(set(self.layer_slides)) == len(self.rope_kinds) == 1

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
    """Return float32[D / 2]: radians per position of each rotated channel pair in `global` layers."""
    return rotary.frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)


def rope_table(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """int32[B, T] -> cosines and sines, float32[B, T, 1, D / 2], or [kinds, B, T, 1, D / 2] if layers differ."""
    tables = [_rope_table(positions, config, kind) for kind in config.rope_kinds]
    if len(tables) == 1:
        return tables[0]
    cos, sin = (jnp.stack(x) for x in zip(*tables, strict=True))
    return cos, sin


def _rope_table(positions, config, kind: str) -> tuple[jax.Array, jax.Array]:
    if kind == "local":
        return rotary.table(positions, rotary.frequencies(config.rotary_dim, config.local_rope_theta))
    if kind == "none":
        return rotary.table(positions, np.zeros(config.rotary_dim // 2, np.float32))  # angles of 0 rotate nothing
    scaling = config.rope_scaling
    return rotary.table(positions, rope_frequencies(config), scaling.magnitude if scaling else 1.0)


class DecoderBlock(nn.Module):
    """Pre-norm attention with RoPE, then a gated MLP: LLaMA's block with the options of its config."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, rope, q_segments: jax.Array, k_segments: jax.Array, layer=None, cache=None, positions=None
    ):
        """Return (x, cache).

        Args:
          x: float[B, T, E].
          rope: `rope_table` of the positions of x.
          layer: number of this block; may be None without a cache if all layers are equal.
          cache: None, or a KVCache whose `layer` receives the keys and values of x.
          positions: None: x is the start of each row, and its tokens attend to each other. int32[B]: x is the one token
            of each row at that position (T = 1) and attends to the cache under `k_segments`.
        """
        c = self.config
        h = norm(c, "attention_norm")(x)
        q = dense((c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), c, bias=c.qkv_bias, name="query")(h)
        k = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), c, bias=c.qkv_bias, name="key")(h)
        v = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), c, bias=c.qkv_bias, name="value")(h)
        if c.qk_norm:
            q, k = norm(c, "query_norm")(q), norm(c, "key_norm")(k)
        rope = layer_rope(c, rope, layer)
        q, k = checkpoint_name(rotate(q, rope), "query"), checkpoint_name(rotate(k, rope), "key")
        v = checkpoint_name(v, "value")
        if cache is not None:
            cache = cache.write(layer, k, v, positions)
        if positions is None:
            h = attend(c, q, k, v, q_segments, k_segments, layer)
        else:
            k, v = cache.read(layer)
            h = attend_to_cache(c, q, k, v, q_segments, k_segments, layer, positions)
        h = checkpoint_name(h, "attention")
        h = dense(c.width, ("heads", "head_dim", "embed"), c, axis=(-2, -1), gain=RESIDUAL, name="out")(h)
        if c.post_norms:
            h = norm(c, "attention_post_norm")(h)
        x = constrain(x + h, "batch", None, None)
        h = norm(c, "mlp_norm")(x)
        gate = dense(c.mlp_width, ("embed", "mlp"), c, name="gate")(h)
        up = dense(c.mlp_width, ("embed", "mlp"), c, name="up")(h)
        h = dense(c.width, ("mlp", "embed"), c, gain=RESIDUAL, name="down")(ACTIVATIONS[c.activation](gate) * up)
        if c.post_norms:
            h = norm(c, "mlp_post_norm")(h)
        return constrain(x + h, "batch", None, None), cache


def norm(config: DecoderConfig, name: str | None) -> nn.Module:
    return rms_norm(config, config.norm_eps, name, unit_offset=config.unit_offset)


def by_layer(values: Sequence, layer):
    """Return values[layer]. It is a Python value if all are equal or `layer` is an int, else an array."""
    if len(set(values)) == 1:
        return values[0]
    return values[layer] if isinstance(layer, int) else jnp.asarray(values)[layer]


def layer_rope(config: DecoderConfig, rope, layer):
    """Return a layer's cosines and sines from those of `rope_table`."""
    kinds = config.rope_kinds
    if len(kinds) == 1:
        return rope
    kind = by_layer([kinds.index(name) for name in config.layer_ropes], layer)
    return tuple(x[kind] for x in rope)


def attend(config: DecoderConfig, q, k, v, q_segments, k_segments, layer) -> jax.Array:
    """Return the attention of the tokens of each row to each other, with the layer's window if it has one."""

    def within(window: int):
        return lambda: attention(
            q, k, v, q_segments, k_segments, causal=True, window=window, scale=config.attention_scale,
            softcap=config.attention_softcap, kernel=config.attention,
        )  # fmt: skip

    # A window as long as the row hides nothing.
    slides = by_layer(config.layer_slides, layer) if config.window < q.shape[1] else False
    if isinstance(slides, bool):
        return within(config.window if slides else 0)()
    return jax.lax.cond(slides, within(config.window), within(0))  # kernels need static masks


def attend_to_cache(config: DecoderConfig, q, k, v, q_segments, k_segments, layer, positions) -> jax.Array:
    """Return the attention of one token per row, at `positions` int32[B], to a layer's cache [B, G, length, K]."""
    with jax.named_scope("attention"):
        allowed = attention_mask(q_segments, k_segments, causal=False)
        if config.window:
            near = jnp.arange(allowed.shape[-1]) > positions[:, None, None] - config.window
            allowed &= near | ~jnp.asarray(by_layer(config.layer_slides, layer))
        return plain_attention(q, k, v, allowed, scale=config.attention_scale, softcap=config.attention_softcap)


class Decoder(nn.Module):
    """`embed` for token ids, `__call__` for the blocks, `logits` for the head. RadFM adds visual tokens in between."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        # A fresh table gives inputs of deviation 0.5.
        vocabulary = partitioned(nn.initializers.normal(0.5 / _embedding_factor(c)), ("vocab", "embed"))
        self.embedding = self.param("embedding", vocabulary, (c.vocab_size, c.width), c.param_dtype)
        self.blocks = scan_blocks(DecoderBlock, c.num_layers, c.remat, (nn.broadcast, nn.broadcast, nn.broadcast, 0))(c)
        self.norm = norm(c, None)
        if not c.tied_head:
            head = partitioned(nn.initializers.normal(0.02), ("embed", "vocab"))
            self.head = self.param("head", head, (c.width, c.vocab_size), c.param_dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32[B, T], clipped to the vocabulary -> [B, T, E]. A gather: a one-hot product would copy the table."""
        c = self.config
        x = self.embedding[jnp.clip(ids, 0, c.vocab_size - 1)].astype(c.dtype)
        return x * jnp.asarray(_embedding_factor(c), c.dtype) if c.scale_embeddings else x

    def __call__(self, x: jax.Array, positions: jax.Array, segments: jax.Array, key_ok: jax.Array) -> jax.Array:
        """Return the hidden states float[B, T, E] after the final norm.

        Args:
          x: float[B, T, E]; positions: int32[B, T], restarting in every segment.
          segments: int32[B, T], 0 = padding; key_ok: bool[B, T], false for keys that no query may see.
        """
        c = self.config
        k_segments = jnp.where(key_ok | (segments == 0), segments, -1)
        layers = None if c.has_equal_layers else jnp.arange(c.num_layers)
        x, _ = self.blocks(x.astype(c.dtype), rope_table(positions, c), segments, k_segments, layers)
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[..., E] -> float32[..., V]."""
        c = self.config
        kernel = self.embedding.T if c.tied_head else self.head
        return head_logits(hidden, kernel, c.dtype, self.get_variable("params", "head_scale"), c.logit_softcap)


def _embedding_factor(config: DecoderConfig) -> float:
    return config.width**0.5 if config.scale_embeddings else 1.0


def head_logits(
    hidden: jax.Array, kernel: jax.Array, dtype: str, scale: jax.Array | None = None, softcap: float | None = None
) -> jax.Array:
    """float[..., E] x [E, V] -> float32[..., V], multiplied in `dtype`, summed in float32, soft-capped.

    `scale` has the factors of an int8 kernel's columns, float32[V]; it is None for other kernels.
    """
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    logits = jnp.matmul(hidden, kernel, precision=matmul_precision(dtype), preferred_element_type=jnp.float32)
    return soft_cap(logits if scale is None else logits * scale, softcap)


@functools.lru_cache(maxsize=8)
def abstract_params(config: DecoderConfig) -> dict:
    """Return the boxed tree of parameter shapes and logical axis names of a language model alone, without adapters."""
    model, ids = Decoder(dataclasses.replace(config, attention="xla")), jnp.zeros((1, 1), jnp.int32)

    def forward(model: Decoder) -> jax.Array:
        return model.logits(model(model.embed(ids), ids, ids, ids > 0))

    return jax.eval_shape(functools.partial(model.init, method=forward), jax.random.key(0))["params"]


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
        arguments = (x, rope, q_segments, k_segments, layer, cache, positions)
        return DecoderBlock(config).apply({"params": block_params}, *arguments)

    x, cache = cache.apply_blocks(block, params["blocks"], x.astype(config.dtype))
    return norm(config, None).apply({"params": params["norm"]}, x), cache
