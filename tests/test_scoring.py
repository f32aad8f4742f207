"""Scores of answers, and of failed ones."""

import math

import pytest

from input_pipeline.text.terms import Terms
from radfm_jax.evaluate import (
    scoring,
)
from radfm_jax.evaluate.model_answers import RecordedAnswer
from radfm_jax.evaluate.radbench import Question


def test_scores_of_one_answer_each():
    terms = Terms(["mass", "nodule"])
    closed = Question("x/1", "diagnosis", "x", "Q?", ("yes",), closed=("yes", "no"))
    open_one = Question("x/2", "report", "x", "Q?", ("a mass and a nodule",))
    scored = scoring.score([closed, open_one], {"x/1": RecordedAnswer("Yes."), "x/2": RecordedAnswer("a mass")}, terms)
    assert scored[0].predicted == "yes" and scored[0].values == {"accuracy": 1.0, "named": 1.0}
    assert scored[1].values["umls_precision"] == 1 and scored[1].values["umls_recall"] == 0.5
    assert scored[1].values["bleu"] == pytest.approx(math.exp(1 - 5 / 2))
    for answers in (
        {},
        {"x/1": RecordedAnswer("  "), "x/2": RecordedAnswer("")},
        {"x/1": RecordedAnswer("yes", error="no scan")},
    ):
        failed = scoring.score([closed, open_one], answers, terms)
        assert all(one.error for one in failed) and failed[0].predicted is None
        assert not any(value for one in failed for value in one.values.values())


def test_a_failed_yes_no_answer_is_neither():
    """It counts as 0.5, so that failures give no advantage."""
    ask = lambda i, r: Question(f"x/{i}", "diagnosis", "x", "Q?", (r,), closed=("yes", "no"))  # noqa: E731
    questions = [ask(1, "yes"), ask(2, "no"), ask(3, "no")]
    answers = {
        "x/1": RecordedAnswer("yes", 0.4),
        "x/2": RecordedAnswer("no", 0.1),
        "x/3": RecordedAnswer("", error="broken"),
    }
    found = scoring.intervals(scoring.score(questions, answers, Terms(["mass"])), resamples=10, seed=0, by_study=False)
    assert found["auc"].value == pytest.approx(1 / 2) and found["accuracy"].value == pytest.approx(2 / 3)
    del answers["x/3"]
    answers["x/2"] = RecordedAnswer("no")
    assert "auc" not in scoring.intervals(
        scoring.score(questions, answers, Terms(["mass"])), resamples=10, seed=0, by_study=False
    )


def test_umls_scores_are_averaged_over_all_samples_and_over_those_with_terms():
    """Four answers: precision 1, 0, undefined and undefined; the paper averages over all samples."""
    ask = lambda i, reference: Question(f"x/{i}", "vqa", "x", "Q?", (reference,))  # noqa: E731
    questions = [ask(1, "a mass and a nodule"), ask(2, "a mass"), ask(3, "left"), ask(4, "right")]
    answers = {f"x/{i}": RecordedAnswer(text) for i, text in enumerate(("a mass", "left", "left", "left"), 1)}
    scored = scoring.score(questions, answers, Terms(["mass", "nodule"]))
    found = scoring.intervals(scored, resamples=20, seed=0, by_study=False)
    assert {name: found[name].value for name in found if name.startswith("umls")} == {
        "umls_precision": 1 / 4, "umls_recall": 0.5 / 4,
        "umls_precision_with_terms": 1 / 2, "umls_recall_with_terms": 0.5 / 2,
    }  # fmt: skip
    (row,) = scoring.score_rows("m", scored, resamples=20, seed=0, by_study=False)[:1]
    assert row.without["umls_precision"] == 2 and scored[2].to_dict()["umls_precision"] is None
