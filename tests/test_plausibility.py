"""Warnings about implausible answers, paths in files of answers, and labels of figures."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.samples import Scan
from input_pipeline.text.terms import Terms
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate import figures, results, scoring
from radfm_jax.evaluate.model_answers import RecordedAnswer
from radfm_jax.evaluate.plausibility import GivenAnswer, few_steps, implausible
from radfm_jax.evaluate.radbench import Benchmark, Question
from radfm_jax.evaluate.radbench_build import BuiltBenchmark, read_questions, write_questions, write_roots
from radfm_jax.evaluate.radbench_command import _replace_questions
from radfm_jax.inference.batch_files import existing_answers, read_batch_file
from radfm_jax.inference.batch_run import model_name

REPORTS = [f"there is a nodule of {k} mm" for k in range(10)]


@pytest.mark.parametrize(
    "answers, references, reason",
    [
        (["Yes."] * 10, ["yes", "no"] * 5, "all 10 answers are 'yes'"),
        ([""] * 10, ["yes", "no"] * 5, "all 10 answers are empty"),
        (["no"] * 9 + ["yes"], ["yes", "no"] * 5, "9 of 10 answers are 'no', but at most 5 references"),
        (list("abcdefghij"), REPORTS, "no answer has more than one word, but references have 7.0"),
        ([f"{k} " + "the " * 20 for k in range(10)], REPORTS, "100% of answers repeat one word"),
        (REPORTS, REPORTS, None),
        (["yes", "no"] * 5, ["yes", "no"] * 5, None),
        (["no"] * 10, ["no"] * 10, None),  # the references are all equal
        (["yes"] * 7, ["yes", "no"] * 3 + ["no"], None),  # too few
        (list("abcdefghij"), ["left", "right"] * 5, None),
    ],
)
def test_implausible_answers(answers, references, reason):
    reasons = implausible([GivenAnswer(a, r) for a, r in zip(answers, references, strict=True)])
    assert (not reasons) if reason is None else any(reason in line for line in reasons), reasons


def test_answers_at_the_length_limit():
    given = [GivenAnswer(report, report, cut=True) for report in REPORTS]
    assert implausible(given) == ["100% of answers are cut at the length limit"]


def test_the_report_warns():
    questions = [Question(f"x/{k}", "vqa", "x", "Q?", (f"place {k}",)) for k in range(9)]
    scored = scoring.score(questions, {q.row_id: RecordedAnswer("left") for q in questions}, Terms(["mass"]))
    bench = Benchmark({"x": {"family": "vqa_rad", "task": "vqa", "root": "x", "table": "y"}})
    (line,) = results.warnings_of(results.Results(bench, BuiltBenchmark(questions, {}, {}), {"m": scored}, []))
    assert line.startswith("m, Medical VQA: all 9 answers are 'left'") and "may be untrained" in line


def test_a_checkpoint_of_few_steps(monkeypatch, tmp_path):
    for step, warned in ((0, True), (1, True), (500, False), (None, False)):
        monkeypatch.setattr(checkpoint, "read_description", lambda d, step=step: {"source": {"step": step}})
        assert bool(few_steps(tmp_path)) == warned
    monkeypatch.setattr(checkpoint, "read_description", lambda d: {})
    assert few_steps(tmp_path) == []


def test_the_roc_axes(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda pyplot, figure, file: (drawn.append(figure), pyplot.close(figure)))
    questions = [
        Question(f"x/{k}", "diagnosis", "x", "Q?", (r,), closed=("yes", "no")) for k, r in enumerate(["yes", "no"])
    ]
    answers = {q.row_id: RecordedAnswer("yes", 0.5 + 0.1 * k) for k, q in enumerate(questions)}
    assert figures.calibration({"m": scoring.score(questions, answers, Terms(["mass"]))}, Path("x.png"))
    roc = drawn[0].axes[2]
    assert (roc.get_xlabel(), roc.get_ylabel()) == ("1 - specificity", "sensitivity")


# --- files that can be moved ------------------------------------------------------------------------------------------


def asked(root: Path) -> list[Question]:
    root.mkdir(parents=True, exist_ok=True)
    np.save(root / "a.npy", np.zeros((4, 4, 2), np.int16))
    scans = (Scan(str((root / "a.npy").resolve())),)
    return [Question("x/1", "vqa", "x", "<image-1> Q?", ("a",), scans=scans, root=str(root.resolve()))]


def test_answers_resume_after_the_data_move(tmp_path):
    """Relative paths in questions and answers; absolute ones of older versions are accepted at their old place."""
    settings = {"model": "m", "checkpoint": "c"}
    questions = asked(tmp_path / "data")
    file, out = tmp_path / "run" / "questions.jsonl", tmp_path / "run" / "answers.jsonl"
    write_questions(questions, file)
    write_roots(questions, file.parent)
    assert str(tmp_path) not in file.read_text() and read_questions(file) == questions
    (line,) = read_batch_file(file, Path("/"))
    assert line.scans == questions[0].scans
    answer = {"id": "x/1", **line.echo(), "answer": "a", "made_with": settings}
    assert answer["scans"] == ["a.npy"]
    moved = asked(tmp_path / "elsewhere")
    write_questions(moved, file)
    write_roots(moved, file.parent)
    lines = {line.row_id: line for line in read_batch_file(file, Path("/"))}
    for scan, accepted in (("a.npy", True), (moved[0].scans[0].path, True), ("/data/a.npy", False)):
        out.write_text(json.dumps(answer | {"scans": [scan]}) + "\n")
        if accepted:
            assert existing_answers(out, settings, lines) == {"x/1"}
        else:
            with pytest.raises(ValueError, match=r"has changed \(scans\)"):
                existing_answers(out, settings, lines)


def test_questions_with_absolute_paths_are_the_same(tmp_path):
    questions = asked(tmp_path / "data")
    out = tmp_path / "out"
    (out / "answers").mkdir(parents=True)
    (out / "answers" / "m.jsonl").touch()
    write_questions([dataclasses.replace(q, root="") for q in questions], out / "questions.jsonl")  # as before
    assert str(tmp_path) in (out / "questions.jsonl").read_text()
    _replace_questions(questions, out)
    assert str(tmp_path) not in (out / "questions.jsonl").read_text()


def test_damaged_roots_are_named(tmp_path):
    (tmp_path / "roots.json").write_text("[1]")
    (tmp_path / "q.jsonl").write_text('{"id": "a", "prompt": "Q?"}\n')
    with pytest.raises(ValueError, match=r"roots.json cannot be read"):
        read_batch_file(tmp_path / "q.jsonl", tmp_path)


def test_answers_record_the_name_of_a_checkpoint_not_its_path(tmp_path):
    assert model_name(tmp_path / "run" / "checkpoints" / "1200") == "run/checkpoints/1200"
    assert model_name(tmp_path / "radfm") == "radfm"
