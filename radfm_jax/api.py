"""The Python interface: `model = radfm_jax.load(directory)`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from input_pipeline.packing import plain_rows
from radfm_jax import checkpoint, sharding
from radfm_jax.models import radfm


@dataclasses.dataclass(frozen=True)
class Model:
    """A RadFM with its weights.

    Attributes:
      config: sizes, and how to compute (`config.with_compute(dtype="bfloat16")`).
      params: a plain dict of arrays.
      directory: where it was loaded from, None for a model made in memory.
      mesh: what the parameters are sharded over, None for one device.
    """

    config: radfm.RadFMConfig
    params: dict
    directory: Path | None = None
    mesh: jax.sharding.Mesh | None = None

    def logits(self, ids, vision=None, attention_mask=None) -> jax.Array:
        """Logits of every position, in the layout of the released model.

        Args:
          ids: int[B, L]. Below V: text; V `<image>`, V + 1 `</image>`; V + 2 + 32 s + j: visual token j of scan s.
          vision: float[B, S, 3, H, W, D], values in [0, 1]; H and W multiples of 32, D of 4. None: no scans.
            Values far outside that range give a warning: the network was trained on min-max scaled intensities.
          attention_mask: int or bool[B, L]; a token whose mask is 0 is seen by nobody.
        Returns:
          float32[B, L, V].
        Raises:
          ValueError: ids out of range, sizes that do not fit, voxels that are not finite.
        """
        return self.forward(ids, vision, attention_mask)[0]

    def forward(self, ids, vision=None, attention_mask=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`logits` and a dict `out` of intermediates: vit float[B, S, P, D] (patch tokens), perceiver
        float[B, S, 32, D], visual_tokens float[B, S, 32, E], embeddings float[B, L, E] (text and scans fused).
        A sharded model runs on its mesh."""
        c = self.config
        ids = np.asarray(ids)
        text_only = vision is None or np.shape(vision)[1:2] == (0,)
        if text_only:
            # The network always encodes at least one scan; nothing may refer to this one.
            if ids.size and ids.max() >= c.llama.vocab_size + 2:
                raise ValueError(f"ids reach {ids.max()}, which is a visual token, but there is no scan: pass vision")
            vision = np.zeros((*ids.shape[:1], 1, c.vision.channels, *c.vision.patch), np.float32)
        vision = np.asarray(vision)
        bad = np.argwhere(~np.isfinite(vision).reshape(*vision.shape[:2], -1).all(-1)) if vision.ndim == 6 else []
        if len(bad):
            scans = ", ".join(f"scan {s} of sample {b}" for b, s in bad)
            raise ValueError(f"voxels that are not finite in {scans}")
        if vision.size and (vision.min() < -0.5 or vision.max() > 1.5):
            warnings.warn(
                f"vision runs from {vision.min():g} to {vision.max():g}, the model reads [0, 1]: scale each scan first",
                stacklevel=3,
            )
        batch = plain_rows(
            ids,
            vision,
            attention_mask,
            vocab_size=c.llama.vocab_size,
            num_latents=c.num_latents,
            patch=c.vision.patch,
            channels=c.vision.channels,
            tables=c.vision.tables,
        )
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            return _forward(c, self.params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, batch):
    return radfm.RadFM(config).apply({"params": params}, batch)


def load(directory, *, dtype: str = "float32", param_dtype: str | None = None, mesh=None, verify: bool = True) -> Model:
    """Reads a checkpoint directory (made by `python -m radfm_jax.convert`, training or `save`).

    Args:
      dtype: what matrices are multiplied in: float32 or bfloat16.
      param_dtype: what parameters are kept in; None keeps each as it is stored.
      mesh: a mesh of `sharding.make_mesh` to shard the parameters over; None uses the first device.
      verify: compare every file with its SHA-256 first; False compares sizes only.
    Raises:
      ValueError: not a checkpoint directory, damaged, or not a whole RadFM.
    """
    for name in filter(None, (dtype, param_dtype)):
        if name not in checkpoint.DTYPES:
            raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(checkpoint.DTYPES)}")
    if mesh is not None and mesh.axis_names != sharding.AXES:
        raise ValueError(f"mesh has axes {mesh.axis_names}, expected {sharding.AXES}: use sharding.make_mesh")
    directory = Path(directory)
    checkpoint.verify(directory, hashes=verify)
    config = checkpoint.model_config(checkpoint.read_description(directory), directory)
    boxed = radfm.abstract_params(config)
    stored = checkpoint.ParamReader(directory).dtypes
    abstract = checkpoint.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, param_dtype or stored.get(path, leaf.dtype))
            for path, leaf in checkpoint.flatten(nn.unbox(boxed)).items()
        }
    )
    shardings = sharding.param_shardings(boxed, mesh)[0] if mesh is not None else None
    params = checkpoint.restore_params(directory, abstract, shardings)
    return Model(config.with_compute(dtype=dtype), params, directory, mesh)


def save(model: Model, directory) -> None:
    """Writes a checkpoint directory, whole or not at all; what `load` found beside the parameters (tokenizer, unused
    tensors of a released file) goes along. For one process with all parameters.

    Raises ValueError if `directory` exists, the disk is too small, or there are several processes.
    """
    if jax.process_count() > 1:
        raise ValueError("save writes from one process, and there are several: gather the parameters in one of them")
    beside = []
    if model.directory is not None:
        beside = [p for n in checkpoint.BESIDE if (p := model.directory / n).is_file()]
    size = sum(x.nbytes for x in jax.tree.leaves(model.params)) + sum(p.stat().st_size for p in beside)
    checkpoint.require_space(directory, size + size // 50, f"saving {directory}")
    with checkpoint.new_directory(directory) as partial:
        checkpoint.save_params(partial, model.params)
        source = {}
        if model.directory is not None:
            source = checkpoint.read_description(model.directory).get("source", {})
        for path in beside:
            shutil.copyfile(path, partial / path.name)
        checkpoint.write_description(partial, "radfm", model.config.to_dict(), source=source)
