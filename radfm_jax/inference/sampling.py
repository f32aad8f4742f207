"""Selection of the next token from its logits. Letters: B rows, V vocabulary."""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Decoding options. The defaults are those of the released model: greedy, at most 200 tokens."""

    max_new_tokens: int | None = None  # length limit, including the stop token; None: 200, or fewer if the cache ends
    temperature: float = 0.0  # 0: greedy decoding; otherwise logits are divided by it and a token is sampled
    top_k: int = 0  # sample from the k most likely tokens, and those tied with the k-th; 0: all
    top_p: float = 1.0  # sample from the most likely of these that together reach probability p; 1: all
    # For tokens that are already in the answer: divides positive logits and multiplies negative ones; 1: no penalty.
    # The prompt does not count, as in the released model.
    repetition_penalty: float = 1.0
    seed: int = 0  # prompt i is sampled with seed + i, so its answer does not depend on the other prompts
    stop: tuple[str, ...] = ()  # texts that end an answer; the answer excludes them
    stop_ids: tuple[int, ...] | None = None  # tokens that end an answer; None: those of the tokenizer

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or any(not isinstance(text, str) for text in stop):
            raise ValueError(f"stop must be a str or a list of str (got {self.stop!r})")
        object.__setattr__(self, "stop", tuple(stop))
        if self.stop_ids is not None:
            try:
                object.__setattr__(self, "stop_ids", tuple(map(operator.index, self.stop_ids)))
            except TypeError:
                raise ValueError(f"stop_ids must be a list of integers (got {self.stop_ids!r})") from None
        for name, (convert, _, _) in _RULES.items():
            value = getattr(self, name)
            if name == "max_new_tokens" and value is None:
                continue
            try:
                if isinstance(value, bool | str):
                    raise TypeError
                object.__setattr__(self, name, convert(value))  # NumPy scalars are not JSON
            except (TypeError, ValueError, OverflowError):
                kind = "a number" if convert is float else "an integer"
                raise ValueError(f"{name} must be {kind} (got {value!r})") from None
        problems = [
            f"{name} must be {rule} (got {getattr(self, name)})"
            for name, (_, valid, rule) in _RULES.items()
            if not valid(getattr(self, name))
        ]
        if not all(self.stop):
            problems.append("stop contains an empty text")
        if problems:
            raise ValueError("; ".join(problems))


# field -> converter, whether a value is valid, the rule
_RULES = {
    "max_new_tokens": (operator.index, lambda n: n is None or n >= 1, "at least 1"),
    "temperature": (float, lambda x: 0 <= x < float("inf"), "0 (greedy) or a positive number"),
    "top_k": (operator.index, lambda k: 0 <= k < 2**31, "0 (all tokens) or a positive integer"),
    "top_p": (float, lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "repetition_penalty": (float, lambda x: 0 < x < float("inf"), "a positive number (1 for none)"),
    "seed": (operator.index, lambda seed: 0 <= seed < 2**31, "an integer from 0 to 2^31 - 1"),
}


def penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Return float32[B, V]: logits, reduced by float32[] `penalty` for the tokens in bool[B, V] `seen`."""
    smaller = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, smaller, logits)


def restricted(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return scores float32[B, V] to sample from: logits over temperature, -inf for excluded tokens.

    A token tied with the last included one is included too, so the result does not depend on the order of ids.
    temperature: float32[], above 0. top_k: int32[], 0 for all. top_p: float32[] in (0, 1].
    """
    v = logits.shape[-1]
    scores = logits / temperature
    ranked = -jnp.sort(-scores, axis=-1)
    in_top_k = jnp.arange(v) < jnp.where(top_k > 0, top_k, v)
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding of the cumulative sum must not drop tokens when top_p is 1.
    count = (in_top_k & ((before < top_p) | (top_p >= 1))).sum(axis=-1)
    threshold = jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)
    return jnp.where(scores >= threshold, scores, -jnp.inf)


def draw(scores: jax.Array, keys: jax.Array, steps: jax.Array) -> jax.Array:
    """Sample tokens int32[B] from scores float32[B, V].

    keys: uint32[B, 2], key data of each row. steps: int32[B], number of the token in each row's answer.
    """

    def sample(key, step, row):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(sample)(keys, steps, scores).astype(jnp.int32)
