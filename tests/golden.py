"""Golden cases: outputs of the released RadFM at tiny sizes, with their weights and inputs.

The files in ``data/golden`` hold outputs only. Weights and images are regenerated here from names and seeds, with
numpy and hashlib alone, so that any implementation can be compared with them.
"""

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "data" / "golden"
CASES = (
    "p1_2d_s1",
    "p2_3d_d24",
    "p3_3d_s3_d64",
    "p4_b2s2_2d_pad",
    "p5_noimage",
    "p6_3d_s2_d8_mid",
    "p7_3d_d12_answer_end",
    "p8_vis48_2d_s2",
)

EMBED = "lang_model.model.embed_tokens.weight"
EMBED_ALIAS = "embedding_layer.weight"
"""The two names of the one text embedding table."""

UNUSED = (
    "bert_model",
    "bert_projection_fc",
    "output_upscaling",
    "transformer_decoder",
    "transformer_decoder_mlp",
    "cls_head",
)
"""Modules of the released state_dict within ``embedding_layer.`` that affect no output."""


def _is_table(key: str) -> bool:
    """Whether ``key`` names an embedding table or the latents."""
    if key in (EMBED, "embedding_layer.figure_token_weight", "embedding_layer.perceiver.latents"):
        return True
    parent = key.split(".")[-2] if key.endswith(".weight") else ""
    return parent in (
        "embed_tokens",
        "row_embed",
        "col_embed",
        "dep_embed",
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
    )


def _gain(key: str) -> float:
    """Return 1.5 for weights of queries, keys and logits, so that attention and predictions are sharp; else 1."""
    return 1.5 if any(part in key for part in ("q_proj", "k_proj", "to_q", "to_kv", "lm_head")) else 1.0


def tensor(key: str, shape: tuple[int, ...] | list[int], salt: str = "") -> np.ndarray:
    """The value of state_dict entry ``key``: a function of its name, shape and ``salt`` alone.

    Returns an array of ``shape`` (torch's layout, so a linear layer is (out, in)): float32, or int64 for counters and
    indices.
    """
    if key == EMBED_ALIAS:
        key = EMBED
    shape = tuple(map(int, shape))
    leaf = key.split(".")[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(np.int64)
    if leaf == "inv_freq":
        half = shape[0]
        power = (np.arange(half, dtype=np.float32) / np.float32(half)).astype(np.float64)
        return np.reciprocal(np.power(10000.0, power)).astype(np.float32)
    digest = hashlib.sha256(f"{salt}{key}".encode()).digest()
    noise = np.random.default_rng(int(np.frombuffer(digest, "<u8", 1)[0])).standard_normal(shape, np.float32)
    if leaf in ("bias", "in_proj_bias", "running_mean"):
        return noise * np.float32(0.02)
    if leaf == "running_var":
        return np.abs(noise) * np.float32(0.1) + np.float32(1)
    if leaf == "weight" and len(shape) == 1:
        return noise * np.float32(0.1) + np.float32(1)
    if _is_table(key):
        return noise * np.float32(0.5)
    return noise * np.float32(_gain(key) / math.sqrt(math.prod(shape[1:])))


@dataclass(frozen=True)
class Golden:
    """One golden case: ``case["logits"]`` reads an array; ``meta`` holds its sizes and seeds.

    Arrays (B samples, S scans a sample, L tokens, V words): lang_x, attention_mask, labels, loss_reweight (B, L);
    vit_rows, vit_slice (B*S, rows, vis_dim); pos_slice (rows, vis_dim); perceiver (B, S, 32, vis_dim);
    visual_tokens (B, S*32, hidden); input_embeds (B, L, hidden); logits (B, L, V); token_ce (B, L-1); loss_reg,
    loss_hf; grad_norm_reg, grad_norm_hf (one for each of meta["grad_names"]); grad_reg:NAME, grad_hf:NAME; gen_*.
    """

    name: str
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; the defaults are those of the released one where a tiny model can keep them.

    patch and tables are (height, width, depth): pixels of a patch, and rows of the learned position tables.
    """

    vocab: int
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int | None = None
    vis_dim: int = 24
    vit_depth: int = 12
    vit_heads: int = 8
    vit_dim_head: int = 64
    vit_mlp: int = 2048
    patch: tuple[int, int, int] = (32, 32, 4)
    tables: tuple[int, int, int] = (16, 16, 128)
    perceiver_depth: int = 6
    perceiver_heads: int = 8
    perceiver_dim_head: int = 64
    latents: int = 32
    ff_mult: int = 4
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6

    @classmethod
    def of_golden(cls, case: Golden) -> "Sizes":
        """The sizes of a golden case."""
        return cls(**case.meta["llama"], rope_theta=case.meta["rope_theta"], rms_eps=case.meta["rms_norm_eps"])


@functools.cache
def load(name: str) -> Golden:
    """Read the stored arrays of case ``name`` (cached; do not write to them)."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Golden(name, arrays, json.loads(str(arrays.pop("meta_json"))))


@functools.cache
def _manifest() -> dict[str, Any]:
    return json.loads((FOLDER / "manifest_tiny.json").read_text())


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Name and torch shape of every entry of the released state_dict at the size of case ``name``, in its order."""
    manifest = _manifest()
    return {key: tuple(shape) for key, shape in manifest["sizes"][manifest["cases"][name]].items()}


def is_used(key: str) -> bool:
    """Whether an entry of the released state_dict is a parameter that affects an output."""
    module = key.removeprefix("embedding_layer.").split(".")[0]
    return not (key.startswith("embedding_layer.") and module in UNUSED) and not key.endswith("rotary_emb.inv_freq")


def state_dict(name: str) -> dict[str, np.ndarray]:
    """Return all weights of case ``name``, with unused modules, and the tied table under both names."""
    salt = load(name).meta["salt"]
    return {key: tensor(key, shape, salt) for key, shape in shapes(name).items()}


def vision(case: str | Golden) -> np.ndarray:
    """Return the images of a case (or its name): float32 (B, S, 3, H, W, D) in [0, 1)."""
    meta = (load(case) if isinstance(case, str) else case).meta
    shape = tuple(meta["vision_shape"])
    if meta["vision_all_zero"]:
        return np.zeros(shape, np.float32)
    images = np.random.default_rng(meta["vision_seed"]).random(shape, dtype=np.float32)
    for sample, scan in meta["vision_zero_slots"]:
        images[sample, scan] = 0
    return images
