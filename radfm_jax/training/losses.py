"""Weighted token cross-entropy as (sum, weight), with logits only where a target has weight.

Letters: B rows, T text tokens, N = B T positions, E width, V vocabulary, C positions per chunk.
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

# How term weights 0, 1 and 3 are used (paper, equations 2 to 4): unchanged, or 1 for all that are not 0.
WEIGHTINGS = ("weighted", "unweighted")
# A sample counts as its weight (token), as 1 (sample) or as the square root of its weight (sqrt_sample).
NORMALISATIONS = ("token", "sample", "sqrt_sample")


def radfm_loss(
    model: RadFM, params, batch, *, weighting="weighted", normalise="token", chunk=256, rngs=None
) -> tuple[jax.Array, jax.Array, dict]:
    """Return the loss of a packed batch as (sum, weight). Add both over micro-batches and devices; divide last.

    Args:
      batch: a batch of `models/radfm.py` with targets int32[B, T] (the token that position t should predict) and
        weights float32[B, T] (0 = not trained on).
      rngs: {"dropout": key} enables dropout.
    Returns:
      sum, weight: float32 scalars; (0, 0) without weights, so divide by max(weight, tiny).
      out: intermediates of the model, token_loss float32[B, T] (0 without weight), correct bool[B, T], and weights
        float32[B, T] as used.
    """
    weights = token_weights(batch["weights"], batch["segments"], weighting=weighting, normalise=normalise)
    out = answer_losses(model, params, batch, weights > 0, chunk=chunk, rngs=rngs)
    total = jnp.sum(jnp.where(weights > 0, weights * out["token_loss"], 0.0))
    return total, jnp.sum(weights), {**out, "weights": weights}


def answer_losses(model: RadFM, params, batch, active: jax.Array, *, chunk: int, rngs=None) -> dict:
    """Return the intermediates of the model, with token_loss float32[B, T] and correct bool[B, T].

    token_loss is minus the log probability of the target; 0 where bool[B, T] `active` is false.
    """
    hidden, out = model.apply({"params": params}, batch, deterministic=rngs is None, rngs=rngs, method=RadFM.hidden)
    llama, c = params["llama"], model.config.llama
    kernel = llama["embedding"].T if c.tied_head else llama["head"]
    with jax.named_scope("loss"):
        losses, correct = token_losses(
            hidden, kernel, batch["targets"], active, dtype=c.dtype, chunk=chunk, softcap=c.logit_softcap
        )
        # Only samples with a voxel that is not finite get a NaN loss (models/radfm.py).
        losses = jnp.where(out["nonfinite_tokens"] & active, jnp.nan, losses)
    return {**out, "token_loss": losses, "correct": correct}


def token_weights(weights: jax.Array, segments: jax.Array, *, weighting: str, normalise: str) -> jax.Array:
    """Convert term weights of the data, [B, T], to weights of the loss. Raises ValueError for an unknown name."""
    for kind, name, known in (("weighting", weighting, WEIGHTINGS), ("normalisation", normalise, NORMALISATIONS)):
        if name not in known:
            raise ValueError(f"{kind} {name!r} is unknown: choose one of {', '.join(known)}")
    weights = weights.astype(jnp.float32)
    if weighting == "unweighted":
        weights = (weights > 0).astype(jnp.float32)
    if normalise == "token":
        return weights
    sums = jax.vmap(lambda w, seg: jnp.zeros(w.size + 1).at[seg].add(w)[seg])(weights, segments)
    sums = jnp.where(sums > 0, sums, 1.0)
    return weights / (sums if normalise == "sample" else jnp.sqrt(sums))


def token_losses(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, active: jax.Array, *, dtype: str = "float32",
    chunk: int = 256, softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Return the cross-entropy of each active position, and whether the most likely token is the target.

    Each device sorts its active positions to the front and loops over chunks of them. So it needs memory for the
    logits of one chunk, and its time is proportional to the number of active positions.

    Args:
      hidden: float[B, T, E]; kernel: [E, V]; targets: int32[B, T]; active: bool[B, T].
      chunk: number of positions per device whose logits are materialized at once.
      softcap: soft cap of the logits (`decoder.head_logits`).
    Returns:
      float32[B, T] and bool[B, T], 0 and false where inactive.
    """

    def local(hidden, kernel, targets, active):
        b, t, e = hidden.shape
        flat = (hidden.reshape(b * t, e), kernel, targets.reshape(-1), active.reshape(-1))
        losses, correct = _chunked(min(chunk, b * t), dtype, softcap, *flat)
        return losses.reshape(b, t), correct.reshape(b, t)

    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a in BATCH if a in mesh.axis_names and a not in mesh.manual_axes}
    if not axes or np.prod([mesh.shape[a] for a in axes]) == 1:
        return local(hidden, kernel, targets, active)
    # Sort per device, because a global sort would move rows between devices. Gather the kernel once, before the loop.
    rows = PartitionSpec(BATCH)
    sharded = jax.shard_map(
        local, in_specs=(rows, PartitionSpec(), rows, rows), out_specs=(rows, rows), axis_names=axes, check_vma=False
    )
    return sharded(hidden, kernel, targets, active)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(chunk: int, dtype: str, softcap: float | None, hidden, kernel, targets, active):
    """[N, E], [E, V], [N], [N] -> losses float32[N], correct bool[N]."""
    return _forward(chunk, dtype, softcap, hidden, kernel, targets, active)[0]


def _loop_over_chunks(chunk: int, active: jax.Array, body, carry):
    """Run body(positions int32[C], carry) -> carry for each chunk of active positions; unused entries are N.

    The number of chunks depends on the data. Reverse-mode differentiation does not support that, hence the custom VJP.
    """
    n = active.size
    count = active.sum()
    order = jnp.argsort(~active, stable=True)
    order = jnp.where(jnp.arange(n) < count, order, n)  # out of range: gathers fill with zeros, scatters drop
    order = jnp.pad(order, (0, -n % chunk), constant_values=n)
    step = lambda i, c: body(jax.lax.dynamic_slice(order, (i * chunk,), (chunk,)), c)  # noqa: E731
    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, step, carry)


take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)


def _forward(chunk, dtype, softcap, hidden, kernel, targets, active):
    def body(positions, carry):
        logits = head_logits(take(hidden, positions), kernel, dtype, softcap=softcap)
        target = take(targets, positions)
        maximum = logits.max(axis=-1)
        log_sum = jnp.log(jnp.exp(logits - maximum[:, None]).sum(axis=-1))
        # The normaliser is saved as two parts: the sum of a large maximum and `log_sum` would lose digits.
        loss = log_sum + (maximum - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0])
        new = (loss, logits.argmax(-1) == target, maximum, log_sum)
        return tuple(old.at[positions].set(x, mode="drop") for old, x in zip(carry, new, strict=True))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    losses, correct, *normaliser = _loop_over_chunks(chunk, active, body, (zeros, zeros.astype(bool), zeros, zeros))
    return (losses, correct), (hidden, kernel, targets, active, normaliser)


def _backward(chunk, dtype, softcap, saved, cotangents):
    hidden, kernel, targets, active, normaliser = saved
    weight, _ = cotangents

    def body(positions, carry):
        d_hidden, d_kernel = carry
        h = take(hidden, positions)
        maximum, log_sum = (take(x, positions)[:, None] for x in normaliser)
        logits = head_logits(h, kernel, dtype, softcap=softcap)
        probabilities = jnp.exp(logits - maximum - log_sum)
        target = jax.nn.one_hot(take(targets, positions), kernel.shape[1], dtype=jnp.float32)
        d_logits = (probabilities - target) * take(weight, positions)[:, None]
        if softcap is not None:
            d_logits *= 1 - (logits / softcap) ** 2  # the derivative of tanh
        d_hidden = d_hidden.at[positions].set(head_logits(d_logits, kernel.T, dtype).astype(h.dtype), mode="drop")
        return d_hidden, d_kernel + head_logits(h.T, d_logits.astype(dtype), dtype)

    start = (jnp.zeros_like(hidden), jnp.zeros(kernel.shape, jnp.float32))
    d_hidden, d_kernel = _loop_over_chunks(chunk, active, body, start)
    zero = functools.partial(np.zeros, dtype=jax.dtypes.float0)
    return d_hidden, d_kernel.astype(kernel.dtype), zero(targets.shape), zero(active.shape)


_chunked.defvjp(_forward, _backward)
