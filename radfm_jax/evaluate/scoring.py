"""Questions and answers -> the scores of every answer, and their tables with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.text.terms import TermFinder
from radfm_jax.evaluate import metrics
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.model_answers import Given
from radfm_jax.evaluate.radbench import NAMES, Question

# metric -> its name in tables. Those of the paper, then ours.
TITLES = {
    "accuracy": "ACC", "f1": "F1", "bleu": "BLEU-1", "rouge": "ROUGE-1", "umls_precision": "UMLS-Precision",
    "umls_recall": "UMLS-Recall", "balanced_accuracy": "balanced ACC", "named": "ACC by word",
    "auc": "AUC", "calibration_error": "ECE", "exact": "exact match",
}  # fmt: skip
OF_TEXT = ("bleu", "rouge", "umls_precision", "umls_recall", "exact")
GROUPINGS = {"task": lambda q: (), "data set": lambda q: (q.dataset,), "modality": lambda q: (q.modality,),
             "anatomy": lambda q: (q.anatomy,)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """A question, what a model said, and what that is worth.

    Attributes:
      predicted: the choice of a closed list that the answer was matched to; None for open answers and for no match.
      values: metric -> share; nan where it has none (metrics.medical_overlap).
        Closed answers have `accuracy` and `named`.
      error: why it counts as wrong without being looked at.
    """

    question: Question
    given: Given
    predicted: str | None
    values: Mapping[str, float]
    error: str = ""

    @property
    def right(self) -> float:
        """How good it is, to choose examples by: right or not; for open answers the mean of BLEU-1 and ROUGE-1."""
        return self.values.get("accuracy", (self.values.get("bleu", 0.0) + self.values.get("rouge", 0.0)) / 2)

    def to_dict(self) -> dict:
        """A line of scores/NAME.jsonl: enough to score again, or to score otherwise."""
        q, g = self.question, self.given
        found = {"id": q.row_id, "task": q.task, "dataset": q.dataset, "study": q.study, "modality": q.modality}
        found |= {"anatomy": q.anatomy, "references": list(q.references), "answer": g.text, "predicted": self.predicted}
        found |= {"p_yes": g.p_yes, "error": self.error}
        return found | {name: None if np.isnan(value) else value for name, value in self.values.items()}


def score(questions: Sequence[Question], answers: Mapping[str, Given], terms: TermFinder) -> list[ScoredAnswer]:
    """Every question, those without an answer counted as wrong in everything."""
    return [_score(q, answers.get(q.row_id, Given("", error="no answer in the file")), terms) for q in questions]


def _score(question: Question, given: Given, terms: TermFinder) -> ScoredAnswer:
    error = given.error or ("" if given.text.strip() else "the answer is empty")
    if question.closed:
        predicted = None if error else metrics.match(given.text, question.closed)
        names = {choice: NAMES.get(choice, (choice,)) for choice in question.closed}
        named = None if error else metrics.named(given.text, names)
        right = {"accuracy": float(predicted in question.references), "named": float(named in question.references)}
        return ScoredAnswer(question, given, predicted, right, error)
    text, references = "" if error else given.text, question.references
    overlap = metrics.medical_overlap(text, references, terms)
    values = (metrics.bleu1(text, references), metrics.rouge1(text, references), *overlap)
    return ScoredAnswer(
        question, given, None, dict(zip(OF_TEXT, (*values, metrics.exact(text, references)), strict=True)), error
    )


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the tables: one model on one task, or on a part of it.

    Attributes:
      grouping, group: what kind of part (GROUPINGS), and which; "" for a whole task.
      failed: questions without a usable answer, counted as wrong.
      studies: how many different ones.
      metrics: name -> value and interval.
      without: metric -> questions that it says nothing about.
    """

    model: str
    task: str
    grouping: str
    group: str
    questions: int
    failed: int
    studies: int
    metrics: Mapping[str, Interval]
    without: Mapping[str, int]


def tables(model: str, scored: Sequence[ScoredAnswer], *, resamples: int, seed: int, by_study: bool) -> list[Line]:
    """Lines for every task, then for its data sets, modalities and anatomies where they are known."""
    lines = []
    for grouping, of in GROUPINGS.items():
        parts: dict[tuple, list[ScoredAnswer]] = {}
        for one in scored:
            parts.setdefault((one.question.task, *of(one.question)), []).append(one)
        for (task, *group), some in parts.items():
            if group == [""]:
                continue
            found = intervals(some, resamples=resamples, seed=seed, by_study=by_study)
            without = {
                name: count for name in found
                if name in some[0].values and (count := sum(bool(np.isnan(one.values[name])) for one in some))
            }  # fmt: skip
            failed = sum(bool(one.error) for one in some)
            name = group[0] if group else ""
            lines.append(Line(model, task, grouping, name, len(some), failed, len(set(_studies(some))), found, without))
    return lines


def intervals(some: Sequence[ScoredAnswer], *, resamples: int, seed: int, by_study: bool) -> dict[str, Interval]:
    """Every metric that this kind of question has, with its interval."""
    values = {name: np.array([one.values[name] for one in some]) for name in some[0].values}
    statistics = {name: metrics.mean(of) for name, of in values.items()}
    if some[0].question.closed:
        predicted = [one.predicted for one in some]
        reference = [one.question.references[0] for one in some]
        if some[0].question.task == "diagnosis":
            statistics["f1"] = metrics.f1(predicted, reference, "yes")
            statistics |= of_probabilities(some)
        else:
            statistics["f1"] = metrics.macro_f1(predicted, reference)
        statistics["balanced_accuracy"] = metrics.balanced_accuracy(predicted, reference)
    statistics = {name: statistics[name] for name in TITLES if name in statistics}
    clusters = _studies(some) if by_study else [one.question.row_id for one in some]
    return metrics.bootstrap(statistics, clusters, resamples, seed)


def of_probabilities(some: Sequence[ScoredAnswer]) -> dict[str, metrics.Statistic]:
    """AUC and calibration error, where every question has a probability or failed. A failed one, which said neither,
    counts as 0.5: leaving it out would reward failing."""
    if without_probability(some) or all(one.given.p_yes is None for one in some):
        return {}
    score, positive = probabilities(some)
    return {"auc": metrics.auc(score, positive), "calibration_error": metrics.calibration_error(score, positive)}


def without_probability(some: Sequence[ScoredAnswer]) -> int:
    """How many answers came without a probability of yes."""
    return sum(one.given.p_yes is None and not one.error for one in some)


def probabilities(some: Sequence[ScoredAnswer]) -> tuple[np.ndarray, np.ndarray]:
    """float[n] probability of yes (0.5 where the answer failed), bool[n] whether yes is right."""
    score = [0.5 if one.given.p_yes is None else one.given.p_yes for one in some]
    return np.array(score, float), np.array([one.question.references[0] == "yes" for one in some])


def _studies(some: Sequence[ScoredAnswer]) -> list[str]:
    """The study of each; a question without one is its own."""
    return [
        f"{one.question.dataset}/{one.question.study}" if one.question.study else one.question.row_id for one in some
    ]
