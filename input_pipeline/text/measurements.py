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

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from input_pipeline.text.sentences import spans

_NUMBER = r"(?:\d++(?:[.,]\d++)?+|\.\d++)"
_UNIT = r"(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)(?:[³²]|\^?[23]\b)?(?![A-Za-z])"
# Each blank here and in _SIZE must match in one way only; otherwise "1 x 1 x 1 x ..." backtracks exponentially. Repeats
# have a limit that no real text reaches; otherwise a text of only such repeats takes quadratic time.
_HYPHEN = r"\s*+(?:-\s*+)?+"
_DIRECTION = r"\b(?:AP|TR|TV|TRV|CC|ML|SI|LL|transverse|craniocaudal|anteroposterior)\b"
_AXIS = rf"(?:\s*+\(?{_DIRECTION}\)?)"
_TIMES = r"\s*+(?:x|×|\*|by|to|--?|–|and)\s*+"
_NOUN = r"(?:length|size|sizes|diameter|diameters|thickness|width|height|depth|dimensions?|axis)"
_EXTENT = r"(?:(?:short|long)(?:[- ]axis)?|maxim\w+|AP|transverse|greatest|largest)"
# "3 x 2.5 cm", "3.5 cm (AP) x 2 cm (TR)", "12-mm": the last number must have a unit, so that no "3 x" remains.
_ALONG = rf"(?:\s+in\s+(?:\w+\s+){{0,2}}{_NOUN}\b|\s+(?:{_EXTENT}\s+)?{_NOUN}\b(?!\s+of\b))"
_SIZE = (
    rf"(?<![\w.])(?:{_NUMBER}(?:{_HYPHEN}{_UNIT})?+{_AXIS}?+{_TIMES}){{0,11}}{_NUMBER}{_HYPHEN}{_UNIT}{_AXIS}?"
    rf"(?:\s*\({_DIRECTION}(?:\s*(?:x|×|,|by)\s*{_DIRECTION}){{1,5}}\))?"
    rf"(?:{_HYPHEN}(?:thick|wide|long|deep|high)\b)?" + _ALONG + "?"
)
_ABOUT = (
    r"(?:(?:approximately|about|around|roughly|up\s+to|at\s+least|at\s+most|(?:(?:no|not)\s+)?(?:less|more|\b[a-z]{3,}er)"
    r"\s+than|over|nearly|almost)\s+|(?:ca\.|~|≈|<|>|≤|≥)\s*)"
)
_MEASURE = rf"(?=[\w.~≈<>≤≥])(?:{_ABOUT}){{0,4}}{_SIZE}"
_SEVERAL = rf"{_MEASURE}(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+){_MEASURE})*"
_NOW = r"(?:now|currently|today|presently|again|still)"
_HAS_SIZE = re.compile(_SIZE, re.IGNORECASE)
_WORD = re.compile(r"\w+")
_SAME_LETTERS = str.maketrans("ıſ", "is", "\u0307")  # re.IGNORECASE takes ı, İ and ſ for i and s


class _Rule(NamedTuple):
    """A pattern with its clues: every match contains at least one clue, and a text without clues is skipped quickly."""

    words: frozenset[str]
    marks: tuple[str, ...]
    pattern: re.Pattern

    def search(self, text: str) -> re.Match | None:
        return self.pattern.search(text) if self._has_clue(text) else None

    def sub(self, replacement, text: str) -> str:
        return self.pattern.sub(replacement, text) if self._has_clue(text) else text

    def _has_clue(self, text: str) -> bool:
        if self.words:
            return not self.words.isdisjoint(_words(text))
        return not self.marks or any(mark in text for mark in self.marks)


@functools.lru_cache(maxsize=1)
def _words(text: str) -> frozenset[str]:
    """Return the words of a text in lower case."""
    return frozenset(_WORD.findall(text.lower().translate(_SAME_LETTERS)))


def _rule(clues: str, pattern: str, flags: re.RegexFlag = re.IGNORECASE) -> _Rule:
    words = frozenset(clue for clue in clues.split() if clue.isalpha())
    marks = tuple(clue for clue in clues.split() if not clue.isalpha())
    return _Rule(words, marks, re.compile(pattern, flags))


# "previously 2 cm when measured similarly", "compared to 3 mm before", "increased from 6 mm to 9 mm".
_BEFORE = (
    _rule(
        "from",
        rf"(?<=[cm]m)\s*,?\s*(?:increased|decreased|enlarged|reduced|grown|up|down)\s+from\s+{_MEASURE}(?:\s+previously)?",
    ),
    _rule(
        "previously formerly",
        rf"\s*[,;]?\s*\b(?:and\s+|was\s+|were\s+)?(?:previously|formerly)\s+(?:(?:measuring|measured|sized|was|were|of|at)\s+){{0,6}}"
        rf"{_MEASURE}(?:\s+when\s+measured\s+\w+)?",
    ),
    _rule(
        "compared versus vs",
        rf"\s*[,;]?\s*\b(?:as\s+)?(?:compared\s+(?:to|with)|versus|vs\.?)\s+{_MEASURE}(?:\s+(?:previously|before|earlier))?",
    ),
    _rule(
        "from between",
        rf"\s*[,;]?\s*\b(?:(?:ranging|varying)\s+(?:in\s+{_NOUN}\s+)?)?(?<!ranges )(?<!range )(?<!ranged )"
        rf"(?:from|between)\s+{_MEASURE}(?:\s+previously)?(?:\s+to\s+{_MEASURE})?(?:\s+previously)?",
    ),
)
_LISTED = (
    _rule(",", rf"(?:\s*\bof\s+)?(?:\b\d+(?:\.\d+)?\s*,\s*){{1,12}}(?:(?:and|or)\s+)?{_MEASURE}"),
    _rule("measured", rf",?\s*\b(?<!was )(?<!were )(?<!is )measured\s+(?:at\s+)?{_SEVERAL}"),
    _rule(
        "with and over along at to",
        rf",?\s*\b(?:with|and|over|along|at|to)\s+(?:an?\s+|the\s+|its\s+)?(?:\w+\s+)?{_NOUN}\s*"
        rf"(?:(?:of|measuring)\s+|[=:]\s*)?{_SEVERAL}",
    ),
    _rule("by", rf"\s*\bby\s+(?:an?\s+)?(?:(?:additional|another|further)\s+)?{_MEASURE}"),
)
_ARTICLE = _rule("a an", rf"\b(an?)\s+{_MEASURE}(?:\s+(?:in\s+)?{_NOUN}\b)?\s*,?\s+(?=([A-Za-z]))")
_PHRASES = (
    _rule("( [", rf"\s*[(\[]\s*(?:{_NOW}\s+)?(?:measur\w+\s+)?{_MEASURE}\s*[)\]]"),
    _rule(
        "largest biggest longest smallest",
        rf",\s*(?:the\s+)?(?:largest|biggest|longest|smallest)(?:\s+(?:of\s+(?:which|these|them)|one))?\s+(?:(?:measur\w+|is|being|"
        rf"of|at)\s+)?{_MEASURE}\s*(?:,(?=\s+(?:is|are|was|were)\b)|(?=[,.;)]|$))",
    ),
    _rule("measuring sized", rf",?\s*\b(?:and\s+)?(?:{_NOW}\s+)?(?:measuring|sized)\s+(?:{_NOW}\s+)?{_SEVERAL}"),
    _rule("now currently today presently again still", rf",\s*{_NOW}\s+{_MEASURE}"),
    _rule(
        "with", rf"\s*\bwith\s+{_SEVERAL}(?=\s*(?:[.,;)]|$)|\s+(?:is|are|was|were|has|have|had|in|at|on|and|by|for)\b)"
    ),
    _rule("of", rf"(?<=\bis )(?:{_NOW}\s+)?{_MEASURE}\s+of\s+"),
    _rule(
        "with of to at",
        r"\s*\b(?:with\s+an?\s+(?:\w+\s+)?(?:size|diameter|thickness|length|width)\s+of|of|(?<!up )to|at)"
        rf"\s+{_MEASURE}",
    ),
)
_IS = rf"(?:is|are|was|were)(?:\s+{_NOW})?"
# The statement after the size is kept: "The duct measures 9 mm but tapers." -> "The duct tapers."
_AND_MORE = _rule(
    "and but",
    rf"\s+(?:{_IS}|measures?|measured)\s+{_MEASURE}\s*,?\s+(?:and|but)(?=\s+(?:is|are|was|were|has|have|had|shows?|showed|"
    r"demonstrates?|tapers?|appears?|contains?|extends?|causes?|enhances?|remains?|involves?|displaces?|compresses|abuts?|"
    r"invades?|encases?)\b)",
)
_STATEMENTS = (
    _rule("measures measure measured", rf"\b(?:measures?|measured)\s+(?:{_NOW}\s+)?{_MEASURE}"),
    # "There is 3 cm mass", "is 3 cm above" and "Kidney: 3 cm cyst" state more than a size.
    _rule(
        "is are was were",
        rf"\b{_IS}\s+{_MEASURE}(?=\s*(?:[^\sA-Za-z]|$)|\s+(?:and|but|or|in|at|on|with|apart|away|when|compared|to|for|from|during|by|within|as|since)\b)",
    ),
    _rule("= :", rf"[=:]\s*{_MEASURE}\s*(?=[.,;)]*\s*$|[,;]\s*\w+\s*[:=])"),
)
# Statements that _PHRASES would cut into fragments.
_HAS = _rule(
    "has have had show shows showed demonstrate demonstrates range ranges ranged",
    rf"\b(?:has|have|had|shows?|showed|demonstrates?)\s+(?:an?\s+|the\s+)?(?:\w+\s+)?{_NOUN}\s+(?:of|measuring)\s+"
    rf"{_MEASURE}|\b(?:ranges?|ranged)\s+(?:in\s+{_NOUN}\s+)?(?:from|between)\s+{_MEASURE}",
)
# "No node over 1 cm" is not "No node": a `no`, then a limit in the same clause. The marks between clauses reset it.
_NO_OVER = re.compile(
    r"(?P<mark>[,.;])|(?P<no>\b(?:no|not|without)\b(?!\s+(?:less|more|[a-z]{3,}er)\s+than))"
    rf"|\b(?:(?:less|more|[a-z]{{3,}}er)\s+than|over|exceeding)\s+{_MEASURE}",
    re.IGNORECASE,
)
_NO = _rule("no not without", r"\b(?:no|not|without)\b")
_APART = _rule(
    "from",
    rf"(?P<moved>\b(?:withdrawn|retracted|pulled(?:\s+back)?|moved|migrated|displaced|separated|removed)\s+)?"
    rf"(?P<phrase>,\s*)?{_MEASURE}\s+(?:away\s+)?from\b(?P<whence>[^,;.]*)(?P<end>[,;.]|$)",
)
_REST = _rule("", _SEVERAL)
_PIECE = _rule("of", rf"(?:^|[,;]\s*){_MEASURE}\s+of\b")
# "5 mM", "25 mm Hg" and "3 cm/s" are not sizes: a mark between number and unit hides them from the patterns.
_NOT_A_SIZE = re.compile(r"(?<=\d)(?=\s*(?:-\s*)?(?:mM\b|[cm]m\s*(?:-\s*)?(?:Hg|H2O|H₂O|[-−]1|⁻¹|/|per\b)))")
_MARK = "\ue000"
# Digits that cannot belong to a size are hidden as letters. All rules together remove fewer than _MOST numbers before a
# unit.
_LAST_DIGIT = re.compile(rf"(\d{_HYPHEN}{_UNIT})", re.IGNORECASE)
_MOST = 1000
_NUMBERS = re.compile(rf"(?:\D*+\d++){{{_MOST}}}")
_HIDDEN = "ꀀꀁꀂꀃꀄꀅꀆꀇꀈꀉ"
_HIDE, _SHOW = str.maketrans("0123456789", _HIDDEN), str.maketrans(_HIDDEN, "0123456789")
_BLANKS = re.compile(r"\s(?:\s+|(?<=[\n\r]))")
_CLEAN = (
    (_rule("( [", r"([(\[])\s*[,;]\s*", re.NOFLAG), r"\1"),
    (_rule("( [", r"\s*(?:\(\s*\)|\[\s*\])", re.NOFLAG), ""),
    (
        _rule("", r"(?:\s*\b(?:and|or|but)\b)?[\s,]+([.;:])|\s*,(?:\s*,)+|\s+(?=,)", re.NOFLAG),
        lambda m: m[1] or ("," * ("," in m[0])),
    ),
    (_rule("and or but", r"\s+(?:and|or|but)\s*(?=[.;]|$)", re.NOFLAG), ""),
    (_rule(":", r":\s*,\s*", re.NOFLAG), ": "),
)
_FIRST = re.compile(r"(?:(?:\d{1,2}[.)]|[-–•*])\s*)?[a-z]")


def has_size(text: str) -> bool:
    """Return whether a text states a size in mm or cm."""
    return _HAS_SIZE.search(_hide_numbers(_NOT_A_SIZE.sub(_MARK, text))) is not None


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
        if _HAS_SIZE.search(_hide_numbers(piece)):
            piece = _remove_sizes(piece)
        if piece.strip(" .,;:-–•*"):
            out += [(gap or " ") if len(out) > 1 else "", piece]
            gap = ""
    return "".join(out).replace(_MARK, "")


def _hide_numbers(text: str) -> str:
    """Replace the digits with _MOST or more numbers between them and the next unit.

    Otherwise "1 x 1 x 1 x ..." is tried as a size from each of its numbers.
    """
    if len(text) < 2 * _MOST or any(digit in text for digit in _HIDDEN):
        return text
    *pieces, rest = _LAST_DIGIT.split(text)  # texts and units in turn
    for k in range(0, len(pieces), 2):
        if len(pieces[k]) >= 2 * _MOST and (last := _NUMBERS.match(pieces[k][::-1])):
            end = len(pieces[k]) - last.end()
            pieces[k] = pieces[k][:end].translate(_HIDE) + pieces[k][end:]
    return "".join(pieces) + rest.translate(_HIDE)


def _without(rules: Iterable[_Rule], text: str) -> str:
    """Remove what the rules match, and reduce each run of white space to one space."""
    text = _BLANKS.sub(" ", text)  # a run would be tried from each of its characters
    for rule in rules:
        if (shorter := rule.sub("", text)) != text:
            text = _BLANKS.sub(" ", shorter)
    return text


def _denies_a_size(sentence: str) -> bool:
    if not _NO.search(sentence):
        return False
    denied = False
    for match in _NO_OVER.finditer(sentence):
        if denied and not (match["mark"] or match["no"]):
            return True
        denied = not match["mark"] and bool(denied or match["no"])
    return False


def _remove_sizes(sentence: str) -> str:
    shown = _without((), sentence)
    sentence = _hide_numbers(shown)
    is_hidden = sentence is not shown
    if _PIECE.search(sentence):
        return ""
    sentence = _without(_BEFORE, sentence)
    if _HAS.search(sentence) or _denies_a_size(sentence):
        return ""
    sentence = _without(_LISTED, sentence)
    sentence = _ARTICLE.sub(_article, sentence)
    sentence = _without((*_PHRASES, _AND_MORE), sentence)
    if any(rule.search(sentence) for rule in _STATEMENTS):
        return ""
    apart = _APART.search(sentence)
    if apart and not apart["moved"]:
        if not apart["phrase"]:
            return ""
        sentence = sentence[: apart.start()] + sentence[apart.start("end") :]
    sentence = _without((_REST,), sentence)
    if is_hidden:
        sentence = sentence.translate(_SHOW)
    for rule, replacement in _CLEAN:
        sentence = rule.sub(replacement, sentence)
    sentence = sentence.strip(" ,")
    first = _FIRST.match(sentence)
    return first[0].upper() + sentence[first.end() :] if first else sentence


def _article(match: re.Match) -> str:
    article = "an" if match[2].lower() in "aeiou" else "a"
    return (article.capitalize() if match[1][0].isupper() else article) + " "
