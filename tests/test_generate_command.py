"""`python -m radfm_jax.generate`: single questions, chats and invalid options."""

# ruff: noqa: F811 (fixtures that are imported)

import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from generation_parts import SHORT, greedy, model, run, scans, tokenizer  # noqa: F401
from PIL import Image

from input_pipeline.messages import printable
from radfm_jax.checkpoints import checkpoint
from radfm_jax.inference import inputs, stored
from radfm_jax.inference.command import main, mesh_of
from radfm_jax.inference.requests import Answer, suspicious
from radfm_jax.models import radfm


def test_one_question(run, model, scans, tmp_path, capsys):
    film = scans / "film.png"
    command = ["--checkpoint", str(run), "--scan", str(film), "--scan", str(scans / "ct.nii.gz"), *SHORT]
    picture = tmp_path / "new" / "seen.png"
    assert main([*command, "--prompt", "<image-2> Compare <image-1>.", "--show", str(picture)]) == 0
    out, err = capsys.readouterr()
    expected = greedy(model, "<image-2> Compare <image-1>.", [film, scans / "ct.nii.gz"])
    assert out == printable(expected, keep="\n\t") + "\n"
    page = np.asarray(Image.open(picture).convert("L"))
    # One slice of the film and eight of the volume, each 160 pixels high below its caption.
    shown = [
        page[k * 180 + 20 : k * 180 + 170, j * 164 + 5 : j * 164 + 155].std() > 5 for k in (0, 1) for j in range(8)
    ]
    assert shown == [True, *[False] * 7, *[True] * 8]
    drawn = [*command, "--prompt", "Lesion?", "--temperature", "1.5", "--top-p", "0.9", "--seed"]
    said = []
    for seed in ("1", "1", "2"):
        assert main([*drawn, seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert main([*command, "--prompt", "<image-1> Lesion?"]) == 2
    assert "error: the prompt does not fit its scans: 2 scans, but no mark <image-2>" in capsys.readouterr().err
    # Other sizes than in training change the answer.
    assert (
        main([*command[:4], *SHORT, "--prompt", "Lesion?", "--size-2d", "32", "--show", str(tmp_path / "s.png")]) == 0
    )
    assert capsys.readouterr().out != greedy(model, "Lesion?", [film]) + "\n"


def test_text_is_checked_before_scans(run, scans, capsys):
    command = ["--checkpoint", str(run), "--scan", str(scans / "broken.png"), "--prompt"]
    assert main([*command, "<image-2> Lesion?"]) == 2
    assert "no scan for <image-2>" in capsys.readouterr().err
    assert main([*command, "<image-1> Lesion?"]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_chat(run, model, scans, capsys, monkeypatch):
    film = scans / "film.png"
    lines = iter(
        [
            "Lesion?",
            "/nonsense",
            "/scan",
            "/scan " + str(scans / "broken.png"),
            f"/scan {film}",
            "/scans",
            "<image-1> Lesion?",
            f"/scan {film}",
            "Lesion?",
            "",
        ]
    )

    def typed(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert main(["--checkpoint", str(run), "--chat", "--history", *SHORT]) == 0
    out, err = capsys.readouterr()
    first = greedy(model, "Lesion?")
    second = greedy(model, "<image-1> Lesion?", [film], context=f"Lesion? {first}")
    # The history has no marks. The third question has none either, so both scans come first.
    before = f"Lesion? {first}\nscan 1 Lesion? {inputs.without_marks(second)}"
    answers = f"{first}\n{second}\n{greedy(model, 'Lesion?', [film, film], context=before)}\n"
    assert out == printable(answers, keep="\n\t")
    assert (
        "unknown command /nonsense" in err
        and "/scan needs a file" in err
        and "broken.png" in err
        and f"<image-1> {film}" in err
    )


@pytest.mark.parametrize("lines, code", [("Lesion?\n", 0), ("/nonsense\nLesion?\n/quit\nLesion?\n", 1)])
def test_chat_from_a_pipe(run, model, capsys, monkeypatch, lines, code):
    """Standard output has the answers only, and the exit code reports failed lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["--checkpoint", str(run), "--chat", *SHORT]) == code
    out, err = capsys.readouterr()
    assert out == greedy(model, "Lesion?") + "\n" and ("unknown command /nonsense" in err) == bool(code)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", "x", "--window", "lung"], "--window, --volume and --series need a --scan"),
        (["--prompt", "x", "--window", "-1000,400"], "--window, --volume and --series need a --scan"),
        (["--jsonl", "x", "--out", "y", "--volume", "1"], "--jsonl excludes --scan, --window, --volume"),
        (["--prompt", "x", "--history"], "--history needs --chat"),
    ],
)
def test_options_without_effect_are_errors(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", "x", *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", "x", "--top-p", "2"], "top_p must be above 0 and at most 1 (got 2.0)"),
        (
            ["--prompt", "x", "--devices", "3"],
            "--devices must be at most 8 and divide the model's 4 key/value heads (got 3)",
        ),
        (["--prompt", "x", "--scan", "f", "--window", "brian"], "--window: intensity 'brian' is not one of"),
        (["--prompt", "x", "--show", "x.png"], "--show needs a --scan"),
        (["--prompt", "x", "--size-2d", "50"], "size_2d, size_3d, depth: "),
    ],
)
def test_invalid_options(run, capsys, arguments, words):
    assert main(["--checkpoint", str(run), "--no-verify", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_mesh_of(model):
    """There are eight devices and four heads."""
    assert mesh_of(model.config, None).shape == {"data": 1, "fsdp": 1, "tensor": 4}
    assert mesh_of(model.config, 1) is None


@pytest.mark.parametrize(
    "source, run_config, words",
    [
        ({"training": "run", "step": 0}, {}, "the weights of step 0, before any training"),
        ({"training": "run", "step": 0}, {"checkpoint": {"init_from": "runs/align"}}, None),
        ({"training": "run", "step": 5}, {}, None),
        ({"file": "x.bin"}, None, None),
        ({"file": "x.bin", "origin": {"training": "run", "step": 0, "init_from": ""}}, None, "step 0"),
        ({}, None, "does not record a training run or a weight file"),
    ],
)
def test_untrained_weights(source, run_config, words, tmp_path):
    checkpoint.write_description(tmp_path, "radfm", radfm.tiny().to_dict(), source=source)
    if run_config is not None:
        (tmp_path / "run.json").write_text(json.dumps({"config": run_config}))
    reason = stored.untrained(tmp_path)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    "ids, ended, words",
    [
        ((2,), "stop id", "the answer is empty"),
        ((), "stop text", "the answer is empty"),
        ((9, 9, 9, 9), "length", "one token 4 times"),
        ((9, 9, 9, 2), "stop id", "one token 3 times"),
        ((9, 2), "stop id", None),
        ((9,), "length", None),
        ((9, 8, 9, 2), "stop id", None),
    ],
)
def test_answers_that_look_wrong(ids, ended, words):
    reason = suspicious(Answer("", ids, (0.0,) * len(ids), ended))
    assert reason is None if words is None else words in reason


def test_warnings_are_on_standard_error(model, tokenizer, tmp_path, capsys):
    """A model of zeros repeats one token."""
    with checkpoint.new_directory(tmp_path / "zeros") as directory:
        checkpoint.save_params(directory, jax.tree.map(lambda x: x * 0, model.params))
        checkpoint.write_description(directory, "radfm", model.config.to_dict(), source={"training": "x", "step": 0})
        (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    command = ["--checkpoint", str(tmp_path / "zeros"), "--preprocess", "paper", *SHORT]
    assert main([*command, "--prompt", "Lesion?"]) == 0
    error = capsys.readouterr().err
    assert "warning: " in error and "step 0, before any training" in error and "one token 12 times" in error
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(json.dumps({"id": i, "prompt": "Lesion?"}) + "\n" for i in "ab"))
    assert main([*command, "--jsonl", str(questions), "--out", str(answers)]) == 0
    assert "warning: 2 answers look wrong (a, b): the answer repeats one token 12 times" in capsys.readouterr().err
