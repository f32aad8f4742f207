"""How the next token is chosen from its logits.

Letters: B rows, V vocabulary, S stop ids.
"""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer is written. The default is what the released model does: the likeliest token, 200 of them at most.

    Attributes:
      max_new_tokens: most tokens of an answer, the stop token among them. None: 200, or as many as the cache has room
        for behind the prompt.
      temperature: 0: always the likeliest token; else logits are divided by it and a token is drawn.
      top_k: draw among the k likeliest only (and those as likely as the k-th); 0: all.
      top_p: of those, draw among the likeliest whose probabilities together reach p; 1: all.
      repetition_penalty: a token that stands in the answer already has its logit divided by this if it is positive,
        multiplied if it is negative; 1: none. The prompt does not count, as in the released model.
      seed: of the draws. Prompt i of several draws with seed + i, so an answer does not depend on its neighbours.
      stop: texts before which an answer ends.
      stop_ids: tokens that end an answer; None: the tokenizer's end-of-text token.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or any(not isinstance(text, str) for text in stop):
            raise ValueError(f"stop is {self.stop!r}: a text or a list of texts is needed")
        object.__setattr__(self, "stop", tuple(stop))
        if self.stop_ids is not None:
            try:
                object.__setattr__(self, "stop_ids", tuple(map(operator.index, self.stop_ids)))
            except TypeError:
                raise ValueError(f"stop_ids is {self.stop_ids!r}: a list of whole numbers is needed") from None
        problems = []
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if name == "max_new_tokens" and value is None:
                continue
            try:
                if isinstance(value, bool | str):
                    raise TypeError
                plain = operator.index(value) if kind is int else float(value)  # NumPy's are no JSON
            except (TypeError, ValueError, OverflowError):
                what = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name} is {value!r}: {what} is needed") from None
            object.__setattr__(self, name, plain)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}: at least 1 is needed")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}: 0 for the likeliest token, or a number above it")
        if not 0 <= self.top_k < 2**31:
            problems.append(f"top_k is {self.top_k}: 0 for all tokens, or how many")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}: a share above 0, up to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(f"repetition_penalty is {self.repetition_penalty}: a number above 0, 1 for none")
        if not 0 <= self.seed < 2**31:
            problems.append(f"seed is {self.seed}: a whole number from 0 to 2^31 - 1")
        if any(not text for text in self.stop):
            problems.append("a stop text is empty")
        if problems:
            raise ValueError("; ".join(problems))


_KINDS = {
    "max_new_tokens": int, "top_k": int, "seed": int, "temperature": float, "top_p": float, "repetition_penalty": float
}  # fmt: skip


def penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """float32[B, V] with the logits of the tokens in bool[B, V] `seen` made smaller by float32[] `penalty`."""
    smaller = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, smaller, logits)


def restricted(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Scores float32[B, V] to draw from: logits over temperature, -inf for every token that must not be drawn.

    A token as likely as the last one that is let in is let in too, so the result does not depend on the order of ids.

    Args:
      temperature: float32[], above 0. top_k: int32[], 0 for all. top_p: float32[] in (0, 1].
    """
    v = logits.shape[-1]
    scores = logits / temperature
    ranked = -jnp.sort(-scores, axis=-1)
    among = jnp.arange(v) < jnp.where(top_k > 0, top_k, v)
    probabilities = jax.nn.softmax(jnp.where(among, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding of the sum must not drop tokens where nothing is to be dropped.
    count = (among & ((before < top_p) | (top_p >= 1))).sum(axis=-1)
    least = jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)
    return jnp.where(scores >= least, scores, -jnp.inf)


def draw(scores: jax.Array, keys: jax.Array, steps: jax.Array) -> jax.Array:
    """Tokens int32[B] drawn from float32[B, V] scores, token number steps int32[B] of rows with keys uint32[B, 2]."""

    def one(key, step, row):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(one)(keys, steps, scores).astype(jnp.int32)
