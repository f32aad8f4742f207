"""Rewards of generated answers by the metrics of `evaluate`; each is in [0, 1].

exact      1 for the words of the reference, in order (metrics.exact)
rouge      ROUGE-1 F-measure
bleu       BLEU-1
umls       F1 of UMLS-Precision and UMLS-Recall, with the terms of `data.terms`; 0 if both texts have no term
radgraph   mean of the RadGraph F1 values of RadEval (extra package, evaluate/clinical.py)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from input_pipeline.text.terms import TermFinder
from radfm_jax.evaluate import clinical, metrics


class Rewards:
    """Computes the mean of several rewards. Equal pairs of answer and reference are scored once.

    Raises ValueError if a reward needs a package or weights that are missing.
    """

    def __init__(self, names: Sequence[str], terms: TermFinder):
        known: dict[str, Callable[[str, str], float]] = {
            "exact": lambda answer, reference: metrics.exact(answer, [reference]),
            "rouge": lambda answer, reference: metrics.rouge1(answer, [reference]),
            "bleu": lambda answer, reference: metrics.bleu1(answer, [reference]),
            "umls": functools.partial(term_f1, terms=terms),
            "radgraph": radgraph_f1,
        }
        self._rewards = [known[name] for name in names]
        self._score = functools.lru_cache(maxsize=1 << 14)(self._mean)
        if "radgraph" in names:
            try:
                radgraph_f1("No pleural effusion.", "No pleural effusion.")
            except clinical.Unavailable as error:
                raise ValueError(f"grpo.reward 'radgraph': {error}") from None

    def __call__(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Return the reward of each answer, float64[n]. An empty answer has the reward 0."""
        return np.array([self._score(a, r) if a.strip() else 0.0 for a, r in zip(answers, references, strict=True)])

    def _mean(self, answer: str, reference: str) -> float:
        return float(np.mean([reward(answer, reference) for reward in self._rewards]))


def term_f1(answer: str, reference: str, terms: TermFinder) -> float:
    """Return the harmonic mean of UMLS-Precision and UMLS-Recall; 0 if a text has no medical words."""
    precision, recall = np.nan_to_num(metrics.medical_overlap(answer, [reference], terms))
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def radgraph_f1(answer: str, reference: str) -> float:
    """Return the mean of RadEval's RadGraph F1 values. Raises clinical.Unavailable."""
    return float(np.mean([*clinical.clinical("radgraph", [answer], [reference]).values()]))
