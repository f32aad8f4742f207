"""radfm_jax.load and Model.logits: results and errors."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import parity
import pytest

import radfm_jax
from radfm_jax.models import radfm

V, LATENTS = 96, 4  # of radfm.tiny()


@pytest.fixture(scope="module")
def model() -> radfm_jax.Model:
    config = radfm.tiny()
    return radfm_jax.Model(config, jax.device_put(parity.recipe_params(config)))


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    """Return two texts of ten tokens, each with one scan of 32 x 64 x 8 after the first token."""
    scan = [V, *range(V + 2, V + 2 + LATENTS), V + 1]
    ids = np.array([[1, *scan, 11, 12, 13], [1, *scan, 21, 22, 23]], np.int32)
    return ids, np.random.default_rng(0).random((2, 1, 3, 32, 64, 8), dtype=np.float32)


def test_logits_and_intermediates(model, sample):
    ids, vision = sample
    logits, out = model.forward(ids, vision)
    assert logits.shape == (2, 10, V) and logits.dtype == np.float32
    np.testing.assert_array_equal(logits, model.logits(ids, vision))
    shapes = {k: out[k].shape for k in ("vit", "perceiver", "visual_tokens", "embeddings")}
    patches = 1 * 2 * 2
    assert shapes == {
        "vit": (2, 1, patches, 24),
        "perceiver": (2, 1, LATENTS, 24),
        "visual_tokens": (2, 1, LATENTS, 32),
        "embeddings": (2, 10, 32),
    }
    np.testing.assert_array_equal(out["embeddings"][:, 2 : 2 + LATENTS], out["visual_tokens"][:, 0])


def test_the_answer_depends_on_the_scan_and_on_the_mask(model, sample):
    ids, vision = sample
    logits = model.logits(ids, vision)
    assert np.abs(logits - model.logits(ids, 1 - vision))[:, -1].max() > 1e-4
    mask = np.ones_like(ids)
    mask[:, 7] = 0
    masked = model.logits(ids, vision, mask)
    np.testing.assert_allclose(masked[:, :7], logits[:, :7], atol=1e-6)
    assert np.abs(masked - logits)[:, 8:].max() > 1e-4


def test_the_repr_is_short(model):
    count = sum(x.size for x in jax.tree.leaves(model.params))
    assert repr(model) == f"Model({count:,} parameters in float32, built in memory)"


def test_version():
    import importlib.metadata

    assert radfm_jax.__version__.count(".") == 2
    try:
        assert radfm_jax.__version__ == importlib.metadata.version("radfm_jax")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree


def test_text_alone(model):
    ids = np.array([[1, 5, 6, 7]])
    logits = model.logits(ids)
    zeros = np.zeros((1, 1, 3, 32, 32, 4), np.float32)
    np.testing.assert_array_equal(logits, model.logits(ids, zeros))


def test_a_visual_token_needs_a_scan(model, sample):
    ids, _ = sample
    for vision in (None, np.zeros((2, 0, 3, 32, 32, 4), np.float32)):
        with pytest.raises(ValueError, match="visual token, but there is no scan"):
            model.logits(ids, vision)


def test_unscaled_intensities_warn(model, sample):
    ids, vision = sample
    with pytest.warns(UserWarning, match=r"vision runs from -1000 to .*the model expects \[0, 1\]"):
        model.logits(ids, np.where(vision < 0.01, -1000, vision))


def test_unknown_dtype_and_mesh(tmp_path):
    with pytest.raises(ValueError, match="dtype 'bf16' is unknown: choose one of float32"):
        radfm_jax.load(tmp_path, dtype="bf16")
    mesh = jax.make_mesh((8,), ("x",))
    with pytest.raises(ValueError, match="use sharding.make_mesh"):
        radfm_jax.load(tmp_path, mesh=mesh)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(ids=[[1, V + 2 + LATENTS]]), f"ids range from 1 to {V + 2 + LATENTS}.*1 scans of 4 visual tokens"),
        (dict(ids=[[-1, 2]]), "ids range from -1"),
        (dict(ids=[[1.0, 2.0]]), "must be integers"),
        (dict(ids=[1, 2]), r"integers \[B, L\]"),
        (dict(shape=(1, 1, 3, 544, 32, 4)), "height 544 is 17 patches, but there are 16 learned positions"),
        (dict(shape=(1, 1, 3, 32, 48, 4)), "width 48 is not a multiple of 32"),
        (dict(shape=(1, 1, 3, 32, 32, 6)), "depth 6 is not a multiple of 4"),
        (dict(shape=(1, 1, 3, 32, 32, 516)), "depth 516 is 129 patches, but there are 128"),
        (dict(shape=(2, 1, 3, 32, 32, 4)), "ids has 1 rows but vision has 2"),
        (dict(shape=(1, 3, 32, 32, 4)), r"vision must be \[B, S, C, H, W, D\]"),
        (dict(shape=(1, 1, 1, 32, 32, 4)), "3 channels"),
        (dict(mask=[[1]]), r"attention_mask is \[1, 1\]"),
        (dict(nan=True), "not finite in scan 0 of sample 0"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(model, change, words):
    ids = np.array(change.get("ids", [[1, 2]]))
    vision = np.zeros(change.get("shape", (1, 1, 3, 32, 32, 4)), np.float32)
    if "nan" in change:
        vision[0, 0, 1, 2, 3, 0] = np.nan
    with pytest.raises(ValueError, match=words):
        model.logits(ids, vision, change.get("mask"))


def test_importing_the_package_imports_no_jax():
    """Workers of the input pipeline import it and must start fast."""
    code = "import sys, radfm_jax, input_pipeline; assert not {'jax', 'flax', 'torch'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
