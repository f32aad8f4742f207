"""One train step: accumulation, frozen parts, meshes, values that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import pytest
from jax.extend.core import jaxprs_in_params

from input_pipeline.samples import TASKS
from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.models.radfm import RadFM
from radfm_jax.runtime import sharding
from radfm_jax.training import train_step
from radfm_jax.training.losses import radfm_loss
from radfm_jax.training.optimizer import OptimizerConfig, optimizer, split

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip=1.0)
RATE = np.float32(1e-2)


def batch_of(rows, accumulation=1, *, mesh, **changes):
    """Put rows of packed.py on the devices; segment s of a row is task s (from 1: modality, diagnosis, ...)."""
    arrays = packed.stack(packed.row([packed.SAMPLES[s] for s in names], **packed.SIZES) for names in rows)
    arrays["tasks"] = np.minimum(arrays["segments"], len(TASKS))
    return train_step.put_batch(arrays | changes, mesh, accumulation)


ROWS = ("AB", "CD", "BC", "DA", "C", "AC", "DB", "A")


@functools.cache
def setting(data, fsdp, tensor, frozen=(), devices=8):
    mesh = sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[:devices])
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, frozen=frozen)
    abstract, transform, _ = train_step.abstract_state(packed.CONFIG, config, mesh)
    return mesh, config, abstract, transform


@functools.cache
def compiled(data, fsdp, tensor, frozen, devices, normalise):
    _, _, abstract, transform = setting(data, fsdp, tensor, frozen, devices)
    step = train_step.make_train_step(packed.CONFIG, transform, train_step.StepConfig(normalise=normalise, chunk=16))
    return jax.jit(step, donate_argnums=0, out_shardings=(train_step.shardings_of(abstract), None))


@functools.cache
def initial():
    """Return the initial state in numpy: every mesh starts from it, and steps donate their state."""
    _, config, abstract, transform = setting(1, 1, 1, (), 1)
    state = train_step.init_state(abstract, packed.CONFIG, config, transform, seed=0)
    return jax.tree.map(np.asarray, {**state, "step": np.int32(5)})


def start(frozen=()):
    """Return `initial` with a frozen part, which has no moments."""
    trainable, fixed = split(train_step.params_of(initial()), frozen)
    _, _, abstract, _ = setting(1, 1, 1, frozen, 1)
    moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract["opt"])
    return {**initial(), "params": trainable, "frozen": fixed, "opt": moments}


def fresh(data=1, fsdp=1, tensor=1, frozen=(), devices=1):
    mesh, _, abstract, _ = setting(data, fsdp, tensor, frozen, devices)
    return mesh, jax.device_put(start(frozen), train_step.shardings_of(abstract))


def step_on(*, data=1, fsdp=1, tensor=1, frozen=(), devices=1, normalise="token"):
    """Return the jitted step. Calls with the same arguments share it and its traces."""
    return compiled(data, fsdp, tensor, frozen, devices, normalise)


def run(rows, accumulation=1, steps=2, normalise="token", **where):
    mesh, state = fresh(**where)
    step = step_on(normalise=normalise, **where)
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = step(state, batch_of(rows, accumulation, mesh=mesh), RATE)
    return jax.tree.map(np.asarray, (state, metrics))


def close(a, b, tolerance):
    for (path, x), y in zip(flatten(a).items(), flatten(b).values(), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, err_msg=path)


@functools.cache
def by_hand():
    """Return (mean loss, intermediates, gradients, their norm, updated parameters) of ROWS with the initial state.

    The loss is sum / weight over all rows at once; optax updates the parameters.
    """
    rows = packed.stack(packed.row([packed.SAMPLES[s] for s in names], **packed.SIZES) for names in ROWS)

    def mean(params):
        total, weight, out = radfm_loss(RadFM(packed.CONFIG), params, rows, chunk=16)
        return total / weight, {name: out[name] for name in ("token_loss", "weights", "correct")}

    @jax.jit
    def computed(params):
        (loss, out), grads = jax.value_and_grad(mean, has_aux=True)(params)
        transform = optimizer(CONFIG, params)
        updates, _ = transform.update(grads, transform.init(params), params)
        down = jax.tree.map(lambda u: -RATE * u, updates)
        return loss, out, grads, optax.tree_utils.tree_norm(grads), optax.apply_updates(params, down)

    return jax.device_get(computed(train_step.params_of(initial())))


def test_a_step_is_adam_on_the_mean_of_all_weights():
    loss, _, grads, norm, expected = by_hand()
    after, metrics = run(ROWS, steps=1)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert after["step"] == 6 and metrics["finite"]
    # Adam's first update is the gradient's sign times the rate, 1e-2. For gradients near epsilon, rounding changes the
    # update, so only its size is checked.
    clear = {path: (np.abs(g) > 1e-6) | (g == 0) for path, g in flatten(grads).items()}
    assert np.mean(np.concatenate([np.ravel(x) for x in clear.values()])) > 0.99
    after, expected = flatten(train_step.params_of(after)), flatten(expected)
    for path, known in clear.items():
        off = np.abs(after[path] - np.asarray(expected[path]))
        assert off[known].max() < 1e-5 and off.max() <= 2 * RATE, path


def test_accumulation_is_exact():
    """4 micro-batches of 2 rows with different weights equal 8 rows at once.

    Measured 3e-5 after two steps of Adam, which divides by the gradient's magnitude.
    """
    at_once, m1 = run(ROWS)
    in_four, m4 = run(ROWS, accumulation=4)
    close(at_once["params"], in_four["params"], 5e-5)
    np.testing.assert_allclose(m1["loss"], m4["loss"], rtol=2e-6)
    assert m1["weight"] == m4["weight"]
    assert np.abs(m1["task_loss"] - m4["task_loss"]).max() < 1e-5


def test_every_mesh_takes_the_same_step():
    alone, metrics = run(ROWS)
    sharded, others = run(ROWS, data=2, fsdp=2, tensor=2, devices=8)
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=5e-6)
    close(alone["params"], sharded["params"], 1e-4)


@functools.cache
def frozen_run():
    """Return the first step of 4 micro-batches with a frozen part, in which each micro-batch has the same weight."""
    return run(ROWS, accumulation=4, steps=1, normalise="micro_batch", frozen=("llama",))


def test_micro_batches_with_equal_weights():
    """The original divides each micro-batch by its own weight, which is another loss."""
    loss, out, *_ = by_hand()
    sums, weights = (x.reshape(4, -1).sum(axis=1) for x in (out["token_loss"] * out["weights"], out["weights"]))
    metrics = frozen_run()[1]
    np.testing.assert_allclose(metrics["loss"], np.mean(sums / weights), rtol=2e-6)
    assert abs(metrics["loss"] - loss) > 1e-3 and metrics["weight"] == 4


def test_a_frozen_part_is_unchanged_and_costs_no_gradient():
    before = start(("llama",))
    after, _ = frozen_run()
    for path, x in flatten(before["frozen"]).items():
        assert path.startswith("llama/")
        np.testing.assert_array_equal(x, flatten(after["frozen"])[path])
    moved = flatten(after["params"])
    assert all((x != moved[path]).any() for path, x in flatten(before["params"]).items() if "kernel" in path)
    moments = [x for x in jax.tree.leaves(before["opt"]) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(before["params"]))
    # The step computes no array with the shape of a frozen kernel.
    assert made((2, 32, 64), frozen=("llama",), normalise="micro_batch") == 0 < made((2, 32, 64))


def made(shape, frozen=(), normalise="token"):
    """Count the arrays of a shape that a step of 4 micro-batches computes, without its inputs and slices of them."""
    mesh, state = fresh(frozen=frozen)
    with jax.set_mesh(mesh):
        step = step_on(frozen=frozen, normalise=normalise)
        jaxpr = step.trace(state, batch_of(ROWS, 4, mesh=mesh), RATE).jaxpr
    found, todo = 0, [jaxpr.jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            inner = list(jaxprs_in_params(equation.params))
            todo += inner
            if not inner or equation.primitive.name == "scan":
                found += sum(getattr(v.aval, "shape", None) == shape for v in equation.outvars)
    return found


@pytest.mark.parametrize("poison", ["loss", "voxel"])
def test_nonfinite_values_leave_the_state_unchanged(poison):
    mesh, state = fresh()
    before = initial()
    broken = {"scan_scale": np.full((8, packed.SIZES["slots"]), np.nan, np.float32)} if poison == "voxel" else {
        "weights": np.full((8, packed.SIZES["text"]), np.inf, np.float32)
    }  # fmt: skip
    step = step_on()
    with jax.set_mesh(mesh):
        state, metrics = step(state, batch_of(ROWS, mesh=mesh, **broken), RATE)
        assert not metrics["finite"] and state["skipped"] == 1 and state["step"] == 6
        for name in ("params", "opt"):
            for x, y in zip(jax.tree.leaves(before[name]), jax.tree.leaves(state[name]), strict=True):
                np.testing.assert_array_equal(x, y)
        state, metrics = step(state, batch_of(ROWS, mesh=mesh, **broken), RATE)
        assert state["skipped"] == 2
        state, metrics = step(state, batch_of(ROWS, mesh=mesh), RATE)
        assert metrics["finite"] and state["skipped"] == 0


def test_evaluation_counts_by_task():
    """Compare the sums of row "AB" (segments 1, modality, and 2, diagnosis) with the intermediates of the loss."""
    mesh, state = fresh()
    params, out = train_step.params_of(state), by_hand()[1]
    evaluate = jax.jit(train_step.make_eval_step(packed.CONFIG, train_step.StepConfig(chunk=16)))
    with jax.set_mesh(mesh):
        counts = evaluate(params, batch_of(("AB", "B"), mesh=mesh))
    found = train_step.summarise(counts)
    assert list(found) == ["all", "modality", "diagnosis"]
    assert [found[k]["samples"] for k in found] == [3, 2, 1]
    row = packed.row([packed.A, packed.B], **packed.SIZES)  # ROWS[0]
    of_b = ((row["segments"] == 2) & (row["weights"] > 0))[0]
    expected = (out["token_loss"][0] * row["weights"][0])[of_b].sum() / row["weights"][0][of_b].sum()
    np.testing.assert_allclose(found["diagnosis"]["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["diagnosis"]["token_accuracy"], out["correct"][0][of_b].mean())


def test_a_sample_is_exact_if_every_trained_token_is_correct():
    """Segments and tasks 1 1 1 2 2 0: the first sample has a wrong token, the second none; padding does not count."""
    batch = {"segments": np.array([[1, 1, 1, 2, 2, 0]]), "tasks": np.array([[1, 1, 1, 2, 2, 0]])}
    out = {
        "weights": np.array([[0, 1, 3, 1, 1, 0]], np.float32),
        "token_loss": np.array([[9, 1, 2, 0.5, 0.5, 9]], np.float32),
        "correct": np.array([[False, True, False, True, True, False]]),
    }
    found = train_step.summarise(train_step._counts(batch, jax.tree.map(jnp.asarray, out)))
    assert found["modality"] == {"loss": 7 / 4, "token_accuracy": 0.5, "exact_match": 0.0, "samples": 1}
    assert found["diagnosis"] == {"loss": 0.5, "token_accuracy": 1.0, "exact_match": 1.0, "samples": 1}
    assert found["all"]["exact_match"] == 0.5


def test_init_state_keeps_loaded_parameters():
    mesh, config, abstract, transform = setting(2, 2, 2)
    fresh = initial()["params"]
    loaded = {path: x + 1 for path, x in flatten(fresh).items() if not path.startswith("perceiver")}
    loaded = jax.device_put(loaded, {path: flatten(abstract["params"])[path].sharding for path in loaded})
    state = train_step.init_state(abstract, packed.CONFIG, config, transform, seed=0, loaded=loaded)
    assert jax.tree.map(lambda x: x.sharding, state) == train_step.shardings_of(abstract)
    for path, x in flatten(state["params"]).items():
        if path in loaded:
            assert x is loaded[path]
        else:
            np.testing.assert_allclose(x, flatten(fresh)[path], atol=1e-6, err_msg=path)


def test_indivisible_rows():
    mesh = sharding.make_mesh(2, 4, 1)
    with pytest.raises(ValueError, match="8 rows per process do not divide into 3 micro-batches over 8 devices"):
        batch_of(ROWS, 3, mesh=mesh)


@pytest.mark.parametrize("group", ["normalise", "weighting"])
def test_bad_settings(group):
    with pytest.raises(ValueError, match=rf"train.{group} must be one of .* \(got 'rows'\)"):
        train_step.StepConfig(**{group: "rows"})
