"""Exported folders run by transformers in a process without JAX, and read back: the same numbers as ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hub_parts import MODELS, inputs_of, prompts, run_child, saved

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.models.radfm import RadFMConfig


def write_exports(root, models):
    """Export models with random parameters below `root`, with their inputs; return the models by name."""
    loaded = {name: saved(config, root / "ours" / name) for name, config in models.items()}
    for name, config in models.items():
        to_torch(root / "ours" / name, root / name, part="hub", max_shard_bytes=50_000 if name == "qwen3" else 2**30)
        for side in ("left", "right"):
            np.savez(root / name / f"{side}.npz", **inputs_of(config, prompts(config), side))
    return loaded


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    models = write_exports(root, MODELS)
    return root, models, run_child("all_models", root, *MODELS)


def own_logits(model, rows, new, longest: int) -> np.ndarray:
    """Return our logits of each prompt and its new tokens. Scans of equal size are one batch, and one program."""
    count, width = max(len(scans) for _, scans in rows), longest + new.shape[1]
    logits = np.zeros((len(rows), width, model.config.llama.vocab_size), np.float32)
    for wanted in {scans.shape[1:] for _, scans in rows}:
        members = [i for i, (_, scans) in enumerate(rows) if scans.shape[1:] == wanted]
        ids, vision = np.zeros((len(members), width), int), np.zeros((len(members), count, *wanted), np.float32)
        mask = np.zeros(ids.shape, bool)
        for row, i in enumerate(members):
            whole = np.concatenate([rows[i][0], new[i]])
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, True
            vision[row, : len(rows[i][1])] = rows[i][1]
        logits[members] = model.logits(ids, vision, mask)
    return logits


def compare_with_ours(root, name, model) -> dict[str, float]:
    """Compare the logits of an export with ours for each prompt, padded at both sides, and its greedy tokens."""
    theirs, rows = np.load(root / name / "torch.npz"), prompts(model.config)
    size, worst = model.config.llama.vocab_size, {"left": 0.0, "right": 0.0, "cache": 0.0}
    longest, new = max(len(ids) for ids, _ in rows), theirs["new"].shape[1]
    own = own_logits(model, rows, theirs["new"], longest)
    for i, (ids, _) in enumerate(rows):
        n, ours = len(ids), own[i]
        worst["left"] = max(worst["left"], np.abs(theirs["left"][i, longest - n :, :size] - ours[:n]).max())
        worst["right"] = max(worst["right"], np.abs(theirs["right"][i, :n, :size] - ours[:n]).max())
        worst["cache"] = max(worst["cache"], np.abs(theirs["whole"][i, longest - n :, :size] - ours[: n + new]).max())
        # Greedy tokens of the cached generation: each is our most likely one after all before it.
        np.testing.assert_array_equal(theirs["new"][i], ours[n - 1 : n + new - 1].argmax(axis=-1))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_ours(name, exports):
    """Text, 2D, 3D and several scans in one batch of unequal lengths. Measured: at most 7e-6 of logits up to 4.5."""
    root, models, found = exports
    worst = compare_with_ours(root, name, models[name])
    assert max(worst.values()) < 2e-4, worst
    assert found[name]["columns"] == models[name].config.llama.vocab_size + 3 and found[name]["lowest"]
    assert found[name]["same without cache"]


def stored_equal(a, b) -> None:
    a, b = checkpoint.StoredParams(a), checkpoint.StoredParams(b)
    assert a.shapes == b.shapes and a.dtypes == b.dtypes
    assert all(np.array_equal(a.read(path), b.read(path)) for path in a.shapes)


@pytest.mark.parametrize("name", MODELS)
def test_from_hf_returns_every_parameter(name, exports, tmp_path):
    root, models, found = exports
    from_torch(root / name, tmp_path / "back", part="llama")
    stored_equal(root / "ours" / name, tmp_path / "back")
    sizes = RadFMConfig.from_dict(checkpoint.read_description(tmp_path / "back")["model"])
    fields = {part: getattr(models[name].config, part) for part in ("vision", "perceiver", "llama")}
    assert sizes == RadFMConfig(**fields).with_compute(remat="full")
    to_torch(tmp_path / "back", tmp_path / "again", part="hub")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (root / name, tmp_path / "again")]
    assert configs[0] == configs[1]


# --- other libraries, damaged folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def used(exports, tmp_path_factory):
    root, models, _ = exports
    scratch = tmp_path_factory.mktemp("used")
    return scratch, run_child("uses", root / "llama", scratch)


def test_other_libraries_use_it(used, exports):
    """Attention kernels, device_map, beams, PEFT, Trainer, gradient checkpointing."""
    root, models, _ = exports
    _, found = used
    assert found["attention"] == "sdpa" and found["eager"] < 2e-5 and 0 < found["bfloat16"] < 0.3
    assert found["device_map"] == 0 and {"ViT3D", "Perceiver", "LlamaDecoderLayer"} <= set(found["split"])
    assert found["several answers"] and found["tuple"]
    assert found["gradients"] < 1e-6
    assert found["adapted"] == ["bridge", "language_model", "vision"] and found["merged"] < 2e-5
    for name in ("peft", "trainer"):
        assert len(found[name]) == 3 and found[name][2] < found[name][0], found[name]
    # The loss is the mean over the labels that are text.
    rows, losses = prompts(models["llama"].config), []
    logits = np.load(root / "llama" / "torch.npz")["right"].astype(np.float64)
    for i, (ids, _) in enumerate(rows):
        for t in range(1, len(ids)):
            if ids[t] < models["llama"].config.image_id:
                losses.append(np.logaddexp.reduce(logits[i, t - 1]) - logits[i, t - 1, ids[t]])
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_folder_that_transformers_saved_is_read(used, exports, tmp_path):
    from_torch(used[0] / "saved", tmp_path / "back", part="llama")
    stored_equal(exports[0] / "ours" / "llama", tmp_path / "back")


MESSAGES = {
    "missing tensor": "lacks 1 tensors of the model (bridge.latents.weight): export it again",
    "other size": "ignore_mismatched_sizes",
    "other version": "written by radfm_jax 9.0.0, but configuration_radfm.py is of version",
    "other code": "but modeling_radfm.py is of version 0.",
    "missing key": "vision_config lacks width",
    "other id": "image_token_id must be 98, as text_config.vocab_size is 96",
    "unknown bridge": "bridge_config.kind 'qformer' is unknown",
    "no pixels": "input_ids have visual tokens, but there are no pixel_values",
    "fewer patches": "but image_grid and the vision encoder need",
    "other grid": "image_grid has (99, 99, 99), but the encoder reads (1, 1, 1) to (16, 16, 128) patches",
    "more visual tokens": "visual tokens, but the scans give",
    "embeddings": "pass input_ids with pixel_values, not inputs_embeds",
}


@pytest.mark.parametrize("damage", MESSAGES)
def test_transformers_reports_damage(damage, used):
    assert MESSAGES[damage] in used[1]["errors"][damage]
