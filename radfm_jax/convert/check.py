"""Comparison of the logits of two checkpoints of any format, on the same random inputs.

An exported RadFM with its own code is run by transformers, in a process of its own; everything else by this package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.files import read_json
from input_pipeline.images.planes import patch_grid, to_planes
from radfm_jax import api
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.convert.hub import config as hub_config
from radfm_jax.convert.hub import source as hub_source
from radfm_jax.convert.torch_source import TorchModel
from radfm_jax.models.decoder import Decoder, DecoderConfig
from radfm_jax.models.radfm import RadFMConfig

CHILD = Path(__file__).parent / "hub" / "child.py"


def part_of(path, config: dict | None = None) -> str:
    """Return `radfm`, or `llama` for everything that has only a language model, without reading the parameters."""
    path = run_directory.select_checkpoint(path)
    if hub_source.is_export(path):
        return "radfm"
    if (Path(path) / checkpoint.DESCRIPTION).is_file():
        return "radfm" if checkpoint.read_description(path)["part"] == "radfm" else "llama"
    with TorchModel(path, config=config, verify=False) as model:
        return model.part


def load_any(path, *, config: dict | None = None) -> tuple[str, RadFMConfig, dict]:
    """Return (part, sizes, params) of a checkpoint or run directory, or of PyTorch weights.

    The part is `radfm`, or `llama` for everything that has only a language model. Parameters keep their stored dtype
    and stay on the host. Raises ValueError if there is no language model.
    """
    path = run_directory.select_checkpoint(path)
    if (Path(path) / checkpoint.DESCRIPTION).is_file():
        checkpoint.verify(path)
        part, description = part_of(path), checkpoint.read_description(path)
        if "llama" not in description["model"]:
            raise ValueError(f"{path} has only the part {description['part']!r}: there are no logits to compare")
        if part == "radfm" and checkpoint.BASE in description:
            model = api.load(path, verify=False)  # its base may be quantised
            return part, model.config, model.params
        sizes = {name: x for name, x in description["model"].items() if part in ("radfm", name)}
        reader = checkpoint.StoredParams(path)
        names = [name for name in reader.shapes if part == "radfm" or name.startswith("llama/")]
        return part, RadFMConfig.from_dict(sizes), checkpoint.unflatten({name: reader.read(name) for name in names})
    with TorchModel(path, config=config) as model:
        model.check()
        params = {k: np.empty(shape, dtype) for k, (shape, dtype) in model.shapes.items()}
        for name, index, value in model.slices():
            params[name][index or ...] = value
        return model.part, model.config, checkpoint.unflatten(params)


def random_inputs(part: str, config: RadFMConfig, seed: int, length: int = 64) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ids int32[2, length] and, for part `radfm`, vision float32[2, 1, C, H, W, D].

    Each text starts with the tokens of one scan.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, config.llama.vocab_size, size=(2, length), dtype=np.int32)
    ids[:, 0] = 1
    if part == "llama":
        return ids, None
    v, latents = config.llama.vocab_size, config.num_latents
    scan = [v, *range(v + 2, v + 2 + latents), v + 1]
    ids = np.concatenate([ids[:, :1], np.tile(np.array(scan, np.int32), (2, 1)), ids[:, 1:]], axis=1)
    shape = (2, 1, config.vision.channels, *config.vision.scan_shape(4))
    return ids, rng.random(shape, dtype=np.float32)


def logits_of(part: str, config: RadFMConfig, params: dict, ids: np.ndarray, vision, dtype: str) -> np.ndarray:
    """Return logits float32[2, L, V], computed in `dtype`."""
    config = config.with_compute(dtype=dtype)
    if part == "radfm":
        return np.asarray(api.Model(config, params).logits(ids, vision))
    return np.asarray(_llama_logits(config.llama, params["llama"], ids))


@functools.partial(jax.jit, static_argnums=0)
def _llama_logits(config: DecoderConfig, params: dict, ids: jax.Array) -> jax.Array:
    llama = Decoder(config).bind({"params": params})
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    ones = jnp.ones_like(ids)
    return llama.logits(llama(llama.embed(ids), positions, ones, ones > 0))


def compare(a, b, *, config: dict | None = None, seed: int = 0, dtype: str = "float32") -> dict[str, float]:
    """Return `compare_logits` of two checkpoints on the same inputs, with one model in memory at a time.

    If only one of them is a RadFM, the language models are compared. Raises ValueError if one of them cannot be read,
    or if they need different inputs.
    """
    part = "radfm" if {part_of(a, config), part_of(b, config)} == {"radfm"} else "llama"
    sizes, run = _opened(a, part, config, dtype)
    inputs = random_inputs(part, sizes, seed)
    first = run(*inputs)
    del run  # before the second model is loaded
    sizes_b, run = _opened(b, part, config, dtype)
    latents_differ = part == "radfm" and sizes_b.num_latents != sizes.num_latents
    if sizes_b.llama.vocab_size != sizes.llama.vocab_size or latents_differ:
        raise ValueError(
            f"{a} and {b} need different inputs: vocabularies {sizes.llama.vocab_size} and "
            f"{sizes_b.llama.vocab_size}, visual tokens {sizes.num_latents} and {sizes_b.num_latents}"
        )
    return compare_logits(first, run(*inputs))


def _opened(path, part: str, config: dict | None, dtype: str) -> tuple[RadFMConfig, Callable[..., np.ndarray]]:
    """Return the sizes of a model, and a function of ids and vision that returns its logits."""
    if hub_source.is_export(path):
        file = Path(path) / "config.json"
        sizes = hub_config.read_config(read_json(file, kind=dict), file)
        return sizes, functools.partial(logits_of_export, path, sizes, dtype=dtype)
    _, sizes, params = load_any(path, config=config)
    return sizes, lambda ids, vision: logits_of(part, sizes, params, ids, vision, dtype)


def logits_of_export(
    folder, config: RadFMConfig, ids: np.ndarray, vision: np.ndarray | None, *, dtype: str
) -> np.ndarray:
    """Return the logits float32[B, L, V] of an exported RadFM, run by transformers in a process without JAX.

    Raises:
      ValueError: torch or transformers is not installed, or the process fails; the message has the end of its output.
    """
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{folder} is run by transformers, but {' and '.join(missing)} is not installed: "
                         "pip install torch transformers")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        files = [os.path.join(scratch, name) for name in ("inputs.npz", "logits.npy")]
        np.savez(files[0], **export_inputs(config, ids, vision))
        command = [sys.executable, str(CHILD), str(Path(folder).absolute()), *files, dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"transformers cannot run {folder}:\n{done.stderr.strip()[-2000:]}")
        return np.load(files[1])[..., : config.llama.vocab_size]


def export_inputs(config: RadFMConfig, ids: np.ndarray, vision: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the arguments of an exported RadFM for ids int[B, L] and vision float[B, S, C, H, W, D] of `Model.logits`.

    The ids of each scan must be in order, and each row must refer to all its scans.
    """
    arguments = {"input_ids": np.minimum(ids, config.image_id + 2).astype(np.int64)}
    if vision is None:
        return arguments
    c = config.vision
    grid = patch_grid(vision.shape[-3:], c.patch, c.tables)
    planes = to_planes(np.asarray(vision, np.float32), c.patch, c.patch_order)
    arguments["image_grid"] = np.tile(np.array(grid, np.int64), (vision.shape[0] * vision.shape[1], 1))
    return arguments | {"pixel_values": planes.reshape(-1, c.patch_size)}


def compare_logits(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Compare logits float[..., V] in float64. A NaN in either gives NaN differences.

    Top-10 agreement is the mean share of A's ten most likely tokens that are in B's ten. KL is in nats.
    """
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    log_a, log_b = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    kl = np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)
    k = min(10, a.shape[-1])
    top = [np.argsort(-x, axis=-1, kind="stable")[:, :k] for x in (a, b)]
    shared = [len(np.intersect1d(x, y)) / k for x, y in zip(*top, strict=True)]
    return {
        "positions": len(a),
        "largest logit of A": np.abs(a).max(),
        "max difference": np.abs(a - b).max(),
        "mean difference": np.abs(a - b).mean(),
        "top-1 agreement": (top[0][:, 0] == top[1][:, 0]).mean(),
        "top-10 agreement": np.mean(shared),
        "KL(A || B), mean": kl.mean(),
        "KL(A || B), max": kl.max(),
    }
