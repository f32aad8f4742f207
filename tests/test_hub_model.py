"""Exported folders run by transformers in a process without JAX, and read back: the same numbers as ours."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import golden
import numpy as np
import pytest
from convert_parts import save_bin
from hub_parts import MODELS, MORE, inputs_of, prompts, run_child, saved

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import hf_folder
from radfm_jax.convert.__main__ import main
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.hub import config as hub_config
from radfm_jax.convert.hub import table as hub_table
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.models import radfm
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig


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
    return root, models, run_child("quick", root, *MODELS)


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
    assert found[name]["same without cache"] and found[name]["scores of tokens"] < 1e-5


def stored_equal(a, b) -> None:
    a, b = checkpoint.StoredParams(a), checkpoint.StoredParams(b)
    assert a.shapes == b.shapes and a.dtypes == b.dtypes
    assert all(np.array_equal(a.read(path), b.read(path)) for path in a.shapes)


@pytest.mark.parametrize("name", MODELS)
def test_from_hf_returns_every_parameter(name, exports, tmp_path):
    """Of an export, and of a folder that transformers saved again."""
    root, models, _ = exports
    for source, target in ((root / name, tmp_path / "back"), (root / f"{name} saved", tmp_path / "saved")):
        from_torch(source, target, part="llama")
        stored_equal(root / "ours" / name, target)
    sizes = RadFMConfig.from_dict(checkpoint.read_description(tmp_path / "back")["model"])
    fields = {part: getattr(models[name].config, part) for part in ("vision", "perceiver", "llama")}
    assert sizes == RadFMConfig(**fields).with_compute(remat="full")
    to_torch(tmp_path / "back", tmp_path / "again", part="hub")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (root / name, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_the_other_families_and_options(tmp_path):
    """Measured: at most 2e-5."""
    models = write_exports(tmp_path, MORE)
    run_child("all_models", tmp_path, *MORE)
    for name, model in models.items():
        worst = compare_with_ours(tmp_path, name, model)
        assert max(worst.values()) < 2e-4, (name, worst)
        from_torch(tmp_path / name, tmp_path / f"{name} back", part="llama")
        stored_equal(tmp_path / "ours" / name, tmp_path / f"{name} back")


@pytest.mark.slow
def test_check_runs_the_code_of_the_folder(exports, tmp_path, capsys):
    root = exports[0]
    assert main(["check", str(root / "ours" / "qwen3"), str(root / "qwen3"), "--tolerance", "2e-4"]) == 0
    assert main(["check", str(root / "qwen3"), str(root / "qwen3 saved"), "--tolerance", "0"]) == 0
    to_torch(root / "ours" / "qwen3", tmp_path / "llm", part="llama")
    assert main(["check", str(root / "qwen3"), str(tmp_path / "llm")]) == 0  # texts
    edited = shutil.copytree(root / "qwen3", tmp_path / "edited")
    code = (edited / "modeling_radfm.py").read_text()
    (edited / "modeling_radfm.py").write_text(code.replace("F.gelu(self.up(x.flatten", "F.relu(self.up(x.flatten"))
    assert main(["check", str(root / "ours" / "qwen3"), str(edited)]) == 1
    (edited / "modeling_radfm.py").write_text("raise RuntimeError('broken')")
    assert main(["check", str(root / "ours" / "qwen3"), str(edited)]) == 2
    assert "RuntimeError: broken" in capsys.readouterr().err


@pytest.mark.slow
def test_the_released_sizes(tmp_path):
    """All 13,123,822,336 parameters have the names and shapes of the table."""
    config = radfm.radfm_14b()
    hf_folder.write_json(tmp_path / "config.json", hub_config.write_config(config, "bfloat16"))
    for path in hf_folder.CODE.glob("*.py"):
        shutil.copyfile(path, tmp_path / path.name)
    shapes = run_child("shapes", tmp_path)
    assert shapes == {e.name: list(e.torch_shape) for e in hub_table.entries(config)}
    assert sum(math.prod(shape) for shape in shapes.values()) == 13_123_822_336


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p1_2d_s1", "p4_b2s2_2d_pad", "p6_3d_s2_d8_mid"])
def test_released_weights_give_the_released_outputs(name, tmp_path):
    """Logits of the released code (golden files) against released weights, converted and run by transformers."""
    case = golden.load(name)
    path = save_bin(tmp_path / "x.bin", golden.state_dict(name), config=None)
    sizes = golden.Sizes.of_golden(case)
    vision = ViTConfig(width=sizes.vis_dim)
    llama = DecoderConfig(
        vocab_size=sizes.vocab, width=sizes.hidden, mlp_width=sizes.inter, num_layers=sizes.layers,
        num_heads=sizes.heads, num_kv_heads=sizes.heads, head_dim=sizes.hidden // sizes.heads,
    )  # fmt: skip
    config = RadFMConfig(vision, PerceiverConfig(width=sizes.vis_dim), llama)
    from_torch(path, tmp_path / "ours", config={"model": config.to_dict()})
    to_torch(tmp_path / "ours", tmp_path / "export", part="hub")
    real, rows = case["attention_mask"] > 0, []
    for ids, mask, scans in zip(case["lang_x"], real, golden.vision(case), strict=True):
        rows.append((ids[mask], scans[: (ids == config.image_id).sum()]))
    np.savez(tmp_path / "inputs.npz", **inputs_of(config, rows, "right"))
    run_child("logits", tmp_path / "export", tmp_path / "inputs.npz", tmp_path / "logits.npy")
    actual = np.load(tmp_path / "logits.npy")[..., : sizes.vocab]
    for i, (ids, _) in enumerate(rows):
        np.testing.assert_allclose(actual[i, : len(ids)], case["logits"][i, real[i]], atol=2e-4, rtol=0)


# --- other libraries, damaged folders ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_libraries_use_it(exports, tmp_path):
    """Attention kernels, device_map, beams, PEFT, Trainer, gradient checkpointing."""
    root, models, _ = exports
    found = run_child("uses", root / "llama", tmp_path)
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


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("trl", "datasets"))), reason="needs trl and datasets")
def test_trl_trains_it(exports, tmp_path):
    losses = run_child("sft", exports[0] / "llama", tmp_path)
    assert len(losses) == 4 and losses == sorted(losses, reverse=True), losses


MESSAGES = {
    "missing tensor": "lacks 1 tensors of the model (bridge.latents.weight): export it again",
    "other size": "ignore_mismatched_sizes",
    "other version": "written by radfm_jax 9.0.0, but configuration_radfm.py is of version",
    "other code": "but modeling_radfm.py is of version 0.",
    "missing key": "vision_config lacks width",
    "missing part": "config.json lacks bridge_config",
    "fewer layers": "tensors that are not of the model (language_model.model.layers.1.",
    "other id": "image_token_id must be 98, as text_config.vocab_size is 96",
    "unknown bridge": "bridge_config.kind 'qformer' is unknown",
    "no pixels": "input_ids have visual tokens, but there are no pixel_values",
    "fewer patches": "but image_grid and the vision encoder need",
    "other grid": "image_grid has (99, 99, 99), but the encoder reads (1, 1, 1) to (16, 16, 128) patches",
    "no grid": "there are pixel_values, but no image_grid",
    "unknown id": "IndexError: index out of range",
    "resized": "the vocabulary cannot be resized",
    "more visual tokens": "visual tokens, but the scans give",
    "embeddings": "pass input_ids with pixel_values, not inputs_embeds",
}


@pytest.mark.parametrize("damage", MESSAGES)
def test_transformers_reports_damage(damage, exports):
    assert MESSAGES[damage] in exports[2]["errors"][damage]
