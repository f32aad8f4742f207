"""An exported model means the same after it is read back: sizes, preparation, origin, tokens, bytes."""

# ruff: noqa: F811 (fixtures that are imported)

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from convert_parts import SMALL, save_bin, state_of, write_sizes
from generation_parts import PREPARED, greedy, run, tokenizer, write_scans  # noqa: F401

import radfm_jax
from input_pipeline.text.tokenizer import load_tokenizer
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import from_torch as from_torch_module
from radfm_jax.convert import model_config, table
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.inference import inputs, stored
from radfm_jax.models import radfm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """Return its export in Hugging Face's layout."""
    path = tmp_path_factory.mktemp("export") / "folder"
    to_torch(run / "checkpoints" / "5", path)
    return path


def released_shapes(**llama) -> dict[str, tuple[int, ...]]:
    config = radfm.radfm_14b()
    config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, **llama))
    return {e.name: e.torch_shape for e in table.entries(config)}


# --- run -> PyTorch -> checkpoint -------------------------------------------------------------------------------------


def test_a_run_gives_the_same_answers_after_a_round_trip(run, folder, tmp_path):
    report = from_torch(folder, tmp_path / "again")
    assert not any("prepared" in line for line in report.lines)
    first, again = radfm_jax.load(run), radfm_jax.load(tmp_path / "again")
    assert first.config == again.config
    assert again.preparation == first.preparation == inputs.Preparation(**PREPARED, text_length=128)
    scans = write_scans(tmp_path)
    for scan in ("film.png", "ct.nii.gz"):
        answers = [greedy(model, "Is there a lesion?", [scans / scan]) for model in (first, again)]
        assert answers[0] == answers[1] != ""
    assert stored.origin_of(tmp_path / "again") == {"training": "run", "step": 5, "init_from": ""}


def test_a_bin_has_its_config_next_to_it(run, tokenizer, tmp_path):
    to_torch(run / "checkpoints" / "5", tmp_path / "weights.bin")
    assert {p.name for p in tmp_path.iterdir()} == {"weights.bin", "weights.config.json"}
    from_torch(tmp_path / "weights.bin", tmp_path / "again", tokenizer=tokenizer)
    first, again = radfm_jax.load(run), radfm_jax.load(tmp_path / "again")
    assert first.config == again.config and again.preparation == first.preparation
    (tmp_path / "weights.config.json").unlink()
    with pytest.raises(ValueError, match="number of attention heads .*vision.num_heads.*llama.norm_eps.*--config"):
        from_torch(tmp_path / "weights.bin", tmp_path / "guessed")


def test_the_whole_record_of_the_preparation_travels(run, folder):
    """Every field of Preparation, also one that is added later."""
    record = json.loads((folder / "config.json").read_text())["preparation"]
    assert record.keys() == {f.name for f in dataclasses.fields(inputs.Preparation)}
    assert stored.from_record(record, "x") == radfm_jax.load(run).preparation
    with pytest.raises(ValueError, match="x: `preparation` has unknown fields colour: update radfm_jax"):
        stored.from_record({**record, "colour": "red"}, "x")
    with pytest.raises(ValueError, match="x: `preparation` is invalid: preprocess must be one of"):
        stored.from_record({**record, "preprocess": "new"}, "x")


def test_the_released_preparation_is_assumed_for_released_sizes_only(tmp_path):
    fields = {"user_config": None, "hf_config": None, "part": "radfm", "src": "x.bin", "notes": []}
    model = SimpleNamespace(**fields, config=radfm.radfm_14b())
    records = from_torch_module._records(model)
    assert stored.from_record(records["preparation"], "x") == inputs.RELEASED
    assert "assumed 'released' preprocessing at 512/256" in model.notes[0]
    report = from_torch(save_bin(tmp_path / "x.bin", state_of()), tmp_path / "checkpoint")
    assert any("does not state how scans are prepared: load it with" in line for line in report.lines)
    with pytest.raises(ValueError, match="records how scans were prepared.*--preprocess"):
        _ = radfm_jax.load(tmp_path / "checkpoint").preparation


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """It names its source file and no preparation."""
    for config, expected in ((radfm.radfm_14b().with_compute(dtype="bfloat16"), inputs.RELEASED), (SMALL, None)):
        directory = tmp_path / str(config.vision.width)
        directory.mkdir()
        checkpoint.write_description(directory, "radfm", config.to_dict(), source={"file": "pytorch_model.bin"})
        if expected is not None:
            assert stored.preparation_of(directory, config) == expected
            continue
        with pytest.raises(ValueError, match="how scans were prepared"):
            stored.preparation_of(directory, config)


def test_an_export_of_an_earlier_version(tmp_path):
    """Its config.json described a LLaMA and had the sizes, but no preparation."""
    state = state_of()
    old = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 16, "model": SMALL.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(old))
    from_torch(save_bin(tmp_path / "pytorch_model.bin", state, config=None), tmp_path / "checkpoint")
    assert radfm_jax.load(tmp_path / "checkpoint").config == SMALL


def test_latents_of_another_model(tmp_path):
    record = stored.to_record(inputs.Preparation(num_latents=7))
    path = save_bin(tmp_path / "x.bin", state_of())
    write_sizes(path, preparation=record)
    with pytest.raises(ValueError, match="`preparation` has 7 latents, the weights 4"):
        from_torch(path, tmp_path / "checkpoint")


def test_a_config_of_an_experiment_gives_the_preparation():
    config = model_config.read_config(ROOT / "configs" / "quickstart.py")
    preparation = stored.from_record(config["preparation"], "x")
    assert (preparation.preprocess, preparation.size_2d, preparation.num_latents) == ("paper", 128, 16)


def test_a_config_gives_the_intensities_of_its_sources(tmp_path):
    """They are what the weights were trained with, so an answer needs the same."""
    source = "dict(family='jsonl', table='t', root='r', intensity='lung')"
    (tmp_path / "own.py").write_text(
        "from configs.quickstart import get_config as base\n\n\ndef get_config():\n    config = base().unlock()\n"
        f"    config.data.train = dict(a={source})\n    return config\n"
    )
    config = model_config.read_config(tmp_path / "own.py")
    assert stored.from_record(config["preparation"], "x").intensities == ("lung",)
    with pytest.raises(ValueError, match="intensities must have at least one"):
        stored.from_record({"intensities": []}, "x")


def test_save_keeps_what_the_model_was_loaded_with(run, tokenizer, tmp_path):
    prepared = inputs.Preparation(size_2d=96, num_latents=4)
    model = radfm_jax.load(run, prepared=prepared, tokenizer=tokenizer)
    radfm_jax.save(model, tmp_path / "saved")
    assert radfm_jax.load(tmp_path / "saved").preparation == prepared
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


# --- sizes that no shape gives ----------------------------------------------------------------------------------------


def test_heads_of_another_width_are_never_guessed(tmp_path):
    """Four heads of 32 have the tensor shapes of two heads of 64."""
    vision = dataclasses.replace(SMALL.vision, num_heads=4, head_dim=32)
    perceiver = dataclasses.replace(SMALL.perceiver, num_heads=4, head_dim=32)
    config = radfm.RadFMConfig(vision, perceiver, SMALL.llama)
    path = save_bin(tmp_path / "x.bin", state_of(config), config=None)
    unknown = "vision.num_heads, vision.head_dim, vision.patch.*perceiver.num_heads.*llama.num_heads"
    with pytest.raises(ValueError, match=unknown):
        from_torch(path, tmp_path / "checkpoint")
    # The language model's config gives the sizes of that part only.
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    with pytest.raises(ValueError, match="vision.head_dim") as error:
        from_torch(path, tmp_path / "checkpoint")
    assert "llama." not in str(error.value)
    sizes = config.to_dict()
    from_torch(path, tmp_path / "checkpoint", config={"model": sizes})
    assert radfm_jax.load(tmp_path / "checkpoint").config == config
    del sizes["vision"]["num_heads"], sizes["llama"]["norm_eps"]
    with pytest.raises(ValueError, match="lacks vision.num_heads, llama.norm_eps, which tensor shapes do not give"):
        from_torch(path, tmp_path / "other", config={"model": sizes})


def test_released_vision_with_another_language_model():
    shapes = released_shapes(width=256, mlp_width=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64)
    with pytest.raises(ValueError, match="llama.num_heads") as error:
        model_config.radfm_from_shapes(shapes, None, "x")
    assert "vision." not in str(error.value)
    hf = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    sizes = model_config.radfm_from_shapes(shapes, hf, "x")
    assert (sizes.vision, sizes.llama.norm_eps, sizes.llama.rope_theta) == (radfm.radfm_14b().vision, 1e-5, 5e5)
    for other, words in (
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported .did you mean mistral"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ):
        with pytest.raises(ValueError, match=words):
            model_config.radfm_from_shapes(shapes, hf | other, "x")


def test_rotary_buffers_of_another_base(tmp_path):
    llama = dataclasses.replace(SMALL.llama, rope_theta=5e5)
    path = save_bin(tmp_path / "x.bin", state_of(dataclasses.replace(SMALL, llama=llama)))
    with pytest.raises(ValueError, match="rotary_emb.inv_freq does not fit rope_theta 10000 of the config"):
        from_torch(path, tmp_path / "checkpoint")


# --- transformers -----------------------------------------------------------------------------------------------------


def test_transformers_refuses_the_model(folder):
    """With the type `llama`, it loaded a LLaMA with random weights."""
    import transformers

    with pytest.raises(ValueError, match="radfm_jax"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["radfm", "llama"])
def test_the_tokenizer_of_transformers_adds_bos(part, run, folder, tokenizer, tmp_path):
    import transformers

    if part == "llama":
        folder = tmp_path / "llm"
        to_torch(run / "checkpoints" / "5", folder, part="llama")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(tokenizer)
    for text in ("Is there a lesion?", "size 3 x 4 mm\nleft  lung", "Läsion", "none"):
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)], text
    assert theirs.eos_token_id == ours.eos_id


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_exports_are_reproducible(tmp_path):
    """The order of a set depends on the hash seed of Python; the order of the buffers was one."""
    import torch

    config = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, num_layers=8))
    from_torch(save_bin(tmp_path / "x.bin", state_of(config), config=config), tmp_path / "checkpoint")
    code = """
from radfm_jax.convert.to_torch import to_torch
to_torch("checkpoint", "again.bin")
to_torch("checkpoint", "again")
"""
    to_torch(tmp_path / "checkpoint", tmp_path / "first.bin")
    to_torch(tmp_path / "checkpoint", tmp_path / "first")
    names = [n for n in torch.load(tmp_path / "first.bin", weights_only=True) if table.is_buffer(n)]
    assert names == list(table.buffers(config)) and len(names) == 9
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "first.bin").read_bytes() == (tmp_path / "again.bin").read_bytes()
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
