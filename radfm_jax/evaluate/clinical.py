"""Metrics of clinical content by RadEval (RadGraph F1, CheXbert F1, BERTScore ...), where it is there.

RadEval, from version 2 on, needs torch and downloads weights; it is no requirement of this package: `pip install
radeval`. What it has beside these asks a language model of some company: reports would leave the machine.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import numbers
import warnings
from collections.abc import Sequence

NAMES = (
    *("radgraph", "chexbert", "bertscore", "radeval_bertscore", "ratescore", "green", "srrbert", "radcliq"),
    *("radgraph_radcliq", "f1radbert_ct", "temporal", "bleu", "rouge"),
)
RADEVALS = {"chexbert": "f1chexbert"}  # what RadEval calls it, where that is another name
TASKS = ("report", "rationale")


class Unavailable(ValueError):
    """Why a clinical metric cannot be had here."""


def check(wanted: Sequence[str]) -> None:
    """ValueError for names that are unknown, before anything is computed."""
    if unknown := [name for name in wanted if name not in NAMES]:
        raise ValueError(f"clinical metrics {', '.join(unknown)} are unknown; known: {', '.join(NAMES)}")


def clinical(name: str, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """What RadEval finds for one of its metrics: its own names -> values over all pairs. A failed answer goes in as "".

    Raises:
      Unavailable: RadEval, the metric or its weights are missing; the message says which, and what to do.
    """
    try:
        RadEval = importlib.import_module("radeval").RadEval
    except ImportError as error:
        raise Unavailable(f"RadEval is not installed ({error}): pip install radeval") from error
    try:
        # It prints what it downloads, and switches warnings off for the whole program.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            metric = RadEval(metrics=[RADEVALS.get(name, name)], show_progress=False)
            found = metric(refs=list(references), hyps=list(answers))
    except Exception as error:  # whatever torch, a hub or a tokenizer of it raises
        raise Unavailable(
            f"{name} cannot be computed ({type(error).__name__}: {str(error)[:200]}): its weights are downloaded at "
            "first use, so give it a network or a filled cache; and radeval must be 2.0 or later"
        ) from error
    values = {key: float(v) for key, v in found.items() if isinstance(v, numbers.Real) and not isinstance(v, bool)}
    if not values:
        raise Unavailable(f"RadEval gave no number for {name}, but {str(found)[:200]}")
    return values
