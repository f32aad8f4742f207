"""Weighted token cross-entropy as (sum, weight), with logits only where a target has weight.

Letters: B rows, T text tokens, N = B T positions, E width, V vocabulary, C positions a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from radfm_jax.models.decoder import head_logits
from radfm_jax.models.radfm import RadFM
from radfm_jax.runtime.sharding import BATCH

# How much a token counts, given the term weights of the data (0, 1 or 3; paper, equations 2 to 4).
WEIGHTINGS = ("weighted", "unweighted")
# What is divided by: all weights together, or those of each sample first, so that every sample counts 1 (or, between
# the two, the square root of its weight).
NORMALISATIONS = ("token", "sample", "sqrt_sample")


def radfm_loss(
    model: RadFM, params, batch, *, weighting="weighted", normalise="token", chunk=256, rngs=None
) -> tuple[jax.Array, jax.Array, dict]:
    """Loss of a packed batch as (sum, weight): sum them over micro-batches and devices, divide last.

    Args:
      batch: a batch of `models/radfm.py` with targets int32[B, T] (the token that position t should predict) and
        weights float32[B, T] (0 = not trained on).
      rngs: {"dropout": key} switches dropout on.
    Returns:
      sum, weight: float32 scalars. Nothing has weight: (0, 0), never NaN; divide by max(weight, tiny).
      out: intermediates of the model, and token_loss float32[B, T] (0 without weight), correct bool[B, T],
        weights float32[B, T] as used.
    """
    hidden, out = model.apply({"params": params}, batch, deterministic=rngs is None, rngs=rngs, method=RadFM.hidden)
    llama = params["llama"]
    kernel = llama["embedding"].T if model.config.llama.tied_head else llama["head"]
    weights = token_weights(batch["weights"], batch["segments"], weighting=weighting, normalise=normalise)
    with jax.named_scope("loss"):
        losses, correct = token_losses(
            hidden, kernel, batch["targets"], weights > 0, dtype=model.config.llama.dtype, chunk=chunk
        )
        # A sample with a voxel that is not finite must be seen, and by nobody else (models/radfm.py).
        losses = jnp.where(out["nonfinite_tokens"] & (weights > 0), jnp.nan, losses)
    total = jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))
    return total, jnp.sum(weights), {**out, "token_loss": losses, "correct": correct, "weights": weights}


def token_weights(weights: jax.Array, segments: jax.Array, *, weighting: str, normalise: str) -> jax.Array:
    """float32[B, T] term weights of the data -> weights of the loss. Raises ValueError for an unknown name."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is unknown: choose one of {', '.join(WEIGHTINGS)}")
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalisation {normalise!r} is unknown: choose one of {', '.join(NORMALISATIONS)}")
    weights = weights.astype(jnp.float32)
    if weighting == "unweighted":
        weights = (weights > 0).astype(jnp.float32)
    if normalise == "token":
        return weights
    sums = jax.vmap(lambda w, seg: jnp.zeros(w.size + 1).at[seg].add(w)[seg])(weights, segments)
    sums = jnp.where(sums > 0, sums, 1.0)
    return weights / (sums if normalise == "sample" else jnp.sqrt(sums))


def token_losses(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, active: jax.Array, *, dtype="float32", chunk=256
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every active position, and whether the most likely token is the target.

    Exact and without a budget: each device sorts its active positions to the front and walks them in chunks, so its
    memory is one chunk of logits and its time follows the number of labels.

    Args:
      hidden: float[B, T, E]; kernel: [E, V]; targets: int32[B, T]; active: bool[B, T].
      chunk: positions whose logits exist at a time, on each device.
    Returns:
      float32[B, T], 0 where inactive; bool[B, T], false where inactive.
    """

    def local(hidden, kernel, targets, active):
        b, t, e = hidden.shape
        size = min(chunk, b * t)
        flat = (hidden.reshape(b * t, e), kernel, targets.reshape(-1), active.reshape(-1))
        losses, correct = _chunked(size, dtype, *flat)
        return losses.reshape(b, t), correct.reshape(b, t)

    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a in BATCH if a in mesh.axis_names and a not in mesh.manual_axes}
    if not axes or np.prod([mesh.shape[a] for a in axes]) == 1:
        return local(hidden, kernel, targets, active)
    # By device, since sorting all rows together would move them. The kernel is gathered once, outside the walk.
    rows = PartitionSpec(BATCH)
    by_device = jax.shard_map(
        local, in_specs=(rows, PartitionSpec(), rows, rows), out_specs=(rows, rows), axis_names=axes, check_vma=False
    )
    return by_device(hidden, kernel, targets, active)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunk: int, dtype: str, hidden, kernel, targets, active):
    """[N, E], [E, V], [N], [N] -> losses float32[N], correct bool[N]."""
    return _forward(chunk, dtype, hidden, kernel, targets, active)[0]


def _walk(chunk: int, active: jax.Array, body, carry):
    """Calls body(positions int32[C], carry) for chunks of active positions; positions past the last one are N.

    The number of chunks is decided by the data, which reverse-mode cannot follow: hence the hand-written gradient.
    """
    n = active.size
    count = active.sum()
    order = jnp.argsort(~active, stable=True)
    order = jnp.where(jnp.arange(n) < count, order, n)  # n is out of range: gathers fill with zeros, scatters drop
    order = jnp.pad(order, (0, -n % chunk), constant_values=n)
    step = lambda i, c: body(jax.lax.dynamic_slice(order, (i * chunk,), (chunk,)), c)  # noqa: E731
    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, step, carry)


take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)


def _forward(chunk, dtype, hidden, kernel, targets, active):
    def body(at, carry):
        logits = head_logits(take(hidden, at), kernel, dtype)
        target = take(targets, at)
        top = logits.max(axis=-1)
        spread = jnp.log(jnp.exp(logits - top[:, None]).sum(axis=-1))
        # Two parts, not their sum: large logits leave no digits of `spread` in it.
        loss = spread + (top - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0])
        new = (loss, logits.argmax(-1) == target, top, spread)
        return tuple(old.at[at].set(x, mode="drop") for old, x in zip(carry, new, strict=True))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    losses, correct, *normaliser = _walk(chunk, active, body, (zeros, zeros.astype(bool), zeros, zeros))
    return (losses, correct), (hidden, kernel, targets, active, normaliser)


def _backward(chunk, dtype, saved, cotangents):
    hidden, kernel, targets, active, normaliser = saved
    weight, _ = cotangents

    def body(at, carry):
        d_hidden, d_kernel = carry
        h = take(hidden, at)
        top, spread = (take(x, at)[:, None] for x in normaliser)
        probabilities = jnp.exp(head_logits(h, kernel, dtype) - top - spread)
        target = jax.nn.one_hot(take(targets, at), kernel.shape[1], dtype=jnp.float32)
        d_logits = (probabilities - target) * take(weight, at)[:, None]
        d_hidden = d_hidden.at[at].set(head_logits(d_logits, kernel.T, dtype).astype(h.dtype), mode="drop")
        return d_hidden, d_kernel + head_logits(h.T, d_logits.astype(dtype), dtype)

    start = (jnp.zeros_like(hidden), jnp.zeros(kernel.shape, jnp.float32))
    d_hidden, d_kernel = _walk(chunk, active, body, start)
    zero = functools.partial(np.zeros, dtype=jax.dtypes.float0)
    return d_hidden, d_kernel.astype(kernel.dtype), zero(targets.shape), zero(active.shape)


_chunked.defvjp(_forward, _backward)
