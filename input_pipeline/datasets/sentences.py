"""Sentences: where they end, and how they are joined. (Phrases of size inside them: sizes.py.)"""

from __future__ import annotations

import re

# After these a full stop ends no sentence.
_ABBREVIATIONS = frozenset(
    "fig figs dr drs mr mrs ms prof vs e.g i.e eg ie ref refs eq eqs tbl cf ca approx al st dept viz resp sp spp var "
    "incl esp suppl ed eds jr sr no nos vol pp inj tab".split()
)
# These are abbreviations before a number only: "no. 5", but "The answer is no. He ..."
_BEFORE_NUMBER = frozenset({"no", "nos", "vol", "pp", "tab", "ed", "sp", "p", "var", "inj"})
# "Vitamin D. The ..." ends a sentence, "J. Smith" does not.
_LETTERED = frozenset(
    "vitamin hepatitis type grade stage class group figure fig panel factor protein category lesion arm cohort patient "
    "case part section and or influenza".split()
)
_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9<≥>≤~])|\n\s*\n""")
_LAST_WORD = re.compile(r"([^\s(\[\"'“‘]+)$")


def sentences(text: str) -> list[str]:
    """Splits English medical prose into sentences, without outer white space.

        "A 2.5 cm mass (Fig. 2). Seen by Dr. Lee. OK." -> ["A 2.5 cm mass (Fig. 2).", "Seen by Dr. Lee.", "OK."]

    A decimal point, an abbreviation, an initial and the number of a list item end nothing; a blank line always does.
    """
    out, start = [], 0
    for match in _END.finditer(text):
        if text[match.start()] == "." and match.group().startswith(".") and not _ends(text, start, match):
            continue
        out.append(text[start : match.end()].strip())
        start = match.end()
    out.append(text[start:].strip())
    return [s for s in out if s]


def _ends(text: str, start: int, match: re.Match) -> bool:
    before = text[start : match.start()]
    found = _LAST_WORD.search(before)
    if found is None or len(match.group()) > 1:
        # ")." and '."' close a sentence, except after an abbreviation inside quotes: too rare to care.
        return True
    word = found.group(1)
    plain = word.lower().strip(".")
    following = text[match.end() :].lstrip()
    if plain in _BEFORE_NUMBER:
        return not following[:1].isdigit()
    if plain in _ABBREVIATIONS:
        return False
    if len(word) == 1 and word.isalpha() and word.isupper():
        previous = before[: found.start()].split()
        return bool(previous) and previous[-1].lower().strip(".,(") in _LETTERED
    return not (word.isdigit() and not before[: found.start()].strip())


def shorten(text: str, first: int = 1, last: int = 4) -> str:
    """Text of more than first + last sentences -> its first and its last ones (PMC-CaseReport: 1 and 4)."""
    parts = sentences(text)
    if len(parts) <= first + last:
        return text.strip()
    return " ".join(parts[:first] + parts[-last:])


def join(*texts: str) -> str:
    """Joins the texts that are not blank by one space."""
    return " ".join(t.strip() for t in texts if t.strip())


def closed(text: str) -> str:
    """The text with a full stop, unless it ends a sentence already."""
    text = text.strip()
    return text if not text or text[-1] in ".!?:;" or re.search(r"[.!?][\"'”’)\]]+$", text) else text + "."
