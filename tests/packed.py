"""Packed rows of a few small samples and scans, made by hand so that they can be checked by eye."""

import dataclasses

import numpy as np

from input_pipeline.images.planes import patch_grid, patch_positions, to_planes
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig

CONFIG = RadFMConfig(
    ViTConfig(
        width=24, num_layers=2, num_heads=2, head_dim=8, mlp_width=32, patch=(4, 4, 2), tables=(4, 4, 8), dropout=0.0
    ),
    PerceiverConfig(width=24, num_layers=2, num_heads=2, head_dim=8, num_latents=2, mlp_factor=2),
    DecoderConfig(vocab_size=40, width=32, mlp_width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8),
)
"""All meshes of eight devices shard it: widths are multiples of 8, numbers of heads multiples of 2."""

SIZES = {"text": 44, "slots": 4, "vision_rows": 2, "patches": 12, "planes": 96}
"""T, S, R, P and M of a row."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """Stored voxels [H, W, D, C], D = 1 in 2D and C = 1 in gray. A value is voxel * scale + offset."""

    voxels: np.ndarray
    scale: float = 1.0
    offset: float = 0.0

    def values(self) -> np.ndarray:
        """Return the released model's input float32[3, H, W, D]; a 2D scan is repeated to one patch of slices."""
        return self.expand().voxels.transpose(3, 0, 1, 2)

    def expand(self, scaled: bool = True) -> "Scan":
        """Return the scan with all planes written out; `scaled` gives float32 values instead of stored voxels."""
        h, w, d, _ = self.voxels.shape
        voxels = np.broadcast_to(self.voxels, (h, w, max(d, CONFIG.vision.patch[2]), CONFIG.vision.channels))
        if not scaled:
            return dataclasses.replace(self, voxels=voxels)
        return Scan(voxels * np.float32(self.scale) + np.float32(self.offset))

    def patches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return planes [m, h, w], plane_index [n, slices, C] and patch_positions [n, 3]."""
        h, w, slices = CONFIG.vision.patch
        depth, channels = self.voxels.shape[2:]
        own = min(depth, slices)
        planes = to_planes(self.voxels.transpose(3, 0, 1, 2), (h, w, own))
        grid = patch_grid((*self.voxels.shape[:2], max(depth, slices)), CONFIG.vision.patch, CONFIG.vision.tables)
        n = int(np.prod(grid))
        index = np.arange(len(planes)).reshape(n, own, channels)
        shape = (n, slices, CONFIG.vision.channels)
        return planes, np.broadcast_to(index, shape), patch_positions(grid, CONFIG.vision.tables)


def scan(height: int, width: int, depth: int, channels: int = 1, *, dtype=np.int16, seed: int = 0) -> Scan:
    """Return noise: uint8 gray values (scaled to 0..1), int16 Hounsfield-like values (to about 0..1), or float32."""
    rng = np.random.default_rng(seed)
    shape = (height, width, depth, channels)
    if dtype == np.uint8:
        return Scan(rng.integers(0, 256, shape, np.uint8), 1 / 255)
    if dtype == np.int16:
        return Scan(rng.integers(-1000, 1500, shape, np.int16), 1 / 2500, 0.4)
    return Scan(rng.random(shape, np.float32))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Ids and names of scans, then the answer and the weight of each of its tokens.

    A negative id is a token hidden from every query, as is the answer's last token, EOS, in the released model.
    """

    question: tuple[int | str, ...]
    answer: tuple[int, ...]
    weights: tuple[float, ...]


SCANS = {
    "cxr": scan(8, 8, 1, dtype=np.uint8, seed=1),  # 2 x 2 x 1 patches, 4 planes: one for 2 slices and 3 channels
    "ct": scan(8, 4, 4, seed=2),  # 2 x 1 x 2 patches, 8 planes: one for 3 channels
    "mr": scan(4, 12, 4, seed=3),  # 1 x 3 x 2 patches, 12 planes
}
A = Sample((1, "cxr", 11, 12), (13, 2), (3, 1))
B = Sample((1, "ct", 14, "mr", 15), (16, 17, 2), (1, 3, 1))
C = Sample((1, 18, 19, -30, 20), (21, 2), (1, 1))
D = Sample((1, "ct", 22), (23, 24, 2), (1, 1, 3))
SAMPLES = {"A": A, "B": B, "C": C, "D": D}


def row(
    samples, scans=SCANS, *, dtype=np.int16, text, slots, vision_rows, patches, planes, seed=9
) -> dict[str, np.ndarray]:
    """Return one packed row (a batch of one).

    Scans take slots in the order of their first mention, and the first vision row with room. Unused planes are noise.
    """
    c, latents = CONFIG.vision, CONFIG.num_latents
    noise = np.random.default_rng(seed).integers(0, 200, (planes, *c.patch[:2]))
    out = {
        **{k: np.zeros(text, np.int32) for k in ("ids", "targets", "segments", "positions")},
        "visual_index": np.full(text, -1, np.int32),
        "key_ok": np.zeros(text, bool),
        "weights": np.zeros(text, np.float32),
        "planes": noise.astype(dtype),
        "plane_index": np.zeros((vision_rows, patches, c.patch[2], c.channels), np.int32),
        "patch_segments": np.zeros((vision_rows, patches), np.int32),
        "patch_positions": np.zeros((vision_rows, patches, 3), np.int32),
        "scan_rows": np.full(slots, -1, np.int32),
        "scan_scale": np.zeros(slots, np.float32),
        "scan_offset": np.zeros(slots, np.float32),
    }
    slot_of: dict[str, int] = {}
    used, used_planes, at = [0] * vision_rows, 0, 0

    for segment, sample in enumerate(samples, 1):
        start = at
        for item in (*sample.question, *sample.answer):
            slot = slot_of.setdefault(item, len(slot_of)) if isinstance(item, str) else None
            marked = item if slot is None else CONFIG.image_id
            steps = [(marked, -1)]
            if slot is not None:
                steps += [(0, slot * latents + i) for i in range(latents)] + [(CONFIG.image_id + 1, -1)]
            for token, visual in steps:
                out["ids"][at], out["visual_index"][at] = abs(token), visual
                out["segments"][at], out["positions"][at], out["key_ok"][at] = segment, at - start, token >= 0
                at += 1
        out["key_ok"][at - 1] = False
        n = len(sample.answer)
        out["targets"][at - n - 1 : at - 1], out["weights"][at - n - 1 : at - 1] = sample.answer, sample.weights

    for name, slot in slot_of.items():
        own_planes, index, positions = scans[name].patches()
        n, m = len(index), len(own_planes)
        r = next(r for r in range(vision_rows) if used[r] + n <= patches)
        here = slice(used[r], used[r] + n)
        out["planes"][used_planes : used_planes + m] = own_planes
        out["plane_index"][r, here] = index + used_planes
        out["patch_positions"][r, here], out["patch_segments"][r, here] = positions, slot + 1
        out["scan_rows"][slot] = r
        out["scan_scale"][slot], out["scan_offset"][slot] = scans[name].scale, scans[name].offset
        used[r], used_planes = used[r] + n, used_planes + m
    return {k: v[None] for k, v in out.items()}


def stack(rows) -> dict[str, np.ndarray]:
    """Concatenate batches along their rows."""
    rows = list(rows)
    return {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
