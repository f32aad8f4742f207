"""Metrics against hand-computed values and other implementations, and their confidence intervals."""

import collections
import math

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sklearn

from input_pipeline.text.terms import Terms
from radfm_jax.evaluate import metrics, published, radbench

WORDS = "the a left right lung mass no nodule seen is small in of lobe effusion pleural".split()
TERMS = Terms(["pleural effusion", "nodule", "mass", "left lower lobe"])
SIX = ("CT", "MRI", "Ultrasound", "PET", "X-ray", "angiography")


def random_texts(n: int, seed: int = 0, least: int = 1):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(least, 12))) for _ in range(n)]


# --- one answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, choices, chosen",
    [
        ("ct", SIX, "CT"),
        ("It is an x-ray.", SIX, "X-ray"),
        ("ultrasonography", SIX, "angiography"),  # they share "ography"
        ("Yes, it does", ("yes", "no"), "yes"),
        ("None", ("yes", "no"), "no"),
        ("", ("yes", "no"), None),
        ("???", ("yes", "no"), None),
        ("ny", ("yes", "no"), "no"),  # 2 x 1 / 5 for yes, 2 x 1 / 4 for no
        ("yn", ("yes", "on"), "on"),
    ],
)
def test_matching_a_list(answer, choices, chosen):
    assert metrics.closest_choice(answer, choices) == chosen


@pytest.mark.parametrize(
    "answer, chosen",
    [
        ("This is a CT scan.", "CT"),  # `closest_choice` returns Ultrasound
        ("Computed tomography of the chest", "CT"),
        ("A PET scan, not magnetic resonance", "PET"),
        ("mri", "MRI"),
        ("chest X-rays", "X-ray"),
        ("X\u2011ray of the chest", "X-ray"),
        ("Chest radiographs, two views", "X-ray"),
        ("cerebral angiograms", "angiography"),
        ("the CTA shows", "CT"),
        ("Mrs. Smith had an ultrasound", "Ultrasound"),
        ("an MR angiogram", "MRI"),
        ("An actor", None),
        ("", None),
    ],
)
def test_a_choice_that_is_named(answer, chosen):
    names = {choice: radbench.NAMES[choice] for choice in SIX}
    assert metrics.named_choice(answer, names) == chosen
    assert metrics.closest_choice("This is a CT scan.", SIX) == "Ultrasound"


def test_yes_or_no_that_is_named():
    names = {choice: radbench.NAMES[choice] for choice in ("yes", "no")}
    said = {"No, there is none.": "no", "Yes: no doubt.": "yes", "I do not know.": None, "There is no mass.": "no"}
    assert {answer: metrics.named_choice(answer, names) for answer in said} == said


def test_a_tie_goes_to_the_first():
    assert metrics.closest_choice("b", ("ab", "bc")) == "ab" and metrics.closest_choice("b", ("bc", "ab")) == "bc"


def test_bleu_by_hand():
    """Counts are clipped to those of the reference, and short answers are penalised."""
    assert metrics.bleu1("the the the the", ["the cat the mat"]) == pytest.approx(2 / 4)
    assert metrics.bleu1("a mass", ["there is a mass"]) == pytest.approx(math.exp(1 - 4 / 2))
    assert metrics.bleu1("Left lung.", ["left lung"]) == pytest.approx(2 / 3)  # the full stop is a token of 13a
    assert metrics.bleu1("nothing", ["there is a mass"]) == metrics.bleu1("", ["a mass"]) == 0
    assert metrics.bleu1("a mass", ["nothing", "a mass"]) == pytest.approx(1)


def test_rouge_by_hand():
    """Answer 4 words, reference 3, 2 shared: precision 1/2, recall 2/3."""
    assert metrics.rouge1("no mass in lung", ["The lung: mass!"]) == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert metrics.rouge1("", ["mass"]) == 0 and metrics.rouge1("masses", ["mass"]) == 0


def test_bleu_and_rouge_are_those_of_others():
    """Compare with nltk's sentence BLEU and the F-measure of word counts, on 400 pairs of random text."""
    from nltk.translate.bleu_score import sentence_bleu

    said, wanted = random_texts(400), random_texts(400, 1)
    for answer, reference in zip(said, wanted, strict=True):
        shared = (collections.Counter(answer.split()) & collections.Counter(reference.split())).total()
        rouge = 2 * shared / (len(answer.split()) + len(reference.split()))
        assert metrics.rouge1(answer, [reference]) == pytest.approx(rouge)
        bleu = sentence_bleu([reference.split()], answer.split(), weights=(1.0,)) if shared else 0.0
        assert metrics.bleu1(answer, [reference]) == pytest.approx(bleu)


def test_medical_words_by_hand():
    """The answer has nodule, mass, mass; the reference mass, pleural, effusion; they share one of three words."""
    answer, reference = "Nodules and a mass; another mass.", "A mass with pleural effusion."
    assert metrics.medical_words(answer, TERMS) == {"nodule": 1, "mass": 2}
    assert metrics.medical_overlap(answer, [reference], TERMS) == pytest.approx((1 / 3, 1 / 3))
    assert metrics.medical_overlap("mass, nodule", ["Mass."], TERMS) == (0.5, 1.0)
    assert metrics.medical_overlap("effusion", ["pleural effusion"], TERMS) == (0.0, 0.0)  # not a term by itself


@pytest.mark.parametrize(
    "answer, reference, precision, recall",
    [("yes", "no", None, None), ("yes", "a mass", 0.0, 0.0), ("a mass", "yes", 0.0, None), ("", "yes", None, None)],
)
def test_overlap_without_medical_words(answer, reference, precision, recall):
    found = metrics.medical_overlap(answer, [reference], TERMS)
    for value, expected in zip(found, (precision, recall), strict=True):
        assert np.isnan(value) if expected is None else value == expected


def test_exact_match_ignores_case_and_punctuation():
    assert metrics.exact("  Left LUNG. ", ["left lung"]) == 1 and metrics.exact("left", ["left lung"]) == 0


# --- many answers -----------------------------------------------------------------------------------------------------


def test_statistics_by_hand():
    """yes: 2 true positives, 1 false negative, 1 false positive; no: 1 of 2 correct."""
    said, wanted, w = ["yes", "yes", None, "yes", "no"], ["yes", "yes", "yes", "no", "no"], np.ones(5)
    assert metrics.f1(said, wanted, "yes")(w) == pytest.approx(4 / 6)
    assert metrics.f1(said, wanted, "no")(w) == pytest.approx(2 / 3)
    assert metrics.macro_f1(said, wanted)(w) == pytest.approx((4 / 6 + 2 / 3) / 2)
    assert metrics.balanced_accuracy(said, wanted)(w) == pytest.approx((2 / 3 + 1 / 2) / 2)
    positive = np.array([True, True, False, False])
    assert metrics.auc(np.array([0.9, 0.4, 0.4, 0.1]), positive)(np.ones(4)) == pytest.approx(3.5 / 4)
    assert np.isnan(metrics.auc(np.array([0.9, 0.4]), np.array([True, True]))(np.ones(2)))
    # Bin 0.9 to 1: mean 0.95, two of two positive. Bin 0 to 0.1: mean 0.05, one of two positive.
    score, yes = np.array([0.95, 0.95, 0.05, 0.05]), np.array([1, 1, 1, 0], bool)
    assert metrics.calibration_error(score, yes)(np.ones(4)) == pytest.approx((0.05 + 0.45) / 2)
    values = np.array([1.0, np.nan, 0.0])
    assert metrics.mean(values)(np.array([3.0, 5.0, 1.0])) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(5))
def test_statistics_agree_with_sklearn(seed):
    """With random integer weights, like those of resamples."""
    rng = np.random.default_rng(seed)
    wanted, said = rng.choice(SIX[:4], 200), rng.choice(SIX, 200)
    w = rng.integers(0, 3, 200).astype(float)
    held = sorted(set(wanted))
    of_sklearn = sklearn.f1_score(wanted, said, labels=held, average="macro", sample_weight=w)
    assert metrics.macro_f1(said, wanted)(w) == pytest.approx(of_sklearn)
    recall = sklearn.recall_score(wanted, said, labels=held, average="macro", sample_weight=w)
    assert metrics.balanced_accuracy(said, wanted)(w) == pytest.approx(recall)
    score, positive = rng.integers(0, 20, 200) / 20, rng.random(200) < 0.4
    assert metrics.auc(score, positive)(w) == pytest.approx(sklearn.roc_auc_score(positive, score, sample_weight=w))
    a, b = rng.integers(0, 6, 50), rng.integers(0, 6, 50)
    kappa = sklearn.cohen_kappa_score(a, b, labels=range(6), weights="quadratic")
    assert metrics.weighted_kappa(a, b, 6) == pytest.approx(kappa)
    assert metrics.weighted_kappa(a, a, 6) == pytest.approx(1) and np.isnan(metrics.weighted_kappa([2], [2], 6))


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_over_samples_as_scipy_has_them():
    values = np.random.default_rng(0).beta(2, 5, 300)
    ours = metrics.bootstrap({"mean": metrics.mean(values)}, range(300), resamples=2000)["mean"]
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=1).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    # Over two sets of 2,000 resamples, the bounds vary by about 0.0005.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


def test_intervals_over_studies():
    """Ten equal samples per study: as wide as with one each, and sqrt(10) times wider than over samples."""
    of_study = np.random.default_rng(0).random(60)
    values, studies = np.repeat(of_study, 10), np.repeat(np.arange(60), 10).tolist()
    width = lambda i: i.high - i.low  # noqa: E731
    statistics = {"mean": metrics.mean(values)}
    by_sample = metrics.bootstrap(statistics, range(600))["mean"]
    by_study = metrics.bootstrap(statistics, studies)["mean"]
    alone = metrics.bootstrap({"mean": metrics.mean(of_study)}, range(60))["mean"]
    assert (by_study.low, by_study.high) == pytest.approx((alone.low, alone.high))
    assert by_study.value == pytest.approx(alone.value) and alone.value == pytest.approx(by_sample.value)
    assert width(by_study) / width(by_sample) == pytest.approx(math.sqrt(10), rel=0.15)


def test_the_same_seed_gives_the_same_interval():
    statistics = {"mean": metrics.mean(np.arange(20.0))}
    assert metrics.bootstrap(statistics, range(20), seed=3) == metrics.bootstrap(statistics, range(20), seed=3)
    assert metrics.bootstrap(statistics, range(20), seed=3) != metrics.bootstrap(statistics, range(20), seed=4)
    nothing = metrics.bootstrap({"mean": metrics.mean(np.full(3, np.nan))}, range(3), resamples=10)["mean"]
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


# --- the published table ----------------------------------------------------------------------------------------------


def test_published_intervals_hold_their_values():
    assert sum(len(of) for of in published.TABLE.values()) == 15 and published.TABLE.keys() == published.CASES.keys()
    for task in published.TABLE:
        for model in published.MODELS:
            for value, low, high in published.values(model, task).values():
                assert 0 < low < value < high < 1, (task, model)


def test_published_f1_is_that_of_yes():
    """OpenFlamingo has F1 23.08 and ACC 53.76 on balanced answers. A macro F1 could not be so low."""
    least = 1.0
    for yes_right in np.linspace(0, 1, 1001):
        no_right = 2 * 0.5376 - yes_right
        if 0 <= no_right <= 1:
            of_yes = 2 * yes_right / (yes_right + (1 - no_right) + 1)
            of_no = 2 * no_right / (no_right + (1 - yes_right) + 1)
            least = min(least, (of_yes + of_no) / 2)
    assert least == pytest.approx(0.4118, abs=1e-3) and least > 0.2308
