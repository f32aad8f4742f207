"""Mentions of figures in running text: "Figs. 1-3 and 5b" -> figures 1, 2, 3 and 5 panel b, with positions.

This module parses the words. `figure_ties` finds the figure of the paper, with the links of the article.
"""

from __future__ import annotations

import dataclasses
import functools
import re

_KEYWORD = re.compile(
    r"\b(?P<before>(?:supplementa(?:ry|l)|suppl?\.|supporting)(?:\s+(?:materials?|data|information|files?))?,?"
    r"|online|additional|extended data|appendix|their|his|her)?\s*"
    r"\b(?P<word>figures?|figs?|schemes?|charts?|plates?|images?)\b\.?[\s:]*",
    re.IGNORECASE,
)
# "2", "12", "S1", "A.3", "3.1", "IV"
_NUMBER = re.compile(r"(?:[A-Z]\.?[-–]?)?\d+(?:\.\d+)*(?![\d%])|[IVX]+\b")
# "a", "A-C", "(b, c)", "a and b", "i-iii": letters that do not start a word.
_LETTER = r"(?:[A-Za-z]|i{2,3}|iv|vi{0,3})(?:['’′*])?(?![A-Za-z0-9])"
_DASH = r"\s*[-–—−‒]\s*"
_LETTERS = rf"{_LETTER}(?:(?:{_DASH}|\s*[,/&+]\s*(?:and\s+)?|\s+(?:and|to)\s+){_LETTER})*"
_PANELS = re.compile(
    rf"\s?[(\[]\s*(?P<bracketed>{_LETTERS})\s*[)\]]|(?P<joined>{_LETTERS})"
    rf"|\s(?P<apart>{_LETTERS})(?=\s*(?:[).,;:\]–—-]|$|and\b|&))"
)
_RANGE = re.compile(rf"{_DASH}|\s+(?:to|through)\s+", re.IGNORECASE)
_SEPARATOR = re.compile(r"\s*(?:,|;|/|&|\+)\s*(?:and\s+|&\s*)?|\s+(?:and|or)\s+", re.IGNORECASE)
# For `split`: white space is matched from its first character only; otherwise a long run takes quadratic time.
_BETWEEN = re.compile(r"(?:(?<!\s)\s+)?[,/&+]\s*(?:and\s+)?|(?<!\s)\s+and\s+")
_ENDS_OF_RANGE = re.compile(r"(?:(?<!\s)\s+)?[-–—−‒]\s*|(?<!\s)\s+to\s+")
_AGAIN = re.compile(r"(?:figures?|figs?)\b\.?\s*", re.IGNORECASE)
# Text after a number in a list that shows that the number does not refer to a figure.
_COUNTED = re.compile(
    r"\s*(?:%|°|×|=|<|>)|\s+(?:mm|cm|m|ml|mg|g|kg|s|h|hours?|days?|weeks?|months?|years?|patients?|cases?|"
    r"subjects?|patients|of\s+\d)\b|\s+[a-z]+(?:s|ed)\b(?<!shows)(?<!demonstrates)(?<!depicts)(?<!illustrates)"
)
_ENDS = re.compile(r"\s*(?:[).,;:\]–—-]|$)|\s+(?:show|illustrate|demonstrate|depict|present|reveal|and\b|are\b)")
# Text after and before a mention that refers to another paper.
_ELSEWHERE_AFTER = re.compile(
    r"[A-Za-z)]{0,2}\s*(?:,\s*)?(?:of|in|from)\s+(?:refs?\b|references?\b|\[|\(?[A-Z][\w'’-]+(?:\s+and\s+[A-Z][\w'’-]+|"
    r"\s+et\s+al)|the\s+(?:original\s+)?(?:paper|article|study|work|report)\s+(?:of|by)\b)|\s+therein\b"
)
_ELSEWHERE_BEFORE = re.compile(
    r"(?:\bet\s+al\.?(?:,?\s*\(?(?:19|20)\d\d[a-z]?\)?|\s*\[\d+\])?|[A-Z][\w'’-]+,?\s+(?:19|20)\d\d[a-z]?|\[\d+|"
    r"\brefs?\.?\s*\d+|\breferences?\s*\d+)\s*[,;:]?\s*(?:see\s+)?$"
)


@dataclasses.dataclass(frozen=True)
class Item:
    """One figure that a mention names, at a position of the text."""

    number: str  # normalized like labels (`fold`): "2", "S1", "IV"
    panels: tuple[str, ...]  # letters in lower case; empty for the whole figure
    begin: int  # position in the text; for an inner figure of a range, that of the range
    end: int
    inner: bool = False  # inside a range, so the text does not name it


@dataclasses.dataclass(frozen=True)
class Mention:
    """A mention of one or more figures, such as "Figs. 1-3". Its position includes the keyword."""

    word: str  # "figure", "scheme", "chart", "plate" or "image"
    items: tuple[Item, ...]
    begin: int
    end: int
    supplement: bool = False  # the text refers to a supplement
    elsewhere: bool = False  # the text refers to another paper


@functools.lru_cache(4096)
def fold(number: str) -> str:
    """Normalize the number of a label or a mention: "S 1." -> "S1", "A.2" -> "A2", "02" -> "2"."""
    number = re.sub(r"^([A-Za-z])[\s.–-]*(?=\d)", r"\1", number.strip(" .:"))
    return re.sub(r"(?<![\d.])0+(?=\d)", "", number).upper()


def mentions(text: str, is_linked=lambda begin, end: False) -> list[Mention]:
    """Return every mention of numbered figures.

    is_linked(begin, end) returns whether the author linked this text to a figure. Linked numbers are always figures.
    """
    out, position = [], 0
    while (match := _KEYWORD.search(text, position)) is not None:
        word, before = match["word"].lower(), (match["before"] or "").lower()
        items, end = _items(text, match.end(), word.endswith("s"), is_linked)
        position = max(end, match.end())
        if not items:
            continue
        word = word.rstrip("s")
        word = "figure" if word == "fig" else word
        elsewhere = before in ("their", "his", "her") or bool(
            _ELSEWHERE_AFTER.match(text, end)
            or _ELSEWHERE_BEFORE.search(text, max(0, match.start() - 60), match.start())
        )
        supplement = bool(before) and before not in ("their", "his", "her", "appendix")
        out.append(Mention(word, tuple(items), match.start(), end, supplement, elsewhere))
    return out


def bare_items(text: str) -> list[Item]:
    """Return the figures of a link without a keyword: "2", "1-3", "4b, c"; empty if the link is not of this form."""
    items, end = _items(text, len(text) - len(text.lstrip(" (")), True, lambda b, e: True)
    return items if items and not text[end:].strip(" ).,;") else []


def _items(text: str, position: int, plural: bool, is_linked) -> tuple[list[Item], int]:
    """Return the figures of the list that starts at a position, and where the list ends."""
    number = _NUMBER.match(text, position)
    if number is None:
        return [], position
    items: list[Item] = []
    ranged = False
    while True:
        panels, end = _panels(text, number.end())
        name = fold(number.group())
        if ranged:
            items += _between(items[-1], name, number.start())
        items.append(Item(name, panels, number.start(), end))
        ranged = False
        follow = _RANGE.match(text, end)
        if follow is not None:
            again = _AGAIN.match(text, follow.end())
            start = again.end() if again else follow.end()
            number = _NUMBER.match(text, start)
            if number is not None and _plausible(text, number, plural, True, is_linked):
                ranged = items[-1].number.isdigit() and number.group().isdigit()
                continue
        follow = _SEPARATOR.match(text, end)
        # "Scheme 1, Fig. 2": the next keyword starts another mention.
        number = _NUMBER.match(text, follow.end()) if follow is not None else None
        if number is None or not _plausible(text, number, plural, False, is_linked):
            return items, end


def _plausible(text: str, number: re.Match, plural: bool, ranged: bool, is_linked) -> bool:
    """Return whether a later number in a list is a figure: it is linked, or the text after it suggests so."""
    if is_linked(number.start(), number.end()):
        return True
    _, stop = _panels(text, number.end())
    if re.fullmatch(r"[IVX]+", number.group()) and not plural:
        return False
    return bool(_ENDS.match(text, stop)) or ((plural or ranged) and not _COUNTED.match(text, stop))


def _panels(text: str, position: int) -> tuple[tuple[str, ...], int]:
    """Return the panels named at a position, and their end."""
    match = _PANELS.match(text, position)
    if match is None:
        return (), position
    letters = match["bracketed"] or match["joined"] or match["apart"]
    following = text[match.end() : match.end() + 1]
    # "a" and "I" are also English words.
    if match["apart"] and letters in ("a", "A", "I", "i") and following not in (")", ",", "]"):
        return (), position
    names: list[str] = []
    for piece in _BETWEEN.split(letters):
        ends = [e.strip(" '’′*").lower() for e in _ENDS_OF_RANGE.split(piece)]
        if len(ends) == 2 and all(len(e) == 1 for e in ends) and ends[0] < ends[1]:
            names += [chr(c) for c in range(ord(ends[0]), ord(ends[1]) + 1)]
        else:
            names += ends
    return tuple(dict.fromkeys(names)), match.end()


def _between(first: Item, last: str, end: int) -> list[Item]:
    """Return the inner figures of a range, or [] if the range runs backwards or is longer than 30."""
    low, high = int(first.number), int(last)
    if not low < high <= low + 30:
        return []
    return [Item(str(k), (), first.begin, end, True) for k in range(low + 1, high)]


_LABEL = re.compile(
    r"^\W*+(?:(?P<before>supplementa(?:ry|l)|suppl?\.?|supporting|online|additional|extended data|appendix)\s+)?"
    r"(?:(?P<word>figures?|figs?|schemes?|charts?|plates?|images?|abb(?:ildung)?)\b[.:]?\s*)?"
    r"(?P<number>(?:[A-Z][\s.–-]?)?\d+(?:\.\d+)*|[IVX]+\b)?\s*[-–(]?\s*(?P<panel>[A-Za-z])?\W*$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Label:
    word: str
    number: str
    panel: str
    supplement: bool


def label(text: str) -> Label | None:
    """Parse a label: "Figure 2A." -> figure 2, panel a. Returns None if it has no number."""
    match = _LABEL.match(" ".join(text.split()))
    if match is None or not (match["number"] or match["panel"]):
        return None
    word = (match["word"] or "figure").lower().rstrip("s")
    word = "figure" if word in ("fig", "abb", "abbildung") else word
    before = (match["before"] or "").lower()
    number, panel = fold(match["number"] or ""), (match["panel"] or "").lower()
    return Label(word, number, panel, bool(before) and before != "appendix")
