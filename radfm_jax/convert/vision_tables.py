"""Vision encoders of other projects: names and layouts of their tensors, as in table.py.

    config = vision_config.read_config(...)
    for entry in vision_entries(config):   # entry.name is the name in the file after `local_name`

Letters of layouts: d width, h heads, k head width, f MLP width, n positions, c channels, p voxels of a patch, z y x its
slices, rows and columns, g = which of keys and values, or of gate and value.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import flax.linen as nn

from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.convert.table import Entry, entries_of
from radfm_jax.models.encoders.ctvit import CTViTConfig
from radfm_jax.models.encoders.dinov2 import Dinov2Config
from radfm_jax.models.encoders.kinds import VisionConfig
from radfm_jax.models.encoders.siglip import SiglipConfig
from radfm_jax.models.radfm import RadFMConfig, abstract_params

FRESH = ("depth_positions",)
"""Parameters below `vit/` that no 2D checkpoint has: they start fresh."""

Rules = dict[str, tuple[str, str]]


def _affine(name: str, path: str, first: str = "weight", ours: str = "scale") -> Rules:
    return {f"{name}.{first}": (f"{path}/{ours}", "d -> d"), f"{name}.bias": (f"{path}/bias", "d -> d")}


def _attention(names: Mapping[str, str]) -> Rules:
    """Return the rules of query, key, value and out, each with its name in a layer."""
    rules: Rules = {}
    for part, name in names.items():
        weight, bias = ("d (h k) -> h k d", "d -> d") if part == "out" else ("(h k) d -> d h k", "(h k) -> h k")
        rules |= {f"{name}.weight": (f"blocks/{part}/kernel", weight), f"{name}.bias": (f"blocks/{part}/bias", bias)}
    return rules


def _mlp(layer: str, up: str, down: str, gated: bool = False) -> Rules:
    ours, weight, bias = ("gate_up", "(g f) d -> d g f", "(g f) -> g f") if gated else ("up", "f d -> d f", "f -> f")
    return {
        f"{layer}.mlp.{up}.weight": (f"blocks/mlp/{ours}/kernel", weight),
        f"{layer}.mlp.{up}.bias": (f"blocks/mlp/{ours}/bias", bias),
        f"{layer}.mlp.{down}.weight": ("blocks/mlp/down/kernel", "d f -> f d"),
        f"{layer}.mlp.{down}.bias": ("blocks/mlp/down/bias", "d -> d"),
    }


SIGLIP: Rules = {
    "embeddings.patch_embedding.weight": ("embedding/kernel", "d c y x -> c y x d"),
    "embeddings.patch_embedding.bias": ("embedding/bias", "d -> d"),
    "embeddings.position_embedding.weight": ("positions", "n d -> n d"),
    **_affine("encoder.layers.*.layer_norm1", "blocks/attention_norm"),
    **_attention(
        {
            part: f"encoder.layers.*.self_attn.{name}"
            for part, name in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}.items()
        }
    ),
    **_affine("encoder.layers.*.layer_norm2", "blocks/mlp_norm"),
    **_mlp("encoder.layers.*", "fc1", "fc2"),
    **_affine("post_layernorm", "norm"),
}

DINOV2: Rules = {
    "embeddings.cls_token": ("class_token", "1 n d -> n d"),
    "embeddings.register_tokens": ("registers", "1 n d -> n d"),
    "embeddings.position_embeddings": ("positions", "1 n d -> n d"),
    "embeddings.patch_embeddings.projection.weight": ("embedding/kernel", "d c y x -> c y x d"),
    "embeddings.patch_embeddings.projection.bias": ("embedding/bias", "d -> d"),
    **_affine("encoder.layer.*.norm1", "blocks/attention_norm"),
    **_attention(
        {
            **{part: f"encoder.layer.*.attention.attention.{part}" for part in ("query", "key", "value")},
            "out": "encoder.layer.*.attention.output.dense",
        }
    ),
    "encoder.layer.*.layer_scale1.lambda1": ("blocks/attention_scale", "d -> d"),
    **_affine("encoder.layer.*.norm2", "blocks/mlp_norm"),
    "encoder.layer.*.layer_scale2.lambda1": ("blocks/mlp_scale", "d -> d"),
    **_affine("layernorm", "norm"),
}


def _ctvit_stack(name: str, stack: str, convolution: str) -> Rules:
    layer = f"enc_{name}_transformer.layers.*"
    return {
        f"{layer}.0.dsconv.weight": (f"{stack}/positions/taps", convolution),
        f"{layer}.0.dsconv.bias": (f"{stack}/positions/bias", "d -> d"),
        f"{layer}.1.norm.gamma": (f"{stack}/norm/scale", "d -> d"),
        f"{layer}.1.to_q.weight": (f"{stack}/query/kernel", "(h k) d -> d h k"),
        f"{layer}.1.to_kv.weight": (f"{stack}/key_value/kernel", "(g h k) d -> d g h k"),
        f"{layer}.1.q_scale": (f"{stack}/query_scale", "k -> k"),
        f"{layer}.1.k_scale": (f"{stack}/key_scale", "k -> k"),
        f"{layer}.1.to_out.weight": (f"{stack}/out/kernel", "d (h k) -> h k d"),
        **_affine(f"{layer}.3.0", f"{stack}/mlp_norm"),
        f"{layer}.3.1.weight": (f"{stack}/gate_up/kernel", "(g f) d -> d g f"),
        f"{layer}.3.4.weight": (f"{stack}/down/kernel", "d f -> f d"),
        f"enc_{name}_transformer.norm_out.gamma": (f"{name}_norm/scale", "d -> d"),
    }


CTVIT: Rules = {
    **_affine("to_patch_emb.1", "embedding/patch_norm"),
    "to_patch_emb.2.weight": ("embedding/projection/kernel", "d p -> p d"),
    "to_patch_emb.2.bias": ("embedding/projection/bias", "d -> d"),
    **_affine("to_patch_emb.3", "embedding/norm"),
    **{
        f"spatial_rel_pos_bias.net.{torch}.{leaf}": (f"bias/{ours}/{name}", layout)
        for torch, ours in (("0.0", "hidden_0"), ("1.0", "hidden_1"), ("2", "out"))
        for leaf, name, layout in (("weight", "kernel", "f d -> d f"), ("bias", "bias", "f -> f"))
    },
    # The axes of the convolution: depth, rows, columns in the spatial stack, but rows, columns, depth in the temporal.
    **_ctvit_stack("spatial", "spatial", "d 1 z y x -> z y x d"),
    **_ctvit_stack("temporal", "temporal", "d 1 y x z -> z y x d"),
    "vq._codebook.embed": ("codebook", "1 n d -> n d"),
}

# Prefixes of tensor names that differ between files of one encoder, and tensors that features do not depend on.
PREFIXES = {
    "siglip": r"(model\.)?(vision_tower\.)?(vision_model\.)?",
    "dinov2": r"(dinov2\.|dinov2_with_registers\.)?",
    "ctvit": r"(visual_transformer\.)?",
}
UNUSED = {
    "siglip": r"(model\.)?(vision_tower\.)?(vision_model\.)?head\..*|text_model\..*|logit_(scale|bias)|.*position_ids|"
    r"(model\.)?(language_model|multi_modal_projector)\..*|lm_head\..*",
    "dinov2": r"(.*\.)?embeddings\.mask_token|classifier\..*",
    "ctvit": r"text_transformer\..*|to_(text|visual)_latent.*|temperature|(visual_transformer\.)?("
    r"to_patch_emb_first_frame\..*|dec_.*|to_pixels.*|vgg\..*|discr\..*|.*\.(beta|null_kv)|.*\.context_norm\..*|"
    r"vq\.(?!_codebook\.embed$).*)",
}


def local_name(kind: str, name: str) -> str | None:
    """Return the name of a file's tensor in the table of an encoder, or None if its features do not depend on it."""
    if re.fullmatch(UNUSED[kind], name):
        return None
    return re.sub(f"^{PREFIXES[kind]}", "", name)


def rules_of(config: VisionConfig) -> Rules:
    """Return the table of an encoder: {tensor name: (path below `vit/`, layout)}."""
    if isinstance(config, SiglipConfig):
        return SIGLIP
    if isinstance(config, CTViTConfig):
        return CTVIT if config.codebook else {k: v for k, v in CTVIT.items() if v[0] != "codebook"}
    if not isinstance(config, Dinov2Config):
        raise ValueError(f"the vision encoder {config.kind} has no table of another project's tensors")
    gated = config.mlp == "swiglu"
    rules = DINOV2 | (
        _mlp("encoder.layer.*", "weights_in", "weights_out", gated) if gated else _mlp("encoder.layer.*", "fc1", "fc2")
    )
    absent = set() if config.registers else {"registers"}
    if not config.qkv_bias:
        absent |= {f"blocks/{part}/bias" for part in ("query", "key", "value")}
    return {name: rule for name, rule in rules.items() if rule[0] not in absent}


def vision_entries(config: VisionConfig) -> list[Entry]:
    """Return every tensor of an encoder, with parameter paths that start with `vit/`."""
    shapes = {k: v for k, v in vision_shapes(config).items() if k.removeprefix("vit/") not in FRESH}
    return entries_of({name: (f"vit/{path}", layout) for name, (path, layout) in rules_of(config).items()}, shapes)


@functools.lru_cache(maxsize=8)
def vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Return {parameter path: shape} of an encoder."""
    perceiver = dataclasses.replace(RadFMConfig().perceiver, width=config.width)
    boxed = abstract_params(RadFMConfig(vision=config, perceiver=perceiver))
    shapes = {k: tuple(v.shape) for k, v in flatten(nn.unbox(boxed)).items()}
    return {k: v for k, v in shapes.items() if k.startswith("vit/")}
