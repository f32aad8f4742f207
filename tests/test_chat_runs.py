"""A model with a Hugging Face tokenizer and a chat template: data, training, checkpoints and answers."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import numpy as np
import parity
import pytest
from generation_parts import CONFIG, PREPARED, SHORT, write_scans
from practice import write_index
from tokenizer_parts import CHATML, write_folder

import radfm_jax
from input_pipeline.batching.load import RowLoader
from input_pipeline.config import DataConfig
from input_pipeline.index.index import Index
from input_pipeline.inspect.sampling import first_rows
from input_pipeline.text.tokenizer import load_tokenizer
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate.model_answers import first_tokens
from radfm_jax.inference import Request, Sampling, inputs
from radfm_jax.inference.batch_files import read_batch_file
from radfm_jax.inference.command import main
from radfm_jax.training import loop
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig

V = 640  # ids of the model; the tokenizer has fewer
MODEL = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, vocab_size=V))
TURNS = [("user", "Any edema in the film?"), ("assistant", "Mild edema."), ("user", "Where?"), ("assistant", "Left.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(CHATML, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def data(folder, scans, tmp_path_factory) -> DataConfig:
    """Write the index of two conversations."""
    messages = [{"role": role, "content": content} for role, content in TURNS]
    normal = [{"role": "user", "content": "Any edema in the volume?"}, {"role": "assistant", "content": "No."}]
    rows = [
        {"id": "film", "task": "vqa", "scans": ["film.png"], "messages": messages},
        {"id": "volume", "task": "vqa", "scans": ["ct.nii.gz"], "messages": normal},
    ]
    (scans / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        train={"chat": {"family": "jsonl", "table": "chat.jsonl", "root": str(scans)}},
        index=str(tmp_path_factory.mktemp("data") / "index"), tokenizer=str(folder), template="chat", vocab_size=V,
        terms="none", text_length=160, vision_rows=2, patch_length=16, planes=96, scans=4, num_latents=4, workers=0,
        size_2d=64, size_3d=32, depth=8, crop=1.0,
    )  # fmt: skip
    write_index(config)
    return config


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """Save an untrained model with its tokenizer, and load it again."""
    prepared = inputs.Preparation(**PREPARED, text_length=128, template="chat")
    built = radfm_jax.Model(MODEL, parity.recipe_params(MODEL), tokenizer_file=folder, prepared=prepared)
    directory = tmp_path_factory.mktemp("model") / "model"
    radfm_jax.save(built, directory)
    return radfm_jax.load(directory)


def test_the_index_and_the_rows(data, folder):
    description = Index(data.index).description
    assert description["tokenizer"] == load_tokenizer(folder).fingerprint and description["data"]["template"] == "chat"
    loader = RowLoader(data, "train", training=True)
    assert loader.describe()["vocab_size"] == V and loader.index.identity
    _, sample, encoded = loader.sample(0, 0)
    assert sample.row_id == "film" and (encoded.ids == V).sum() == (encoded.ids == V + 1).sum() == 1
    trained = loader.tokenizer.decode(encoded.targets[encoded.weights > 0])
    assert trained == "Mild edema.Left."
    _, views = first_rows(data, "train", 1, 0, "config")
    shown = {token.text: token.weight for token in views[0].samples[0].tokens if token.kind == "special"}
    assert shown == {"<|im_start|>": 0} and not views[0].warnings
    ends = [token.weight for token in views[0].samples[0].tokens if token.kind == "eos"]
    # The end of the system and user messages is not trained, that of the answers is.
    assert sorted(set(ends)) == [0, 1] and sum(ends) == 1 + (views[0].samples[0].row_id == "film")


def test_the_vocabulary_must_fit_the_model(data, tmp_path):
    experiment = Experiment(MODEL, data)
    with pytest.raises(ValueError, match=f"data.vocab_size is 700, but model.llama.vocab_size is {V}: set both"):
        dataclasses.replace(experiment, data=dataclasses.replace(data, vocab_size=700))
    unpadded = dataclasses.replace(experiment, data=dataclasses.replace(data, vocab_size=0))
    with pytest.raises(ValueError, match=f"if the vocabulary of the model is padded, set data.vocab_size={V}"):
        loop.train(unpadded, tmp_path / "run")
    small = dataclasses.replace(MODEL, llama=dataclasses.replace(MODEL.llama, vocab_size=300))
    with pytest.raises(ValueError, match="data.tokenizer: tokenizer .* ids, but the model has 300"):
        loop.train(Experiment(small, dataclasses.replace(data, vocab_size=300)), tmp_path / "run")


def test_a_checkpoint_has_its_tokenizer(model, folder, tmp_path):
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for name in names:
        assert (model.directory / name).read_bytes() == (folder / name).read_bytes()
    assert checkpoint.tokenizer_path(model.directory) == model.directory
    assert model.tokenizer.image_id == V and model.preparation.template == "chat"
    radfm_jax.save(model, tmp_path / "again")
    assert all((tmp_path / "again" / name).is_file() for name in names)
    (tmp_path / "again" / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"missing: tokenizer.json: copy the file of .* bytes, SHA-256 .* or pass it as "
    ):
        radfm_jax.load(tmp_path / "again")
    again = radfm_jax.load(tmp_path / "again", tokenizer=folder)
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    large = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, vocab_size=300))
    with pytest.raises(ValueError, match="ids, but the model has 300"):
        _ = radfm_jax.Model(large, {}, tokenizer_file=folder).tokenizer


def test_answers_end_at_each_stop_token(model, folder, scans, tmp_path):
    """The prompt is that of training; every stop token of the checkpoint ends the answer and gives no text."""
    request = Request("Any edema in the film?", [scans / "film.png"])
    assert [model.tokenizer.piece(i) for i in model.generator.stop_ids] == ["<|im_end|>", "<|endoftext|>"]
    (free,) = model.generator.answers([request], Sampling(12, stop_ids=()))
    assert len(free.ids) == 12 and free.text == model.tokenizer.decode(free.ids).strip()
    pieces = list(model.stream(request.prompt, request.scans, max_new_tokens=12, stop_ids=(), chunk=1))
    assert "".join(pieces) == free.text and not any("\ufffd" in piece for piece in pieces[:-1])
    known = model.tokenizer.size
    position = next(i for i, token in enumerate(free.ids) if i and token < known and token not in free.ids[:i])
    edited = tmp_path / "edited"
    shutil.copytree(folder, edited)
    (edited / "generation_config.json").write_text(json.dumps({"eos_token_id": free.ids[position]}))
    other = dataclasses.replace(model, tokenizer_file=edited)
    (stopped,) = other.generator.answers([request], Sampling(12))
    assert (stopped.ended, stopped.ids) == ("stop id", free.ids[: position + 1])
    assert stopped.text == model.tokenizer.decode(free.ids[:position]).strip()
    assert first_tokens(model.tokenizer, "chat")[0][0] == model.tokenizer.encode("yes")[0]
    assert first_tokens(model.tokenizer, "radfm")[0][0] == model.tokenizer.encode("yes", separator=" ")[0]


def test_the_commands(model, scans, tmp_path, capsys, monkeypatch):
    """A chat with history, and a batch file of conversations, use turns of the template."""
    command = ["--checkpoint", str(model.directory), *SHORT]
    monkeypatch.setattr("sys.stdin", io.StringIO("Any edema?\nWhere?\n"))
    assert main([*command, "--chat", "--history", "--system", "Be brief."]) == 0
    first = model.answer("Any edema?", system="Be brief.", max_new_tokens=12)
    history = [("Any edema?", inputs.without_marks(first))]
    second = model.answer("Where?", system="Be brief.", history=history, max_new_tokens=12)
    assert capsys.readouterr().out.splitlines()[-1] == second.splitlines()[-1]
    rows = [
        {"id": "a", "messages": [{"role": role, "content": content} for role, content in TURNS]},
        {"id": "b", "messages": [{"role": "user", "content": "Q"}], "prompt": "Q"},
        {"id": "c", "messages": [{"role": "system", "content": "S"}]},
        {"id": "d", "prompt": "Where?"},
    ]
    file = tmp_path / "batch.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    a, b, c, d = read_batch_file(file, tmp_path)
    assert (a.prompt, a.history) == ("Where?", (("Any edema in the film?", "Mild edema."),))
    assert "has both `prompt` and `messages`" in b.error and "messages has no question" in c.error
    assert d.echo() == {"prompt": "Where?", "context": "", "scans": []}
    assert a.echo()["history"] == [["Any edema in the film?", "Mild edema."]]
    out = tmp_path / "out.jsonl"
    for answered in (2, 0):  # the second run finds the answers
        assert main([*command, "--jsonl", str(file), "--out", str(out)]) == 1
        assert f"{answered} answers in" in capsys.readouterr().err
    (answer, _) = map(json.loads, out.read_text().splitlines())
    assert answer["answer"] == model.answer("Where?", history=a.history, max_new_tokens=12)
    assert main([*command, "--prompt", "Where?", "--template", "radfm"]) == 0
    plain = dataclasses.replace(model, prepared=dataclasses.replace(model.preparation, template="radfm"))
    assert capsys.readouterr().out.strip() == plain.answer("Where?", max_new_tokens=12)


@pytest.mark.slow
def test_a_trained_model_answers_and_stops(data, tmp_path):
    """After training on two conversations, the model answers each turn as trained, and ends it."""
    experiment = Experiment(
        MODEL, data, TrainConfig(steps=120, batch=8, remat="none", chunk=64, log_every=40),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=10), checkpoint=CheckpointConfig(save_every=120),
    )  # fmt: skip
    assert loop.train(experiment, tmp_path / "run") == 0
    model = radfm_jax.load(tmp_path / "run")
    assert model.preparation.template == "chat" and model.tokenizer.vocab_size == V
    root = data.train["chat"]["root"]
    film = [f"{root}/film.png"]
    assert model.answer("Any edema in the film?", film) == "Mild edema."
    assert model.answer("Where?", film, history=[("Any edema in the film?", "Mild edema.")]) == "Left."
    assert model.answer("Any edema in the volume?", [f"{root}/ct.nii.gz"]) == "No."
    (answer,) = model.generator.answers([Request("Any edema in the volume?", [f"{root}/ct.nii.gz"])])
    assert answer.ended == "stop id" and answer.ids[-1] == model.tokenizer.chat.end_id
    assert np.exp(answer.logprobs[-1]) > 0.9
