"""Names and layouts of PyTorch tensors and of the parameters they correspond to: one table for both directions.

A layout is an einops pattern from PyTorch's axes to ours; the reversed pattern converts back. On our side each letter
is one axis, so axis sizes come from the parameter. Letters: v vocabulary, e text width, f MLP width, h heads, k head
width, d vision width, p patch voxels, l latents, n table rows, x = which of q, k, v.
"""

from __future__ import annotations

import dataclasses
import math
import re

import einops
import flax.linen as nn
import numpy as np

from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.models import radfm
from radfm_jax.models.decoder import rope_frequencies

LLAMA = {
    "model.embed_tokens.weight": ("embedding", "v e -> v e"),
    "model.layers.*.self_attn.q_proj.weight": ("blocks/query/kernel", "(h k) e -> e h k"),
    "model.layers.*.self_attn.k_proj.weight": ("blocks/key/kernel", "(h k) e -> e h k"),
    "model.layers.*.self_attn.v_proj.weight": ("blocks/value/kernel", "(h k) e -> e h k"),
    "model.layers.*.self_attn.o_proj.weight": ("blocks/out/kernel", "e (h k) -> h k e"),
    "model.layers.*.mlp.gate_proj.weight": ("blocks/gate/kernel", "f e -> e f"),
    "model.layers.*.mlp.down_proj.weight": ("blocks/down/kernel", "e f -> f e"),
    "model.layers.*.mlp.up_proj.weight": ("blocks/up/kernel", "f e -> e f"),
    "model.layers.*.input_layernorm.weight": ("blocks/attention_norm/scale", "e -> e"),
    "model.layers.*.post_attention_layernorm.weight": ("blocks/mlp_norm/scale", "e -> e"),
    "model.norm.weight": ("norm/scale", "e -> e"),
    "lm_head.weight": ("head", "v e -> e v"),
}

VISION = {
    "to_patch_embedding.1.weight": ("embedding/patch_norm/scale", "p -> p"),
    "to_patch_embedding.1.bias": ("embedding/patch_norm/bias", "p -> p"),
    "to_patch_embedding.2.weight": ("embedding/projection/kernel", "d p -> p d"),
    "to_patch_embedding.2.bias": ("embedding/projection/bias", "d -> d"),
    "to_patch_embedding.3.weight": ("embedding/norm/scale", "d -> d"),
    "to_patch_embedding.3.bias": ("embedding/norm/bias", "d -> d"),
    "pos_embedding.row_embed.weight": ("embedding/row_positions", "n d -> n d"),
    "pos_embedding.col_embed.weight": ("embedding/column_positions", "n d -> n d"),
    "pos_embedding.dep_embed.weight": ("embedding/depth_positions", "n d -> n d"),
    "transformer.layers.*.0.norm.weight": ("blocks/attention_norm/scale", "d -> d"),
    "transformer.layers.*.0.norm.bias": ("blocks/attention_norm/bias", "d -> d"),
    "transformer.layers.*.0.fn.to_qkv.weight": ("blocks/qkv/kernel", "(x h k) d -> d x h k"),
    "transformer.layers.*.0.fn.to_out.0.weight": ("blocks/out/kernel", "d (h k) -> h k d"),
    "transformer.layers.*.0.fn.to_out.0.bias": ("blocks/out/bias", "d -> d"),
    "transformer.layers.*.1.norm.weight": ("blocks/mlp_norm/scale", "d -> d"),
    "transformer.layers.*.1.norm.bias": ("blocks/mlp_norm/bias", "d -> d"),
    "transformer.layers.*.1.fn.net.0.weight": ("blocks/mlp/up/kernel", "f d -> d f"),
    "transformer.layers.*.1.fn.net.0.bias": ("blocks/mlp/up/bias", "f -> f"),
    "transformer.layers.*.1.fn.net.3.weight": ("blocks/mlp/down/kernel", "d f -> f d"),
    "transformer.layers.*.1.fn.net.3.bias": ("blocks/mlp/down/bias", "d -> d"),
}

PERCEIVER = {
    "latents": ("latents", "l d -> l d"),
    "layers.*.0.norm_media.weight": ("blocks/token_norm/scale", "d -> d"),
    "layers.*.0.norm_media.bias": ("blocks/token_norm/bias", "d -> d"),
    "layers.*.0.norm_latents.weight": ("blocks/latent_norm/scale", "d -> d"),
    "layers.*.0.norm_latents.bias": ("blocks/latent_norm/bias", "d -> d"),
    "layers.*.0.to_q.weight": ("blocks/query/kernel", "(h k) d -> d h k"),
    "layers.*.0.to_kv.weight": ("blocks/key_value/kernel", "(x h k) d -> d x h k"),
    "layers.*.0.to_out.weight": ("blocks/out/kernel", "d (h k) -> h k d"),
    "layers.*.1.0.weight": ("blocks/mlp_norm/scale", "d -> d"),
    "layers.*.1.0.bias": ("blocks/mlp_norm/bias", "d -> d"),
    "layers.*.1.1.weight": ("blocks/mlp/up/kernel", "f d -> d f"),
    "layers.*.1.3.weight": ("blocks/mlp/down/kernel", "d f -> f d"),
    "norm.weight": ("norm/scale", "d -> d"),
    "norm.bias": ("norm/bias", "d -> d"),
}

RADFM = {
    "embedding_layer.figure_token_weight": ("image_marks", "n e -> n e"),
    "embedding_layer.fc.weight": ("projection/kernel", "e d -> d e"),
    "embedding_layer.fc.bias": ("projection/bias", "e -> e"),
    **{f"embedding_layer.vision_encoder.{k}": (f"vit/{v}", layout) for k, (v, layout) in VISION.items()},
    **{f"embedding_layer.perceiver.{k}": (f"perceiver/{v}", layout) for k, (v, layout) in PERCEIVER.items()},
    **{f"lang_model.{k}": (f"llama/{v}", layout) for k, (v, layout) in LLAMA.items()},
}

# One tensor under two names in a released file. If the two differ, the released code uses the second.
EMBEDDING, EMBEDDING_ALIAS = "lang_model.model.embed_tokens.weight", "embedding_layer.weight"

# Modules that the released forward pass never runs: Med-KEBERT with its projection, and a segmentation head.
UNUSED = re.compile(
    r"embedding_layer\.(bert_model|bert_projection_fc|output_upscaling|transformer_decoder|transformer_decoder_mlp|"
    r"cls_head)\..+"
)
# Computed, not learned. transformers 4.28 writes these buffers into the file, later versions do not.
ROTARY = re.compile(r"(?:lang_model\.)?model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq")
POSITION_IDS = "embedding_layer.bert_model.embeddings.position_ids"


def is_buffer(name: str) -> bool:
    """Return whether `name` is one of the 41 buffers that transformers 4.28 saves."""
    return name == POSITION_IDS or ROTARY.fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    torch_shape: tuple[int, ...]
    path: str  # the parameter it belongs to
    layer: int | None  # index in a stack
    layout: str
    axes: dict[str, int] = dataclasses.field(hash=False)

    @property
    def index(self) -> tuple:
        return () if self.layer is None else (self.layer,)

    def row_index(self, rows: slice) -> tuple:
        """Return the index in the parameter of some rows of the tensor. The tensor's first axis must not be folded."""
        torch_axes, our_axes = self.layout.split(" -> ")
        return (slice(None),) * our_axes.split().index(torch_axes[0]) + (rows,)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return einops.rearrange(tensor, self.layout, **self._sizes())

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        torch_axes, our_axes = self.layout.split(" -> ")
        return np.ascontiguousarray(einops.rearrange(value, f"{our_axes} -> {torch_axes}", **self._sizes()))

    def _sizes(self) -> dict[str, int]:
        """Return the sizes of folded axes, which einops cannot infer."""
        folded = re.findall(r"\(([^)]*)\)", self.layout)
        return {letter: self.axes[letter] for letter in " ".join(folded).split()}


def entries(config: radfm.RadFMConfig, part: str = "radfm") -> list[Entry]:
    """Return every tensor of a model's PyTorch form, in the order of the table.

    Part `radfm` has the released names, `llama` those of a Hugging Face folder. Parameter names are the same in both
    (`llama/...`), so that one can initialise the other.
    """
    if part == "radfm" and (config.vision.kind, config.perceiver.kind) != ("vit3d", "perceiver"):
        raise ValueError(
            f"RadFM's PyTorch form has only the vision encoder vit3d and the perceiver, but model.vision.kind is "
            f"{config.vision.kind} and model.perceiver.kind is {config.perceiver.kind}"
        )
    rules = RADFM if part == "radfm" else {k: (f"llama/{v}", layout) for k, (v, layout) in LLAMA.items()}
    if config.llama.tied_head:
        rules = {k: rule for k, rule in rules.items() if rule[0] != "llama/head"}
    return entries_of(rules, param_shapes(config, part))


def entries_of(rules: dict[str, tuple[str, str]], shapes: dict[str, tuple[int, ...]]) -> list[Entry]:
    """Return the tensors of a table for parameters of these shapes, in the order of the table."""
    result = []
    for name, (path, layout) in rules.items():
        stacked = "*" in name
        shape = shapes[path][1:] if stacked else shapes[path]
        torch_axes, our_axes = layout.split(" -> ")
        axes = dict(zip(our_axes.split(), shape, strict=True))
        groups = re.findall(r"\([^)]*\)|[a-z1]", torch_axes)
        torch_shape = tuple(math.prod(axes[letter] for letter in re.findall("[a-z]", group)) for group in groups)
        for layer in range(shapes[path][0]) if stacked else (None,):
            result.append(Entry(name.replace("*", str(layer)), torch_shape, path, layer, layout, axes))
    missing = shapes.keys() - {e.path for e in result}
    assert not missing, f"parameters without a rule: {missing}"
    return result


def param_shapes(config: radfm.RadFMConfig, part: str = "radfm") -> dict[str, tuple[int, ...]]:
    """Return {parameter path: shape} of a RadFM, or of its language model alone."""
    shapes = {k: tuple(v.shape) for k, v in flatten(nn.unbox(radfm.abstract_params(config))).items()}
    return shapes if part == "radfm" else {k: v for k, v in shapes.items() if k.startswith("llama/")}


def unused_shapes(config: radfm.RadFMConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes of the 143,079,969 unused parameters (at released sizes) and their counters.

    A file needs them to load strictly into the released class, even if the originals were dropped.
    """
    d, bert, mlp = config.vision.width, 768, 3072
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}

    def put(prefix, dtype="float32", **leaves):
        shapes.update({f"embedding_layer.{prefix}.{k}": (shape, dtype) for k, shape in leaves.items()})

    def affine(prefix, out, *inner):  # a linear layer, or a norm without `inner`
        put(prefix, weight=(out, *inner), bias=(out,))

    for name, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        put(f"bert_model.embeddings.{name}_embeddings", weight=(rows, bert))
    affine("bert_model.embeddings.LayerNorm", bert)
    for i in range(12):
        layer = f"bert_model.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            affine(f"{layer}.attention.{name}", bert, bert)
        affine(f"{layer}.attention.output.LayerNorm", bert)
        affine(f"{layer}.intermediate.dense", mlp, bert)
        affine(f"{layer}.output.dense", bert, mlp)
        affine(f"{layer}.output.LayerNorm", bert)
    affine("bert_model.pooler.dense", bert, bert)
    affine("bert_projection_fc", d, bert)
    put("output_upscaling.0", weight=(d, d // 4, 2, 2, 2), bias=(d // 4,))
    affine("output_upscaling.1", d // 4)
    put("output_upscaling.1", running_mean=(d // 4,), running_var=(d // 4,))
    put("output_upscaling.1", "int64", num_batches_tracked=())
    put("output_upscaling.3", weight=(d // 4, d // 8, 2, 2, 2), bias=(d // 8,))
    for i in range(4):
        layer = f"transformer_decoder.layers.{i}"
        for name in ("self_attn", "multihead_attn"):
            put(f"{layer}.{name}", in_proj_weight=(3 * d, d), in_proj_bias=(3 * d,))
            affine(f"{layer}.{name}.out_proj", d, d)
        affine(f"{layer}.linear1", 2048, d)
        affine(f"{layer}.linear2", d, 2048)
        for name in ("norm1", "norm2", "norm3"):
            affine(f"{layer}.{name}", d)
    affine("transformer_decoder.norm", d)
    affine("transformer_decoder_mlp.0", d // 4, d)
    affine("transformer_decoder_mlp.2", d // 8, d // 4)
    affine("cls_head", 1, d // 8)
    return shapes


def buffers(config: radfm.RadFMConfig, position_ids: int = 512) -> dict[str, np.ndarray]:
    """Return the 41 buffers that transformers 4.28 saves, computed the same way.

    They are 40 x inv_freq float32[K / 2] and BERT's position_ids int64[1, 512].
    """
    inv_freq = rope_frequencies(dataclasses.replace(config.llama, rope_scaling=None))
    name = "lang_model.model.layers.{}.self_attn.rotary_emb.inv_freq"
    rotary = {name.format(layer): inv_freq for layer in range(config.llama.num_layers)}
    return {**rotary, POSITION_IDS: np.arange(position_ids, dtype=np.int64)[None]}
