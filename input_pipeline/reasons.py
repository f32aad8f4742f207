"""Group the reasons of problems, so that a thousand rows with the same fault take one line."""

from __future__ import annotations

import re
import textwrap

_QUOTED = re.compile(r"""(["'])(?:(?!\1).)*\1""")
_WORD = re.compile(r"\S+")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,5}\b")
_NUMBER = re.compile(r"-?\d[\d,.]*")


def pattern(reason: str) -> str:
    """Mask quoted text, file names and numbers, so that reasons of one kind become equal. Not for display.

    Reasons do not quote names of keys and columns, so the names remain: other keys are another kind.
    """
    reason = _QUOTED.sub("...", reason)
    reason = _WORD.sub(lambda word: "..." if "/" in word[0] or _SUFFIX.search(word[0]) else word[0], reason)
    return _NUMBER.sub("...", reason)


class Reasons:
    """Counts of reasons by kind. Each kind is shown by its first reason, in full and with its row."""

    def __init__(self, kind=pattern):
        self._kind = kind
        self._groups: dict[str, tuple[str, str]] = {}  # kind -> first reason, and where it is
        self._counts: dict[str, int] = {}  # kind -> number of problems

    def add(self, reason: str, where: str = "", count: int = 1) -> None:
        kind = self._kind(reason)
        self._groups.setdefault(kind, (reason, where))
        self._counts[kind] = self._counts.get(kind, 0) + count

    def counts(self, most: int | None = None) -> dict[str, int]:
        """Return {"reason (first: where)": count}, most frequent first. A single problem has "(where)" only."""
        out: dict[str, int] = {}
        for kind, count in sorted(self._counts.items(), key=lambda item: -item[1])[:most]:
            reason, where = self._groups[kind]
            label = textwrap.shorten(reason, 200, placeholder=" ...")
            if where:
                label += f" ({where})" if count == 1 else f" (first: {where})"
            out[label] = out.get(label, 0) + count
        return out
