"""Metrics of clinical content by RadEval (RadGraph F1, CheXbert F1, BERTScore ...), where it is there.

RadEval needs torch and downloads weights; it is no requirement of this package: `pip install RadEval`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import numbers
import warnings
from collections.abc import Sequence

# What people call them -> what RadEval's arguments are called in one version or another.
NAMES = {
    "chexbert": ("f1chexbert", "chexbert"), "f1chexbert": ("f1chexbert", "chexbert"), "radgraph": ("radgraph",),
    "bertscore": ("bertscore",), "radeval_bertscore": ("radeval_bertscore",), "ratescore": ("ratescore",),
    "green": ("green",), "srrbert": ("srrbert", "srr_bert"), "radcliq": ("radcliq",), "temporal": ("temporal",),
}  # fmt: skip
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
        RadEval = importlib.import_module("RadEval").RadEval
    except ImportError as error:
        raise Unavailable(f"RadEval is not installed ({error}): pip install RadEval") from error
    except AttributeError:
        raise Unavailable("the package RadEval has no class RadEval: install another version of it") from None
    known = inspect.signature(RadEval.__init__).parameters
    flag = next((f"do_{own}" for own in NAMES[name] if f"do_{own}" in known), None)
    if flag is None:
        flags = ", ".join(k.removeprefix("do_") for k in known if k.startswith("do_")) or "nothing that is known here"
        raise Unavailable(f"this RadEval does not know {name}; it knows {flags}")
    more = {"show_progress": False} if "show_progress" in known else {}
    try:
        # It prints what it downloads, and switches warnings off for the whole program.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            found = RadEval(**{flag: True}, **more)(refs=list(references), hyps=list(answers))
    except Exception as error:  # whatever torch, a hub or a tokenizer of it raises
        raise Unavailable(
            f"{name} cannot be computed ({type(error).__name__}: {str(error)[:200]}): its weights are downloaded at "
            "first use, so give it a network or a filled cache"
        ) from error
    values = {key: float(v) for key, v in found.items() if isinstance(v, numbers.Real) and not isinstance(v, bool)}
    if not values:
        raise Unavailable(f"RadEval gave no number for {name}, but {str(found)[:200]}")
    return values
