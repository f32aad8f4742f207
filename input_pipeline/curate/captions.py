"""What a caption says of its figure: its sub-figures, and whether it is a radiologic image."""

from __future__ import annotations

import re

# "(a)", "(A-C)", "(a, b)", "A:", "a) ", "A, axial ..." at the beginning of a sentence
_MARK = re.compile(
    r"\(\s*(?P<in>[A-Za-z](?:\s*[-–,/&]\s*(?:and\s+)?[A-Za-z]|\s+and\s+[A-Za-z])*)\s*\)"
    r"|(?:(?<=[.;:]\s)|^)(?P<plain>[A-Z])(?=[:.,)]\s)"
    r"|(?:(?<=[\s.;])|^)(?P<half>[a-zA-Z])\)(?=\s)"
)


def panels(caption: str) -> list[str]:
    """The marks of sub-figures in a caption, small letters in the order of the alphabet: "(A, C) ... (B)" -> a b c.

    Empty unless they run from a on without a gap: "(p < 0.05)" and "(n)" are no marks.
    """
    found: set[str] = set()
    for match in _MARK.finditer(caption):
        said = match["in"] or match["plain"] or match["half"]
        for piece in re.split(r"\s*[,/&]\s*(?:and\s+)?|\s+and\s+", said):
            ends = re.split(r"\s*[-–]\s*", piece.lower())
            found |= {chr(c) for c in range(ord(ends[0]), ord(ends[-1]) + 1)}
    letters = []
    for c in "abcdefghijklmnopqrstuvwxyz":
        if c not in found:
            break
        letters.append(c)
    return letters if len(letters) > 1 else []
