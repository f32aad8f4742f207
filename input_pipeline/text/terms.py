"""Find medical terms in text. Tokens within a term have weight 3 in the loss (paper, equations 3 and 4).

Text and terms are folded word by word. A phrase matches a sequence of folded words, the longest first:

    text       (Oedema\n  and ground-glass opacities.
    words       Oedema       and  ground  glass  opacities
    folded      edema        and  ground  glass  opacity
    matches     [1, 7)            [14, 36)

A word is a sequence of letters and digits, so a term never matches inside another word. Two words of one phrase may be
separated by white space with at most one line break, or by a hyphen. Offsets refer to the original text.
"""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import ahocorasick_rs

HERE = Path(__file__).parent
TERM_WEIGHT = 3.0  # loss weight of a token within a medical term; other trained text has weight 1


class TermFinder(Protocol):
    def find(self, text: str) -> list[tuple[int, int]]:
        """Return the character offsets [begin, end) of the medical terms of a text, sorted, without overlap."""


_ASCII_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Combining accents, soft hyphens and zero-width characters may occur inside words.
_INSIDE = "\u0300-\u036f\u00ad\u200b-\u200d\u2060\ufeff"
_WORD = re.compile(rf"[^\W_](?:[^\W_]|[{_INSIDE}])*(?:['\u2019\u02bc][^\W_](?:[^\W_]|[{_INSIDE}])*)*")
# The separators allowed between two words of one phrase.
_SEPARATOR = re.compile(r"[^\S\n\r\v\f]*+(?:\r?\n[^\S\n\r\v\f]*+)?|[-\u2010\u2011\u2013]")

# British to American spelling, for words of five or more letters. A rule may produce non-words ("contour" -> "contor"):
# both sides of a comparison are folded, so words of different meaning must stay different, and nothing else matters.
_SPELLING = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"ae|oo?e", "e"),  # haemorrhage, oedema, gastrooesophageal, anaemia, diarrhoea
        (r"our(?=$|al$|ed$|ing$)", "or"),  # tumour, colour
        (r"([bcgtv])re$", r"\1er"),  # fibre, centre, calibre, litre
        (r"is(?=(?:e|ed|ing|ation|er)$)", "iz"),  # localised, catheterisation
        (r"ys(?=(?:e|ed|ing|er)$)", "yz"),  # paralysed
        (r"^leuco", "leuko"),
        (r"sulph", "sulf"),
    )
)


def _singular(word: str) -> str:
    if len(word) < 4 or word[-1] != "s" or word.endswith(("ss", "us", "is", "'s")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("oses", "tases", "yses")) and len(word) > 6:
        return word[:-2] + "is"  # stenoses, metastases
    if word.endswith(("sses", "xes", "shes", "ches")):
        return word[:-2]
    return word[:-1]


def _fold_by_rule(word: str) -> str:
    word = word.casefold()
    if not word.isascii():
        # Fold compatibility forms too: the ligature of "ﬁbrosis", the superscript of "cm²".
        kept = (c for c in unicodedata.normalize("NFKD", word) if unicodedata.category(c) not in ("Mn", "Cf"))
        word = "".join(kept).casefold().replace("\u2019", "'").replace("\u02bc", "'")
    word = _singular(word.removesuffix("'s"))
    if len(word) >= 5:
        for pattern, replacement in _SPELLING:
            word = pattern.sub(replacement, word)
    return word


def read_list(path: Path) -> list[str]:
    """Return the lines of a list file without comments (`#` to the end of the line) and blank lines."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


_pairs = map(str.split, read_list(HERE / "spelling_pairs.txt"))
_PAIRS = {_fold_by_rule(variant): _fold_by_rule(standard) for variant, standard in _pairs}


@functools.lru_cache(200_000)  # bounded, because a stream of numbers never repeats
def fold_word(word: str) -> str:
    """Fold case, accents, possessive, plural and British spelling, so that words to match become equal."""
    folded = _fold_by_rule(word)
    return _PAIRS.get(folded, folded)


def fold_phrase(text: str) -> str | None:
    """Return the folded words joined by spaces; None if anything but a separator is between two words.

    "Ground-glass opacities" -> "ground glass opacity"; "effusion, pleural" -> None
    """
    words, end = [], None
    for match in _WORD.finditer(text):
        if end is not None and not _SEPARATOR.fullmatch(text, end, match.start()):
            return None
        words.append(fold_word(match.group()))
        end = match.end()
    return " ".join(words) if words else None


class Terms:
    """A compiled dictionary of phrases. `name` is the vocabulary that they come from, for logs and reports."""

    def __init__(self, phrases: Iterable[str], name: str = "own list", folded: bool = False):
        """Compile `phrases`; if they are `folded`, they must be sorted and unique.

        Raises ValueError naming all phrases that are empty or have punctuation between words.
        """
        phrases = list(phrases)
        if not folded:
            forms = [fold_phrase(phrase) for phrase in phrases]
            if bad := [phrase for phrase, form in zip(phrases, forms, strict=True) if form is None]:
                raise ValueError(f"{name}: {len(bad)} terms are not words separated by spaces or hyphens: {bad[:10]}")
            phrases = sorted(set(forms))
        if not phrases:
            raise ValueError(f"{name}: no terms")
        self.name, self.phrases = name, tuple(phrases)
        # Each word has a space on both sides, in phrases and text. So a match starts and ends at word boundaries, a
        # longer match that would end inside a word cannot hide a shorter one, and adjacent matches share no space.
        patterns = [" " + phrase.replace(" ", "  ") + " " for phrase in phrases]
        self._automaton = ahocorasick_rs.AhoCorasick(patterns, matchkind=ahocorasick_rs.MatchKind.LeftmostLongest)

    def __reduce__(self):
        return Terms, (self.phrases, self.name, True)  # the automaton cannot be pickled

    def find(self, text: str) -> list[tuple[int, int]]:
        """Return the character offsets [begin, end) of the terms of a text: longest first, sorted, without overlap."""
        spans = [match.span() for match in (_ASCII_WORD if text.isascii() else _WORD).finditer(text)]
        if not spans:
            return []
        parts, starts, length, previous_end = [], [], 0, 0
        for begin, end in spans:
            if begin - previous_end != 1 or text[previous_end] not in " -":
                if not _SEPARATOR.fullmatch(text, previous_end, begin):
                    parts.append("\n")  # occurs in no phrase
                    length += 1
            word = fold_word(text[begin:end])
            parts += (" ", word, " ")
            starts.append(length)
            length += len(word) + 2
            previous_end = end
        matches = []
        for _, begin, end in self._automaton.find_matches_as_indexes("".join(parts)):
            first = bisect.bisect_left(starts, begin)
            last = bisect.bisect_left(starts, end) - 1
            matches.append((spans[first][0], spans[last][1]))
        return matches
