"""Clinical metrics by RadEval (RadGraph F1, CheXbert F1, BERTScore ...), if it is installed.

RadEval 2.0 or later needs torch and downloads weights, so it is optional: `pip install radeval`. Metrics that send
reports to a commercial language model are not offered here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import numbers
import warnings
from collections.abc import Callable, Sequence

NAMES = (
    *("radgraph", "chexbert", "bertscore", "radeval_bertscore", "ratescore", "green", "srrbert", "radcliq"),
    *("radgraph_radcliq", "f1radbert_ct", "temporal", "bleu", "rouge"),
)
RADEVAL_NAMES = {"chexbert": "f1chexbert"}  # names that differ in RadEval
TASKS = ("report", "rationale")


class Unavailable(ValueError):
    """A clinical metric cannot be computed here."""


def check(names: Sequence[str]) -> None:
    """Raise ValueError for unknown metrics."""
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"unknown clinical metrics {', '.join(unknown)}; known: {', '.join(NAMES)}")


@functools.lru_cache(maxsize=len(NAMES))
def _metric(kind: Callable, name: str):
    """Return a metric. It is made once, because it reads its weights."""
    return kind(metrics=[RADEVAL_NAMES.get(name, name)], show_progress=False)


def clinical(name: str, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the values of one RadEval metric over all pairs, by RadEval's names. A failed answer is "".

    Raises Unavailable if RadEval, the metric or its weights are missing; the message contains the remedy.
    """
    try:
        RadEval = importlib.import_module("radeval").RadEval
    except ImportError as error:
        raise Unavailable(f"RadEval is not installed ({error}): pip install radeval") from error
    try:
        # RadEval prints its downloads, and disables warnings for the whole process.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            results = _metric(RadEval, name)(refs=list(references), hyps=list(answers))
    except Exception as error:  # torch, the hub and tokenizers raise many types
        raise Unavailable(
            f"{name} cannot be computed ({type(error).__name__}: {str(error)[:200]}): check that "
            "its weights can be downloaded or are cached, and that radeval is 2.0 or later"
        ) from error
    values = {key: float(v) for key, v in results.items() if isinstance(v, numbers.Real) and not isinstance(v, bool)}
    if not values:
        raise Unavailable(f"RadEval returned no number for {name}: {str(results)[:200]}")
    return values
