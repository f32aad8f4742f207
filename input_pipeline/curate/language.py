"""A coarse check for English text by its letters and function words."""

from __future__ import annotations

import re

_FUNCTION_WORDS = frozenset(
    "the of and in to a is was with for that on as by at from were are be this an or which no not has had it we his "
    "her he she there what where does how any seen show shows left right".split()
)
_WORD = re.compile(r"[^\W\d_]+")


def is_english(text: str, min_words: int = 12) -> bool:
    """Return False if the text has many non-ASCII letters, or is long and has few function words of English.

    A short text of Latin letters ("Pneumothorax.") is accepted.
    """
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return True
    if sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    words = _WORD.findall(text.lower())
    return len(words) < min_words or sum(w in _FUNCTION_WORDS for w in words) >= 0.12 * len(words)
