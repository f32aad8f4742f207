"""What an answer is worth, and what many of them come to (paper, section 5.1). Numbers and text; no model, no files.

Of one answer: `match` (closed lists), `bleu1`, `rouge1`, `medical_overlap`, `exact`. Of many: functions of weights
w [n], one a sample, so that one bootstrap serves them all; a weight is how often a resample drew the sample.

    mean(x)              sum w x / sum w over the samples that have a value
    accuracy             the mean of whether it is right
    f1, macro_f1         of a class; of all classes that are references, each counting once
    balanced_accuracy    mean over the classes of the share of them that is right
    auc                  chance that a yes has a higher probability of "yes" than a no, ties counting half
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from input_pipeline.text.terms import TermFinder, fold_word

Statistic = Callable[[np.ndarray], float]
_WORD = re.compile(r"[^\W_]+")


# --- one answer -------------------------------------------------------------------------------------------------------


def match(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that is most like the answer by difflib.SequenceMatcher's ratio, case aside; the first of several that
    are as like. None if the answer has nothing in common with any of them: a guess would then be the list's order."""
    said = answer.strip().casefold()
    ratios = [difflib.SequenceMatcher(None, said, choice.casefold()).ratio() for choice in choices]
    best = int(np.argmax(ratios))
    return choices[best] if ratios[best] > 0 else None


def named(answer: str, names: Mapping[str, Sequence[str]]) -> str | None:
    """The choice of which a name stands first in the answer as whole words, case and plural aside; the longest of those
    that begin at one place; None if it names none. Not the paper's: it finds CT in "This is a CT scan.", to which
    `match` finds Ultrasound more alike.

    Args:
      names: choice -> what it may be called.
    """
    answer, found = re.sub("[\u2010-\u2015\u2212]", "-", answer), []  # all hyphens and dashes
    for choice, called in names.items():
        for name in called:
            if place := re.search(rf"(?<![^\W_]){re.escape(name)}s?(?![^\W_])", answer, re.IGNORECASE):
                found.append((place.start(), -len(name), choice))
    return min(found)[2] if found else None


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference word by word, case and punctuation aside; else 0."""
    words = lambda text: _WORD.findall(text.casefold())  # noqa: E731
    return float(any(words(answer) == words(reference) for reference in references))


def bleu1(answer: str, references: Sequence[str]) -> float:
    """BLEU of single words in [0, 1]: the share of the answer's words that a reference has, each as often as it has it,
    times exp(1 - reference length / answer length) where the answer is the shorter one. Tokens of sacrebleu's `13a`,
    lower case, of this one sentence, not smoothed."""
    return _bleu().sentence_score(answer, list(references)).score / 100


def rouge1(answer: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE-1 in [0, 1], lower-case words of a-z and 0-9, not stemmed; the best of the references."""
    return max(_rouge().score(reference, answer)["rouge1"].fmeasure for reference in references)


@functools.cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=1, effective_order=True, lowercase=True, smooth_method="none", tokenize="13a")


@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=False)


def medical_words(text: str, terms: TermFinder) -> collections.Counter[str]:
    """Words inside the medical terms of a text, folded (case, plural, British spelling), and how often each comes."""
    found: collections.Counter[str] = collections.Counter()
    for begin, end in terms.find(text):
        found.update(fold_word(word) for word in _WORD.findall(text[begin:end]))
    return found


def medical_overlap(answer: str, references: Sequence[str], terms: TermFinder) -> tuple[float, float]:
    """(UMLS-Precision, UMLS-Recall): words inside medical terms that answer and reference share, each as often as both
    have it, over those of the answer, and over those of the reference.

    Precision of an answer without any is 0 where the reference has some, and nan where neither has: such a pair says
    nothing about medical words. Recall is nan where the reference has none. Of several references that with the best
    sum.
    """
    said = medical_words(answer, terms)
    found = []
    for reference in references:
        wanted = medical_words(reference, terms)
        shared = (said & wanted).total()
        nothing = float("nan")
        precision = shared / said.total() if said else 0.0 if wanted else nothing
        recall = shared / wanted.total() if wanted else nothing
        found.append((precision, recall))
    return max(found, key=lambda pair: np.nansum(pair))


# --- many answers -----------------------------------------------------------------------------------------------------


def mean(values: np.ndarray) -> Statistic:
    """values: float[n]; samples whose value is nan do not count."""
    counts = np.isfinite(values)
    filled = np.where(counts, values, 0.0)
    return lambda w: _share(w @ filled, w @ counts)


def f1(predicted: Sequence, reference: Sequence, positive) -> Statistic:
    """F1 of one class: 2 TP / (2 TP + FP + FN). An answer that is None is of no class: it misses what it should be."""
    p, r = (np.array([x == positive for x in side], bool) for side in (predicted, reference))
    return lambda w: _share(2 * (w @ (p & r)), w @ p.astype(float) + w @ r)


def macro_f1(predicted: Sequence, reference: Sequence) -> Statistic:
    """Mean of F1 over the classes that are the reference of some sample."""
    classes = sorted(set(reference))
    return _over_classes([f1(predicted, reference, c) for c in classes], reference, classes)


def balanced_accuracy(predicted: Sequence, reference: Sequence) -> Statistic:
    """Mean over the references of the share of them that is right."""
    right = np.array([p == r for p, r in zip(predicted, reference, strict=True)], float)
    classes = sorted(set(reference))
    of = [mean(np.where(np.array([r == c for r in reference]), right, np.nan)) for c in classes]
    return _over_classes(of, reference, classes)


def _over_classes(of: list[Statistic], reference: Sequence, classes: list) -> Statistic:
    """A resample need not hold every class: the mean is over those that it holds."""
    present = np.array([[r == c for r in reference] for c in classes], float)

    def statistic(w: np.ndarray) -> float:
        here = present @ w > 0
        return float(np.mean([one(w) for one, held in zip(of, here, strict=True) if held])) if here.any() else np.nan

    return statistic


def auc(score: np.ndarray, positive: np.ndarray) -> Statistic:
    """Area under the ROC curve of score float[n] for positive bool[n]; nan in a sample of one kind only."""
    score, positive = np.asarray(score, float), np.asarray(positive, bool)
    order = np.argsort(score, kind="stable")
    ranked, is_yes = score[order], positive[order]
    first = np.r_[True, ranked[1:] > ranked[:-1]]  # of samples that tie
    group = np.cumsum(first) - 1

    def statistic(w: np.ndarray) -> float:
        w = w[order]
        yes = np.bincount(group, w * is_yes)
        no = np.bincount(group, w * ~is_yes)
        below = np.cumsum(no) - no
        return _share(yes @ (below + no / 2), yes.sum() * no.sum())

    return statistic


def calibration_error(score: np.ndarray, positive: np.ndarray, bins: int = 10) -> Statistic:
    """Expected calibration error: over bins of equal width of the probability of "yes", the distance of its mean from
    the share of yes, weighted by the samples in the bin."""
    score, positive = np.asarray(score, float), np.asarray(positive, float)
    which = bin_of(score, bins)

    def statistic(w: np.ndarray) -> float:
        gap = np.bincount(which, w * (score - positive), bins)
        return _share(np.abs(gap).sum(), w.sum())

    return statistic


def bin_of(score: np.ndarray, bins: int) -> np.ndarray:
    """int[n]: which of `bins` bins of [0, 1] each score lies in; 1 lies in the last."""
    return np.minimum((np.asarray(score) * bins).astype(int), bins - 1)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")


# --- intervals --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic and the interval that holds 95 % of its values over resamples; nan where it has no value."""

    value: float
    low: float
    high: float


def bootstrap(
    statistics: Mapping[str, Statistic],
    clusters: Sequence[Hashable],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals by resampling clusters with replacement (Efron 1979): all statistics see the same draws.

    scipy.stats.bootstrap draws samples one by one and has no clusters.

    Args:
      clusters: of each sample. All different: samples are drawn. The study: studies are drawn, with all their samples,
        which are alike, so that intervals over samples would be too narrow.
    """
    names = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    of = np.array([names[cluster] for cluster in clusters], int)
    count, rng = len(names), np.random.default_rng(seed)
    ones = np.ones(len(of))
    values = {name: statistic(ones) for name, statistic in statistics.items()}
    drawn = {name: np.full(resamples, np.nan) for name in statistics}
    for k in range(resamples if count else 0):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)[of].astype(float)
        for name, statistic in statistics.items():
            drawn[name][k] = statistic(weights)
    found = {}
    for name, value in values.items():
        kept = drawn[name][np.isfinite(drawn[name])]
        low, high = np.percentile(kept, (2.5, 97.5)) if len(kept) else (np.nan, np.nan)
        found[name] = Interval(value, float(low), float(high))
    return found


def weighted_kappa(a: Sequence[int], b: Sequence[int], classes: int) -> float:
    """Cohen's kappa of two raters' grades 0 .. classes - 1, disagreement weighted by its square (Cohen 1968); nan where
    both always gave one and the same grade, which leaves nothing to agree on beyond chance."""
    seen = np.zeros((classes, classes))
    np.add.at(seen, (np.asarray(a, int), np.asarray(b, int)), 1)
    cost = (np.arange(classes)[:, None] - np.arange(classes)) ** 2
    expected = np.outer(seen.sum(1), seen.sum(0)) / max(seen.sum(), 1)
    return 1 - (cost * seen).sum() / (cost * expected).sum() if (cost * expected).sum() else float("nan")
