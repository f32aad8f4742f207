"""Sentences: where they end, how they are joined, and phrases of size inside them."""

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


_NUMBER = r"\d+(?:[.,]\d+)?"
_UNIT = r"(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)(?:[³²]|\^?[23]\b)?(?![A-Za-z])"
_AXIS = r"(?:\s*\(?\b(?:AP|TR|TV|CC|ML|SI|LL|transverse|craniocaudal|anteroposterior)\b\)?)"
_TIMES = r"\s*(?:x|×|\*|by|to|-|–|and)\s*"
# "3 x 2.5 cm", "3.5 cm (AP) x 2 cm (TR)", "12-mm": the last number always has its unit, so that no "3 x" is left over.
_ALONG = r"(?:\s+in\s+(?:\w+\s+)?(?:size|diameter|dimensions?|length|width|thickness|depth|axis))"
_SIZE = (
    rf"(?<![\w.])(?:{_NUMBER}\s*-?\s*(?:{_UNIT})?{_AXIS}?{_TIMES})*{_NUMBER}\s*-?\s*{_UNIT}{_AXIS}?"
    r"(?:\s*-?\s*(?:thick|wide|long|deep|high)\b)?" + _ALONG + "?"
)
_ABOUT = (
    r"(?:(?:approximately|about|around|up\s+to|at\s+least|more\s+than|less\s+than|over|nearly)\s+"
    r"|(?:ca\.|~|≈|<|>|≤|≥)\s*)"
)
_MEASURE = rf"(?:{_ABOUT})*{_SIZE}"
_HAS_SIZE = re.compile(_SIZE, re.IGNORECASE)
_PHRASES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\s*[(\[]\s*(?:measur\w+\s+)?{_MEASURE}\s*[)\]]",
        rf",?\s*\b(?:and\s+)?(?:measuring|sized)\s+{_MEASURE}",
        r"\s*\b(?:with\s+an?\s+(?:\w+\s+)?(?:size|diameter|thickness|length|width)\s+of|of|(?<!up )to|at)"
        rf"\s+{_MEASURE}",
    )
)
_STATEMENT = re.compile(rf"\b(?:measures?|measured|is|are|was|were|than|by|from|=|:)\s+{_MEASURE}", re.IGNORECASE)
_REST = re.compile(_MEASURE, re.IGNORECASE)


def without_sizes(text: str) -> str:
    """Removes phrases that state a size in mm or cm (paper, Table 2: Rad3D-Caption of RadMD).

        "A 3 x 2.5 cm mass, measuring 30 mm, and a cyst (4 mm)."  ->  "A mass, and a cyst."

    A sentence whose statement is the size itself ("It measures 3 cm.") goes whole: nothing of it is left standing.
    """
    if not _HAS_SIZE.search(text):
        return text
    paragraphs = []
    for paragraph in text.split("\n"):
        kept = []
        for sentence in sentences(paragraph):
            if _HAS_SIZE.search(sentence):
                sentence = _without_sizes(sentence)
            if sentence.strip(" .,;:"):
                kept.append(sentence)
        paragraphs.append(" ".join(kept))
    return "\n".join(paragraphs).strip()


def _without_sizes(sentence: str) -> str:
    for phrase in _PHRASES:
        sentence = phrase.sub("", sentence)
    if _STATEMENT.search(sentence):
        return ""
    sentence = re.sub(r"[ \t]{2,}", " ", _REST.sub("", sentence))
    sentence = re.sub(r"[\s,]+([.;:])|\s+(,)", r"\1\2", sentence).strip(" ,")
    return sentence[:1].upper() + sentence[1:]
