"""Names and layouts of the tensors of an exported RadFM (code/modeling_radfm.py), as in convert/table.py.

The language model and the encoders that transformers has keep their published names. The other modules have the names
of our parameters: `vit/blocks/qkv/kernel` is `vision.blocks.*.qkv.weight`.
"""

from __future__ import annotations

from radfm_jax.convert import table, vision_tables
from radfm_jax.convert.table import Entry, Rules
from radfm_jax.models.encoders.kinds import VisionConfig
from radfm_jax.models.encoders.slices import SliceConfig
from radfm_jax.models.pooling import PooledMlpConfig
from radfm_jax.models.radfm import RadFMConfig

LANGUAGE_MODEL, ENCODER = "language_model.", "vision.encoder."
STACKS = ("blocks", "spatial", "temporal")  # their parameters have an axis of layers
WEIGHTS = ("kernel", "scale", "taps")  # leaves that are `weight` of a module of PyTorch
TABLES = ("row_positions", "column_positions", "depth_positions", "latents", "codebook", "image_marks")  # nn.Embedding
POOLED_MLP: Rules = {"weight": ("up/kernel", "f d -> d f"), "bias": ("up/bias", "f -> f")}
DEPTH: Rules = {"depth_positions": ("depth_positions", "n d -> n d")}
# Layouts that differ from the released ones: both convolutions of CT-ViT have the axes depth, rows, columns.
LAYOUTS = {"temporal/positions/taps": "d 1 z y x -> z y x d", "codebook": "n d -> n d"}


def entries(config: RadFMConfig, *, fused: bool = False) -> list[Entry]:
    """Return every tensor of an export, in the order of the table. `fused`: the language model has Phi's names."""
    slices = isinstance(config.vision, SliceConfig)
    bridge = POOLED_MLP if isinstance(config.perceiver, PooledMlpConfig) else table.PERCEIVER
    rules = {
        **_own(table.BRIDGE, "", ""),
        **_own(_vision(config.vision), "vit/", "vision."),
        **_own(bridge, "perceiver/", "bridge."),
        **(_published(vision_tables.rules_of(config.vision), "vit/", ENCODER) if slices else {}),
        **_published(table.decoder_rules(config.llama), "llama/", LANGUAGE_MODEL),
    }
    rename = lambda name: table.fused_name(name) if fused and name.startswith(LANGUAGE_MODEL) else name  # noqa: E731
    return table.entries_of(rules, table.param_shapes(config), rename=rename)


def _vision(config: VisionConfig) -> Rules:
    """Return the rules of an encoder's modules that have no published names."""
    if isinstance(config, SliceConfig):
        return DEPTH
    return table.VISION if config.kind == "vit3d" else vision_tables.rules_of(config)


def _published(rules: Rules, parameters: str, prefix: str) -> Rules:
    return {prefix + name: (parameters + path, layout) for name, (path, layout) in rules.items()}


def _own(rules: Rules, parameters: str, prefix: str) -> Rules:
    """Return rules with the names of our parameters; the layouts are those of the given rules."""
    return {prefix + own_name(path): (parameters + path, LAYOUTS.get(path, layout)) for path, layout in rules.values()}


def own_name(path: str) -> str:
    """Return the name of a parameter in PyTorch: `blocks/qkv/kernel` is `blocks.*.qkv.weight`."""
    *modules, leaf = path.split("/")
    modules = [f"{name}.*" if name in STACKS else name for name in modules]
    leaf = "weight" if leaf in WEIGHTS else f"{leaf}.weight" if leaf in TABLES else leaf
    return ".".join([*modules, leaf])
