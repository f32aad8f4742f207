"""The compiled functions of generation: visual tokens of scans, the first token of each answer, more tokens.

Letters: B rows, T prompt tokens, U cache length, S scan slots, L latents, E width, V vocabulary, W watched tokens.

All arrays that are kept between two tokens are in one dict, `state`, which is an argument and a result:

    cache    decoder.KVCache of length U
    length   int32[B]      tokens in the cache; the newest token is not in it yet
    token    int32[B]      the newest token
    count    int32[B]      tokens of the answer so far
    limit    int32[B]      maximum tokens of the answer; 0 in rows that pad the batch
    out      int32[B, U]   the answer
    logprob  float32[B, U] log probabilities of its tokens, before temperature and penalties
    done     bool[B]       the answer is complete
    failed   bool[B]       the logits were not finite: there is no answer
    seen     bool[B, V]    tokens of the answer, for the repetition penalty; bool[B, 1] without one
    keys     uint32[B, 2]  random keys
    watched  float32[B, W] log probabilities of the tokens choice["watch"] as the first token
    choice   temperature float32[], top_k int32[], top_p float32[], penalty float32[], stop_ids int32[16] padded with
             -1, watch int32[W]

Rows of a batch are independent: no row changes another one's answer, and a row that is not finite fails alone.
"""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from radfm_jax.inference.sampling import Sampling, draw, penalised, restricted
from radfm_jax.models import cpu_decode, decoder, radfm
from radfm_jax.runtime.sharding import constrain

STOP_IDS = 16


@functools.partial(jax.jit, static_argnums=0)
def visual_tokens(config: radfm.RadFMConfig, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Return visual tokens [B, S, L, E], and bool[B, S]: scans with values that are not finite."""
    # The whole network is traced; XLA drops what these two do not need.
    _, out = radfm.RadFM(config).apply({"params": params}, batch, method="hidden")
    return constrain(out["visual_tokens"], None, None, None, None), out["nonfinite_scans"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def first_token(
    config: radfm.RadFMConfig, length: int, sample: bool, penalise: bool, params: dict, prompt: dict, choice: dict
) -> dict:
    """Prefill the prompts, add the first token of each answer, and return the state.

    Args:
      length: U.
      sample, penalise: whether to draw tokens and to apply the repetition penalty; False compiles without them.
      params: llama (as trained, or from cpu_decode.split_params) and image_marks.
      prompt: ids, visual_index int32[B, T]; lengths, limit int32[B]; keys uint32[B, 2]; visual [B, S, L, E].
    """
    b, t = prompt["ids"].shape
    segments = (jnp.arange(t) < prompt["lengths"][:, None]).astype(jnp.int32)
    arrays = {"ids": prompt["ids"], "visual_index": prompt["visual_index"], "segments": segments}
    no_scan_is_bad = jnp.zeros(prompt["visual"].shape[:2], bool)
    with jax.named_scope("fusion"):
        network = radfm.RadFM(config)
        x, _ = network.apply({"params": params}, arrays, prompt["visual"], no_scan_is_bad, method="fuse")
        x = constrain(x, "batch", None, None)
    with jax.named_scope("prefill"):
        cache = _implementation(params).empty_cache(config.llama, b, length)
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
def more_tokens(
    config: radfm.RadFMConfig,
    sample: bool,
    penalise: bool,
    params: dict,
    state: dict,
    steps: jax.Array,
    stop: jax.Array,
) -> dict:
    """Add up to `steps` tokens to every answer; return earlier when all are done.

    `steps` int32[] is not static, so one program serves any number. `stop` bool[B] marks rows that end because
    their text contains a stop string.
    """

    def decode(carry):
        step, state = carry
        llama = params["llama"]
        x = decoder.Decoder(config.llama).apply({"params": llama}, state["token"][:, None], method="embed")
        hidden, cache = decoder.extend(config.llama, llama, x, state["length"], state["cache"])
        # Rows that are done do not advance, so they never run out of cache.
        length = state["length"] + jnp.where(state["done"], 0, 1)
        state = {**state, "cache": cache, "length": length}
        return step + 1, _with_token(state, _logits(config, params, hidden[:, 0]), sample, penalise)

    state = {**state, "done": state["done"] | stop}
    unfinished = lambda carry: (carry[0] < steps) & ~carry[1]["done"].all()  # noqa: E731
    return jax.lax.while_loop(unfinished, decode, (jnp.int32(0), state))[1]


def _implementation(params: dict) -> ModuleType:
    """Return the module with the `empty_cache` and `next_logits` for these parameters."""
    return cpu_decode if cpu_decode.is_split(params["llama"]) else decoder


def _logits(config, params, hidden) -> jax.Array:
    with jax.named_scope("logits"):
        return _implementation(params).next_logits(config.llama, params["llama"], hidden)


def _with_token(state: dict, logits: jax.Array, sample: bool, penalise: bool) -> dict:
    """Return the state with one more token in every row that is not done."""
    choice, rows = state["choice"], jnp.arange(logits.shape[0])
    active = ~state["done"]
    finite = jnp.isfinite(logits).all(axis=-1)
    failed = active & ~finite
    adding = active & finite
    # The token of a failed row is not used. With zeros, sampling is still well defined.
    logits = jnp.where(finite[:, None], logits, 0.0)
    scores = penalised(logits, state["seen"], choice["penalty"]) if penalise else logits
    if sample:
        scores = restricted(scores, choice["temperature"], choice["top_k"], choice["top_p"])
        token = draw(scores, state["keys"], state["count"])
    else:
        token = scores.argmax(axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
    # A row that adds nothing gets an index past the end, which the scatter drops.
    index = jnp.where(adding, state["count"], state["out"].shape[1])
    put = lambda array, value: array.at[rows, index].set(value, mode="drop")  # noqa: E731
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


def sampling_arrays(sampling: Sampling, stop_ids: tuple[int, ...], watch: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return the entry `choice` of a state. Raises ValueError for more than 16 stop ids."""
    if len(stop_ids) > STOP_IDS:
        raise ValueError(f"{len(stop_ids)} stop ids, at most {STOP_IDS} are supported")
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
