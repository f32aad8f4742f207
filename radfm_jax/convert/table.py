"""Names and layouts of PyTorch tensors and of the parameters they correspond to: one table for both directions.

A layout is an einops pattern from PyTorch's axes to ours; the reversed pattern converts back. On our side each letter
is one axis, so axis sizes come from the parameter. Letters: v vocabulary, e text width, f MLP width, h heads, k head
width, d vision width, p patch voxels, l latents, n table rows, x = which of q, k, v.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import einops
import flax.linen as nn
import numpy as np

from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.models import decoder, radfm
from radfm_jax.models.decoder import DecoderConfig, rope_frequencies

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
# What the options of other families add. POST_NORMS replaces the name that LLaMA gives to the norm before the MLP.
QKV_BIAS = {
    f"model.layers.*.self_attn.{name}_proj.bias": (f"blocks/{path}/bias", "(h k) -> h k")
    for name, path in (("q", "query"), ("k", "key"), ("v", "value"))
}
QK_NORM = {
    "model.layers.*.self_attn.q_norm.weight": ("blocks/query_norm/scale", "k -> k"),
    "model.layers.*.self_attn.k_norm.weight": ("blocks/key_norm/scale", "k -> k"),
}
POST_NORMS = {
    "model.layers.*.post_attention_layernorm.weight": ("blocks/attention_post_norm/scale", "e -> e"),
    "model.layers.*.pre_feedforward_layernorm.weight": ("blocks/mlp_norm/scale", "e -> e"),
    "model.layers.*.post_feedforward_layernorm.weight": ("blocks/mlp_post_norm/scale", "e -> e"),
}
# Phi: one tensor has the rows of several. Entries of the same name follow each other in it.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip

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

BRIDGE = {
    "figure_token_weight": ("image_marks", "n e -> n e"),
    "fc.weight": ("projection/kernel", "e d -> d e"),
    "fc.bias": ("projection/bias", "e -> e"),
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
    """One tensor of a file, or the rows of it that belong to one parameter."""

    name: str
    torch_shape: tuple[int, ...]  # of the rows from `start` on
    path: str  # the parameter it belongs to
    layer: int | None  # index in a stack
    layout: str
    axes: dict[str, int] = dataclasses.field(hash=False)
    start: int = 0  # the first row

    @property
    def index(self) -> tuple:
        return () if self.layer is None else (self.layer,)

    @property
    def has_rows(self) -> bool:
        """Whether single rows of the tensor can be written: the parameter has its first axis, unfolded."""
        return self.layer is None and self.layout[0].isalpha()

    def row_index(self, rows: slice) -> tuple:
        """Return the index in the parameter of some rows of the tensor."""
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


Rules = dict[str, tuple[str, str]]  # name of a tensor, * for the layer -> (path of the parameter, layout)


def entries(config: radfm.RadFMConfig, part: str = "radfm", *, fused: bool = False) -> list[Entry]:
    """Return every tensor of a model's PyTorch form, in the order of the table.

    Part `radfm` has the released names, `llama` those of a Hugging Face folder. Parameter names are the same in both
    (`llama/...`), so that one can initialise the other. A `fused` language model has Phi's names.
    """
    if part == "radfm" and (config.vision.kind, config.perceiver.kind) != ("vit3d", "perceiver"):
        raise ValueError(
            f"RadFM's PyTorch form has only the vision encoder vit3d and the perceiver, but model.vision.kind is "
            f"{config.vision.kind} and model.perceiver.kind is {config.perceiver.kind}"
        )
    tables = {("", "llama/"): decoder_rules(config.llama)}
    if part == "radfm":
        tables = {
            ("embedding_layer.", ""): BRIDGE,
            ("embedding_layer.vision_encoder.", "vit/"): VISION,
            ("embedding_layer.perceiver.", "perceiver/"): PERCEIVER,
            ("lang_model.", "llama/"): decoder_rules(config.llama),
        }
    rules = {
        prefix + name: (path_prefix + path, layout)
        for (prefix, path_prefix), table in tables.items()
        for name, (path, layout) in table.items()
    }
    return entries_of(rules, param_shapes(config, part), rename=fused_name if fused else str)


def decoder_rules(config: DecoderConfig) -> Rules:
    """Return the table of a language model."""
    rules = LLAMA | (QKV_BIAS if config.qkv_bias else {}) | (QK_NORM if config.qk_norm else {})
    rules |= POST_NORMS if config.post_norms else {}
    return {name: rule for name, rule in rules.items() if name != "lm_head.weight" or not config.tied_head}


def fused_name(name: str) -> str:
    """Return the name that a tensor of a language model has in Phi."""
    return ".".join(FUSED.get(part, part) for part in name.split("."))


def entries_of(rules: Rules, shapes: dict[str, tuple[int, ...]], *, rename: Callable[[str], str] = str) -> list[Entry]:
    """Return the tensors of a table for parameters of these shapes, in the order of the table.

    Args:
      rename: from a name in the table to that in the file. Rules that get the same name have consecutive rows.
    """
    result, rows = [], collections.Counter[str]()
    for name, (path, layout) in rules.items():
        name, stacked = rename(name), "*" in name
        shape = shapes[path][1:] if stacked else shapes[path]
        torch_axes, our_axes = layout.split(" -> ")
        axes = dict(zip(our_axes.split(), shape, strict=True))
        groups = re.findall(r"\([^)]*\)|[a-z1]", torch_axes)
        torch_shape = tuple(math.prod(axes[letter] for letter in re.findall("[a-z]", group)) for group in groups)
        for layer in range(shapes[path][0]) if stacked else (None,):
            result.append(Entry(name.replace("*", str(layer)), torch_shape, path, layer, layout, axes, rows[name]))
        rows[name] += torch_shape[0]
    missing = shapes.keys() - {e.path for e in result}
    assert not missing, f"parameters without a rule: {missing}"
    return result


def by_tensor(table: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the entries of each tensor, by its name."""
    tensors: dict[str, list[Entry]] = {}
    for entry in table:
        tensors.setdefault(entry.name, []).append(entry)
    return tensors


def tensor_shape(parts: list[Entry]) -> tuple[int, ...]:
    """Return the shape of a tensor from its entries."""
    return (sum(e.torch_shape[0] for e in parts), *parts[0].torch_shape[1:])


def param_shapes(config: radfm.RadFMConfig, part: str = "radfm") -> dict[str, tuple[int, ...]]:
    """Return {parameter path: shape} of a RadFM, or of its language model alone."""
    boxed = {"llama": decoder.abstract_params(config.llama)} if part == "llama" else radfm.abstract_params(config)
    return {k: tuple(v.shape) for k, v in flatten(nn.unbox(boxed)).items()}


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
