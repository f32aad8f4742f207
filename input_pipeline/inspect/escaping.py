"""Escape text for HTML and make invisible characters visible.

Text of a data set may contain anything, so all of it goes through these functions: markup is escaped, and invisible
characters (controls, bidirectional marks, zero widths) are replaced by their names, such as ⟨U+202E⟩.
"""

from __future__ import annotations

import html
import unicodedata

# A page must never run or load anything, regardless of its text.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}


def visible(text: object) -> str:
    """Return text as HTML, for content and attributes."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if _is_invisible(c) else html.escape(c) for c in str(text))


def visible_lines(text: str) -> str:
    """Return `visible` text with line breaks. Line breaks at both ends are removed."""
    return "<br>".join(map(visible, text.strip().replace("\r\n", "\n").split("\n")))


def spaced(text: str) -> str:
    """Return `visible` text with a dot in each space and a sign before each line break."""
    signs = {" ": '<span class="space"> </span>', "\n": '<span class="sign">↵</span>\n'}
    return "".join(signs.get(c) or visible(c) for c in text)


def _is_invisible(c: str) -> bool:
    return c != " " and unicodedata.category(c) in _INVISIBLE
