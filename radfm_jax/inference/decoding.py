"""The compiled functions: scans -> visual tokens, prompts -> first token, more tokens.

Letters: B rows, T prompt tokens, U places of the cache, S scan slots, L latents, E width, V vocabulary, W watched.

Everything between two tokens is one dict of arrays, `state`, an argument and a result:

    cache    {"key", "value"} [layers, B, kv heads, U, head dim], or a list of such with one layer each
    length   int32[B]      places in use; the newest token is not among them yet
    token    int32[B]      the newest token
    count    int32[B]      tokens of the answer so far
    limit    int32[B]      most tokens of the answer; 0 in rows that fill up a batch
    out      int32[B, U]   the answer
    logprob  float32[B, U] natural logarithms of the probabilities of its tokens, before temperature and the like
    done     bool[B]       nothing is added any more
    failed   bool[B]       logits were not finite: there is no answer
    seen     bool[B, V]    tokens of the answer, where repetitions are punished; else bool[B, 1]
    keys     uint32[B, 2]  of the draws
    watched  float32[B, W] natural logarithms of the probabilities that tokens choice["watch"] had of being the first
    choice   temperature float32[], top_k int32[], top_p float32[], penalty float32[], stop_ids int32[16], -1 for none,
             watch int32[W]

A row of a batch is a world of its own: no row changes another one's answer, and one that is not finite ends alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from radfm_jax.inference.sampling import Sampling, draw, penalised, restricted
from radfm_jax.models import decoder, radfm
from radfm_jax.runtime.sharding import constrain

STOP_IDS = 16


@functools.partial(jax.jit, static_argnums=0)
def visual_tokens(config: radfm.RadFMConfig, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Visual tokens [B, S, L, E] and, bool[B, S], which scans are not finite."""
    # The whole network is traced, and what does not lead to these two is not compiled.
    _, out = radfm.RadFM(config).apply({"params": params}, batch, method="hidden")
    return constrain(out["visual_tokens"], None, None, None, None), out["nonfinite_scans"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def begin(
    config: radfm.RadFMConfig, length: int, sample: bool, penalise: bool, params: dict, prompt: dict, choice: dict
) -> dict:
    """Reads the prompts and adds the first token of each answer.

    Args:
      length: U. sample, penalise: whether tokens are drawn, and repetitions punished; costs nothing where not.
      params: llama (with `blocks` a stack, or a list of layers and `head_rows`) and image_marks.
      prompt: ids, visual_index int32[B, T]; lengths, limit int32[B]; keys uint32[B, 2]; visual [B, S, L, E].
    Returns:
      The state.
    """
    b, t = prompt["ids"].shape
    segments = (jnp.arange(t) < prompt["lengths"][:, None]).astype(jnp.int32)
    embedding = {"llama": _without_blocks(params["llama"]), "image_marks": params["image_marks"]}
    arrays = {"ids": prompt["ids"], "visual_index": prompt["visual_index"], "segments": segments}
    finite = jnp.zeros(prompt["visual"].shape[:2], bool)
    with jax.named_scope("fusion"):
        x, _ = radfm.RadFM(config).apply({"params": embedding}, arrays, prompt["visual"], finite, method="fuse")
        x = constrain(x, "batch", None, None)
    with jax.named_scope("prefill"):
        cache = decoder.empty_cache(config.llama, b, length, apart=isinstance(params["llama"]["blocks"], list))
        hidden, cache = decoder.prefill(config.llama, params["llama"], x, prompt["lengths"], cache)
    last = jnp.take_along_axis(hidden, (prompt["lengths"] - 1)[:, None, None], axis=1)[:, 0]
    state = {
        "cache": cache,
        "length": prompt["lengths"],
        "token": jnp.zeros(b, jnp.int32),
        "count": jnp.zeros(b, jnp.int32),
        "limit": prompt["limit"],
        "out": jnp.zeros((b, length), jnp.int32),
        "logprob": jnp.zeros((b, length), jnp.float32),
        "done": prompt["limit"] <= 0,
        "failed": jnp.zeros(b, bool),
        "seen": jnp.zeros((b, config.llama.vocab_size if penalise else 1), bool),
        "keys": prompt["keys"],
        "choice": choice,
    }
    logits = _logits(config, params, last)
    state["watched"] = jax.nn.log_softmax(logits, axis=-1)[:, choice["watch"]]
    return _with_token(state, logits, sample, penalise)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def go_on(
    config: radfm.RadFMConfig,
    sample: bool,
    penalise: bool,
    params: dict,
    state: dict,
    steps: jax.Array,
    stop: jax.Array,
) -> dict:
    """Adds up to `steps` tokens to every answer; ends early when all are done.

    Args:
      steps: int32[]; one program serves any number.
      stop: bool[B], rows that ended for a reason that only their text shows.
    """

    def more(carry):
        step, state = carry
        return (step < steps) & ~state["done"].all()

    def one(carry):
        step, state = carry
        of = _without_blocks(params["llama"])
        x = decoder.Decoder(config.llama).apply({"params": of}, state["token"][:, None], method="embed")
        hidden, cache = decoder.extend(config.llama, params["llama"], x, state["length"], state["cache"])
        # Rows that are done stay where they are, so that they never run out of places.
        length = state["length"] + jnp.where(state["done"], 0, 1)
        state = {**state, "cache": cache, "length": length}
        return step + 1, _with_token(state, _logits(config, params, hidden[:, 0]), sample, penalise)

    state = {**state, "done": state["done"] | stop}
    return jax.lax.while_loop(more, one, (jnp.int32(0), state))[1]


def _without_blocks(params: dict) -> dict:
    return {name: x for name, x in params.items() if name != "blocks"}


def _logits(config, params, hidden) -> jax.Array:
    c, of = config.llama, params["llama"]
    with jax.named_scope("logits"):
        if "head_rows" in of:
            return decoder.head_logits(hidden, of["head_rows"], c.dtype, of.get("head_scale"), by_rows=True)
        head = of["embedding"].T if c.tied_head else of["head"]
        return decoder.head_logits(hidden, head, c.dtype, of.get("head_scale"))


def _with_token(state: dict, logits: jax.Array, sample: bool, penalise: bool) -> dict:
    """The state with one more token in every row that is not done."""
    choice, rows = state["choice"], jnp.arange(logits.shape[0])
    active = ~state["done"]
    finite = jnp.isfinite(logits).all(axis=-1)
    failed = active & ~finite
    adding = active & finite
    # What is drawn in a row that failed is not used, but must not trip anything.
    logits = jnp.where(finite[:, None], logits, 0.0)
    scores = penalised(logits, state["seen"], choice["penalty"]) if penalise else logits
    if sample:
        scores = restricted(scores, choice["temperature"], choice["top_k"], choice["top_p"])
        token = draw(scores, state["keys"], state["count"])
    else:
        token = scores.argmax(axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
    # Places beyond the end are dropped by the scatter: that of a row that adds nothing.
    place = jnp.where(adding, state["count"], state["out"].shape[1])
    put = lambda array, value: array.at[rows, place].set(value, mode="drop")  # noqa: E731
    count = state["count"] + adding
    stopped = (token[:, None] == choice["stop_ids"]).any(axis=-1)
    return {
        **state,
        "token": jnp.where(adding, token, state["token"]),
        "count": count,
        "out": put(state["out"], token),
        "logprob": put(state["logprob"], logprob),
        "seen": state["seen"].at[rows, token].max(adding) if penalise else state["seen"],
        "failed": state["failed"] | failed,
        "done": state["done"] | failed | (adding & (stopped | (count >= state["limit"]))),
    }


def choice_of(sampling: Sampling, stop_ids: tuple[int, ...], watch: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """The entry `choice` of a state. Raises ValueError for more than 16 stop ids."""
    if len(stop_ids) > STOP_IDS:
        raise ValueError(f"{len(stop_ids)} stop ids, at most {STOP_IDS} are possible")
    padded = np.full(STOP_IDS, -1, np.int32)
    padded[: len(stop_ids)] = stop_ids
    return {
        "temperature": np.float32(sampling.temperature or 1.0),
        "top_k": np.int32(sampling.top_k),
        "top_p": np.float32(sampling.top_p),
        "penalty": np.float32(sampling.repetition_penalty),
        "stop_ids": padded,
        "watch": np.array(watch, np.int32),
    }
