"""Sub-figures named in captions."""

from __future__ import annotations

import itertools
import re
import string

# "(a)", "(A-C)", "(a, b)", "A:", "a) ", "A, axial ..." at the start of a sentence
_MARK = re.compile(
    r"\(\s*(?P<bracketed>[A-Za-z](?:\s*[-–,/&]\s*(?:and\s+)?[A-Za-z]|\s+and\s+[A-Za-z])*)\s*\)"
    r"|(?:(?<=[.;:]\s)|^)(?P<plain>[A-Z])(?=[:.,)]\s)"
    r"|(?:(?<=[\s.;])|^)(?P<half>[a-zA-Z])\)(?=\s)"
)
# White space is matched from its first character only; otherwise a long run takes quadratic time.
_BETWEEN = re.compile(r"(?:(?<!\s)\s+)?[,/&]\s*(?:and\s+)?|(?<!\s)\s+and\s+")
_ENDS_OF_RANGE = re.compile(r"(?:(?<!\s)\s+)?[-–]\s*")


def panels(caption: str) -> list[str]:
    """Return the letters of the sub-figures in a caption, sorted, in lower case: "(A, C) ... (B)" -> a b c.

    The list is empty unless the letters run from a without a gap: "(p < 0.05)" and "(n)" do not mark sub-figures.
    """
    marked: set[str] = set()
    for match in _MARK.finditer(caption):
        mark = match["bracketed"] or match["plain"] or match["half"]
        for piece in _BETWEEN.split(mark):
            ends = _ENDS_OF_RANGE.split(piece.lower())
            marked |= {chr(c) for c in range(ord(ends[0]), ord(ends[-1]) + 1)}
    letters = list(itertools.takewhile(marked.__contains__, string.ascii_lowercase))
    return letters if len(letters) > 1 else []
