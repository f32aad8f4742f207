"""Hugging Face's configs of vision encoders, and position tables for another image size."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from radfm_jax.convert import table, vision_tables
from radfm_jax.convert.vision_config import read_config, resized
from radfm_jax.models.encoders.ctvit import CTViTConfig
from radfm_jax.models.encoders.dinov2 import RAD_DINO, rad_dino
from radfm_jax.models.encoders.siglip import SiglipConfig, medsiglip
from radfm_jax.models.radfm import RadFMConfig

SIGLIP = {"model_type": "siglip_vision_model"}
DINOV2 = {"model_type": "dinov2"}


def test_published_configs():
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 448,
              "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}  # fmt: skip
    text = {"model_type": "siglip", "text_config": {"hidden_size": 1152}, "vision_config": vision}
    assert read_config(text, "config.json") == read_config(vision, "config.json") == medsiglip()
    assert read_config(text | {"model_type": "gemma3"}, "config.json") == medsiglip()
    assert read_config({"model_type": "siglip"}, "config.json") == SiglipConfig()
    stated = {"image_mean": list(RAD_DINO[0]), "image_std": list(RAD_DINO[1]), "do_center_crop": True}
    assert read_config(DINOV2 | {"image_size": 518}, "config.json", stated) == rad_dino()
    giant = read_config(
        DINOV2 | {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True},
        "config.json",
    )
    assert (giant.mlp, giant.mlp_width) == ("swiglu", 4096)
    assert read_config({"model_type": "ctvit"}, "config.json") == CTViTConfig()


def test_every_key_of_transformers_is_known():
    """The keys that this version of transformers writes are used, or known not to matter."""
    for config in (
        transformers.SiglipConfig(),
        transformers.SiglipVisionConfig(),
        transformers.Dinov2Config(),
        transformers.Dinov2WithRegistersConfig(),
    ):
        read_config(config.to_dict(), "config.json")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "clip"}, "dir/config.json: model_type 'clip' is not a supported vision encoder; known: siglip"),
        ({}, "model_type None is not a supported vision encoder"),
        ({"model_type": ["siglip"]}, r"model_type \['siglip'\] is not a supported vision encoder"),
        ({"model_type": "siglip", "vision_config": [1]}, r"vision_config must be the config of the encoder .got \[1\]"),
        (DINOV2 | {"patch_size": 0}, "must be a multiple of the side of the square model.vision.patch"),
        (SIGLIP | {"image_size": [["a"], ["a"]]}, "image_size"),
        ({"model_type": "siglip2_vision_model"}, "variable resolution .naflex. is not supported"),
        (SIGLIP | {"window_size": 7}, "key 'window_size' .7. is not known; known: hidden_act, hidden_size"),
        (SIGLIP | {"hidden_act": "relu"}, "key 'hidden_act' must be one of gelu_pytorch_tanh, gelu .got 'relu'"),
        (DINOV2 | {"hidden_act": "silu"}, "key 'hidden_act' must be gelu"),
        (DINOV2 | {"is_decoder": True}, "key 'is_decoder' must be False .got True"),
        (SIGLIP | {"image_size": 225}, "model.vision.image_size 225 must be a multiple"),
        (SIGLIP | {"image_size": [224, 448]}, "model.vision.image_size"),
        (SIGLIP | {"hidden_size": "768"}, "model.vision.width must be an integer"),
    ],
)
def test_unsupported_configs_name_the_key(config, message):
    with pytest.raises(ValueError, match=message):
        read_config(config, "dir/config.json")


def test_a_preprocessor_that_scales_otherwise_is_refused():
    with pytest.raises(ValueError, match="rescale_factor must be 1/255"):
        read_config(SIGLIP, "config.json", {"rescale_factor": 1.0})
    assert read_config(SIGLIP, "config.json", {"do_normalize": False}).std == (1.0, 1.0, 1.0)


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 7}


@pytest.mark.parametrize("side, other", [(49, 28), (28, 49), (35, 14)])
def test_positions_are_interpolated_as_transformers_does(side, other):
    """Measured: at most 2.1e-6 for tables that reach 3."""
    siglip = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SMALL, image_size=side, intermediate_size=8)
    )
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=side))
    registers = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SMALL, image_size=side))
    n = (other // 7) ** 2
    for model, tokens in ((siglip, n), (dino, n + 1), (registers, n + 1)):
        config = read_config(model.config.to_dict(), "config.json")
        embeddings = model.embeddings
        learned = embeddings.position_embedding.weight if model is siglip else embeddings.position_embeddings
        with torch.no_grad():
            learned.normal_()
            theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, tokens, 8), other, other)[0].numpy()
        positions = learned.detach().numpy().reshape(-1, 8)
        new, ours = resized(config, positions, other, interpolate=True)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        assert new == dataclasses.replace(config, image_size=other)
        assert resized(config, positions, side)[1] is positions
        with pytest.raises(ValueError, match=f"positions for images of {side} x {side} pixels, not of {other} x"):
            resized(config, positions, other)
        with pytest.raises(ValueError, match="model.vision.image_size 30 must be a multiple"):
            resized(config, positions, 30, interpolate=True)


def test_tensors_that_features_do_not_depend_on():
    for kind, name in (
        ("siglip", "vision_model.head.probe"),
        ("siglip", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("siglip", "logit_scale"),
        ("dinov2", "embeddings.mask_token"),
        ("ctvit", "visual_transformer.dec_spatial_transformer.norm_out.gamma"),
        ("ctvit", "visual_transformer.vq._codebook.cluster_size"),
    ):
        assert vision_tables.local_name(kind, name) is None, name
    assert vision_tables.local_name("siglip", "model.vision_tower.vision_model.post_layernorm.bias") == (
        "post_layernorm.bias"
    )
    assert vision_tables.local_name("siglip", "encoder.other") == "encoder.other"  # the table does not have it


def test_the_form_of_radfm_has_only_its_own_encoder():
    config = RadFMConfig(SiglipConfig())
    with pytest.raises(
        ValueError, match="only the vision encoder vit3d and the perceiver, but model.vision.kind is si"
    ):
        table.entries(config)
    with pytest.raises(ValueError, match="the vision encoder vit3d has no table"):
        vision_tables.vision_entries(RadFMConfig().vision)
