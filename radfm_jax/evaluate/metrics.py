"""Metrics of one answer, and statistics of many with confidence intervals (paper, section 5.1).

A statistic of many answers is a function of weights w [n], one per sample: the number of times that a bootstrap
resample drew the sample.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from input_pipeline.text.terms import TermFinder, fold_word
from radfm_jax.evaluate.words import fold, same_words, spaced, words

Statistic = Callable[[np.ndarray], float]


def closest_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the choice with the highest difflib ratio to the answer, ignoring case; the first one of a tie.

    This is the paper's metric. Returns None if no choice shares a character with the answer: a tie of zeros would
    select the first of the list.
    """
    answer = answer.strip()
    answer = answer.casefold() if answer.isascii() else fold(answer)  # full-width letters, ligatures
    ratios = [difflib.SequenceMatcher(None, answer, choice.casefold()).ratio() for choice in choices]
    best = int(np.argmax(ratios))
    return choices[best] if ratios[best] > 0 else None


def named_choices(answer: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the choices that an answer names, in the order of their names in the answer.

    Names match whole words (`words.words`), in singular or plural. If several names match at one position, the longest
    counts. This finds CT in "This is a CT scan.", where `closest_choice` returns Ultrasound.
    """
    answer_words, matches = words(answer), []
    positions = collections.defaultdict(list)
    for position, word in enumerate(answer_words):
        positions[word].append(position)
    for choice, choice_names in names.items():
        found = [_position(answer_words, positions, words(name)) for name in choice_names]
        matches += [(position, choice) for position in found if position]
    by_position = {position: choice for (position, _), choice in sorted(matches, reverse=True)}
    return list(dict.fromkeys(by_position[position] for position in sorted(by_position)))


def _position(text: list[str], positions: Mapping[str, list[int]], name: list[str]) -> tuple[int, int] | None:
    """Return (first position of a name in the words of a text, minus its length), or None."""
    *start, last = name
    lasts = sorted(positions.get(last, []) + positions.get(f"{last}s", []))
    first = next((i for i in lasts if i >= len(start) and text[i - len(start) : i] == start), None)
    return None if first is None else (first - len(start), -len(name))


def named_choice(answer: str, names: Mapping[str, Sequence[str]]) -> str | None:
    """Return the choice whose name comes first in the answer (`named_choices`), or None."""
    return next(iter(named_choices(answer, names)), None)


def exact(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer has the words of a reference, in order (`words.words`); else 0."""
    return float(any(same_words(answer, reference) for reference in references))


def bleu1(answer: str, references: Sequence[str]) -> float:
    """Return BLEU-1 in [0, 1], not smoothed: clipped word precision times the brevity penalty.

    Words are lower-case tokens of sacrebleu's `13a` tokenizer, after `words.spaced`.
    """
    return _bleu().sentence_score(spaced(answer), list(map(spaced, references))).score / 100


def rouge1(answer: str, references: Sequence[str]) -> float:
    """Return the ROUGE-1 F-measure in [0, 1] of the best reference, over `words.words`, not stemmed."""
    return max(_rouge().score(reference, answer)["rouge1"].fmeasure for reference in references)


@functools.cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=1, effective_order=True, lowercase=True, smooth_method="none", tokenize="13a")


@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], tokenizer=_Words())


class _Words:
    """A tokenizer for rouge-score, whose default one drops all characters outside a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def medical_words(text: str, terms: TermFinder) -> collections.Counter[str]:
    """Count the words inside the medical terms of a text, folded (case, plural, British spelling)."""
    counts: collections.Counter[str] = collections.Counter()
    for start, end in terms.find(text):
        counts.update(fold_word(word) for word in words(text[start:end]))
    return counts


def medical_overlap(answer: str, references: Sequence[str], terms: TermFinder) -> tuple[float, float]:
    """Return (UMLS-Precision, UMLS-Recall) for the reference with the highest sum.

    Both divide the number of shared medical words (clipped counts): precision by the medical words of the answer,
    recall by those of the reference. Recall is nan if the reference has no medical words. Precision of an answer
    without medical words is 0, or nan if the reference has none either.
    """
    answer_words, pairs = medical_words(answer, terms), []
    for reference in references:
        reference_words = medical_words(reference, terms)
        shared = (answer_words & reference_words).total()
        recall = shared / reference_words.total() if reference_words else float("nan")
        precision = shared / answer_words.total() if answer_words else 0.0 if reference_words else float("nan")
        pairs.append((precision, recall))
    return max(pairs, key=lambda pair: np.nansum(pair))


def mean(values: np.ndarray) -> Statistic:
    """Mean of values float[n], without the samples whose value is nan."""
    counts = np.isfinite(values)
    filled = np.where(counts, values, 0.0)
    return lambda w: _ratio(w @ filled, w @ counts)


def f1(predicted: Sequence, reference: Sequence, positive) -> Statistic:
    """F1 of one class, 2 TP / (2 TP + FP + FN). A prediction of None belongs to no class."""
    p, r = (np.array([x == positive for x in side], bool) for side in (predicted, reference))
    return lambda w: _ratio(2 * (w @ (p & r)), w @ p.astype(float) + w @ r)


def macro_f1(predicted: Sequence, reference: Sequence) -> Statistic:
    """Mean of F1 over the classes that occur in the references."""
    classes = sorted(set(reference))
    return _over_classes([f1(predicted, reference, c) for c in classes], reference, classes)


def balanced_accuracy(predicted: Sequence, reference: Sequence) -> Statistic:
    """Mean over the reference classes of the share of correct predictions."""
    correct = np.array([p == r for p, r in zip(predicted, reference, strict=True)], float)
    classes = sorted(set(reference))
    recalls = [mean(np.where(np.array([r == c for r in reference]), correct, np.nan)) for c in classes]
    return _over_classes(recalls, reference, classes)


def _over_classes(statistics: list[Statistic], reference: Sequence, classes: list) -> Statistic:
    """Mean of per-class statistics over the classes that occur in the resample."""
    members = np.array([[r == c for r in reference] for c in classes], float)

    def statistic(w: np.ndarray) -> float:
        present = members @ w > 0
        values = [class_statistic(w) for class_statistic, p in zip(statistics, present, strict=True) if p]
        return float(np.mean(values)) if values else np.nan

    return statistic


def auc(score: np.ndarray, positive: np.ndarray) -> Statistic:
    """Area under the ROC curve of score float[n] for positive bool[n]; nan if all are positive or none is.

    This is the probability that a positive has a higher score than a negative; ties count half.
    """
    score, positive = np.asarray(score, float), np.asarray(positive, bool)
    order = np.argsort(score, kind="stable")
    ranked, is_yes = score[order], positive[order]
    first = np.r_[True, ranked[1:] > ranked[:-1]]  # first of each group of ties
    group = np.cumsum(first) - 1

    def statistic(w: np.ndarray) -> float:
        w = w[order]
        yes = np.bincount(group, w * is_yes)
        no = np.bincount(group, w * ~is_yes)
        below = np.cumsum(no) - no
        return _ratio(yes @ (below + no / 2), yes.sum() * no.sum())

    return statistic


def calibration_error(score: np.ndarray, positive: np.ndarray, bins: int = 10) -> Statistic:
    """Return the expected calibration error: mean |mean score - share of positives| over bins of equal width."""
    score, positive = np.asarray(score, float), np.asarray(positive, float)
    bin_index = bin_of(score, bins)

    def statistic(w: np.ndarray) -> float:
        gap = np.bincount(bin_index, w * (score - positive), bins)
        return _ratio(np.abs(gap).sum(), w.sum())

    return statistic


def bin_of(score: np.ndarray, bins: int) -> np.ndarray:
    """Return int[n]: the bin of each score, of `bins` equal bins of [0, 1]; 1 is in the last bin."""
    return np.minimum((np.asarray(score) * bins).astype(int), bins - 1)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic with its 95 % confidence interval; nan where it has no value."""

    value: float
    low: float
    high: float


def bootstrap(
    statistics: Mapping[str, Statistic], clusters: Sequence[Hashable], resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Return percentile intervals by resampling clusters with replacement (Efron 1979).

    All statistics see the same resamples. scipy.stats.bootstrap cannot resample clusters. Unique clusters resample
    single samples. With studies as clusters, the samples of a study are drawn together, because they are correlated.
    """
    numbers = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    cluster_of = np.array([numbers[cluster] for cluster in clusters], int)
    count, rng = len(numbers), np.random.default_rng(seed)
    ones = np.ones(len(cluster_of))
    drawn = {name: np.full(resamples, np.nan) for name in statistics}
    for k in range(resamples if count else 0):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)[cluster_of].astype(float)
        for name, statistic in statistics.items():
            drawn[name][k] = statistic(weights)
    intervals = {}
    for name, statistic in statistics.items():
        finite = drawn[name][np.isfinite(drawn[name])]
        low, high = np.percentile(finite, (2.5, 97.5)) if len(finite) else (np.nan, np.nan)
        intervals[name] = Interval(statistic(ones), float(low), float(high))
    return intervals


def weighted_kappa(a: Sequence[int], b: Sequence[int], classes: int) -> float:
    """Return Cohen's kappa of two raters' grades 0 .. classes - 1, with quadratic weights (Cohen 1968).

    Returns nan if all grades of both raters are equal, because kappa is then undefined.
    """
    counts = np.zeros((classes, classes))
    np.add.at(counts, (np.asarray(a, int), np.asarray(b, int)), 1)
    cost = (np.arange(classes)[:, None] - np.arange(classes)) ** 2
    expected = (cost * np.outer(counts.sum(1), counts.sum(0))).sum() / max(counts.sum(), 1)
    return 1 - (cost * counts).sum() / expected if expected else float("nan")
