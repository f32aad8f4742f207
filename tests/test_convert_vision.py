"""`from-hf --vision`: encoders of Hugging Face folders in a checkpoint, and a training that starts from them."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from encoder_parts import converted, random_weights
from family_parity import FAMILIES, their_model

from radfm_jax.checkpoints import checkpoint, train_state
from radfm_jax.convert import vision_config
from radfm_jax.convert.__main__ import main
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.tensor_files import open_tensors
from radfm_jax.models import radfm
from radfm_jax.models.encoders.siglip import SiglipConfig
from radfm_jax.runtime import sharding
from radfm_jax.training import optimizer, train_step

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 28, "patch_size": 14}  # fmt: skip
SIGLIP = SiglipConfig(width=16, num_layers=2, num_heads=2, mlp_width=24, image_size=28, patch=(14, 14, 1))


def models() -> dict:
    """Return transformers models that have an encoder: alone, in a SigLIP, in a Gemma 3."""
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    gemma = {**text, "num_key_value_heads": 1, "head_dim": 8}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    dino = {key: x for key, x in SIZES.items() if key != "intermediate_size"}
    return {
        "encoder": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)),
        "siglip": lambda: transformers.SiglipModel(
            transformers.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=SIZES)
        ),
        "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=gemma, vision_config=SIZES, **tokens)
        ),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**dino)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a function: name of a model -> its folder."""
    made = {}

    def make(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            random_weights(models()[name]()).save_pretrained(made[name])
        return made[name]

    return make


def params_in(directory, part: str) -> dict[str, np.ndarray]:
    reader = checkpoint.StoredParams(directory)
    return {name: reader.read(name) for name in reader.shapes if name.startswith(f"{part}/")}


@pytest.mark.parametrize("name", ["encoder", "siglip", "gemma3", "dinov2"])
def test_an_encoder_alone(name, folder, tmp_path, capsys):
    source = folder(name)
    assert main(["from-hf", "--vision", str(source), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert "has no vit/depth_positions: they start fresh" in " ".join(capsys.readouterr().out.split())
    description = checkpoint.read_description(tmp_path / "out")
    config = vision_config.read_config(transformers.AutoConfig.from_pretrained(source).to_dict(), "config.json")
    stored = description["model"]["vision"]
    assert (description["part"], description["absent"]) == ("vision", ["vit/depth_positions"])
    assert radfm.RadFMConfig.from_dict({"vision": stored, "perceiver": {"width": 16}}).vision == config
    with open_tensors(source) as reader:
        expected = checkpoint.flatten({"vit": converted(config, {n: reader.read(n) for n in reader.infos})})
    actual = params_in(tmp_path / "out", "vit")
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[path], expected[path]) for path in actual)


def test_an_encoder_for_another_image_size(folder, tmp_path):
    report = from_torch(None, tmp_path / "out", part="llama", vision=folder("encoder"), image_size=42)
    assert "positions interpolated from 28 to 42 pixels" in report.lines
    stored = checkpoint.read_description(tmp_path / "out")["model"]["vision"]
    params = params_in(tmp_path / "out", "vit")
    assert stored["image_size"] == 42 and params["vit/positions"].shape == (9, 16)
    net = transformers.SiglipVisionModel.from_pretrained(folder("encoder"))
    with torch.no_grad():
        theirs = net.embeddings.interpolate_pos_encoding(torch.zeros(1, 9, 16), 42, 42)[0].numpy()
    np.testing.assert_allclose(params["vit/positions"], theirs, atol=1e-5)


@pytest.fixture(scope="module")
def parts(folder, tmp_path_factory):
    """Return a checkpoint with the language model of a Qwen3 and the encoder of a SigLIP."""
    root = tmp_path_factory.mktemp("parts")
    their_model("qwen3").save_pretrained(root / "llm")
    command = ["from-hf", str(root / "llm"), str(root / "parts"), "--vision", str(folder("siglip"))]
    assert main(command) == 0
    return root / "parts"


def abstract(model: radfm.RadFMConfig) -> dict:
    return train_step.abstract_state(
        model, optimizer.OptimizerConfig(), sharding.make_mesh(data=len(jax.devices()), fsdp=1)
    )[0]


def small(**llama) -> radfm.RadFMConfig:
    perceiver = dataclasses.replace(radfm.tiny().perceiver, width=16)
    return radfm.RadFMConfig(SIGLIP, perceiver, dataclasses.replace(FAMILIES["qwen3"].config, **llama))


def test_a_training_starts_from_both_parts(parts, tmp_path):
    description = checkpoint.read_description(parts)
    assert description["part"] == "llama+vision" and description["model"].keys() == {"llama", "vision"}
    state = abstract(small())
    train_state.check_init(parts, state, small())
    loaded, report = train_state.init_from(parts, state, small())
    assert {path.partition("/")[0] for path in report.loaded} == {"llama", "vit"} and report.unused == ()
    assert {path.partition("/")[0] for path in report.new} == {"vit", "perceiver", "projection", "image_marks"}
    assert [path for path in report.new if path.startswith("vit/")] == ["vit/depth_positions"]
    assert "perceiver: 0 loaded" in str(report)
    stored = params_in(parts, "llama") | params_in(parts, "vit")
    assert loaded.keys() == stored.keys()
    assert all(np.array_equal(np.asarray(loaded[path]), stored[path]) for path in stored)
    assert main(["to-hf", str(parts), str(tmp_path / "llm")]) == 0
    assert main(["check", str(parts), str(tmp_path / "llm")]) == 0


def test_parts_that_differ_from_the_model(parts):
    model = small(qk_norm=False)
    with pytest.raises(ValueError) as e:
        train_state.check_init(parts, abstract(model), model)
    for line in (
        "unexpected: llama/blocks/query_norm/scale",
        "model.llama.qk_norm is False, was True in the checkpoint",
    ):
        assert line in str(e.value)
    model = dataclasses.replace(radfm.tiny(), llama=FAMILIES["qwen3"].config)
    with pytest.raises(
        ValueError, match="(?s)missing: vit/.*unexpected: vit/.*model.vision.kind is 'vit3d', was 'siglip'"
    ):
        train_state.check_init(parts, abstract(model), model)


def test_bad_input(folder, parts, tmp_path, capsys):
    broken = shutil.copytree(folder("encoder"), tmp_path / "broken")
    (broken / "config.json").unlink()
    for arguments, words in (
        (["from-hf", str(tmp_path / "out")], "nothing to convert: pass the folder of a language model, --vision DIR"),
        (
            ["from-hf", str(folder("encoder")), str(tmp_path / "out"), "--image-size", "42"],
            "--image-size is the size of a vision encoder",
        ),
        (
            ["from-hf", "--vision", str(broken), str(tmp_path / "out")],
            "broken has no config.json, which states the sizes",
        ),
        (["from-hf", "--vision", str(folder("encoder")), str(tmp_path / "out"), "--image-size", "30"], "image_size 30"),
        (["from-hf", "--vision", str(tmp_path / "none"), str(tmp_path / "out")], "none is not a file"),
    ):
        assert main(arguments) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert main(["from-hf", "--vision", str(folder("encoder")), str(tmp_path / "vision")]) == 0
    for command, other in (("to-hf", "other"), ("check", "vision")):
        assert main([command, str(tmp_path / "vision"), str(tmp_path / other)]) == 2
        assert "has only the part 'vision'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
