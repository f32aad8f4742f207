"""Is a text English? A coarse answer that needs no model: English letters, and the small words of English."""

from __future__ import annotations

import re

_SMALL = frozenset(
    "the of and in to a is was with for that on as by at from were are be this an or which no not has had it we his "
    "her he she there what where does how any seen show shows left right".split()
)
_WORD = re.compile(r"[^\W\d_]+")


def is_english(text: str, least_words: int = 12) -> bool:
    """False if letters of other scripts prevail, or if a text of some length has hardly a small word of English.

    A short text of Latin letters ("Pneumothorax.") passes: nothing can be said of it.
    """
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return True
    if sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    words = _WORD.findall(text.lower())
    return len(words) < least_words or sum(w in _SMALL for w in words) >= 0.12 * len(words)
