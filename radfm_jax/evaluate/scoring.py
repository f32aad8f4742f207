"""Questions and answers -> scores of each answer, and tables with confidence intervals."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.text.terms import TermFinder
from radfm_jax.evaluate import metrics
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.model_answers import RecordedAnswer
from radfm_jax.evaluate.radbench import NAMES, Question
from radfm_jax.evaluate.refusals import answer_without_refusal
from radfm_jax.evaluate.words import words

# metric -> title. The first one of a task leads its table. `accuracy` and `f1` are the paper's: they match by difflib.
TITLES = {
    "named": "ACC by word", "named_f1": "F1 by word", "balanced_accuracy": "balanced ACC", "accuracy": "ACC by difflib",
    "f1": "F1 by difflib", "bleu": "BLEU-1", "rouge": "ROUGE-1", "umls_precision": "UMLS-Precision",
    "umls_recall": "UMLS-Recall", "umls_precision_with_terms": "UMLS-P, terms",
    "umls_recall_with_terms": "UMLS-R, terms", "auc": "AUC", "calibration_error": "ECE", "exact": "exact match",
}  # fmt: skip
TEXT_METRICS = ("bleu", "rouge", "umls_precision", "umls_recall", "exact")
# kind of part -> the field of a question that names it
GROUPINGS = {"task": None, "data set": "dataset", "modality": "modality", "anatomy": "anatomy"}


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """A question, the answer of a model, and its scores."""

    question: Question
    answer: RecordedAnswer
    predicted: str | None  # the choice that a closed answer names; None for open questions or without a match
    values: Mapping[str, float]  # metric -> value in [0, 1], or nan (metrics.medical_overlap)
    error: str = ""  # why there is no usable answer, which counts as wrong
    closest: str | None = None  # the choice that the paper's difflib matching selects
    refused: bool = False  # see refusals.py

    @property
    def quality(self) -> float:
        """Accuracy by word; for open questions the mean of BLEU-1 and ROUGE-1. Selects the examples of a report."""
        return self.values.get("named", (self.values.get("bleu", 0.0) + self.values.get("rouge", 0.0)) / 2)

    def to_dict(self) -> dict:
        """Return a line of scores/NAME.jsonl. It has everything that other scores need."""
        q, a = self.question, self.answer
        fields = {"id": q.row_id, "task": q.task, "dataset": q.dataset, "study": q.study, "modality": q.modality}
        fields |= {"anatomy": q.anatomy, "references": list(q.references), "answer": a.text}
        fields |= {"predicted": self.predicted, "closest": self.closest, "refused": self.refused}
        fields |= {"p_yes": a.p_yes, "error": self.error}
        return fields | {name: None if np.isnan(value) else value for name, value in self.values.items()}


def score(
    questions: Sequence[Question], answers: Mapping[str, RecordedAnswer], terms: TermFinder
) -> list[ScoredAnswer]:
    """Score all questions. Those without an answer count as wrong in every metric."""
    missing = RecordedAnswer("", error="no answer in the file")
    return [_score(q, answers.get(q.row_id, missing), terms) for q in questions]


def _score(question: Question, answer: RecordedAnswer, terms: TermFinder) -> ScoredAnswer:
    error = answer.error or ("" if answer.refused or answer.text.strip() else "the answer is empty")
    text, references = "" if error else answer.text, question.references
    names = {choice: NAMES.get(choice, (choice,)) for choice in question.closed}
    named = functools.partial(metrics.named_choices, names=names)
    counted = None if answer.refused else answer_without_refusal(text, named if names else None, words(text))
    refused = counted is None
    if question.closed:
        predicted = None if refused else metrics.named_choice(counted, names)
        closest = None if refused else metrics.closest_choice(text, question.closed)
        values = {"named": float(predicted in references), "accuracy": float(closest in references)}
        return ScoredAnswer(question, answer, predicted, values, error, closest, refused)
    overlap = metrics.medical_overlap(text, references, terms)
    values = (metrics.bleu1(text, references), metrics.rouge1(text, references), *overlap)
    values = dict(zip(TEXT_METRICS, (*values, metrics.exact(text, references)), strict=True))
    return ScoredAnswer(question, answer, None, values, error, None, refused)


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """A row of the tables: one model on one task, or on a part of it."""

    model: str
    task: str
    grouping: str  # kind of part (GROUPINGS)
    group: str  # name of the part; "" for a whole task
    questions: int
    failed: int  # questions without a usable answer, which count as wrong
    refused: int  # answers that refuse (refusals.py)
    studies: int  # number of different studies
    metrics: Mapping[str, Interval]
    without: Mapping[str, int]  # metric -> number of questions without a value


def score_rows(
    model: str, scored: Sequence[ScoredAnswer], *, resamples: int, seed: int, by_study: bool
) -> list[ScoreRow]:
    """Return the rows of all tasks, then of their data sets, modalities and anatomies where known."""
    rows = []
    for grouping, field in GROUPINGS.items():
        parts: dict[tuple[str, str], list[ScoredAnswer]] = {}
        for answer in scored:
            group = getattr(answer.question, field) if field else ""
            if group or not field:
                parts.setdefault((answer.question.task, group), []).append(answer)
        for (task, group), answers in parts.items():
            values = intervals(answers, resamples=resamples, seed=seed, by_study=by_study)
            without = {
                name: count for name in values
                if name in answers[0].values and (count := sum(bool(np.isnan(a.values[name])) for a in answers))
            }  # fmt: skip
            failed, refused = sum(bool(a.error) for a in answers), sum(a.refused for a in answers)
            counts = len(answers), failed, refused, len(set(_studies(answers)))
            rows.append(ScoreRow(model, task, grouping, group, *counts, values, without))
    return rows


def intervals(answers: Sequence[ScoredAnswer], *, resamples: int, seed: int, by_study: bool) -> dict[str, Interval]:
    """Return all metrics of one kind of question, with confidence intervals."""
    names = answers[0].values
    values = {name: np.array([a.values[name] for a in answers]) for name in names}
    statistics = {name: metrics.mean(numbers) for name, numbers in values.items()}
    for name in values.keys() & {"umls_precision", "umls_recall"}:
        # The paper averages over all samples. A sample without medical terms has no ratio, and counts as 0.
        statistics |= {f"{name}_with_terms": statistics[name], name: metrics.mean(np.nan_to_num(values[name]))}
    if answers[0].question.closed:
        predicted, closest = [a.predicted for a in answers], [a.closest for a in answers]
        reference = [a.question.references[0] for a in answers]
        yes_no = answers[0].question.task == "diagnosis"
        f1 = functools.partial(metrics.f1, positive="yes") if yes_no else metrics.macro_f1
        statistics |= {"named_f1": f1(predicted, reference), "f1": f1(closest, reference)}
        if yes_no:
            statistics |= probability_metrics(answers)
        statistics["balanced_accuracy"] = metrics.balanced_accuracy(predicted, reference)
    statistics = {name: statistics[name] for name in TITLES if name in statistics}
    clusters = _studies(answers) if by_study else [a.question.row_id for a in answers]
    return metrics.bootstrap(statistics, clusters, resamples, seed)


def probability_metrics(answers: Sequence[ScoredAnswer]) -> dict[str, metrics.Statistic]:
    """Return AUC and calibration error. Return {} if any answer, except failed ones, has no probability.

    A failed answer counts as 0.5: dropping it would reward failures.
    """
    if without_probability(answers) or all(a.answer.p_yes is None for a in answers):
        return {}
    score, positive = probabilities(answers)
    return {"auc": metrics.auc(score, positive), "calibration_error": metrics.calibration_error(score, positive)}


def without_probability(answers: Sequence[ScoredAnswer]) -> int:
    """Return the number of usable answers without a probability of yes."""
    return sum(a.answer.p_yes is None and not a.error for a in answers)


def probabilities(answers: Sequence[ScoredAnswer]) -> tuple[np.ndarray, np.ndarray]:
    """Return float[n] probability of yes (0.5 for a failed answer) and bool[n] whether the reference is yes."""
    score = [0.5 if a.answer.p_yes is None else a.answer.p_yes for a in answers]
    return np.array(score, float), np.array([a.question.references[0] == "yes" for a in answers])


def _studies(answers: Sequence[ScoredAnswer]) -> list[str]:
    """Return the study of each answer; a question without one counts as a separate study."""
    questions = [a.question for a in answers]
    return [f"{q.dataset}/{q.study}" if q.study else q.row_id for q in questions]
