"""DINOv2 with and without registers, and RAD-DINO: a 2D encoder with a class token and layer scales."""

from __future__ import annotations

import dataclasses
from typing import Literal

from input_pipeline.field_rules import Count
from radfm_jax.models.encoders.slices import SliceConfig

# Fields of `data` for this family; see siglip.py for CT windows as channels.
DATA = {"intensity": "minmax", "fit": "pad", "storage": "uint8", "channels": 3}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std
# Chest radiographs: mean and std of microsoft/rad-dino's preprocessor, equal in all channels.
RAD_DINO = (0.5307,) * 3, (0.2583,) * 3


@dataclasses.dataclass(frozen=True)
class Dinov2Config(SliceConfig):
    """Sizes of a DINOv2; the defaults are those of the base model at 518 pixels."""

    class_token = True
    layer_scale = True
    image_size: int = 518
    patch: tuple[int, int, int] = (14, 14, 1)
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    kind: Literal["dinov2"] = "dinov2"
    registers: Count = 0
    qkv_bias: bool = True
    mlp: Literal["gelu", "swiglu"] = "gelu"


def rad_dino() -> Dinov2Config:
    """Return the sizes of RAD-DINO (microsoft/rad-dino)."""
    return Dinov2Config(mean=RAD_DINO[0], std=RAD_DINO[1])
