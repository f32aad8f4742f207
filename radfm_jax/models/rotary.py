"""Rotary position embeddings (RoFormer): frequencies, their scaling for long contexts, and the rotation.

Letters: B rows, T tokens, H heads, K head width, D channels of a head that are rotated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.field_rules import Size, above, at_least, check_fields, one_of

KINDS = ("llama3", "linear", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """RoPE for contexts `factor` times as long as the `original_context` of pretraining.

    llama3    divides low frequencies by `factor`, keeps high ones, interpolates between `low_freq_factor` and
              `high_freq_factor` turns within the original context
    linear    divides all frequencies by `factor`
    yarn      as llama3, between `beta_slow` and `beta_fast` turns; multiplies cosines and sines by `attention_factor`
    longrope  divides each frequency by its own number of `channel_factors`; `attention_factor` as for yarn

    Published longrope models have two lists of factors, for contexts up to and above `original_context`: use one.
    """

    factor: Annotated[float, at_least(1)] = 8.0
    low_freq_factor: Annotated[float, above(0)] = 1.0
    high_freq_factor: Annotated[float, above(0)] = 4.0
    original_context: Size = 8192
    kind: Annotated[str, one_of(KINDS)] = "llama3"
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
        if self.kind == "longrope" and self.original_context == 1:
            yield f"{group}.original_context must be above 1 for kind longrope"

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        if self.kind in ("llama3", "linear"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))


def frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Return float32[D / 2]: radians per position of each channel pair.

    Each step is rounded to float32 as in PyTorch's models. A difference of one unit in the last place would change
    logits by 3e-4 at position 2,000.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # The float32 power of numpy depends on the CPU and is often not the nearest float32.
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if scaling is None:
        return plain
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return plain / factor
    if scaling.kind == "longrope":
        return np.float32(1) / (np.array(scaling.channel_factors, np.float32) * powers)
    # 1 keeps a frequency, 0 divides it by `factor`, others interpolate.
    if scaling.kind == "llama3":
        wavelength = np.float32(1) / plain * np.float32(2 * math.pi)  # PyTorch's order of a scalar over a tensor
        turns = np.float32(1) / wavelength * np.float32(scaling.original_context)
        low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
        keep = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
        return np.where(keep == 1, plain, (1 - keep) * plain / factor + keep * plain)
    first, last = _yarn_bounds(dim, theta, scaling)
    pairs = np.arange(dim // 2, dtype=np.float32)
    keep = 1 - np.clip((pairs - np.float32(first)) / np.float32(last - first), np.float32(0), np.float32(1))
    return np.float32(1) / (factor * powers) * (1 - keep) + plain * keep


def _yarn_bounds(dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Return the channel pairs with `beta_fast` and with `beta_slow` turns within the original context."""
    first, last = (
        dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return first, last + 0.001 if first == last else last


def table(positions: jax.Array, freqs: np.ndarray, magnitude: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """int32[B, T], float32[D / 2] -> cosines and sines times `magnitude`, float32[B, T, 1, D / 2]."""
    angles = positions[..., None, None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if magnitude == 1 else (cos * magnitude, sin * magnitude)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the channel pairs (i, i + D/2) of float[B, T, H, K] by their angles, in float32."""
    cos, sin = rope
    dim = 2 * cos.shape[-1]
    if dim < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :dim], rope), x[..., dim:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
