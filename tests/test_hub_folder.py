"""The files of an exported folder, and the folders, checkpoints and sizes that our side refuses."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import shutil

import pytest
from generation_parts import train_tokenizer, write_run
from hub_parts import CTVIT, MODELS, MORE, ROOT, saved

from input_pipeline.text.tokenizer import load_tokenizer
from radfm_jax import __version__
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import released_class, run_facts, table
from radfm_jax.convert.__main__ import main
from radfm_jax.convert.check import compare
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.hub import config as hub_config
from radfm_jax.convert.hub import table as hub_table
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.inference import stored
from radfm_jax.models import radfm
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.encoders.dinov2 import Dinov2Config
from radfm_jax.models.encoders.siglip import medsiglip

CODE = ROOT / "radfm_jax" / "convert" / "hub" / "code"
ACCURACY = {
    "own": [{"kind": "vqa", "samples": 1200, "exact": 0.5, "low": 0.4, "high": 0.6, "balanced": None}],
    "another": [{"kind": "vqa", "samples": 1200, "exact": 0.25, "low": 0.2, "high": 0.3, "balanced": None}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return write_run(root / "runs" / "small", train_tokenizer(root))


@pytest.fixture(scope="module")
def export(run):
    """Return the export of a run, made on the command line."""
    scores = run.parent / "scores"
    scores.mkdir()
    (scores / "accuracy.json").write_text(json.dumps(ACCURACY))
    folder = run.parent / "export"
    assert main(["to-hf", str(run), str(folder), "--dtype", "bfloat16", "--scores", str(scores)]) == 0
    return folder


def test_the_files_of_an_export(run, export, tmp_path):
    names = {path.name for path in export.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.model",
            "tokenizer_config.json", *(path.name for path in CODE.glob("*.py"))} <= names  # fmt: skip
    assert all((export / path.name).read_bytes() == path.read_bytes() for path in CODE.glob("*.py"))
    config = json.loads((export / "config.json").read_text())
    assert config["code_version"] == __version__ and config["torch_dtype"] == "bfloat16"
    assert config["preparation"]["size_3d"] == 32 and config["origin"]["training"] == "run"
    size = config["text_config"]["vocab_size"]
    assert [config[name] for name in hub_config.IDS] == [size + 3, size, size + 1, size + 2]
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2] and generation["do_sample"] is False
    # Best step of the run, its preparation, its tokenizer.
    from_torch(export, tmp_path / "back", dtype="float32")
    source, back = run / "checkpoints" / "5", tmp_path / "back"
    model, again = (radfm.RadFMConfig.from_dict(checkpoint.read_description(x)["model"]) for x in (source, back))
    assert again == model and stored.preparation_of(back, model) == stored.preparation_of(source, model)
    assert stored.origin_of(back)["step"] == 5
    texts = [load_tokenizer(folder).encode("is there a lesion?") for folder in (source, back)]
    assert texts[0] == texts[1]


def test_the_model_card(export):
    card = (export / "README.md").read_text()
    for part in ("library_name: transformers", "not for clinical use", "Vision encoder vit3d: 1 layers", "size_3d 32",
                 "- `run`: 5 steps", "| vqa | 1,200 | 50.0% (40.0% to 60.0%) | 25.0% |"):  # fmt: skip
        assert part in card, part
    assert str(export.parent) not in card


def test_stages_sources_and_metrics_of_a_run(run, tmp_path):
    """A run that continued another one, which is found although its path was relative."""
    second = tmp_path / "runs" / "second"
    shutil.copytree(run, tmp_path / "runs" / "small")
    shutil.copytree(run / "checkpoints" / "10", second / "checkpoints" / "10")
    record = {
        "step": 10,
        "metrics": {"validation/vqa/loss": 0.5, "validation/vqa/exact_match": 0.25, "validation/vqa/samples": 8.0},
        "config": {"data": {"train": {"ct": {"family": "jsonl", "table": "/secret"}}, "preprocess": "paper"},
                   "train": {"batch": 8}, "optimizer": {"frozen": ["llama"]},
                   "checkpoint": {"init_from": "runs/small"}},
    }  # fmt: skip
    (second / "checkpoints" / "10" / "run.json").write_text(json.dumps(record))
    text = run_facts.training(second / "checkpoints" / "10")
    assert text.index("`run`: 5 steps") < text.index("`run`: 10 steps, batch 8, preprocessing paper, frozen llama")
    assert "`ct` (jsonl)" in text and "| vqa | 8 | 25.0% | 0.500 |" in text and "secret" not in text
    shutil.rmtree(tmp_path / "runs" / "small")
    text = run_facts.training(second / "checkpoints" / "10")
    assert "initialised from `small` (no record of that run in this export)" in text
    with pytest.raises(ValueError, match="has no accuracy.json"):
        run_facts.scores(tmp_path)
    (tmp_path / "accuracy.json").write_text('{"own": [{}]}')
    with pytest.raises(ValueError, match="accuracy.json is damaged"):
        run_facts.scores(tmp_path)


def test_a_checkpoint_without_tokenizer_and_preparation(tmp_path):
    saved(MODELS["llama"], tmp_path / "ours")
    report = to_torch(tmp_path / "ours", tmp_path / "export", part="hub")
    text = " ".join(report.lines)
    assert "does not state how scans are prepared" in text and "the checkpoint has no tokenizer" in text
    assert "has no record of its training data" in (tmp_path / "export" / "README.md").read_text()


def test_the_code_has_the_version_of_the_package():
    """All files of code state it; config.json is compared with it. Raise them together."""
    for path in CODE.glob("*_radfm.py"):
        values = [node.value.value for node in ast.parse(path.read_text()).body
                  if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VERSION"]  # fmt: skip
        assert values in ([__version__], []) and (values or path.stem not in ("configuration_radfm", "modeling_radfm"))


def test_the_code_imports_neither_jax_nor_this_package():
    for path in CODE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"jax", "flax", "radfm_jax", "input_pipeline"}, path


@pytest.mark.parametrize("name", MORE)
def test_config_and_table_cover_every_model(name):
    """The other models are exported and read back in test_hub_model.py."""
    config = MORE[name]
    hf = json.loads(json.dumps(hub_config.write_config(config, "float32")))
    assert hub_config.read_config(hf, "config.json") == dataclasses.replace(config).with_compute(remat="full")
    entries = hub_table.entries(config)
    assert {e.path for e in entries} == table.param_shapes(config).keys()
    assert len({e.name for e in entries}) == len(entries)


def test_sizes_of_published_encoders():
    for vision in (medsiglip(), Dinov2Config(width=1536, num_heads=24, mlp="swiglu", mlp_width=4096), CTVIT):
        perceiver = dataclasses.replace(radfm.tiny().perceiver, width=vision.width)
        config = radfm.RadFMConfig(vision, perceiver, radfm.tiny().llama)
        assert hub_config.read_config(hub_config.write_config(config, "float32"), "config.json") == config


def refused(change) -> str:
    hf = json.loads(json.dumps(hub_config.write_config(MODELS["qwen3"], "float32")))
    change(hf)
    with pytest.raises(ValueError) as e:
        hub_config.read_config(hf, "folder/config.json")
    return str(e.value)


@pytest.mark.parametrize("change, message", [
    (lambda hf: hf.pop("bridge_config"), "folder/config.json: bridge_config is missing"),
    (lambda hf: hf.update(vision_config=3), "vision_config must be a mapping (got 3)"),
    (lambda hf: hf.update(code_version="99.0.0"), f"code_version is 99.0.0, but this is radfm_jax {__version__}"),
    (lambda hf: hf.update(top="x"), "unknown keys top"),
    (lambda hf: hf.update(image_token_id=3), "image_token_id is 3, but must be 69"),
    (lambda hf: hf["vision_config"].pop("depth_positions"), "vision_config.depth_positions are missing"),
    (lambda hf: hf["bridge_config"].pop("hidden"), "bridge_config.hidden are missing"),
    (lambda hf: hf["vision_config"].update(hidden_act="relu"), "key 'hidden_act' must be one of"),
    (lambda hf: hf["vision_config"].update(model_type="clip"), "model_type 'clip' is not a supported vision encoder"),
    (lambda hf: hf["bridge_config"].update(grid=[1, 1, 0]), "model.perceiver.grid"),
    (lambda hf: hf["bridge_config"].update(kind="qformer"), "model.perceiver"),
    (lambda hf: hf["text_config"].update(rope_scalin=1), "config.json: text_config: unknown keys rope_scalin"),
])  # fmt: skip
def test_configs_that_are_refused(change, message):
    assert message in refused(change)


def test_folders_and_checkpoints_that_are_refused(run, export, tmp_path, capsys):
    def error(*command) -> str:
        capsys.readouterr()
        assert main([str(x) for x in command]) == 2
        return " ".join(capsys.readouterr().err.split())

    broken = shutil.copytree(export, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["bridge_config"]["num_latents"] = 5
    config["vision_config"]["num_layers"] = 2
    (broken / "config.json").write_text(json.dumps(config))
    text = error("from-hf", broken, tmp_path / "out")
    for part in ("shape of bridge.latents.weight: (4, 24), expected (5, 24)", "missing: vision.blocks.1.qkv.weight"):
        assert part in text
    assert "--vision, --config and --trim-vocabulary do not apply" in error(
        "from-hf", export, tmp_path / "out", "--trim-vocabulary"
    )
    assert "use a name without .bin" in error("to-hf", run, tmp_path / "x.bin")
    adapted = shutil.copytree(run / "checkpoints" / "5", tmp_path / "adapted")
    description = json.loads((adapted / "radfm.json").read_text()) | {"base": {"directory": "x", "sha256": "0"}}
    (adapted / "radfm.json").write_text(json.dumps(description))
    (adapted / "manifest.json").unlink()
    checkpoint.write_manifest(adapted)
    assert "merge them first (python -m radfm_jax.convert merge)" in error("to-hf", adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wide = Dinov2Config(width=24, num_layers=1, num_heads=2, mlp_width=40, image_size=28, patch=(7, 7, 1))
    with pytest.raises(ValueError, match="mlp_ratio must be an integer"):
        hub_config.write_config(radfm.RadFMConfig(wide, radfm.tiny().perceiver, radfm.tiny().llama), "float32")
    with pytest.raises(ValueError, match="no model type of transformers has this decoder"):
        odd = dataclasses.replace(radfm.tiny().llama, qkv_bias=True, qk_norm=True)
        hub_config.write_config(dataclasses.replace(radfm.tiny(), llama=odd), "float32")


def test_check_needs_torch_for_an_export(export, run, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(ValueError, match="is run by transformers, but torch is not installed: pip install"):
        compare(export, run)


def test_what_the_released_class_needs(tmp_path):
    lines = released_class.notes(radfm.radfm_14b(), "4.28")
    assert len(lines) == 1 and "transformers 4.28 to 4.30; with 4.32 or newer it needs the other layout" in lines[0]
    llama = DecoderConfig(num_kv_heads=8, head_dim=64, rope_theta=5e5)
    text = " ".join(released_class.notes(radfm.RadFMConfig(radfm.tiny().vision, radfm.tiny().perceiver, llama), "4.28"))
    for part in (
        "vision.head_dim 8 (fixed: 64)", "vision.mlp_width 32 (fixed: 2048)", "perceiver.num_latents 4",
        "llama.rope_theta 500000.0", "llama.num_kv_heads 8", "llama.head_dim 64 (fixed: width / num_heads, 128)",
    ):  # fmt: skip
        assert part in text, part
    plain = " ".join(released_class.notes(dataclasses.replace(radfm.radfm_14b(), llama=llama), "plain"))
    assert "transformers 4.32 or newer" in plain and "llama." not in plain
    saved(radfm.tiny(), tmp_path / "ours")
    report = to_torch(tmp_path / "ours", tmp_path / "folder")
    assert any("without a patch" in line for line in report.lines)
    assert "- the released class cannot build this model" in (tmp_path / "folder" / "README.md").read_text()
