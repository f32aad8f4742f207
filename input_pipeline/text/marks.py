"""`<image-i>` marks in templates of users: JSONL rows and `--prompt`. In other tables the same characters are text."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARK = re.compile(r"<image-([0-9]+)>")
# Marks and misspelt marks: `<image>`, `<image1>`, `<Image-1>`, `<image 1>`.
MARK_LIKE = re.compile(r"<\s*+image[\s_-]*+[0-9]*+\s*+>", re.IGNORECASE)


def place_scans(templates: Sequence[str], n_scans: int, first: bool = True) -> list[list]:
    """Return the texts and scan numbers (from 0) of each template in reading order, in training as in inference.

        ["Was <image-2>.", "And <image-1>?"], 2 -> [["Was ", 1, "."], ["And ", 0, "?"]]
        ["Chest pain.", "Findings?"], 2         -> [[0, 1, "Chest pain."], ["Findings?"]]

    With marks, every scan needs one. Without any mark, all scans come first; with `first=False` they come last. Raises
    ValueError as `parse_marks` does. If all marks are misspelt, also raises ValueError, because the scans would not be
    at the intended positions.
    """
    if not n_scans or any(map(_MARK.search, templates)):
        return parse_marks(templates, n_scans)
    if misspelt := misspelt_marks(*templates):
        raise ValueError(f"not a valid mark: {', '.join(misspelt)}; write <image-1>")
    texts: list[list] = [[template] if template else [] for template in templates]
    scans = list(range(n_scans))
    if first:
        texts[0] = scans + texts[0]
    else:
        texts[-1] = texts[-1] + scans
    return texts


def misspelt_marks(*texts: str) -> list[str]:
    """Return the misspelt marks of some texts, each once."""
    marks = [mark for text in texts for mark in MARK_LIKE.findall(text) if not _MARK.fullmatch(mark)]
    return list(dict.fromkeys(marks))


def parse_marks(text: str | Sequence[str], n_scans: int) -> list:
    """Split a template at its `<image-i>` marks into texts and scan numbers (from 0) in reading order.

        "<image-2> Compare with <image-1>." -> [1, " Compare with ", 0, "."]

    Several templates that share their scans (context, instruction, response) give a list each. Raises ValueError naming
    all marks without a scan and all scans without a mark.
    """
    parsed, unknown, used = [], [], set()
    for template in [text] if isinstance(text, str) else text:
        parts: list[str | int] = []
        end = 0
        for match in _MARK.finditer(template):
            # Check the length first: parsing a number of a thousand digits is slow.
            digits = match[1].lstrip("0")
            if not digits or len(digits) > 9 or int(digits) > n_scans:
                unknown.append(match[0] if len(match[0]) < 30 else match[0][:27] + "...")
                continue
            if template[end : match.start()]:
                parts.append(template[end : match.start()])
            parts.append(int(digits) - 1)
            used.add(int(digits))
            end = match.end()
        if template[end:]:
            parts.append(template[end:])
        parsed.append(parts)
    problems = []
    if unknown:
        known = {0: "no scans are given", 1: "the only mark is <image-1>"}
        marks = known.get(n_scans, f"marks run from <image-1> to <image-{n_scans}>")
        problems.append(f"no scan for {', '.join(unknown)} ({marks})")
    if missing := [f"<image-{i}>" for i in range(1, n_scans + 1) if i not in used]:
        problems.append(f"{n_scans} scan{'s' if n_scans > 1 else ''}, but no mark {', '.join(missing)}")
    if problems:
        raise ValueError("; ".join(problems))
    return parsed[0] if isinstance(text, str) else parsed
