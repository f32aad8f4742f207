"""Running text of JATS elements, with white space folded and the positions of links kept."""

from __future__ import annotations

import html.entities
import re
from typing import NamedTuple

from lxml import etree

from input_pipeline.curate.packages import PackageError

# Elements that are never part of running text.
_SKIPPED = frozenset(
    "fig fig-group table-wrap table-wrap-group table disp-formula disp-formula-group tex-math graphic inline-graphic "
    "media supplementary-material fn fn-group author-notes object-id annotation chem-struct-wrap code preformat "
    "floats-group boxed-text-title array".split()
)
# Elements that are separate running text inside a paragraph.
BLOCKS = frozenset(
    "p list list-item def-list def-item def term boxed-text disp-quote statement sec speech verse-group".split()
)
_SUPERSCRIPTS = str.maketrans("0123456789+-−–()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻⁽⁾ⁿ")
_SPACE = re.compile(r"\s+")


class JatsError(PackageError):
    """An article that cannot be used."""

    default_remedy = "remove it"


class Link(NamedTuple):
    """An <xref> at a position of running text."""

    begin: int
    end: int
    kind: str  # the attribute ref-type
    targets: tuple[str, ...]  # the ids it refers to
    line: int  # line in the XML


class FlatText:
    """Running text of one or several elements."""

    def __init__(self, split_blocks: bool = False):
        self.links: list[Link] = []
        self.blocks: list[etree._Element] = []  # elements inside that are separate running text
        self._split_blocks = split_blocks
        self._pieces: list[str] = []
        self._length = 0
        self._after_space = True

    @property
    def text(self) -> str:
        return "".join(self._pieces).rstrip()

    def _append(self, text: str | None) -> None:
        if not text:
            return
        text = _SPACE.sub(" ", text)
        if self._after_space and text[0] == " ":
            text = text[1:]
        if text:
            self._pieces.append(text)
            self._length += len(text)
            self._after_space = text[-1] == " "

    def add(self, element: etree._Element) -> None:
        """Append the text of an element. Raises JatsError."""
        self._append(element.text)
        for child in element:
            self._add_child(child)
            self._append(child.tail)

    def _add_child(self, child) -> None:
        tag = child.tag
        if tag is etree.Entity:
            code = html.entities.name2codepoint.get(child.name)
            if code is None:
                raise JatsError(f"line {child.sourceline}: the entity &{child.name}; is unknown")
            self._append(chr(code))
        elif not isinstance(tag, str) or tag in _SKIPPED or tag == "break":
            self._append(" ")
        elif tag in BLOCKS:
            self._append(" ")
            if self._split_blocks:
                self.blocks.append(child)
            else:
                self.add(child)
                self._append(" ")
        elif tag == "xref":
            # Citation numbers in superscript would read as part of the word before them.
            if not (child.get("ref-type") == "bibr" and len(child) == 1 and child[0].tag == "sup"):
                begin = self._length
                self.add(child)
                kind, targets = child.get("ref-type") or "", tuple((child.get("rid") or "").split())
                self.links.append(Link(begin, self._length, kind, targets, child.sourceline or 0))
        elif tag == "sup":
            if child.find(".//xref[@ref-type='bibr']") is None:
                inner = "".join(child.itertext()).strip()
                if child.find(".//xref") is None and re.fullmatch(r"[-0-9+−–()n]+", inner):
                    self._append(inner.translate(_SUPERSCRIPTS))
                else:
                    self.add(child)
        else:
            self.add(child)


def text_of(element: etree._Element | None) -> str:
    """Return the text of an element with all its blocks; "" for None."""
    flat = FlatText()
    if element is not None:
        flat.add(element)
    return flat.text
