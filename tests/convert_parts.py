"""A small model as released files have it, for the tests of conversion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from radfm_jax.convert import table
from radfm_jax.models import radfm

SMALL = radfm.RadFMConfig(
    radfm.ViTConfig(width=12, num_layers=2, num_heads=2, head_dim=64, mlp_width=16),
    radfm.PerceiverConfig(width=12, num_layers=2, num_heads=2, head_dim=64, num_latents=4),
    radfm.DecoderConfig(vocab_size=40, width=16, mlp_width=24, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=8),
)
"""No tensor shape gives its heads, the sides of its patches, or its RoPE."""


def write_sizes(path: Path, config: radfm.RadFMConfig = SMALL, **fields) -> None:
    """Write the config that `to-torch` writes next to a file, with the sizes and other fields."""
    path.with_suffix(".config.json").write_text(json.dumps({"model": config.to_dict(), **fields}))


def save_bin(
    path: Path, state: dict[str, np.ndarray], tie: bool = True, config: radfm.RadFMConfig | None = SMALL
) -> Path:
    """Save a state dict, and unless `config` is None the sizes next to it."""
    if config is not None:
        write_sizes(path, config)
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
    if tie and table.EMBEDDING_ALIAS in tensors:
        tensors[table.EMBEDDING_ALIAS] = tensors[table.EMBEDDING]
    torch.save(tensors, path)
    return path


def state_of(config: radfm.RadFMConfig = SMALL, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Return every used tensor of a model under its released name, with both names of the embedding.

    The rotary buffers are included.
    """
    rng = np.random.default_rng(seed)
    state = {e.name: rng.standard_normal(e.torch_shape).astype(dtype) for e in table.entries(config)}
    state[table.EMBEDDING_ALIAS] = state[table.EMBEDDING]
    rotary = {k: v for k, v in table.buffers(config).items() if table.ROTARY.fullmatch(k)}
    return {**state, **rotary}


def only_source(folder: Path) -> bool:
    """Return whether a folder has the source of a conversion and nothing else."""
    return {p.name for p in folder.iterdir()} <= {"x.bin", "x.config.json"}


PEAK = """
import re
from pathlib import Path

def peak() -> int:
    # Bytes. ru_maxrss would include the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
"""Source of a function that returns the peak memory of a process, for tests that start one."""
