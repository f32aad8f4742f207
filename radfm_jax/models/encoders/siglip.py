"""SigLIP, SigLIP 2 (fixed resolution) and MedSigLIP: a 2D encoder without a class token."""

from __future__ import annotations

import dataclasses
from typing import Literal

from radfm_jax.models.encoders.slices import SliceConfig

# Fields of `data` for this family. Sources of CT scans can show three windows as the channels of a slice:
# `intensity: CT_CHANNELS`.
DATA = {"intensity": "minmax", "fit": "stretch", "storage": "uint8", "channels": 3}
CT_CHANNELS = "lung/soft_tissue/bone"


@dataclasses.dataclass(frozen=True)
class SiglipConfig(SliceConfig):
    """Sizes of a SigLIP; the defaults are those of SigLIP base with patches of 16 pixels and images of 224."""

    kind: Literal["siglip"] = "siglip"
    mlp: Literal["gelu_tanh", "gelu"] = "gelu_tanh"


def medsiglip() -> SiglipConfig:
    """Return the sizes of MedSigLIP (google/medsiglip-448) and of the encoder of MedGemma 4B at 448 pixels."""
    return SiglipConfig(width=1152, num_layers=27, num_heads=16, mlp_width=4304, image_size=448, patch=(14, 14, 1))
