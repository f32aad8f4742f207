"""Attention, norms, MLP and the rematerialised stack."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from radfm_jax.models import vit3d
from radfm_jax.models.attention import attention
from radfm_jax.models.kernels.xla import attention_mask
from radfm_jax.models.layers import REMAT_POLICIES, GeluMlp, dense, layer_norm, rms_norm, scan_blocks

CONFIG = vit3d.ViTConfig(width=24)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- masks ------------------------------------------------------------------------------------------------------------


def matrix(text: str) -> np.ndarray:
    return np.array([[int(c) for c in line.split()] for line in text.strip().splitlines()], bool)


@pytest.mark.parametrize(
    "queries, keys, causal, seen",
    [
        (  # one segment
            "1 1 1 1",
            "1 1 1 1",
            True,
            """
            1 0 0 0
            1 1 0 0
            1 1 1 0
            1 1 1 1
            """,
        ),
        (  # two samples; padding attends to padding
            "1 1 1 2 2 0 0",
            "1 1 1 2 2 0 0",
            True,
            """
            1 0 0 0 0 0 0
            1 1 0 0 0 0 0
            1 1 1 0 0 0 0
            0 0 0 1 0 0 0
            0 0 0 1 1 0 0
            0 0 0 0 0 1 0
            0 0 0 0 0 1 1
            """,
        ),
        (  # the third key is hidden from every query, its own included
            "1 1 1 1 2 2",
            "1 1 -1 1 2 2",
            True,
            """
            1 0 0 0 0 0
            1 1 0 0 0 0
            1 1 0 0 0 0
            1 1 0 1 0 0
            0 0 0 0 1 0
            0 0 0 0 1 1
            """,
        ),
        (  # a segment that continues after another one
            "1 2 1 2",
            "1 2 1 2",
            False,
            """
            1 0 1 0
            0 1 0 1
            1 0 1 0
            0 1 0 1
            """,
        ),
        (  # latents of two scans attend to a row of patches and padding
            "1 1 2 2",
            "1 1 1 2 2 0",
            False,
            """
            1 1 1 0 0 0
            1 1 1 0 0 0
            0 0 0 1 1 0
            0 0 0 1 1 0
            """,
        ),
    ],
)
def test_attention_mask(queries, keys, causal, seen):
    segments = [np.array([[int(s) for s in text.split()]]) for text in (queries, keys)]
    np.testing.assert_array_equal(attention_mask(*segments, causal)[0], matrix(seen))


def plain_attention(q, k, v, mask):
    """float64, one query of one head at a time; mask bool[B, T, U]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, g] @ q[b, t, h] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, g]
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_the_reference(heads, kv_heads, causal):
    q, k, v = (normal(2, 9, n, 8, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    q_segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9])
    k_segments = np.array([[1, 1, -1, 1, 2, 2, -1, 0, 0], [1, 1, 1, -1, -1, 1, 1, 1, 1]])
    mask = np.array(attention_mask(q_segments, k_segments, causal))
    ours = jax.jit(functools.partial(attention, causal=causal, kernel="xla"))(q, k, v, q_segments, k_segments)
    # Measured 3e-7.
    np.testing.assert_allclose(ours, plain_attention(q, k, v, mask), atol=2e-6)


def test_queries_and_keys_of_different_lengths():
    q, k, v = normal(1, 4, 2, 8), normal(1, 6, 2, 8, seed=1), normal(1, 6, 2, 8, seed=2)
    q_segments, k_segments = np.array([[1, 1, 2, 2]]), np.array([[1, 1, 1, 2, 2, 0]])
    mask = np.array(attention_mask(q_segments, k_segments, False))
    ours = attention(q, k, v, q_segments, k_segments, causal=False)
    np.testing.assert_allclose(ours, plain_attention(q, k, v, mask), atol=2e-6)  # measured 1.3e-7


def test_a_query_that_sees_no_key_gets_the_mean_and_finite_gradients():
    q, k, v = (normal(1, 4, 2, 8, seed=i) for i in range(3))
    q_segments, k_segments = np.array([[1, 1, 1, 1]]), np.array([[-1, 1, 1, 1]])

    def total(q, k, v):
        out = attention(q, k, v, q_segments, k_segments, causal=True)
        return (out**2).sum(), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(out[:, 0], v.mean(axis=1), atol=1e-6)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_attention_with_large_scores_is_finite(offset):
    q, k, v = (normal(1, 5, 1, 8, seed=i) for i in range(3))
    ones = np.ones((1, 5), int)
    assert np.isfinite(attention(q * offset, k * offset, v, ones, ones, causal=True)).all()


def test_bfloat16_scores_and_softmax_are_float32():
    q, k, v = (normal(1, 64, 2, 16, seed=i).astype(jnp.bfloat16) for i in range(3))
    ones = np.ones((1, 64), int)
    out = attention(q, k, v, ones, ones, causal=False)
    assert out.dtype == jnp.bfloat16
    exact = plain_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), np.ones((1, 64, 64), bool))
    # Measured 2e-3: the rounding of weights and result. Scores in bfloat16 would give 1e-2.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=4e-3)


def test_unknown_names_list_the_choices():
    x, segments = normal(1, 2, 1, 8), np.ones((1, 2), int)
    with pytest.raises(ValueError, match="'flash'.*auto, xla, blocks, cudnn, splash"):
        attention(x, x, x, segments, segments, causal=True, kernel="flash")
    with pytest.raises(ValueError, match="'everything'.*" + ", ".join(REMAT_POLICIES)):
        scan_blocks(vit3d.EncoderBlock, 2, "everything")


# --- layers against PyTorch -------------------------------------------------------------------------------------------


def run(module: nn.Module, x, **replaced):
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x))["params"]
    assert replaced.keys() <= params.keys(), params.keys()
    params = {**params, **replaced}
    return module.apply({"params": params}, x), params


def test_layer_norm_matches_torch_with_a_large_mean():
    """With mean 3000 and deviation 1, E[x^2] - E[x]^2 has no correct digit."""
    x = normal(4, 96) + np.float32(3000)
    scale, bias = 1 + normal(96, seed=1) / 10, normal(96, seed=2)
    ours, _ = run(layer_norm(CONFIG, "norm"), x, scale=scale, bias=bias)
    theirs = torch.nn.functional.layer_norm(*map(torch.from_numpy, (x,)), (96,), *map(torch.from_numpy, (scale, bias)))
    # Measured 3e-4, the rounding of a float32 mean of 3000; the fast variance is off by 3e-2 and more.
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3)
    fast = nn.LayerNorm(epsilon=1e-5, use_fast_variance=True).apply({"params": {"scale": scale, "bias": bias}}, x)
    assert np.abs(fast - theirs.numpy()).max() > 1e-2


def test_layer_norm_epsilon():
    x = normal(4, 96) * np.float32(3e-3)  # variance 1e-5, as large as epsilon
    ours, _ = run(layer_norm(CONFIG, "norm"), x)
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(x), (96,))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)  # measured 2e-7


def test_rms_norm_matches_torch():
    x, scale = normal(4, 96) * np.float32(1e-3), 1 + normal(96, seed=1) / 10
    ours, _ = run(rms_norm(CONFIG, 1e-6, "norm"), x, scale=scale)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (96,), torch.from_numpy(scale), eps=1e-6)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)  # measured 2e-7


def test_norm_statistics_are_float32_in_bfloat16():
    config = vit3d.ViTConfig(width=24, dtype="bfloat16")
    x = (normal(4, 4096) + 8).astype(jnp.bfloat16)
    ours, _ = run(layer_norm(config, "norm"), x)
    assert ours.dtype == jnp.bfloat16
    x = torch.from_numpy(np.asarray(x, np.float32))
    theirs = torch.nn.functional.layer_norm(x, (4096,)).numpy()
    # Measured 2^-7, the rounding of a result of 4; statistics in bfloat16 would be off by 0.03.
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=2**-6)


@pytest.mark.parametrize("bias", [True, False])
def test_gelu_mlp_uses_erf(bias):
    module, x = GeluMlp(CONFIG, 32, bias), normal(3, 24) * 2
    ours, params = run(module, x)
    assert ("bias" in params["up"]) == ("bias" in params["down"]) == bias
    kernels = [torch.from_numpy(np.array(params[name]["kernel"])) for name in ("up", "down")]
    for approximate, same in (("none", True), ("tanh", False)):
        hidden = torch.nn.functional.gelu(torch.from_numpy(x) @ kernels[0], approximate=approximate)
        difference = np.abs(ours - (hidden @ kernels[1]).numpy()).max()
        assert (difference < 2e-6) == same, difference  # measured 5e-7; tanh differs by 1e-3


def test_dropout_of_the_mlp_needs_a_key_and_scales():
    module, x = GeluMlp(CONFIG, 32, True, dropout=0.5), normal(64, 24)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x))
    out = module.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert 0.45 < (np.asarray(out) == 0).mean() < 0.55
    np.testing.assert_array_equal(module.apply(params, x, deterministic=True), module.apply(params, x))


# --- precision and remat ----------------------------------------------------------------------------------------------


def products(f, *args) -> list[str]:
    """Return the lines of the lowered function that are matrix products."""
    text = jax.jit(f).lower(*args).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_have_full_precision(dtype):
    """By default TPUs and Ampere GPUs use fewer bits. Backward products are included."""
    config = vit3d.ViTConfig(width=24, dtype=dtype)
    mlp, linear = GeluMlp(config, 32, True), dense((2, 8), ("embed", "heads", "head_dim"), config)
    x = jnp.ones((1, 4, 24), dtype)
    p_mlp, p_linear = (nn.unbox(jax.eval_shape(m.init, jax.random.key(0), x)) for m in (mlp, linear))
    ones = np.ones((1, 4), int)

    def attend(q):
        return attention(q, q, q, ones, ones, causal=True).astype(jnp.float32).sum()

    found = [
        *products(jax.grad(lambda p, x: mlp.apply(p, x).astype(jnp.float32).sum(), (0, 1)), p_mlp, x),
        *products(jax.grad(lambda p, x: linear.apply(p, x).astype(jnp.float32).sum(), (0, 1)), p_linear, x),
        *products(jax.grad(attend), x.reshape(1, 4, 3, 8)),
    ]
    assert len(found) >= 2 + 4 + 2 + 6 - 2
    highest = [line for line in found if re.search(r"precision = \[HIGHEST, HIGHEST\]", line)]
    assert len(highest) == (len(found) if dtype == "float32" else 0), found


def block_stack(remat: str):
    """Return two blocks over 64 tokens as a function of their parameters, and the parameters."""
    config = vit3d.ViTConfig(width=24, num_layers=2, num_heads=2, head_dim=8, mlp_width=32, dropout=0.0)
    x, segments = jnp.asarray(normal(1, 64, 24)), np.array([[1] * 30 + [2] * 30 + [0] * 4])
    stack = scan_blocks(vit3d.EncoderBlock, 2, remat)(config)
    params = jax.eval_shape(stack.init, jax.random.key(0), x, segments)
    params = jax.tree.map(lambda s: jnp.asarray(normal(*s.shape, seed=s.size) / 4), nn.unbox(params))
    return lambda p: stack.apply(p, x, segments)[0], params


@functools.cache
def block_gradients(remat: str):
    stack, params = block_stack(remat)
    return jax.jit(jax.grad(lambda p: (stack(p) ** 2).sum()))(params)


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES.keys() - {"none"}))
def test_remat_does_not_change_numbers(remat):
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(block_gradients("none")))
    # The same sums with other fusions: measured 6e-8.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / scale, b / scale, atol=1e-6),
        block_gradients(remat),
        block_gradients("none"),
    )


def test_remat_policies_save_the_intermediates_they_name():
    """Compare the number of values saved for the backward pass."""
    kept = {}
    for remat in REMAT_POLICIES:
        stack, params = block_stack(remat)
        pullback = jax.eval_shape(lambda p, stack=stack: jax.vjp(stack, p)[1], params)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    one = 2 * 64 * 2 * 8  # an intermediate of two layers, 64 tokens, 2 heads of 8
    assert kept["attention"] - kept["full"] == one
    assert kept["projections"] - kept["attention"] == 3 * one
    assert kept["full"] < kept["attention"] < kept["projections"] < kept["dots"] < kept["none"], kept
