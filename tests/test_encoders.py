"""Vision encoders: features equal to transformers' and to a PyTorch CT-ViT, packed rows equal to single scans.

A row of the 2D encoders (N = 9 patches of a slice) and of CT-ViT (N = 9 patches of a slab of two slices):

    scan           1, a 2D image   2, a volume of three slices or slabs   padding
    patches        9               27                                     9
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_ctvit
import transformers
from encoder_parts import converted, from_folder, noise, random_weights, vision_batch

from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.convert import vision_config
from radfm_jax.models.encoders.ctvit import nearest_codes
from radfm_jax.models.encoders.kinds import encoder

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 21, "patch_size": 7}
FAMILIES = {
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, intermediate_size=40)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "dinov2_giant": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            **SIZES, num_register_tokens=2, use_swiglu_ffn=True, qkv_bias=False, mlp_ratio=3, layer_norm_eps=1e-4
        )
    ),
}
CTVIT = {"dim": 16, "codebook_size": 50, "image_size": 12, "patch_size": 4, "temporal_patch_size": 2,
         "spatial_depth": 2, "temporal_depth": 1, "dim_head": 4, "heads": 2}  # fmt: skip
PATCHES, PLANES = 45, 300
# Measured on the CPU; features reach 4.
ATOL = 1e-5  # against transformers at most 4.4e-6; one channel against three equal ones 2.5e-6
CTVIT_ATOL = 1e-4  # 4.7e-5; PyTorch in float32 differs from float64 by 3.7e-5
PACKED = 1e-6  # packed against alone: 0


@functools.cache
def features(config):
    """Return a compiled (params, *arguments of the encoder) -> (features [P, D], gradients of a sum of them)."""

    def weighted(params, *arrays):
        out = encoder(config).apply({"params": params}, *arrays)[0, 0]
        weights = jax.random.normal(jax.random.key(0), out.shape)
        return jnp.sum(weights * jnp.where(arrays[2][0, 0, :, None] > 0, out, 0)), out

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def run(config, params, *arrays) -> tuple[np.ndarray, dict]:
    (_, out), grads = features(config)(params, *arrays)
    return np.asarray(out), grads


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Return (PyTorch model, config, params) of a family, by way of a Hugging Face folder."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_weights(FAMILIES[request.param]())
    model.save_pretrained(folder)
    return model, *from_folder(folder)


def test_features_equal_those_of_transformers(family):
    model, config, params = family
    scans = [noise(3, 21, 21, 1, seed=1), noise(3, 21, 21, 3, seed=2)]
    out, grads = run(config, params, *vision_batch(config, scans, patch_length=PATCHES, planes=PLANES))
    slices = np.concatenate([np.moveaxis(scan, -1, 0) for scan in scans])
    normalised = (slices - np.array(config.mean)[:, None, None]) / np.array(config.std)[:, None, None]
    with torch.no_grad():
        theirs = model(torch.tensor(normalised, dtype=torch.float32)).last_hidden_state[:, config.prefix :].numpy()
    np.testing.assert_allclose(out[:36], theirs.reshape(36, -1), rtol=0, atol=ATOL)
    assert np.isfinite(out).all() and np.abs(theirs).max() > 2
    assert all(np.abs(g).max() > 1e-4 for name, g in flatten(grads).items() if name != "blocks/key/bias")


def test_a_packed_scan_equals_the_scan_alone(family):
    _, config, params = family
    scans = [noise(3, 21, 21, 1, seed=1), noise(3, 21, 21, 3, seed=2)]
    batch = functools.partial(vision_batch, config, patch_length=PATCHES, planes=PLANES)
    out, _ = run(config, params, *batch(scans))
    alone, _ = run(config, params, *batch(scans[1:]))
    np.testing.assert_allclose(alone[:27], out[9:36], rtol=0, atol=PACKED)
    # Voxels of another scan change nothing, to the bit.
    other, _ = run(config, params, *batch([scans[0] + 0.5, scans[1]]))
    np.testing.assert_array_equal(other[9:36], out[9:36])
    assert np.abs(other[:9] - out[:9]).max() > 1e-2
    # Slices are told apart by their depth positions only.
    depth = noise(config.depth_positions, config.width, seed=3)
    moved, _ = run(config, {**params, "depth_positions": depth}, *batch(scans))
    steps = (np.arange(3) + 1) * (config.depth_positions // 3) - 1
    np.testing.assert_allclose((moved - out)[9:36].reshape(3, 9, -1), depth[steps][:, None] + np.zeros((3, 9, 1)),
                               atol=ATOL)  # fmt: skip


@pytest.mark.parametrize("family", ["dinov2"], indirect=True)
def test_one_channel_equals_three_equal_ones(family):
    """Means and deviations of the channels differ, so the kernel cannot simply be summed."""
    _, config, params = family
    gray = [np.repeat(noise(1, 21, 21, 3, seed=4), 3, axis=0)]
    batch = functools.partial(vision_batch, config, gray, patch_length=PATCHES, planes=PLANES)
    assert len(set(config.mean)) == 3
    out, _ = run(config, params, *batch())
    once, _ = run(config, params, *batch(channels=1))
    np.testing.assert_allclose(once[:27], out[:27], rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", ["siglip"], indirect=True)
def test_a_row_that_is_not_whole_slices_is_refused(family):
    _, config, params = family
    batch = vision_batch(config, [noise(3, 21, 21, 1)], patch_length=10, planes=30)
    with pytest.raises(
        ValueError, match="data.patch_length 10 must be a multiple of 9, the patches of a slice of 21 x"
    ):
        jax.eval_shape(encoder(config).apply, {"params": params}, *batch)


# --- CT-ViT -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ctvit():
    """Return (PyTorch model, config with continuous features, params, codebook)."""
    model = random_weights(torch_ctvit.CTViT(**CTVIT))
    config = vision_config.read_config({"model_type": "ctvit", **CTVIT}, "config.json")
    params = converted(config, {name: x.detach().numpy() for name, x in model.checkpoint().items()})
    codebook = params.pop("codebook")
    return model, dataclasses.replace(config, codebook=0), params, codebook


def test_ctvit_equals_pytorch(ctvit):
    model, config, params, codebook = ctvit
    scan = noise(1, 12, 12, 6, seed=1)
    out, grads = run(config, params, *vision_batch(config, [scan], patch_length=36, planes=80))
    with torch.no_grad():
        theirs = model(torch.tensor(scan * 2 - 1).permute(0, 3, 1, 2)[None], quantise=False)
        codes = model.quantise(theirs).reshape(27, -1).numpy()
    np.testing.assert_allclose(out[:27], theirs.reshape(27, -1).numpy(), rtol=0, atol=CTVIT_ATOL)
    # A bias that all pairs share does not change a softmax.
    assert all(np.abs(g).max() > 1e-5 for name, g in flatten(grads).items() if name != "bias/out/bias")
    np.testing.assert_allclose(nearest_codes(out[:27], codebook), codes, rtol=0, atol=ATOL)
    assert len(np.unique(codes, axis=0)) > 5


def test_a_packed_volume_of_ctvit_equals_the_volume_alone(ctvit):
    """Neither the convolution nor the temporal attention sees another scan."""
    _, config, params, _ = ctvit
    scans = [noise(1, 12, 12, 4, seed=2), noise(1, 12, 12, 2, seed=3)]
    batch = functools.partial(vision_batch, config, patch_length=36, planes=80)
    out, _ = run(config, params, *batch(scans))
    other, _ = run(config, params, *batch([scans[0], scans[1] ** 2]))
    np.testing.assert_array_equal(other[:18], out[:18])
    assert np.abs(other[18:27] - out[18:27]).max() > 1e-2
    alone, _ = run(config, params, *batch(scans[1:]))
    np.testing.assert_allclose(alone[:9], out[18:27], rtol=0, atol=PACKED)
    # The slabs of a scan do see each other.
    changed = np.concatenate([scans[0][..., :2], scans[0][..., 2:] ** 2], axis=-1)
    other, _ = run(config, params, *batch([changed, scans[1]]))
    assert np.abs(other[:9] - out[:9]).max() > 1e-2
