"""`<image-i>` marks in templates of users: JSONL rows and `--prompt`. In other tables the same characters are text."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARK = re.compile(r"<image-([0-9]+)>")


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
