"""RadFM: packed rows of text and scans -> logits (paper, section 4.2, equation 7).

Letters: B rows, T text tokens, S scan slots per row, R vision rows per row, P patch tokens per vision row, M planes per
row, L latents (visual tokens) per scan, D vision width, E text width, V vocabulary.

A batch is a dict of arrays. One row with two samples, the first with a scan (L = 2 to draw it):

    ids            1 V  .  .  V+1 45 17  2   1 88 23  2   0 0     V `<image>`, V+1 `</image>`, . anything
    visual_index  -1 -1 0  1  -1 -1 -1 -1  -1 -1 -1 -1  -1 -1     slot * L + latent
    segments       1 1  1  1  1  1  1  1   2  2  2  2   0 0       one number per sample, 0 = padding
    positions      0 1  2  3  4  5  6  7   0  1  2  3   0 0       RoPE positions
    key_ok         1 1  1  1  1  1  1  1   1  1  1  1   0 0

    name             dtype and shape                meaning
    ids, visual_index, segments, positions          int32[B, T]
    key_ok           bool[B, T]                     false: hidden from every query
    planes           uint8|int16|float32[B, M, h, w]  one slice of one channel of one patch
    plane_index      int32[B, R, P, slices, C]      which plane is slice p, channel c of patch n;
                                                    C = 1: all channels are equal
    patch_segments   int32[B, R, P]                 1 + scan slot, 0 = padding
    patch_positions  int32[B, R, P, 3]              indices of the row, column and depth tables
    scan_rows        int32[B, S]                    the vision row of a scan, -1 = empty slot
    scan_scale, scan_offset  float32[B, S]          voxel = plane * scale + offset

Rows are independent of each other, and so are the segments of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from input_pipeline.field_rules import check_fields, from_mapping, one_of
from radfm_jax.models import lora, quantised
from radfm_jax.models.computation import COMPUTE
from radfm_jax.models.decoder import Decoder, DecoderConfig
from radfm_jax.models.encoders.kinds import VisionConfig, encoder
from radfm_jax.models.layers import dense, partitioned
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.perceiver import Perceiver, PerceiverConfig
from radfm_jax.models.pooling import PooledMlp, PooledMlpConfig
from radfm_jax.models.quantised import BASES
from radfm_jax.models.vit3d import ViTConfig, gather_rows
from radfm_jax.runtime.sharding import constrain

PARTS = ("vision", "perceiver", "llama")


@dataclasses.dataclass(frozen=True)
class RadFMConfig:
    """Sizes of all parts. `vision.width` equals `perceiver.width`.

    The `kind` of `vision` and `perceiver` chooses the network; an absent kind is RadFM's. `lora` adds adapters to
    linear maps. `base` is the type in which a frozen language model is held (quantised.py).
    """

    vision: VisionConfig = ViTConfig()
    perceiver: PerceiverConfig | PooledMlpConfig = PerceiverConfig()
    llama: DecoderConfig = DecoderConfig()
    lora: LoraConfig | None = None
    base: Annotated[str, one_of(BASES)] = "float32"

    def __post_init__(self):
        check_fields(self, "model")
        for name in PARTS:
            if (part := getattr(self, name)).lora != self.lora:
                object.__setattr__(self, name, dataclasses.replace(part, lora=self.lora))
        if self.vision.width != self.perceiver.width:
            raise ValueError(f"vision width {self.vision.width} and perceiver width {self.perceiver.width} differ")

    @property
    def num_latents(self) -> int:
        return self.perceiver.num_latents

    @property
    def image_id(self) -> int:
        """Id of `<image>`; `</image>` is the next one."""
        return self.llama.vocab_size

    def with_compute(self, **fields) -> RadFMConfig:
        """Return a copy with fields of `COMPUTE` set in every part."""
        parts = {name: dataclasses.replace(getattr(self, name), **fields) for name in PARTS}
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {name: getattr(self, name).to_dict() for name in PARTS}

    @classmethod
    def from_dict(cls, fields: dict) -> RadFMConfig:
        """Invert `to_dict`. ValueError lists every unknown field, or every invalid one."""
        if nested := [name for name in PARTS if "lora" in (fields.get(name) or {})]:
            raise ValueError(f"unknown fields: model.{nested[0]}.lora (set model.lora, which names the linear maps)")
        return from_mapping(cls, fields, "model")


def radfm_14b() -> RadFMConfig:
    """Return the released sizes: 13,123,822,336 parameters."""
    return RadFMConfig()


def has_released_sizes(config: RadFMConfig) -> bool:
    """Return whether all sizes are the released ones. Settings of training and computation do not matter."""
    released = radfm_14b()
    if not (isinstance(config.vision, ViTConfig) and isinstance(released.vision, ViTConfig)):
        return False
    vision = dataclasses.replace(config.vision, dropout=released.vision.dropout)
    config = dataclasses.replace(config, vision=vision, lora=None, base=released.base)
    return config.with_compute(**{name: getattr(released.llama, name) for name in COMPUTE}) == released


def tiny() -> RadFMConfig:
    """Return sizes for tests: every part, as small as possible."""
    return RadFMConfig(
        ViTConfig(width=24, num_layers=2, num_heads=2, head_dim=8, mlp_width=32, dropout=0.0),
        PerceiverConfig(width=24, num_layers=2, num_heads=2, head_dim=8, num_latents=4),
        DecoderConfig(vocab_size=96, width=32, mlp_width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8),
    )


class RadFM(nn.Module):
    """The full network: `jax.jit(lambda params, batch: RadFM(config).apply({"params": params}, batch))`."""

    config: RadFMConfig

    def setup(self):
        c = self.config
        self.vit = encoder(c.vision)
        self.perceiver = (PooledMlp if isinstance(c.perceiver, PooledMlpConfig) else Perceiver)(c.perceiver)
        self.projection = dense(c.llama.width, (None, "embed"), c.llama, bias=True)
        marks = partitioned(nn.initializers.normal(0.5), (None, "embed"))
        self.image_marks = self.param("image_marks", marks, (2, c.llama.width), c.llama.param_dtype)
        self.llama = Decoder(c.llama)

    def __call__(self, batch: dict[str, jax.Array], *, deterministic: bool = True) -> tuple[jax.Array, dict]:
        """Return the logits of every position, float32[B, T, V], and the intermediates of `hidden`.

        Training uses `hidden` and the chunked loss of `losses.py`, since logits of 2,048 positions are 262 MB per row.
        """
        hidden, out = self.hidden(batch, deterministic=deterministic)
        with jax.named_scope("logits"):
            logits = self.llama.logits(hidden)
        return jnp.where(out["nonfinite_tokens"][..., None], jnp.nan, logits), out

    def hidden(self, batch: dict[str, jax.Array], *, deterministic: bool = True) -> tuple[jax.Array, dict]:
        """Return the hidden states float[B, T, E] after the final norm, and the intermediates `out`.

        `out` has vit float[B, R, P, D]; perceiver float[B, S, L, D]; visual_tokens float[B, S, L, E]; embeddings
        float[B, T, E]; nonfinite_scans bool[B, S], scans with a voxel that is not finite; nonfinite_tokens bool[B, T],
        tokens of samples that use such a scan.

        Masks do not stop NaN (0 x NaN is NaN). So scans that are not finite enter the network as zeros. The logits and
        losses of their samples are set to NaN at the end, where they cannot reach another sample.
        """
        c, out = self.config, {}
        with jax.named_scope("finite_check"):
            out["nonfinite_scans"], clean = drop_nonfinite(batch)
        with jax.named_scope("vision_encoder"):
            patches = (clean[k] for k in ("planes", "plane_index", "patch_segments", "patch_positions"))
            out["vit"] = self.vit(*patches, clean["scan_scale"], clean["scan_offset"], deterministic=deterministic)
        with jax.named_scope("perceiver"):
            scans = (batch[k] for k in ("patch_segments", "scan_rows", "patch_positions"))
            out["perceiver"] = self.perceiver(out["vit"], *scans)
        with jax.named_scope("projection"):
            out["visual_tokens"] = self.projection(out["perceiver"].astype(c.llama.dtype))
        with jax.named_scope("fusion"):
            x, out["nonfinite_tokens"] = self.fuse(batch, out["visual_tokens"], out["nonfinite_scans"])
            out["embeddings"] = x = constrain(x, "batch", None, None)
        with jax.named_scope("llama"):
            hidden = self.llama(x, batch["positions"], batch["segments"], batch["key_ok"])
        return hidden, out

    def fuse(self, batch, visual_tokens, nonfinite_scans) -> tuple[jax.Array, jax.Array]:
        """Insert visual tokens and image marks into the text embeddings: ([B, T, E], nonfinite_tokens bool[B, T])."""
        c = self.config
        ids, visual_index = batch["ids"], batch["visual_index"]
        b, s, n, width = visual_tokens.shape
        text = self.llama.embed(ids)
        marks = self.image_marks[jnp.clip(ids - c.image_id, 0, 1)].astype(text.dtype)
        slot = jnp.maximum(visual_index, 0)
        visual = gather_rows(visual_tokens.reshape(b, s * n, width), slot)
        is_visual = visual_index >= 0
        x = jnp.where((ids >= c.image_id)[..., None], marks, text)
        x = jnp.where(is_visual[..., None], visual, x)
        uses_bad = is_visual & gather_rows(nonfinite_scans, slot // n)
        bad_segments = segment_max(batch["segments"], uses_bad)
        return x, gather_rows(bad_segments, batch["segments"]) & (batch["segments"] > 0)


def drop_nonfinite(batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return bool[B, S] (scans with a voxel, scale or offset that is not finite), and the batch with these set to 0."""
    # Large finite values count too: the first LayerNorm squares a voxel of 1e30 to infinity.
    finite = lambda x: jnp.abs(x) < 1e15  # noqa: E731
    scale, offset = batch["scan_scale"], batch["scan_offset"]
    bad = ~(finite(scale) & finite(offset))
    planes = batch["planes"]
    if jnp.issubdtype(planes.dtype, jnp.floating):
        plane_bad = ~finite(planes).all(axis=(-2, -1))  # [B, M]
        patch_bad = gather_rows(plane_bad, batch["plane_index"]).any(axis=(-2, -1))  # [B, R, P]
        b, slots = bad.shape
        bad |= segment_max(batch["patch_segments"].reshape(b, -1), patch_bad.reshape(b, -1), slots)[:, 1:]
        planes = jnp.where(finite(planes), planes, 0.0)
    # Zero scale and offset make every voxel of a bad scan zero, regardless of its planes.
    zeroed = {"scan_scale": jnp.where(bad, 0.0, scale), "scan_offset": jnp.where(bad, 0.0, offset), "planes": planes}
    return bad, {**batch, **zeroed}


def segment_max(segments: jax.Array, values: jax.Array, count: int | None = None) -> jax.Array:
    """Return the maximum of values[B, N] in each segment of a row, [B, 1 + count]; 0 or False in empty segments.

    Args:
      segments: int[B, N] from 0 to `count`, which is N by default.
    """
    size = 1 + (segments.shape[1] if count is None else count)
    return jax.vmap(lambda segment, x: jnp.zeros(size, x.dtype).at[segment].max(x))(segments, values)


def abstract_batch(
    config: RadFMConfig, *, rows=1, text=8, scans=1, vision_rows=1, patches=None, planes=8, plane_dtype=jnp.uint8
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch, for `jax.eval_shape`, ahead-of-time compilation and initialisation.

    `patches` is by default the smallest number that the encoder supports, but at least 8.
    """
    slab = config.vision.slab
    patches = -(-8 // slab) * slab if patches is None else patches
    h, w, d = config.vision.patch
    i32, f32 = jnp.int32, jnp.float32
    shapes = {
        **{k: ((rows, text), i32) for k in ("ids", "visual_index", "segments", "positions")},
        "key_ok": ((rows, text), bool),
        "planes": ((rows, planes, h, w), plane_dtype),
        "plane_index": ((rows, vision_rows, patches, d, config.vision.channels), i32),
        "patch_segments": ((rows, vision_rows, patches), i32),
        "patch_positions": ((rows, vision_rows, patches, 3), i32),
        "scan_rows": ((rows, scans), i32),
        "scan_scale": ((rows, scans), f32),
        "scan_offset": ((rows, scans), f32),
    }
    return {k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, dtype) in shapes.items()}


@functools.lru_cache(maxsize=8)
def abstract_params(config: RadFMConfig) -> dict:
    """Return the boxed tree of parameter shapes and logical axis names. `nn.unbox` gives the plain shapes."""
    boxed = _abstract_params(dataclasses.replace(config, lora=None, base="float32"))
    if (adapters := config.lora) is not None:
        with_adapters = functools.partial(_mapped, boxed, lambda x: x | lora.adapters(adapters, x, jax.random.key(0)))
        boxed = jax.eval_shape(with_adapters)
    return _mapped(boxed, functools.partial(quantised.hold, base=config.base))


@functools.lru_cache(maxsize=8)
def _abstract_params(config: RadFMConfig) -> dict:
    """Trace a model without adapters, which takes seconds."""
    return jax.eval_shape(functools.partial(_init, config), jax.random.key(0), abstract_batch(config))


def init_params(config: RadFMConfig, rng: jax.Array) -> dict:
    """Return fresh parameters as a plain dict, all in float32 whatever `config.base` is.

    Jit it with out_shardings so that none ever exists unsharded.
    """
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract_batch(config))
    return nn.unbox(_init(config, rng, batch))


def _init(config: RadFMConfig, rng: jax.Array, batch: dict) -> dict:
    # Plain XLA attention is the only kernel for the few tokens of `abstract_batch`.
    params = RadFM(config.with_compute(attention="xla")).init(rng, batch)["params"]
    if (adapters := config.lora) is None:
        return params
    return _mapped(params, lambda boxed: boxed | lora.adapters(adapters, boxed, jax.random.fold_in(rng, 1)))


def _mapped(boxed: dict, change: Callable[[dict[str, nn.Partitioned]], dict[str, nn.Partitioned]]) -> dict:
    """Return a tree of boxed parameters after a change of its {path: box}."""
    is_box = lambda _, x: isinstance(x, nn.Partitioned)  # noqa: E731
    return unflatten_dict(change(flatten_dict(boxed, is_leaf=is_box, sep="/")), sep="/")
