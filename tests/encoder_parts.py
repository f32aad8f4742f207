"""Scans, batches and parameters of small vision encoders."""

import json

import numpy as np

from input_pipeline.images.planes import Patches, to_planes
from radfm_jax.checkpoints.checkpoint import unflatten
from radfm_jax.convert import vision_config, vision_tables
from radfm_jax.models.encoders.kinds import VisionConfig


def random_weights(module, seed: int = 0):
    """Return a PyTorch module with random weights, norms and biases; every one of them changes the output."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = 1.0 if p.ndim < 2 else p[0].numel() ** -0.5
            is_gain = p.ndim < 2 and not name.endswith("bias")
            p.copy_(1 + 0.3 * noise if is_gain else (0.3 if p.ndim < 2 else 1.5 * scale) * noise)
    return module.eval()


def converted(config: VisionConfig, tensors: dict[str, np.ndarray]) -> dict:
    """Return the parameters below `vit/` of a file's tensors. Every tensor is used, or known not to matter."""
    named = {vision_tables.local_name(config.kind, name): np.asarray(tensor) for name, tensor in tensors.items()}
    named.pop(None, None)
    entries = vision_tables.vision_entries(config)
    assert {e.name for e in entries} == named.keys()
    leaves: dict = {}
    for e in entries:
        assert named[e.name].shape == e.torch_shape, e.name
        np.testing.assert_array_equal(e.to_torch(e.to_ours(named[e.name])), named[e.name])
        leaves.setdefault(e.path, []).append((e.layer, e.to_ours(named[e.name])))
    stacked = {
        path.removeprefix("vit/"): values[0][1] if values[0][0] is None else np.stack([v for _, v in values])
        for path, values in leaves.items()
    }
    return unflatten(stacked)


def from_folder(folder) -> tuple[VisionConfig, dict]:
    """Return config and parameters of a Hugging Face folder; depth positions are 0."""
    from safetensors.numpy import load_file

    config = vision_config.read_config(json.loads((folder / "config.json").read_text()), folder / "config.json")
    params = converted(config, load_file(folder / "model.safetensors"))
    params["depth_positions"] = np.zeros((config.depth_positions, config.width), np.float32)
    return config, params


def vision_batch(
    config: VisionConfig,
    scans: list[np.ndarray],
    *,
    patch_length: int,
    planes: int,
    slots: int = 3,
    channels: int | None = None,
) -> tuple:
    """Return the arguments of an encoder: one vision row with float32 scans [C, H, W, D] in order, then padding.

    Unused planes are noise. `channels` = 1 writes the first channel once.
    """
    patches, channels = Patches(config.patch, config.tables, config.patch_order), channels or config.channels
    own_planes, index, segments, positions, used = [], [], [], [], 0
    for slot, scan in enumerate(scans):
        own = to_planes(scan[:channels], config.patch, config.patch_order)
        index.append(used + np.arange(len(own)).reshape(-1, config.patch[2], channels))
        segments.append(np.full(len(index[-1]), slot + 1))
        positions.append(patches.positions(scan.shape[1:]))
        own_planes.append(own)
        used += len(own)
    own_planes.append(noise(planes - used, *config.patch[:2], seed=9))
    row = lambda parts: np.pad(  # noqa: E731
        joined := np.concatenate(parts), ((0, patch_length - len(joined)), *((0, 0),) * (joined.ndim - 1))
    ).astype(np.int32)[None, None]
    ones = np.ones((1, slots), np.float32)
    return np.concatenate(own_planes)[None], row(index), row(segments), row(positions), ones, 0 * ones


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)
