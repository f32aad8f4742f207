"""Tile attention for CPUs in plain XLA: skips tiles in which no query sees a key, and never builds a T x U array.

A row packed with many samples has few active tiles: a quarter of the causal tiles for 2,048 tokens in samples of 150.
A sliding window has few too.
On an accelerator each loop step would launch one or more kernels, so only CPUs use it.

Letters: B rows, T query tokens, U key tokens, H query heads, G key/value heads, K head width; C, D queries and keys
of a tile; I = T / C, J = U / D tiles per row each way; X = C H / G queries that share a key head in a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from radfm_jax.models.kernels.sharded import run_per_device
from radfm_jax.models.layers import matmul_precision, soft_cap

TILE = 256
LOWEST = jnp.finfo(jnp.float32).min


class Form(NamedTuple):
    """Options of `attention.attention`."""

    causal: bool
    window: int
    scale: float
    softcap: float | None


def tiled_attention(q, k, v, q_segments, k_segments, *, causal: bool, window=0, scale=None, softcap=None) -> jax.Array:
    """Apply `attend_in_tiles` to each device's rows and heads."""
    form = Form(causal, window, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    arrays = (jnp.asarray(x) for x in (q, k, v, q_segments, k_segments))
    return run_per_device(lambda *local: attend_in_tiles(*local, form), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_in_tiles(q, k, v, q_segments, k_segments, form: Form) -> jax.Array:
    """Compute attention as `attention.attention` does, for T and U that are multiples of 128.

    A query that sees no key gets zeros; a padding query (segment 0) may get zeros.
    """
    return _forward(q, k, v, q_segments, k_segments, form)[0]


def _forward(q, k, v, q_segments, k_segments, form):
    tiles = _Tiles(q, k, q_segments, k_segments, form)
    queries, keys, values = tiles.split_queries(q), tiles.split_keys(k), tiles.split_keys(v)

    def step(query, key, carry):
        scores, allowed = tiles.scores(queries, keys, query, key)
        out, maximum, total = (x[query] for x in carry)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        weights = jnp.where(allowed, jnp.exp(scores - new_maximum[..., None]), 0.0)
        rescale = jnp.exp(maximum - new_maximum)
        out = out * rescale[..., None] + tiles.product("gxd,gdk->gxk", weights.astype(v.dtype), values[key])
        new = (out, new_maximum, total * rescale + weights.sum(axis=-1))
        return tuple(old.at[query].set(x) for old, x in zip(carry, new, strict=True))

    zeros = jnp.zeros(queries.shape, jnp.float32)
    out, maximum, total = tiles.loop(step, (zeros, jnp.full(queries.shape[:-1], LOWEST), zeros[..., 0]))
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = tiles.to_rows(out / total[..., None], q.shape).astype(v.dtype)
    # A remat policy that saves "attention" must save the normaliser too: the backward pass then skips this forward.
    out, normaliser = (checkpoint_name(x, "attention") for x in (out, maximum + jnp.log(total)))
    return out, (q, k, v, q_segments, k_segments, out, normaliser)


def _backward(form, saved, gradient):
    q, k, v, q_segments, k_segments, out, normaliser = saved
    tiles = _Tiles(q, k, q_segments, k_segments, form)
    queries, keys, values = tiles.split_queries(q), tiles.split_keys(k), tiles.split_keys(v)
    gradients = tiles.split_queries(gradient)
    mean_gradient = (gradients.astype(jnp.float32) * tiles.split_queries(out)).sum(axis=-1)

    def step(query, key, carry):
        d_queries, d_keys, d_values = carry
        scores, allowed = tiles.scores(queries, keys, query, key)
        weights = jnp.where(allowed, jnp.exp(scores - normaliser[query][..., None]), 0.0)
        d_weights = tiles.product("gxk,gdk->gxd", gradients[query], values[key])
        d_scores = weights * (d_weights - mean_gradient[query][..., None]) * form.scale
        if form.softcap is not None:
            d_scores *= 1 - jnp.clip(scores / form.softcap, -1, 1) ** 2  # masked scores are LOWEST: 0, not infinity
        d_scores = d_scores.astype(q.dtype)
        return (
            d_queries.at[query].add(tiles.product("gxd,gdk->gxk", d_scores, keys[key])),
            d_keys.at[key].add(tiles.product("gxd,gxk->gdk", d_scores, queries[query])),
            d_values.at[key].add(tiles.product("gxd,gxk->gdk", weights.astype(v.dtype), gradients[query])),
        )

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (queries, keys, values))
    sums = zip(tiles.loop(step, tuple(zeros)), (q, k, v), strict=True)
    return *(tiles.to_rows(total, x.shape).astype(x.dtype) for total, x in sums), None, None


attend_in_tiles.defvjp(_forward, _backward)


class _Tiles:
    """The tiles of all rows, and the list of active pairs of a query tile and a key tile."""

    def __init__(self, q, k, q_segments, k_segments, form: Form):
        b, t, h, _ = q.shape
        u, self.heads = k.shape[1:3]
        self.form, self.group = form, h // self.heads
        self.precision = matmul_precision(q.dtype)
        self.c, self.d = (TILE if n % TILE == 0 else 128 for n in (t, u))
        self.i, self.j = t // self.c, u // self.d
        self.q_segments, self.k_segments = jnp.reshape(q_segments, (-1, self.c)), jnp.reshape(k_segments, (-1, self.d))
        # A pair is active if the ranges of its segments overlap. This test is cheap, but keeps a few unnecessary pairs.
        low_q, high_q, low_k, high_k = (
            pick(x, axis=1).reshape(b, -1) for x in (self.q_segments, self.k_segments) for pick in (jnp.min, jnp.max)
        )
        active = (low_q[:, :, None] <= high_k[:, None]) & (low_k[:, None] <= high_q[:, :, None])
        active &= high_q[:, :, None] > 0  # outputs of padding queries are never read
        if form.causal:
            first_key, query = jnp.arange(self.j) * self.d, jnp.arange(self.i)[:, None]
            active &= first_key < (query + 1) * self.c
            if form.window:
                active &= query * self.c - (first_key + self.d - 1) < form.window
        self.count = active.sum()
        self.order = jnp.argsort(~active.reshape(-1), stable=True)

    def loop(self, step, carry):
        """Run step(query tile, key tile, carry) -> carry for each active pair."""

        def body(n, carry):
            query, key = jnp.divmod(self.order[n], self.j)
            return step(query, query // self.i * self.j + key, carry)

        return jax.lax.fori_loop(0, self.count, body, carry)

    def split_queries(self, x):
        """Split queries [B, T, H, K] into tiles [B I, G, X, K]."""
        x = x.reshape(-1, self.c, self.heads, self.group, x.shape[-1])
        return jnp.moveaxis(x, 1, 3).reshape(x.shape[0], self.heads, -1, x.shape[-1])

    def split_keys(self, x):
        """Split keys or values [B, U, G, K] into tiles [B J, G, D, K]."""
        return jnp.moveaxis(x.reshape(-1, self.d, *x.shape[2:]), 1, 2)

    def to_rows(self, x, shape):
        """Invert `split_queries` or `split_keys`."""
        n, heads, _, width = x.shape
        x = x.reshape(n, heads, shape[2] // heads, -1, width)
        return jnp.moveaxis(x, 3, 1).reshape(shape)

    def product(self, letters, x, y):
        return jnp.einsum(letters, x, y, precision=self.precision, preferred_element_type=jnp.float32)

    def scores(self, queries, keys, query, key):
        """Return float32[G, X, D] scores, LOWEST where masked, and the mask bool[X, D]."""
        allowed = self.q_segments[query][:, None] == self.k_segments[key]
        form = self.form
        if form.causal:
            first_query, first_key = query % self.i * self.c, key % self.j * self.d
            at_key, at_query = first_key + jnp.arange(self.d), first_query + jnp.arange(self.c)[:, None]
            allowed &= at_key <= at_query
            if form.window:
                allowed &= at_query - at_key < form.window
        allowed = jnp.tile(allowed, (self.group, 1))
        scores = soft_cap(self.product("gxk,gdk->gxd", queries[query], keys[key]) * form.scale, form.softcap)
        return jnp.where(allowed, scores, LOWEST), allowed
