"""Phrases of size taken out of running text (paper, Table 2: Rad3D-Caption of RadMD); one set of rules for all.

    "A 3 x 2.5 cm mass, measuring 30 mm, and a cyst (4 mm)."             ->  "A mass, and a cyst."
    "An 8 to 10-cm, tubular structure, measured at 3 x 4 cm."            ->  "A tubular structure."

Articles are set right for the word that follows and lists of sizes go whole. A sentence whose statement is the size
itself ("It measures 3 cm.") or that is about a measured piece ("16 cm of the vein was taken.") goes whole, too: nothing
of it is left standing.
"""

from __future__ import annotations

import re

from input_pipeline.datasets.sentences import sentences

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

_SEVERAL = rf"{_MEASURE}(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+){_MEASURE})*"
_NOUN = r"(?:length|size|sizes|diameter|diameters|thickness|width|height|depth|dimensions?)"
_ARTICLE = re.compile(rf"\b(an?)\s+{_MEASURE}(?:\s+(?:in\s+)?{_NOUN}\b)?\s*,?\s+(?=([A-Za-z]))", re.IGNORECASE)
_MEASURED = re.compile(rf",?\s*\b(?<!was )(?<!were )(?<!is )measured\s+(?:at\s+)?{_SEVERAL}", re.IGNORECASE)
_WITH = re.compile(rf",?\s*\bwith\s+(?:an?\s+|the\s+)?(?:\w+\s+)?{_NOUN}\s*(?:of\s+|[=:]\s*)?{_SEVERAL}", re.IGNORECASE)
_PIECE = re.compile(rf"(?:^|[,;]\s*){_MEASURE}\s+of\b", re.IGNORECASE)
# "5 mM", "25 mm Hg", "3 cm/s" are no sizes: a mark between number and unit hides them from the patterns.
_NO_SIZE = re.compile(r"(?<=\d)(?=\s*-?\s*(?:mM\b|[cm]m\s*-?\s*(?:Hg|H2O|H₂O|[-−]1|⁻¹|/|per\b)))")
_MARK = "\ue000"
_LIST = re.compile(rf"(?:\s*\bof\s+)?(?:\b\d+(?:\.\d+)?\s*,\s*)+(?:(?:and|or)\s+)?{_MEASURE}", re.IGNORECASE)


def has_size(text: str) -> bool:
    return _HAS_SIZE.search(_NO_SIZE.sub(_MARK, text)) is not None


def without_sizes(text: str) -> str:
    """The text without phrases that state a size in mm or cm; '' if it says nothing else."""
    if not has_size(text):
        return text
    paragraphs = []
    for paragraph in _NO_SIZE.sub(_MARK, text).split("\n"):
        kept = [_without(s) if _HAS_SIZE.search(s) else s for s in sentences(paragraph)]
        paragraphs.append(" ".join(s for s in kept if s.strip(" .,;:")))
    return "\n".join(paragraphs).replace(_MARK, "").strip()


def _without(sentence: str) -> str:
    if _PIECE.search(sentence):
        return ""
    for phrase in (_LIST, _MEASURED, _WITH):
        sentence = phrase.sub("", sentence)
    sentence = _ARTICLE.sub(_article, sentence)
    for phrase in _PHRASES:
        sentence = phrase.sub("", sentence)
    if _STATEMENT.search(sentence):
        return ""
    sentence = re.sub(r"[ \t]{2,}", " ", _REST.sub("", sentence))
    sentence = re.sub(r"[\s,]+([.;:])|\s+(,)", r"\1\2", sentence).strip(" ,")
    return sentence[:1].upper() + sentence[1:]


def _article(found: re.Match) -> str:
    article = "an" if found[2].lower() in "aeiou" else "a"
    return (article.capitalize() if found[1][0].isupper() else article) + " "
