"""Matrices in int8: quantisation error, equal results from all ways of loading them, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from packed import CONFIG

from radfm_jax import api
from radfm_jax.checkpoints import checkpoint
from radfm_jax.inference import Generator, Prompt, Sampling
from radfm_jax.models import quantised
from radfm_jax.runtime.sharding import make_mesh

PARAMS = parity.recipe_params(CONFIG)
INT8 = quantised.quantise_params(PARAMS, "int8")
IDS = np.random.default_rng(0).integers(3, CONFIG.llama.vocab_size, (2, 12))


def widened(params: dict) -> dict:
    """Return the float parameters that int8 ones represent."""
    leaves = {path: np.asarray(x) for path, x in checkpoint.flatten(params).items()}
    for path in quantised.quantised_shapes(leaves):
        scale = quantised.companion(path, np.int8)
        steps = np.expand_dims(leaves.pop(scale), tuple(quantised.contraction_axes(path)))
        leaves[path] = leaves[path].astype(np.float32) * steps
    return checkpoint.unflatten(leaves)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("int8") / "model"
    api.save(api.Model(CONFIG, jax.tree.map(jnp.asarray, PARAMS)), directory)
    return directory


def test_quantise_by_hand():
    kernel = np.array([[1.0, -2.54, 0.0], [-0.5, 0.01, 0.0]], np.float32)
    values, scale = quantised.to_int8(kernel, 1)
    assert values.tolist() == [[127, -127, 0], [-64, 0, 0]]  # 63.5 rounds to even
    np.testing.assert_allclose(scale, [1 / 127, 2.54 / 127, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="not finite"):
        quantised.to_int8(np.array([[np.nan]]), 1)


@pytest.mark.parametrize("inputs", [1, 2])
def test_the_error_is_at_most_half_a_step(inputs):
    kernel = np.random.default_rng(1).standard_normal((6, 5, 7)).astype(np.float32)
    values, scale = quantised.to_int8(kernel, inputs)
    assert values.dtype == np.int8 and scale.shape == kernel.shape[inputs:]
    error = np.abs(values * scale - kernel)
    assert (error <= scale * 0.5000001).all() and error.max() > 0.4 * scale.min()
    assert (np.abs(values).max(axis=tuple(range(inputs))) == 127).all()


def test_all_matrices_of_the_language_model_and_no_others_are_int8():
    leaves = checkpoint.flatten(INT8)
    small = {path for path, x in leaves.items() if x.dtype == np.int8}
    matrices = {p for p, x in checkpoint.flatten(PARAMS["llama"]).items() if np.ndim(x) > 2 or p == "head"}
    assert small == {f"llama/{path}" for path in matrices}
    assert all(leaves[path].dtype == np.float32 for path in leaves.keys() - small)


def test_logits_equal_those_of_the_widened_weights():
    ours, same = api.Model(CONFIG, INT8), api.Model(CONFIG, jax.tree.map(jnp.asarray, widened(INT8)))
    np.testing.assert_allclose(ours.logits(IDS), same.logits(IDS), atol=2e-5)
    plain = api.Model(CONFIG, jax.tree.map(jnp.asarray, PARAMS)).logits(IDS)
    off = np.abs(ours.logits(IDS) - plain).max() / np.std(plain)
    assert 1e-4 < off < 0.2  # another model, but a similar one


@pytest.mark.parametrize("apart", [True, False])
def test_answers_equal_those_of_the_widened_weights(apart):
    prompts = [Prompt(row.astype(np.int32), np.full(len(row), -1, np.int32)) for row in IDS]
    ours, same = (
        Generator(CONFIG, jax.tree.map(jnp.asarray, p), length=32, split=apart).answers(
            prompts, Sampling(8, stop_ids=())
        )
        for p in (INT8, widened(INT8))
    )
    assert [a.ids for a in ours] == [a.ids for a in same]
    np.testing.assert_allclose([a.logprobs for a in ours], [a.logprobs for a in same], atol=2e-5)


def test_bfloat16_computes_with_int8_weights():
    config = CONFIG.with_compute(dtype="bfloat16")
    generator = Generator(config, INT8, length=32)
    kinds = {x.dtype.name for x in jax.tree.leaves(generator.decode_params["llama"]["blocks"][0]["query"])}
    assert kinds == {"int8", "float32"}
    wide = api.Model(CONFIG, INT8).logits(IDS)
    np.testing.assert_allclose(api.Model(config, INT8).logits(IDS), wide, atol=0.1 * np.std(wide))


def test_loading_quantises_to_the_same_weights(saved):
    loaded = checkpoint.flatten(api.load(saved, int8=True).params)
    assert loaded.keys() == checkpoint.flatten(INT8).keys()
    for path, x in checkpoint.flatten(INT8).items():
        assert loaded[path].dtype == x.dtype, path
        np.testing.assert_array_equal(loaded[path], x, err_msg=path)


def test_a_mesh_shards_matrices_and_scales(saved):
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    model, alone = api.load(saved, int8=True, mesh=mesh), api.load(saved, int8=True)
    gate = model.params["llama"]["blocks"]["gate"]
    assert gate["kernel"].sharding.spec[2] == gate["scale"].sharding.spec[1] == "tensor"
    assert gate["kernel"].addressable_shards[0].data.nbytes == gate["kernel"].nbytes // 4
    prompts = [Prompt(row.astype(np.int32), np.full(len(row), -1, np.int32)) for row in IDS]
    answers = [m.generator.answers(prompts, Sampling(8, stop_ids=())) for m in (model, alone)]
    assert [a.ids for a in answers[0]] == [a.ids for a in answers[1]]


def test_a_tied_head_is_not_quantised():
    config = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, tied_head=True))
    params = {**INT8, "llama": {k: v for k, v in INT8["llama"].items() if not k.startswith("head")}}
    same = {**PARAMS, "llama": widened({"llama": params["llama"]})["llama"]}
    ours = api.Model(config, params).logits(IDS)
    np.testing.assert_allclose(ours, api.Model(config, jax.tree.map(jnp.asarray, same)).logits(IDS), atol=2e-5)


def test_refused_quantisation_and_saving(saved, tmp_path):
    with pytest.raises(ValueError, match="cannot be saved"):
        api.save(api.Model(CONFIG, INT8), tmp_path / "int8")
    bad = jax.tree.map(np.array, PARAMS)
    bad["llama"]["blocks"]["up"]["kernel"][0, 0, 0] = np.inf
    api.save(api.Model(CONFIG, jax.tree.map(jnp.asarray, bad)), tmp_path / "bad")
    with pytest.raises(ValueError, match="llama/blocks/up/kernel: weights that are not finite"):
        api.load(tmp_path / "bad", int8=True)
