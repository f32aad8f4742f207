"""Split and join sentences of medical prose; measurements.py removes sizes from them."""

from __future__ import annotations

import re

# A full stop after these does not end a sentence.
_ABBREVIATIONS = frozenset(
    "fig figs dr drs mr mrs ms prof vs e.g i.e eg ie ref refs eq eqs tbl cf ca approx al st dept viz resp sp spp var "
    "incl esp suppl ed eds jr sr no nos vol pp inj tab".split()
)
# These are abbreviations only before a number: "no. 5", but "The answer is no. He ..."
_BEFORE_NUMBER = frozenset({"no", "nos", "vol", "pp", "tab", "ed", "sp", "p", "var", "inj"})
# A single letter after these ends a sentence: "Vitamin D. The ..." does, "J. Smith" does not.
_LETTERED = frozenset(
    "vitamin hepatitis type grade stage class group figure fig panel factor protein category lesion arm cohort patient "
    "case part section and or influenza".split()
)
_END = re.compile(r"""(?<![.!?])[.!?]+["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9<≥>≤~])|\n\s*\n""")
_LAST_WORD = re.compile(r"\n?([^\s(\[\"'“‘]+)")  # in a text that runs backwards
_LOOK_BACK = 100  # characters before a full stop that are searched for its word and the word before it
_NEXT = re.compile(r"\s*(\S?)")
# Lines of a list: they start with a bullet, the next number, or a capital after a line without a full stop.
_LINE = re.compile(r"(?<=\S)[ \t]*\n(?=[ \t]*(?:(?P<mark>[-–•*][ \t])|(?P<number>\d{1,2})[.)][ \t]|[A-Z]))")
_NUMBERED = re.compile(r"\s*(\d{1,2})[.)]\s")
_INCOMPLETE = re.compile(
    r"(?:[,:;/(–-]|\b(?:an?|the|and|or|nor|but|of|in|on|at|to|for|from|with|without|by|as|than|is|are|was|were|no|this|"
    r"that|which|dr|drs|vs))$",
    re.IGNORECASE,
)
_WRAPPED = range(50, 101)  # length of a line that was wrapped because it was full


def sentences(text: str) -> list[str]:
    """Split English medical prose into sentences, without outer white space.

        "A 2.5 cm mass (Fig. 2). Seen by Dr. Lee. OK." -> ["A 2.5 cm mass (Fig. 2).", "Seen by Dr. Lee.", "OK."]

    Decimal points, abbreviations, initials and numbers of list items do not end a sentence. Blank lines always do, and
    so do the lines of a list, with or without a full stop.
    """
    return [text[begin:end] for begin, end in spans(text)]


def spans(text: str) -> list[tuple[int, int]]:
    """Return the character offsets [begin, end) of `sentences`."""
    out, start = [], _NEXT.match(text).start(1)
    for match in sorted([*_END.finditer(text), *_LINE.finditer(text)], key=re.Match.start):
        if match.re is _LINE:
            if not _line_ends_sentence(text, start, match):
                continue
        elif match.group().startswith(".") and not _stop_ends_sentence(text, start, match):
            continue
        out.append((start, match.end()))
        start = _NEXT.match(text, match.end()).start(1)
    out.append((start, len(text)))
    stripped = ((a, a + len(text[a:b].rstrip())) for a, b in out)
    return [(a, b) for a, b in stripped if a < b]


def _line_ends_sentence(text: str, start: int, match: re.Match) -> bool:
    """Return whether a line without a full stop ends its sentence. If not, the sentence continues on the next line."""
    if match["mark"]:
        return True
    if match["number"]:
        before = _NUMBERED.match(text, start)
        return before is not None and int(match["number"]) == int(before[1]) + 1
    if text[match.start() - 1] in ".!?":
        return False  # _END matches it
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
    return len(line) not in _WRAPPED and not _INCOMPLETE.search(line)


def _stop_ends_sentence(text: str, start: int, match: re.Match) -> bool:
    before = text[max(start, match.start() - _LOOK_BACK) : match.start()]
    last = _LAST_WORD.match(before[::-1])
    if last is None or len(match.group()) > 1:
        # ")." and '."' end a sentence; an abbreviation inside quotes is too rare to handle.
        return True
    word, earlier = last[1][::-1], before[: len(before) - last.end()]
    plain = word.lower().strip(".")
    if plain in _BEFORE_NUMBER:
        return not _NEXT.match(text, match.end())[1].isdigit()
    if plain in _ABBREVIATIONS:
        return False
    if len(word) == 1 and word.isalpha() and word.isupper():
        previous = earlier.split()
        return bool(previous) and previous[-1].lower().strip(".,(") in _LETTERED
    return not (word.isdigit() and not earlier.strip())


def shorten(text: str, first: int = 1, last: int = 4) -> str:
    """Keep the first and last sentences of a text that has more than first + last (PMC-CaseReport: 1 and 4)."""
    parts = sentences(text)
    if len(parts) <= first + last:
        return text.strip()
    return " ".join(parts[:first] + parts[-last:])


def join(*texts: str) -> str:
    """Join the texts that are not blank with one space."""
    return " ".join(t.strip() for t in texts if t.strip())


def closed(text: str) -> str:
    """Add a full stop unless the text ends with closing punctuation."""
    text = text.strip()
    return text if not text or text[-1] in ".!?:;" or re.search(r"[.!?][\"'”’)\]]+$", text) else text + "."
