"""The HTML page about consecutive runs."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from radfm_jax.evaluate import exact_match
from radfm_jax.evaluate.exact_match import ExactMatch
from radfm_jax.runtime import console
from radfm_jax.training import display, run_summary


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run with its curves."""
    workdir = tmp_path_factory.mktemp("run")
    speed = {"speed/step_s": 9.0, "speed/samples_s": 1.0, "speed/data_wait": 0.9, "data/real_tokens": 0.5}
    lines = [{"step": 1, "train/loss": 6.0, **speed}]
    for step, seconds in ((10, 0.2), (20, 0.4)):
        now = {"speed/step_s": seconds, "speed/samples_s": 100.0, "speed/data_wait": 0.01, "data/real_tokens": 0.9}
        lines.append({"step": step, "train/loss": 1 / step, **now})
    lines.append({"step": 20, "validation/all/loss": 0.125})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    display.draw_curves(workdir)
    return workdir


@pytest.fixture
def run(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "runs" / "align")


def test_brackets_are_not_markup(capsys, tmp_path):
    """Square brackets in rows, paths and settings are not read as markup."""
    line = "settings that differ: data.sources=[pmc_vqa, vqa], [/x] in [red]a[/red]"
    console.log(line)
    display.Display(tmp_path, 0, 1, active=False).record(1, {}, line)
    assert capsys.readouterr().err == f"{line}\nstep 1/1  {line}\n"


def page(tmp_path, run, *more) -> str:
    assert run_summary.main(["--runs", str(run), *map(str, more), "--out", str(tmp_path / "page.html")]) == 0
    return (tmp_path / "page.html").read_text()


def test_runs_without_their_first_speed(tmp_path, run):
    text = page(tmp_path, run, "--note", "<drawn>", "--place", "weights=out/pytorch")
    assert "Not for clinical use" in text and "&lt;drawn&gt;" in text and "<code>out/pytorch</code>" in text
    row = re.search(r"<tr><td>align</td>.*?</tr>", text).group()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells == ["align", "20", "0.050", "0.125", "0.300", "100", "1.0%", "76.7%", "<code></code>"]
    (picture,) = re.findall(r'base64,([^"]+)"', text)
    assert base64.b64decode(picture) == (run / "curves.png").read_bytes()


def test_scores_with_their_control(tmp_path, run):
    own = [ExactMatch("vqa", str(i), None, "vqa", "Side?", "left", i < 9) for i in range(10)]
    other = [ExactMatch("vqa", str(i), None, "vqa", "Side?", "left", i < 5, "another") for i in range(10)]
    exact_match.write(own + other, tmp_path / "scores")
    text = page(tmp_path, run, "--scores", tmp_path / "scores")
    assert re.search(r"<td>vqa</td>.*?90\.0%.*?59\.6% to 98\.2%.*?90\.0%.*?50\.0%", text), text[-900:]


def test_answers_with_scans_as_the_model_saw_them(tmp_path, run):
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(tmp_path / "a.png")
    prepared = {"preprocess": "paper", "size_2d": 64, "size_3d": 32, "depth": 8, "num_latents": 4, "text_length": 64}
    questions = [
        {"id": "a", "scans": ["a.png"], "instruction": "<image-1> Side?", "response": "left"},
        {"id": "b", "scans": ["a.png"], "instruction": "<image-1> Big?"},
    ]
    answers = [{"id": "a", "answer": "<b>right", "made_with": {"prepared": prepared}}]
    for name, lines in (("questions", questions), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("--questions", tmp_path / "questions.jsonl", "--answers", tmp_path / "answers.jsonl", "--root", tmp_path)
    text = page(tmp_path, run, *more)
    assert "answer: <b>&lt;b&gt;right</b><br>reference: <b>left</b>" in text
    assert "answer: <b>no answer</b></div>" in text and "&lt;image-1&gt; Big?" in text
    assert len(re.findall("data:image/png", text)) == 2  # the curves, and the scan of the answered question


@pytest.mark.parametrize("path", ["../../secret.png", "{outside}", "link.png"])
def test_scans_outside_the_root_are_refused(tmp_path, run, capsys, path):
    """A page is made to be sent, so it must not show any image of the disk."""
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "secret.png")
    root = tmp_path / "data" / "scans"
    root.mkdir(parents=True)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    prepared = {"preprocess": "paper", "size_2d": 64, "size_3d": 32, "depth": 8, "num_latents": 4, "text_length": 64}
    question = {"id": "a", "scans": [path.format(outside=tmp_path / "secret.png")], "instruction": "Side?"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "answer": "x", "made_with": {"prepared": prepared}}))
    argv = ["--runs", run, "--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl", "--root", root]
    assert run_summary.main([*map(str, argv), "--out", str(tmp_path / "page.html")]) == 2
    assert str(root) in capsys.readouterr().err and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "question, answer",
    [
        ({"scans": []}, {"id": "a"}),
        ({"id": "a", "scans": [3]}, {"id": "a"}),
        ({"id": "a", "scans": []}, {"answer": "x"}),
    ],
)
def test_questions_and_answers_of_another_form(tmp_path, run, capsys, question, answer):
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    (tmp_path / "a.jsonl").write_text(json.dumps(answer))
    argv = ["--runs", run, "--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl"]
    assert run_summary.main([*map(str, argv), "--out", str(tmp_path / "page.html")]) == 2
    assert ".jsonl" in capsys.readouterr().err


def test_results_of_a_run_and_what_to_do_next(run):
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "checkpoints" / "10").mkdir()
    (run / "checkpoints" / "best.json").write_text('{"step": 10}')
    lines = display.result_lines(run)
    assert "checkpoints/20 (last step), checkpoints/10 (lowest held-out loss), metrics.jsonl" in lines[0]
    assert f"radfm_jax.generate --checkpoint {run}" in lines[1] and "radfm_jax.evaluate" in lines[2]


def test_a_directory_without_a_run(tmp_path, capsys):
    assert run_summary.main(["--runs", str(tmp_path / "none"), "--out", str(tmp_path / "page.html")]) == 2
    assert "none" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
