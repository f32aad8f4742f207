"""Refusals: answers in which the model states that it cannot or will not answer.

    "I cannot say."                       a refusal
    "Unknown"                             a refusal
    "I cannot be certain, but yes."       not for a yes/no question: another clause names exactly one choice
    "A mass cannot be excluded."          not a refusal: no phrase below

An answer is a refusal if the whole answer is one of `ALONE`, or if its first sentence has a phrase of `PHRASES`. There
are two exceptions:

- In an open question the phrase must also start the answer, because a report may mention a limit of the image.
- In a closed question the answer counts if its clauses without a phrase name exactly one choice.

An endpoint may also mark a refusal. The phrases are English. A refusal of a closed question is wrong. This also holds
for the paper's matching, which would map "I cannot say" to "no".
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Whole answers, compared in words.
ALONE = (
    "unknown", "uncertain", "unclear", "indeterminate", "undetermined", "not sure", "unsure", "not certain", "n a",
    "not applicable", "no answer", "cannot say", "can t say", "no idea",
)  # fmt: skip
_VERBS = (
    "say|tell|answer|determine|assess|judge|know|confirm|identify|interpret|analy[sz]e|diagnose|provide|give|help|assist|"
    "comply|view|process|evaluate|make|offer|be (?:certain|sure|determined|answered|assessed)"
)
PHRASES = (
    rf"(?:cannot|can ?not|can't|could not|couldn't|unable to|not able to|won't|will not) (?:\w+ly )?(?:{_VERBS})\b",
    r"\b(?:i|we) (?:do not|don't) (?:know|have (?:enough|sufficient))\b",
    r"\b(?:i'm|i am|we're|we are) (?:not (?:sure|certain|able|qualified|a (?:doctor|physician|radiologist)))\b",
    r"\b(?:i'm|i am|we're|we are) (?:unsure|sorry)\b",
    r"^(?:sorry|my apologies|i apologi[sz]e)\b",
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\b(?:insufficient|not enough) (?:information|data|detail)",
    r"\b(?:it is|it's) (?:not possible|impossible) to\b",
)
_PHRASE = re.compile("|".join(PHRASES), re.IGNORECASE)
# Words that may precede a phrase at the start of an answer.
_START = re.compile(r"^(?:(?:unfortunately|well|but),? )?(?:(?:i|we|it|this)(?:'m| am|'re| are)? )?$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_CLAUSE = re.compile(r"[.!?;\n](?=\s|$)|,\s|\s(?:but|however|although|though)\s", re.IGNORECASE)


def answer_without_refusal(answer: str, named: Callable[[str], list[str]] | None, plain_words: list[str]) -> str | None:
    """Return the part of an answer that counts, or None for a refusal.

    Args:
      named: function that returns the choices that a text names; None for an open question.
      plain_words: `words.words(answer)`.
    """
    if " ".join(plain_words) in ALONE:
        return None
    text = answer.replace("\u2019", "'").strip().lstrip("*_#> ")
    first = _SENTENCE_END.split(text, maxsplit=1)[0]
    phrase = _PHRASE.search(first)
    if phrase is None:
        return answer
    if named is None:
        return answer if not _START.match(first[: phrase.start()]) else None
    rest = ", ".join(clause for clause in _CLAUSE.split(text) if not _PHRASE.search(clause))
    return rest if len(named(rest)) == 1 else None
