"""Small models of every decoder family, vision encoder and bridge, and batches for them, for the tests of exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from family_parity import FAMILIES

from input_pipeline.images.planes import patch_grid, to_planes
from radfm_jax import api
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.hub import table as hub_table
from radfm_jax.models import radfm
from radfm_jax.models.encoders.ctvit import CTViTConfig
from radfm_jax.models.encoders.dinov2 import Dinov2Config
from radfm_jax.models.encoders.siglip import SiglipConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.pooling import PooledMlpConfig
from radfm_jax.models.radfm import RadFMConfig

ROOT = Path(__file__).parent.parent
SLICES = {"width": 24, "num_layers": 2, "num_heads": 2, "image_size": 28, "patch": (7, 7, 1), "depth_positions": 8}
CTVIT = CTViTConfig(width=24, spatial_layers=2, temporal_layers=2, num_heads=2, head_dim=8, mlp_width=20, image_size=28,
                    patch=(7, 7, 2), depth=8, codebook=16)  # fmt: skip
PERCEIVER = PerceiverConfig(width=24, num_layers=2, num_heads=2, head_dim=8, num_latents=4)
POOLED = PooledMlpConfig(width=24, hidden=20, grid=(2, 2, 3))
MODELS = {
    "llama": radfm.tiny(),
    "qwen3": RadFMConfig(SiglipConfig(**SLICES, mlp_width=32, mean=(0.4, 0.5, 0.6)), POOLED, FAMILIES["qwen3"].config),
    "phi3": RadFMConfig(CTVIT, PERCEIVER, FAMILIES["phi3"].config),
}
"""Exported and run in the quick tests."""
MORE = {
    "gemma3": RadFMConfig(Dinov2Config(**SLICES, mlp_width=48, registers=2), PERCEIVER, FAMILIES["gemma3"].config),
    "mistral": RadFMConfig(radfm.tiny().vision, POOLED, FAMILIES["mistral"].config),
    "smollm3": RadFMConfig(SiglipConfig(**SLICES, mlp_width=32, mlp="gelu"), PERCEIVER, FAMILIES["smollm3"].config),
    "qwen2": RadFMConfig(Dinov2Config(**SLICES, mlp_width=96, qkv_bias=False), POOLED, FAMILIES["qwen2"].config),
    "gemma2": RadFMConfig(Dinov2Config(**SLICES, mlp_width=64, mlp="swiglu"), PERCEIVER, FAMILIES["gemma2"].config),
}
"""The other families and options, in a slow test."""


def random_params(config: RadFMConfig, seed: int = 0) -> dict:
    """Return random parameters with the standard deviations of a fresh model; none is zero."""
    rng = np.random.default_rng(seed)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in table.param_shapes(config).items()}
    for e in hub_table.entries(config):
        x = rng.standard_normal(e.torch_shape).astype(np.float32)
        if len(e.torch_shape) > 1:
            x *= np.prod(e.torch_shape[1:]) ** -0.5
        elif e.path.endswith("scale") and not (config.llama.unit_offset and e.path.startswith("llama/")):
            x = 1 + 0.3 * x
        else:
            x *= 0.3
        leaves[e.path][e.index or ...] = e.to_ours(x)
    return checkpoint.unflatten(leaves)


def saved(config: RadFMConfig, directory: Path) -> api.Model:
    """Save a model with random parameters as a checkpoint, and return it."""
    model = api.Model(config, random_params(config))
    api.save(model, directory)
    return model


def prompts(config: RadFMConfig, seed: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids int[t], scans float32[S, C, H, W, D]) of four prompts of unequal length, in the layout of `logits`.

    They have no scan, one volume, one 2D scan, and two volumes; all ids of the text are of the vocabulary.
    """
    rng, size, latents = np.random.default_rng(seed), config.llama.vocab_size, config.num_latents
    text = lambda n: rng.integers(3, size, n).tolist()  # noqa: E731
    mark = lambda s: [size, *range(size + 2 + latents * s, size + 2 + latents * (s + 1)), size + 1]  # noqa: E731
    volume, flat = config.vision.scan_shape(3), (*config.vision.scan_shape(3)[:2], config.vision.patch[2])
    noise = lambda n, shape: rng.random((n, config.vision.channels, *shape), np.float32)  # noqa: E731
    rows = [
        ([1, *text(9)], noise(0, volume)),
        ([1, *text(2), *mark(0), *text(5)], noise(1, volume)),
        ([1, *mark(0), *text(3)], noise(1, flat)),
        ([1, *mark(0), *text(4), *mark(1), *text(7)], noise(2, volume)),
    ]
    return [(np.array(ids), scans) for ids, scans in rows]


def inputs_of(config: RadFMConfig, rows: list[tuple[np.ndarray, np.ndarray]], side: str) -> dict[str, np.ndarray]:
    """Return the arguments of an export for a batch of prompts, padded at the `left` or `right`."""
    length, c = max(len(ids) for ids, _ in rows), config.vision
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for i, (row, _) in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = np.minimum(row, config.image_id + 2), 1
    scans = [scan for _, row in rows for scan in row]
    patches = [to_planes(scan, c.patch, c.patch_order).reshape(-1, c.patch_size) for scan in scans]
    grid = [patch_grid(scan.shape[1:], c.patch, c.tables) for scan in scans]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": np.concatenate(patches),
            "image_grid": np.array(grid, np.int64)}  # fmt: skip


def run_child(program: str, *arguments, timeout: float = 300) -> dict:
    """Run a function of hub_child.py in a process without JAX, and return the JSON that it prints last."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTHONPATH"))}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "tests" / "hub_child.py"), program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd="/")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
