"""Remove sizes in mm or cm from text (paper, Table 2: Rad3D-Caption of RadMD). All data sets share the rules.

    "A 3 x 2.5 cm mass, measuring 30 mm, and a cyst (4 mm)."             ->  "A mass, and a cyst."
    "An 8 to 10-cm, tubular structure, measured at 3 x 4 cm."            ->  "A tubular structure."

    "A node measuring 9 mm, previously 7 x 4 mm (series 2)."             ->  "A node (series 2)."
    "The drain is 4 cm above the bladder."                               ->  "The drain is above the bladder."

Articles are adapted to the next word, and lists of sizes are removed completely. So is a sentence that only states a
size ("It measures 3 cm.", "The tip is 3 cm from the vein.", "No node over 1 cm.") or that is about a measured piece
("16 cm of the vein was taken.").
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from input_pipeline.text.sentences import spans

_NUMBER = r"(?:\d+(?:[.,]\d+)?|\.\d+)"
_UNIT = r"(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)(?:[³²]|\^?[23]\b)?(?![A-Za-z])"
# Each blank here and in _SIZE must match in one way only; otherwise "1 x 1 x 1 x ..." backtracks exponentially. Repeats
# have a limit that no real text reaches; otherwise a text of only such repeats takes quadratic time.
_HYPHEN = r"\s*(?:-\s*)?"
_DIRECTION = r"\b(?:AP|TR|TV|TRV|CC|ML|SI|LL|transverse|craniocaudal|anteroposterior)\b"
_AXIS = rf"(?:\s*\(?{_DIRECTION}\)?)"
_TIMES = r"\s*(?:x|×|\*|by|to|--?|–|and)\s*"
_NOUN = r"(?:length|size|sizes|diameter|diameters|thickness|width|height|depth|dimensions?|axis)"
_EXTENT = r"(?:(?:short|long)(?:[- ]axis)?|maxim\w+|AP|transverse|greatest|largest)"
# "3 x 2.5 cm", "3.5 cm (AP) x 2 cm (TR)", "12-mm": the last number must have a unit, so that no "3 x" remains.
_ALONG = rf"(?:\s+in\s+(?:\w+\s+){{0,2}}{_NOUN}\b|\s+(?:{_EXTENT}\s+)?{_NOUN}\b(?!\s+of\b))"
_SIZE = (
    rf"(?<![\w.])(?:{_NUMBER}(?:{_HYPHEN}{_UNIT})?{_AXIS}?{_TIMES}){{0,11}}{_NUMBER}{_HYPHEN}{_UNIT}{_AXIS}?"
    rf"(?:\s*\({_DIRECTION}(?:\s*(?:x|×|,|by)\s*{_DIRECTION}){{1,5}}\))?"
    rf"(?:{_HYPHEN}(?:thick|wide|long|deep|high)\b)?" + _ALONG + "?"
)
_ABOUT = (
    r"(?:(?:approximately|about|around|roughly|up\s+to|at\s+least|at\s+most|(?:(?:no|not)\s+)?(?:less|more|\b[a-z]{3,}er)"
    r"\s+than|over|nearly|almost)\s+|(?:ca\.|~|≈|<|>|≤|≥)\s*)"
)
_MEASURE = rf"(?:{_ABOUT}){{0,4}}{_SIZE}"
_SEVERAL = rf"{_MEASURE}(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+){_MEASURE})*"
_NOW = r"(?:now|currently|today|presently|again|still)"
_HAS_SIZE = re.compile(_SIZE, re.IGNORECASE)


def _compile(*patterns: str) -> tuple[re.Pattern, ...]:
    return tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)


# "previously 2 cm when measured similarly", "compared to 3 mm before", "increased from 6 mm to 9 mm".
_BEFORE = _compile(
    rf"(?<=[cm]m)\s*,?\s*(?:increased|decreased|enlarged|reduced|grown|up|down)\s+from\s+{_MEASURE}(?:\s+previously)?",
    rf"\s*[,;]?\s*\b(?:and\s+|was\s+|were\s+)?(?:previously|formerly)\s+(?:(?:measuring|measured|sized|was|were|of|at)\s+){{0,6}}"
    rf"{_MEASURE}(?:\s+when\s+measured\s+\w+)?",
    rf"\s*[,;]?\s*\b(?:as\s+)?(?:compared\s+(?:to|with)|versus|vs\.?)\s+{_MEASURE}(?:\s+(?:previously|before|earlier))?",
    rf"\s*[,;]?\s*\b(?:(?:ranging|varying)\s+(?:in\s+{_NOUN}\s+)?)?(?<!ranges )(?<!range )(?<!ranged )"
    rf"(?:from|between)\s+{_MEASURE}(?:\s+previously)?(?:\s+to\s+{_MEASURE})?(?:\s+previously)?",
)
_LISTED = _compile(
    rf"(?:\s*\bof\s+)?(?:\b\d+(?:\.\d+)?\s*,\s*){{1,12}}(?:(?:and|or)\s+)?{_MEASURE}",
    rf",?\s*\b(?<!was )(?<!were )(?<!is )measured\s+(?:at\s+)?{_SEVERAL}",
    rf",?\s*\b(?:with|and|over|along|at|to)\s+(?:an?\s+|the\s+|its\s+)?(?:\w+\s+)?{_NOUN}\s*"
    rf"(?:(?:of|measuring)\s+|[=:]\s*)?{_SEVERAL}",
    rf"\s*\bby\s+(?:an?\s+)?(?:(?:additional|another|further)\s+)?{_MEASURE}",
)
_ARTICLE = re.compile(rf"\b(an?)\s+{_MEASURE}(?:\s+(?:in\s+)?{_NOUN}\b)?\s*,?\s+(?=([A-Za-z]))", re.IGNORECASE)
_PHRASES = _compile(
    rf"\s*[(\[]\s*(?:{_NOW}\s+)?(?:measur\w+\s+)?{_MEASURE}\s*[)\]]",
    rf",\s*(?:the\s+)?(?:largest|biggest|longest|smallest)(?:\s+(?:of\s+(?:which|these|them)|one))?\s+(?:(?:measur\w+|is|being|"
    rf"of|at)\s+)?{_MEASURE}\s*(?:,(?=\s+(?:is|are|was|were)\b)|(?=[,.;)]|$))",
    rf",?\s*\b(?:and\s+)?(?:{_NOW}\s+)?(?:measuring|sized)\s+(?:{_NOW}\s+)?{_SEVERAL}",
    rf",\s*{_NOW}\s+{_MEASURE}",
    rf"\s*\bwith\s+{_SEVERAL}(?=\s*(?:[.,;)]|$)|\s+(?:is|are|was|were|has|have|had|in|at|on|and|by|for)\b)",
    rf"(?<=\bis )(?:{_NOW}\s+)?{_MEASURE}\s+of\s+",
    r"\s*\b(?:with\s+an?\s+(?:\w+\s+)?(?:size|diameter|thickness|length|width)\s+of|of|(?<!up )to|at)"
    rf"\s+{_MEASURE}",
)
_IS = rf"(?:is|are|was|were)(?:\s+{_NOW})?"
# The statement after the size is kept: "The duct measures 9 mm but tapers." -> "The duct tapers."
_AND_MORE = re.compile(
    rf"\s+(?:{_IS}|measures?|measured)\s+{_MEASURE}\s*,?\s+(?:and|but)(?=\s+(?:is|are|was|were|has|have|had|shows?|showed|"
    r"demonstrates?|tapers?|appears?|contains?|extends?|causes?|enhances?|remains?|involves?|displaces?|compresses|abuts?|"
    r"invades?|encases?)\b)",
    re.IGNORECASE,
)
_STATEMENTS = _compile(
    rf"\b(?:measures?|measured)\s+(?:{_NOW}\s+)?{_MEASURE}",
    # "There is 3 cm mass", "is 3 cm above" and "Kidney: 3 cm cyst" state more than a size.
    rf"\b{_IS}\s+{_MEASURE}(?=\s*(?:[^\sA-Za-z]|$)|\s+(?:and|but|or|in|at|on|with|apart|away|when|compared|to|for|from|during|by|within|as|since)\b)",
    rf"[=:]\s*{_MEASURE}\s*(?=[.,;)]*\s*$|[,;]\s*\w+\s*[:=])",
)
# Statements that _PHRASES would cut into fragments.
_HAS = re.compile(
    rf"\b(?:has|have|had|shows?|showed|demonstrates?)\s+(?:an?\s+|the\s+)?(?:\w+\s+)?{_NOUN}\s+(?:of|measuring)\s+"
    rf"{_MEASURE}|\b(?:ranges?|ranged)\s+(?:in\s+{_NOUN}\s+)?(?:from|between)\s+{_MEASURE}",
    re.IGNORECASE,
)
# "No node over 1 cm" is not "No node": a `no`, then a limit in the same clause. The marks between clauses reset it.
_NO_OVER = re.compile(
    r"(?P<mark>[,.;])|(?P<no>\b(?:no|not|without)\b(?!\s+(?:less|more|[a-z]{3,}er)\s+than))"
    rf"|\b(?:(?:less|more|[a-z]{{3,}}er)\s+than|over|exceeding)\s+{_MEASURE}",
    re.IGNORECASE,
)
_APART = re.compile(
    rf"(?P<moved>\b(?:withdrawn|retracted|pulled(?:\s+back)?|moved|migrated|displaced|separated|removed)\s+)?"
    rf"(?P<phrase>,\s*)?{_MEASURE}\s+(?:away\s+)?from\b(?P<whence>[^,;.]*)(?P<end>[,;.]|$)",
    re.IGNORECASE,
)
_REST = re.compile(_SEVERAL, re.IGNORECASE)
_PIECE = re.compile(rf"(?:^|[,;]\s*){_MEASURE}\s+of\b", re.IGNORECASE)
# "5 mM", "25 mm Hg" and "3 cm/s" are not sizes: a mark between number and unit hides them from the patterns.
_NOT_A_SIZE = re.compile(r"(?<=\d)(?=\s*(?:-\s*)?(?:mM\b|[cm]m\s*(?:-\s*)?(?:Hg|H2O|H₂O|[-−]1|⁻¹|/|per\b)))")
_MARK = "\ue000"
_BLANKS = re.compile(r"\s{2,}|[\n\r]")
_CLEAN = (
    (re.compile(r"([(\[])\s*[,;]\s*"), r"\1"),
    (re.compile(r"\s*(?:\(\s*\)|\[\s*\])"), ""),
    (
        re.compile(r"(?:\s*\b(?:and|or|but)\b)?[\s,]+([.;:])|\s*,(?:\s*,)+|\s+(?=,)"),
        lambda m: m[1] or ("," * ("," in m[0])),
    ),
    (re.compile(r"\s+(?:and|or|but)\s*(?=[.;]|$)"), ""),
    (re.compile(r":\s*,\s*"), ": "),
)
_FIRST = re.compile(r"(?:(?:\d{1,2}[.)]|[-–•*])\s*)?[a-z]")


def has_size(text: str) -> bool:
    """Return whether a text states a size in mm or cm."""
    return _HAS_SIZE.search(_NOT_A_SIZE.sub(_MARK, text)) is not None


def without_sizes(text: str) -> str:
    """Remove the phrases that state a size in mm or cm. Returns '' if nothing else is left.

    Line breaks are kept, except within a sentence that had a size.
    """
    if not has_size(text):
        return text
    text = _NOT_A_SIZE.sub(_MARK, text)
    out, gap, previous_end = [""], "", 0
    for begin, end in spans(text):
        gap, previous_end = max(gap, "\n" * text.count("\n", previous_end, begin), key=len), end
        piece = text[begin:end]
        if _HAS_SIZE.search(piece):
            piece = _remove_sizes(piece)
        if piece.strip(" .,;:-–•*"):
            out += [(gap or " ") if len(out) > 1 else "", piece]
            gap = ""
    return "".join(out).replace(_MARK, "")


def _without(patterns: Iterable[re.Pattern], text: str) -> str:
    """Remove what the patterns match, and reduce each run of white space to one space."""
    text = _BLANKS.sub(" ", text)  # a run would be tried from each of its characters
    for pattern in patterns:
        text = _BLANKS.sub(" ", pattern.sub("", text))
    return text


def _denies_a_size(sentence: str) -> bool:
    denied = False
    for match in _NO_OVER.finditer(sentence):
        if denied and not (match["mark"] or match["no"]):
            return True
        denied = not match["mark"] and bool(denied or match["no"])
    return False


def _remove_sizes(sentence: str) -> str:
    sentence = _without((), sentence)
    if _PIECE.search(sentence):
        return ""
    sentence = _without(_BEFORE, sentence)
    if _HAS.search(sentence) or _denies_a_size(sentence):
        return ""
    sentence = _without(_LISTED, sentence)
    sentence = _ARTICLE.sub(_article, sentence)
    sentence = _without((*_PHRASES, _AND_MORE), sentence)
    if any(statement.search(sentence) for statement in _STATEMENTS):
        return ""
    apart = _APART.search(sentence)
    if apart and not apart["moved"]:
        if not apart["phrase"]:
            return ""
        sentence = sentence[: apart.start()] + sentence[apart.start("end") :]
    sentence = _without((_REST,), sentence)
    for pattern, replacement in _CLEAN:
        sentence = pattern.sub(replacement, sentence)
    sentence = sentence.strip(" ,")
    first = _FIRST.match(sentence)
    return first[0].upper() + sentence[first.end() :] if first else sentence


def _article(match: re.Match) -> str:
    article = "an" if match[2].lower() in "aeiou" else "a"
    return (article.capitalize() if match[1][0].isupper() else article) + " "
