"""Phrases of size taken out of running text: `without_sizes` of the readers, after what real reports need beside it.

    "An 8 to 10-cm, tubular structure, measured at 3 x 4 cm."  ->  "A tubular structure."

Articles are set right for the word that follows, lists of sizes go whole, and a sentence about a measured piece
("16 cm of the vein was taken.") goes whole, too.
"""

from __future__ import annotations

import re

from input_pipeline.datasets.sentences import _HAS_SIZE, _MEASURE, sentences, without_sizes

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


def remove(text: str) -> str:
    """The text without phrases of size; '' if it says nothing else."""
    if not has_size(text):
        return text
    text, paragraphs = _NO_SIZE.sub(_MARK, text), []
    for paragraph in text.split("\n"):
        kept = [s for s in sentences(paragraph) if not (has_size(s) and _PIECE.search(s))]
        paragraphs.append(" ".join(_prepared(s) if has_size(s) else s for s in kept))
    return without_sizes("\n".join(paragraphs)).replace(_MARK, "").strip()


def _prepared(sentence: str) -> str:
    for phrase in (_LIST, _MEASURED, _WITH):
        sentence = phrase.sub("", sentence)
    return _ARTICLE.sub(_article, sentence)


def _article(found: re.Match) -> str:
    article = "an" if found[2].lower() in "aeiou" else "a"
    return (article.capitalize() if found[1][0].isupper() else article) + " "
