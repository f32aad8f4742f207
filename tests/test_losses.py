"""The chunked loss against full logits, and its weights."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radfm_jax.runtime.sharding import make_mesh
from radfm_jax.training.losses import token_losses, token_weights

B, T, E, V = 8, 16, 24, 50
ACTIVE = {"none": 0.0, "tenth": 0.1, "half": 0.5, "all": 1.0}


def problem(labelled: float = 0.5, seed: int = 0):
    """Return hidden, kernel, targets and weights in {0, 1, 3}; rows differ in their number of active positions."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, T, E), np.float32)
    kernel = rng.standard_normal((E, V), np.float32) / 2
    targets = rng.integers(0, V, (B, T), np.int32)
    weights = np.where(rng.random((B, T)) < labelled, rng.choice([1, 3], (B, T)), 0).astype(np.float32)
    return hidden, kernel, targets, weights


def full_losses(hidden, kernel, targets, active):
    """Compute all logits, then log-sum-exp minus the target's logit."""
    logits = jnp.einsum("bte,ev->btv", hidden, kernel, precision="highest")
    at_target = (logits * (targets[..., None] == jnp.arange(V))).sum(-1)
    losses = jnp.log(jnp.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1) - at_target
    return jnp.where(active, losses, 0), active & (logits.argmax(-1) == targets)


def optax_losses(hidden, kernel, targets, active):
    logits = jnp.matmul(hidden, kernel, precision="highest")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(active, losses, 0), active & (logits.argmax(-1) == targets)


@functools.partial(jax.jit, static_argnames=("losses_of", "chunk", "dtype"))
def value_and_gradients(hidden, kernel, targets, weights, losses_of=token_losses, **how):
    """Return the weighted sum, token losses, correct tokens, and gradients of hidden states and kernel."""

    def total(hidden, kernel):
        losses, correct = losses_of(hidden, kernel, targets, weights > 0, **how)
        return (losses * weights).sum(), (losses, correct)

    (value, (losses, correct)), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return {"sum": value, "losses": losses, "correct": correct, "hidden": grads[0], "kernel": grads[1]}


def close(ours, reference, atol):
    for name in ("sum", "losses", "hidden", "kernel"):
        scale = max(1.0, float(jnp.abs(reference[name]).max()))
        np.testing.assert_allclose(ours[name] / scale, reference[name] / scale, atol=atol, err_msg=name)
    np.testing.assert_array_equal(ours["correct"], reference["correct"])


# --- against full logits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", ACTIVE.values(), ids=ACTIVE)
@pytest.mark.parametrize("chunk", [1, 7, 16, 128, 1000])  # 128, 18.3, 8, 1 chunks, and 1 that is not full
def test_equals_full_logits(labelled, chunk):
    inputs = problem(labelled)
    ours = value_and_gradients(*inputs, chunk=chunk)
    for reference in (full_losses, optax_losses):
        close(ours, value_and_gradients(*inputs, losses_of=reference), atol=2e-6)  # measured 3e-7
    assert ours["losses"].dtype == jnp.float32 and ours["correct"].dtype == bool
    inactive = inputs[3] == 0
    assert not any(np.asarray(ours[name])[inactive].any() for name in ("losses", "correct", "hidden"))


def test_correct_means_the_most_likely_token():
    hidden, kernel = np.eye(3, dtype=np.float32)[None], 5 * np.eye(3, dtype=np.float32)
    targets, active = np.array([[0, 2, 2]]), np.array([[True, True, False]])
    losses, correct = token_losses(hidden, kernel, targets, active)
    # softmax of (5, 0, 0): a wrong token costs 5 more than the correct one.
    right = np.log(np.exp(5) + 2) - 5
    np.testing.assert_allclose(losses, [[right, right + 5, 0]], atol=1e-6)  # measured 1.3e-7
    np.testing.assert_array_equal(correct, [[True, False, False]])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_every_mesh_matches_one_device(sizes):
    inputs = problem(0.3)
    inputs[3][2] = 0  # a device without active positions
    one = value_and_gradients(*inputs, chunk=7)
    with jax.set_mesh(make_mesh(*sizes)):
        close(value_and_gradients(*inputs, chunk=7), one, atol=2e-6)  # measured 2e-7: the kernel's sum in another order


def test_sums_over_micro_batches_equal_the_full_batch():
    hidden, kernel, targets, weights = problem(0.3)
    whole = value_and_gradients(hidden, kernel, targets, weights, chunk=7)
    parts = [value_and_gradients(hidden[i::4], kernel, targets[i::4], weights[i::4], chunk=7) for i in range(4)]
    for name in ("sum", "kernel"):
        summed = sum(part[name] for part in parts)
        scale = float(jnp.abs(whole[name]).max())
        np.testing.assert_allclose(summed / scale, whole[name] / scale, atol=1e-6)  # measured 2e-7
    for name in ("losses", "hidden"):
        for i, part in enumerate(parts):
            np.testing.assert_allclose(part[name], whole[name][i::4], atol=1e-6)  # measured 0


# --- edge cases -----------------------------------------------------------------------------------------------------


def test_no_active_position_gives_zeros():
    found = value_and_gradients(*problem(0.0), chunk=7)
    assert all(not np.asarray(x).any() for x in found.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("labelled", ACTIVE.values(), ids=ACTIVE)
def test_hidden_states_without_weight_have_no_effect(bad, labelled):
    """Indices out of range are clamped to the last position, which must not leak through a chunk's padding."""
    hidden, kernel, targets, weights = problem(labelled)
    weights[-1, -1] = 0
    clean = value_and_gradients(hidden, kernel, targets, weights, chunk=7)
    hidden[weights == 0] = bad
    found = value_and_gradients(hidden, kernel, targets, weights, chunk=7)
    jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_a_nonfinite_active_position_gives_a_nonfinite_loss():
    hidden, kernel, targets, weights = problem()
    weights[0, 0], hidden[0, 0] = 1, np.nan
    losses = value_and_gradients(hidden, kernel, targets, weights, chunk=7)["losses"]
    assert np.isnan(losses[0, 0]) and np.isfinite(losses).sum() == B * T - 1


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_stay_finite(size):
    hidden, kernel, targets, weights = problem()
    kernel *= np.float32(size) / np.abs(hidden @ kernel).max()
    found = value_and_gradients(hidden, kernel, targets, weights, chunk=7)
    assert all(np.isfinite(x).all() for x in found.values())
    assert found["losses"].max() > size / 2
    reference = value_and_gradients(hidden, kernel, targets, weights, losses_of=optax_losses)
    close(found, reference, atol=2e-6)  # measured 1e-7


def test_bfloat16_multiplies_in_it_and_sums_in_float32():
    """Gradients have the right dtypes and are close to float32 gradients of the same rounded inputs."""
    hidden, kernel, targets, weights = problem()
    hidden = hidden.astype(jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16).astype(np.float32)
    ours = value_and_gradients(hidden, kernel, targets, weights, dtype="bfloat16", chunk=16)
    exact = value_and_gradients(np.float32(hidden), rounded, targets, weights, losses_of=optax_losses)
    assert ours["losses"].dtype == ours["kernel"].dtype == jnp.float32 and ours["hidden"].dtype == jnp.bfloat16
    np.testing.assert_allclose(ours["losses"], exact["losses"], atol=5e-6)  # measured 1e-6
    for name in ("hidden", "kernel"):  # d_logits are rounded to 8 bits before the product
        scale = float(jnp.abs(exact[name]).max())
        np.testing.assert_allclose(np.float32(ours[name]) / scale, exact[name] / scale, atol=8e-3)  # measured 3.5e-3


@pytest.mark.parametrize("sizes", [None, (2, 4, 1)], ids=str)
def test_a_frozen_kernel_costs_no_gradient(sizes):
    """With a frozen kernel, the program has no product for its gradient."""
    hidden, kernel, targets, weights = problem()

    def products(argnums):
        def total(hidden, kernel):
            return (token_losses(hidden, kernel, targets, weights > 0, chunk=16)[0] * weights).sum()

        cost = jax.jit(jax.grad(total, argnums)).lower(hidden, kernel).compile().cost_analysis()
        return cost["flops"] / (2 * 16 * E * V)  # XLA counts the body of a loop once

    with jax.set_mesh(make_mesh(*sizes)) if sizes else contextlib.nullcontext():
        both, frozen, kernel_only = products((0, 1)), products(0), products(1)
    # Logits and the gradients of hidden states and kernel are three products, or two; the rest is softmax.
    assert both - frozen == pytest.approx(1, abs=0.1)
    assert both - kernel_only == pytest.approx(1, abs=0.1)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_token_weights():
    """Two samples and padding in a row; terms in the answers have weight 3.

    segments              1     1     1     1     2     2     2     0
    weights               0     1     3     0     0     1     1     0

    weighted, token       0     1     3     0     0     1     1     0
    weighted, sample      0   1/4   3/4     0     0   1/2   1/2     0
    weighted, sqrt        0   1/2   3/2     0     0  1/√2  1/√2     0
    unweighted, token     0     1     1     0     0     1     1     0
    unweighted, sample    0   1/2   1/2     0     0   1/2   1/2     0
    """
    segments, weights = np.array([[1, 1, 1, 1, 2, 2, 2, 0]]), np.array([[0, 1, 3, 0, 0, 1, 1, 0.0]])
    root = 2**-0.5
    for weighting, normalise, expected in [
        ("weighted", "token", [0, 1, 3, 0, 0, 1, 1, 0]),
        ("weighted", "sample", [0, 1 / 4, 3 / 4, 0, 0, 1 / 2, 1 / 2, 0]),
        ("weighted", "sqrt_sample", [0, 1 / 2, 3 / 2, 0, 0, root, root, 0]),
        ("unweighted", "token", [0, 1, 1, 0, 0, 1, 1, 0]),
        ("unweighted", "sample", [0, 1 / 2, 1 / 2, 0, 0, 1 / 2, 1 / 2, 0]),
        ("unweighted", "sqrt_sample", [0, root, root, 0, 0, root, root, 0]),
    ]:
        found = token_weights(weights, segments, weighting=weighting, normalise=normalise)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_token_weights_of_rows_are_independent():
    """The same segment number in two rows means two samples. Samples without weight and padding rows stay zero.

    segments   1 1 1 2          weights   1 1 0 0        sample   1/2 1/2  0   0
               1 1 2 2                    0 3 1 0                  0   1   1   0
               0 0 0 0                    0 0 0 0                  0   0   0   0
    """
    segments = np.array([[1, 1, 1, 2], [1, 1, 2, 2], [0, 0, 0, 0]])
    weights = np.array([[1, 1, 0, 0], [0, 3, 1, 0], [0, 0, 0, 0]])
    found = token_weights(weights, segments, weighting="weighted", normalise="sample")
    np.testing.assert_allclose(found, [[1 / 2, 1 / 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_unknown_names_list_the_choices():
    ones = np.ones((1, 2))
    with pytest.raises(ValueError, match="'paper'.*weighted, unweighted"):
        token_weights(ones, ones.astype(int), weighting="paper", normalise="token")
    with pytest.raises(ValueError, match="'batch'.*token, sample, sqrt_sample"):
        token_weights(ones, ones.astype(int), weighting="weighted", normalise="batch")
