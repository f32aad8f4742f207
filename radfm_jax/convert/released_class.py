"""What the released PyTorch class needs: a version of transformers for each layout, and its fixed sizes."""

from __future__ import annotations

from collections.abc import Iterator

from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig

# Its strict load needs exactly the tensors that its version of transformers keeps. LLaMA's rotary buffers were saved
# up to 4.31, BERT's position_ids up to 4.30.
VERSIONS = {"4.28": "4.28 to 4.30", "plain": "4.32 or newer"}
# Sizes that the class does not take as arguments. The width of the vision encoder is one of its arguments.
FIXED = {
    "vision": ("num_layers", "num_heads", "head_dim", "mlp_width", "patch", "channels", "tables"),
    "perceiver": ("num_layers", "num_latents", "num_heads", "head_dim", "mlp_factor"),
}
LLAMA_4_28 = ("rope_theta", "rope_scaling", "tied_head")  # that the LLaMA of transformers 4.28 has no setting for


def notes(config: RadFMConfig, layout: str) -> list[str]:
    """Return lines for the report and the model card of an export with the released names."""
    lines = [
        f"layout {layout!r}: the released code loads it strictly with transformers {VERSIONS[layout]}; with "
        f"{' or '.join(v for name, v in VERSIONS.items() if name != layout)} it needs the other layout, and 4.31 loads "
        "neither"
    ]
    if differences := list(_differences(config, layout)):
        lines.append(
            f"the released class cannot build this model without a patch, because it has fixed sizes: "
            f"{', '.join(differences)}"
        )
    return lines


def _differences(config: RadFMConfig, layout: str) -> Iterator[str]:
    for part, default in (("vision", ViTConfig()), ("perceiver", PerceiverConfig())):
        for name in FIXED[part]:
            value, fixed = getattr(getattr(config, part), name), getattr(default, name)
            if value != fixed:
                yield f"{part}.{name} {value} (fixed: {fixed})"
    llama = config.llama
    if layout == "4.28":
        for name in LLAMA_4_28:
            if (value := getattr(llama, name)) != (fixed := getattr(RadFMConfig().llama, name)):
                yield f"llama.{name} {value} (fixed: {fixed})"
        if llama.num_kv_heads != llama.num_heads:
            yield f"llama.num_kv_heads {llama.num_kv_heads} (fixed: num_heads, {llama.num_heads})"
        if llama.head_dim * llama.num_heads != llama.width:
            yield f"llama.head_dim {llama.head_dim} (fixed: width / num_heads, {llama.width / llama.num_heads:g})"
    options = ("qkv_bias", "qk_norm", "unit_offset", "post_norms", "scale_embeddings", "sliding_layers", "nope_layers")
    for name in options:
        if value := getattr(llama, name):
            yield f"llama.{name} {value} (a LLaMA has none)"
