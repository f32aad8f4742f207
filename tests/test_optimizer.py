"""The optimizer: learning rate factors, weight decay, frozen parts, Muon."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import pytest

from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.runtime import sharding
from radfm_jax.training import train_step
from radfm_jax.training.optimizer import OptimizerConfig, learning_rates, merge, optimizer, split

MUON = OptimizerConfig(method="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0, clip=0)


def tree(value=1.0):
    return {
        "vit": {"embedding": {"projection": {"kernel": jnp.full((2, 2), value), "bias": jnp.full(2, value)}}},
        "llama": {"head": jnp.full((2, 3), value), "norm": {"scale": jnp.full(2, value)}},
    }


def test_the_longest_matching_path_sets_the_rate():
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=0,
        weight_decay=0,
        clip=0,
        rates={"vit": 0.5, "vit/embedding/projection/bias": 0.1, "llama": 0.01},
    )
    transform = optimizer(config, tree())
    updates, _ = transform.update(tree(2.0), transform.init(tree()), tree())
    first = {path: float(x.ravel()[0]) for path, x in flatten(updates).items()}
    assert {k: round(v, 5) for k, v in first.items()} == {
        "vit/embedding/projection/kernel": 0.5,
        "vit/embedding/projection/bias": 0.1,
        "llama/head": 0.01,
        "llama/norm/scale": 0.01,
    }


def test_norms_and_biases_do_not_decay():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.1, clip=0)
    transform = optimizer(config, tree())
    updates, _ = transform.update(tree(0.0), transform.init(tree()), tree())
    moved = {path: float(x.ravel()[0]) for path, x in flatten(updates).items()}
    assert moved["llama/head"] == pytest.approx(0.1) == moved["vit/embedding/projection/kernel"]
    assert moved["llama/norm/scale"] == moved["vit/embedding/projection/bias"] == 0


def test_clipping_warm_up_and_dtype_of_the_first_moment():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, final=0.5, mu_dtype="bfloat16")
    np.testing.assert_allclose(learning_rates(config, 10)[[0, 1, 2, 6]], [0, 0.5, 1, 0.75], atol=1e-6)
    state = optimizer(config, tree()).init(tree())
    assert {x.dtype.name for x in jax.tree.leaves(state[1].mu)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state[1].nu)} == {"float32"}


def test_split_and_merge():
    learning, frozen = split(tree(), ("llama", "vit/embedding/projection/bias"))
    assert list(flatten(learning)) == ["vit/embedding/projection/kernel"]
    assert flatten(merge(learning, frozen)).keys() == flatten(tree()).keys()


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: split(tree(), ("lama",)),
            r"frozen: no parameter matches 'lama' \(did you mean llama\?\); parts: llama, vit",
        ),
        (lambda: split(tree(), ("vit", "llama")), "freezes all parameters: leave a part trainable"),
        (lambda: optimizer(OptimizerConfig(rates={"vit/embeding": 1.0}), tree()), "did you mean vit/embedding"),
        (
            lambda: learning_rates(OptimizerConfig(warmup_steps=10), 10),
            r"warmup_steps must be below the 10 steps of the run \(got 10\)",
        ),
        (
            lambda: OptimizerConfig(learning_rate=-1.0, mu_dtype="int8"),
            r"learning_rate must be above 0 \(got -1.0\); .*mu_dtype must be one of .* \(got 'int8'\)",
        ),
        (lambda: OptimizerConfig(method="adam"), r"method must be one of adamw, muon \(got 'adam'\)"),
        (
            lambda: optimizer(MUON, {"vit": {"blocks": {"gate_": {"kernel": jnp.ones((1, 2, 2))}}}}),
            "no Muon axes for vit/blocks/gate_",
        ),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- Muon -------------------------------------------------------------------------------------------------------------


@functools.cache
def moved(data=1, fsdp=1, tensor=1):
    """Take two Muon steps with the same gradients on the tiny model: path -> (change, gradient)."""
    devices = data * fsdp * tensor
    mesh = sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[:devices])
    abstract, transform, _ = train_step.abstract_state(packed.CONFIG, MUON, mesh)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), abstract["params"])
    placed = jax.device_put(gradients, jax.tree.map(lambda x: x.sharding, abstract["params"]))

    @functools.partial(jax.jit, out_shardings=(None, train_step.shardings_of(abstract["opt"])))
    def two_steps(gradients):
        first, state = transform.update(gradients, transform.init(gradients), gradients)
        second, state = transform.update(gradients, state, gradients)
        return jax.tree.map(lambda a, b: a + b, first, second), state

    with jax.set_mesh(mesh):
        changes, state = two_steps(placed)
    assert jax.tree.structure(state) == jax.tree.structure(abstract["opt"])
    return {path: (np.asarray(x), flatten(gradients)[path]) for path, x in flatten(changes).items()}


def is_matrix(path):
    return "/blocks/" in path and path.endswith("/kernel")


def test_muon_updates_matrices_by_an_orthogonal_matrix():
    muon = moved()
    assert sum(map(is_matrix, muon)) == 16
    for path, split_at in (
        ("llama/blocks/query/kernel", 1),
        ("llama/blocks/out/kernel", 2),
        ("vit/blocks/mlp/up/kernel", 1),
    ):
        for change, gradient in zip(*muon[path], strict=True):  # by layer
            rows = int(np.prod(change.shape[:split_at]))
            u, _, v = np.linalg.svd(gradient.reshape(rows, -1), full_matrices=False)
            step = change.reshape(rows, -1) / (2 * 0.2 * max(rows, change.size // rows) ** 0.5)
            # Newton-Schulz with Jordan's coefficients brings singular values to 0.7 to 1.2.
            seen = u.T @ step @ v.T
            assert np.diag(seen).min() > 0.6 and np.diag(seen).max() < 1.3, path
            assert np.abs(seen - np.diag(np.diag(seen))).max() < 0.02, path


def test_muon_treats_query_key_and_value_as_separate_matrices():
    change, gradient = (x[0] for x in moved()["vit/blocks/qkv/kernel"])  # [width, 3, heads, head_dim]
    for i in range(3):
        u, _, v = np.linalg.svd(gradient[:, i].reshape(len(gradient), -1), full_matrices=False)
        seen = np.diag(u.T @ change[:, i].reshape(len(gradient), -1) @ v.T)
        assert seen.min() > 0.5 * seen.max(), i


def test_muon_updates_both_matrices_of_an_adapter():
    """Inputs or outputs that are heads by head widths count as one axis; q, k and v have matrices B of their own."""
    shapes = {
        "llama/blocks/query/lora_a": (2, 12, 3), "llama/blocks/query/lora_b": (2, 3, 2, 4),
        "llama/blocks/out/lora_a": (2, 2, 4, 3), "llama/blocks/out/lora_b": (2, 3, 12),
        "vit/blocks/qkv/lora_a": (2, 12, 3), "vit/blocks/qkv/lora_b": (2, 3, 3, 2, 4),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    gradients = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    transform = optimizer(MUON, unflatten(gradients))
    updates, _ = jax.jit(transform.update)(
        unflatten(gradients), transform.init(unflatten(gradients)), unflatten(gradients)
    )
    for path, update in flatten(updates).items():
        layer = np.asarray(update[0])
        matrices = [layer[:, i] for i in range(3)] if "qkv/lora_b" in path else [layer]
        for matrix in matrices:
            matrix = matrix.reshape(-1, 3) if path.endswith("lora_a") else matrix.reshape(3, -1)
            values = np.linalg.svd(matrix / (0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
            assert values.min() > 0.6 and values.max() < 1.3, (path, values)


def test_muon_has_one_moment_per_matrix_with_the_same_sharding():
    mesh = sharding.make_mesh(2, 2, 2)
    abstract, *_ = train_step.abstract_state(packed.CONFIG, MUON, mesh)
    learning, found = flatten(abstract["params"]), {}
    for keys, x in jax.tree_util.tree_flatten_with_path(abstract["opt"])[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if names := [name for name in learning if path.endswith("/" + name)]:
            name = max(names, key=len)
            found.setdefault(name, []).append(x)
            assert x.shape == learning[name].shape and x.sharding == learning[name].sharding, path
    assert {name: len(x) for name, x in found.items()} == {name: 1 if is_matrix(name) else 2 for name in learning}


def test_other_parameters_are_updated_by_nadam():
    changes = {path: change for path, change in moved().items() if not is_matrix(path)}
    gradients = {path: gradient for path, (_, gradient) in changes.items()}
    adam = optax.scale_by_adam(MUON.b1, MUON.b2, MUON.eps, nesterov=True)
    first, state = adam.update(gradients, adam.init(gradients))
    second, _ = adam.update(gradients, state)
    for path, (change, _) in changes.items():
        np.testing.assert_allclose(change, first[path] + second[path], atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_muon_on_a_mesh():
    alone, sharded = moved(), moved(2, 2, 2)
    for path, (change, _) in alone.items():
        np.testing.assert_allclose(change, sharded[path][0], atol=2e-4 * np.abs(change).max(), err_msg=path)
