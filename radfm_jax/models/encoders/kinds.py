"""All vision encoders, by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from input_pipeline.config import DataConfig
from radfm_jax.models.encoders import ctvit, dinov2, siglip
from radfm_jax.models.encoders.ctvit import CTViT, CTViTConfig
from radfm_jax.models.encoders.dinov2 import Dinov2Config
from radfm_jax.models.encoders.siglip import SiglipConfig
from radfm_jax.models.encoders.slices import SliceViT
from radfm_jax.models.vit3d import ViT3D, ViTConfig

VisionConfig = ViTConfig | SiglipConfig | Dinov2Config | CTViTConfig
MODULES: dict[type, type[nn.Module]] = {
    ViTConfig: ViT3D, SiglipConfig: SliceViT, Dinov2Config: SliceViT, CTViTConfig: CTViT,
}  # fmt: skip
PRESETS = {"vit3d": {}, "siglip": siglip.DATA, "dinov2": dinov2.DATA, "ctvit": ctvit.DATA}


def encoder(config: VisionConfig) -> nn.Module:
    """Return the module of a vision config."""
    return MODULES[type(config)](config)


def data_preset(config: VisionConfig) -> dict[str, Any]:
    """Return the fields of `data` for an encoder: those that it requires, and its conventions of intensity.

    data = DataConfig(..., **data_preset(model.vision), depth=32)
    """
    return {**PRESETS[config.kind], **config.data_fields}


def data_problems(config: VisionConfig, data: Any) -> Iterator[str]:
    """Yield each field of a DataConfig or a Preparation that does not fit the encoder, with the remedy."""
    for name, value in config.data_fields.items():
        if (own := getattr(data, name)) != value:
            yield f"data.{name} is {own}, but model.vision (kind {config.kind}) needs {value}: set data.{name}={value}"
    if isinstance(data, DataConfig):
        if data.patch_length % config.slab:
            yield (
                f"data.patch_length {data.patch_length} is not a multiple of {config.slab}, the patches that "
                f"model.vision (kind {config.kind}) reads together: set data.patch_length to one"
            )
        if data.channels > config.channels:
            yield (
                f"data.channels is {data.channels}, but model.vision.channels is {config.channels}: set data.channels="
                f"{config.channels}"
            )
