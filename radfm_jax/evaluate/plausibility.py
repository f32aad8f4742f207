"""Warnings about answers that a working model would not give: always the same answer, empty or endless answers."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate.words import words

LEAST = 8  # minimum number of answers for a warning
MOST = 0.9  # suspicious share of one answer, if no reference is that frequent
FEW_STEPS = 10
REMEDY = "the model may be untrained, or ignore its input: check the checkpoint, its training loss and its tokenizer"


@dataclasses.dataclass(frozen=True)
class GivenAnswer:
    """An answer and its reference. `cut`: the answer ended at the length limit."""

    answer: str
    reference: str
    cut: bool = False


def implausible(answers: Sequence[GivenAnswer]) -> list[str]:
    """Return why the answers to questions of one kind are implausible; [] if they are plausible or too few."""
    n = len(answers)
    if n < LEAST:
        return []
    given = [" ".join(words(one.answer)) for one in answers]
    text, count = collections.Counter(given).most_common(1)[0]
    expected = collections.Counter(" ".join(words(one.reference)) for one in answers).most_common(1)[0][1]
    share = lambda condition: sum(condition) / n  # noqa: E731
    reasons = []
    if count == n > expected:
        reasons.append(f"all {n:,} answers are {text[:40]!r}" if text else f"all {n:,} answers are empty")
    elif count >= MOST * n and expected <= 0.75 * n:
        reasons.append(f"{count:,} of {n:,} answers are {text[:40]!r}, but at most {expected:,} references agree")
    lengths = [len(answer.split()) for answer in given]
    references = sum(len(words(one.reference)) for one in answers) / n
    if max(lengths) <= 1 and references >= 3:
        reasons.append(f"no answer has more than one word, but references have {references:.1f}")
    if (looping := share(map(_repeats, given))) > 0.5:
        reasons.append(f"{looping:.0%} of answers repeat one word")
    if (cut := share(one.cut for one in answers)) > 0.5:
        reasons.append(f"{cut:.0%} of answers are cut at the length limit")
    return reasons


def few_steps(directory: Path) -> list[str]:
    """Return a warning if a checkpoint of a training run has hardly been trained."""
    step = (checkpoint.read_description(directory).get("source") or {}).get("step")
    if isinstance(step, int) and step < FEW_STEPS:
        return [f"{directory.name} has {step} training steps: its scores show the initial weights"]
    return []


def _repeats(text: str) -> bool:
    parts = text.split()
    return len(parts) >= 8 and collections.Counter(parts).most_common(1)[0][1] >= 0.7 * len(parts)
