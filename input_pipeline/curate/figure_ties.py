"""Ties between the references in the text of a paper and its figures.

A reference is a link of the author (`<xref rid="F2">`) or a mention in the text ("Figure 2"). Links and mentions check
each other:

    text     as seen in Figs. 1-3 and (Figure 4B).
    links                     |F1|F3          |---F4---|
    items                     1 2 3                   4 b      2 is inside a range: tied by its label

Nothing is guessed. A link that contradicts its text, a number without a figure and a repeated id are reported as
problems with their line. They are not tied to a figure.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools

from input_pipeline.curate import references
from input_pipeline.curate.jats_text import Link


@dataclasses.dataclass(eq=False)
class Figure:
    """A figure of a paper. Compared by identity."""

    key: str  # id in the XML, or ""
    name: str  # unique in the paper, safe as a file name
    label: str  # as printed
    caption: str
    graphics: list[str]  # links to its images
    row: int  # line of the XML
    # Parsed from the label:
    word: str = "figure"
    number: str = ""
    panel: str = ""
    supplement: bool = False

    @property
    def names(self) -> list[str]:
        """The img_ref of each image."""
        count = len(self.graphics)
        return [self.name] if count < 2 else [f"{self.name}.{k}" for k in range(1, count + 1)]

    @property
    def full_number(self) -> str:
        return f"SUPPLEMENT {self.number}" if self.supplement else self.number

    @property
    def shown(self) -> str:
        """Label and id, for messages."""
        return f"{self.label.rstrip('.')} ({self.key})"


class _Links:
    """Links in the order of their positions, to find those that overlap a range of the text."""

    def __init__(self, links: list[Link]):
        self.links = sorted(links, key=lambda link: link.begin)
        self._begins = [link.begin for link in self.links]
        self._last_end = list(itertools.accumulate((link.end for link in self.links), max))

    def overlapping(self, begin: int, end: int, empty: bool = False) -> list[int]:
        """Return the numbers of the links that overlap [begin, end). `empty`: include empty links inside it."""
        numbers, k = [], bisect.bisect_left(self._begins, end) - 1
        while k >= 0 and self._last_end[k] >= begin:
            link = self.links[k]
            if link.end > begin or (empty and link.begin == link.end == begin):
                numbers.append(k)
            k -= 1
        return numbers[::-1]


class Ties:
    """The figures of a paper by id and by number, and the references to them.

    `groups` maps the id of a group of figures to the ids of its figures.
    """

    def __init__(self, figures: list[Figure], groups: dict[str, set[str]]):
        self.problems: list[tuple[int, str]] = []  # (line of the XML, reason)
        self._reported: set[tuple[int, str]] = set()
        self.counts: collections.Counter[str] = collections.Counter()  # label -> number of references
        self._by_key: dict[str, list[Figure]] = {}
        self._by_number: dict[tuple[str, str], list[Figure]] = {}
        repeated = set()
        for figure in figures:
            if figure.key in self._by_key:
                self.problems.append((figure.row, f"figure id is repeated: {figure.key}"))
                repeated.add(figure.key)
            elif figure.key:
                self._by_key[figure.key] = [figure]
            if figure.number:
                self._by_number.setdefault((figure.word, figure.full_number), []).append(figure)
        for key, members in groups.items():
            self._by_key[key] = [f for f in figures if f.key in members and f.key]
        for key in repeated:
            self._by_key[key] = []
        # Figures with the same number are tied by their link only, unless they are panels.
        for (word, number), same in list(self._by_number.items()):
            panels = [f.panel for f in same]
            if len(same) > 1 and (len(set(panels)) < len(panels) or "" in panels):
                self.problems.append((same[1].row, f"figure number is repeated: {word} {number}"))
                self._by_number[word, number] = []

    def tie(self, text: str, links: list[Link], line: int) -> list[tuple[int, Figure]]:
        """Return (position in the text, figure) of every reference, sorted by position."""
        to_figures = [x.kind == "fig" or any(target in self._by_key for target in x.targets) for x in links]
        known = _Links(list(itertools.compress(links, to_figures)))
        foreign = _Links(
            [
                x
                for x, known in zip(links, to_figures, strict=True)
                if not known and x.end > x.begin and x.kind != "bibr"
            ]
        )
        tied: list[tuple[int, Figure]] = []
        used: set[int] = set()
        for mention in references.mentions(text, lambda begin, end: bool(known.overlapping(begin, end))):
            if foreign.overlapping(mention.begin, mention.end):
                # "Figure S1" linked to a supplementary file.
                linked = known.overlapping(mention.begin, mention.end)
                used |= {k for k in linked if not self._targets(known.links[k])}
                if not linked:
                    self.counts["references to supplements"] += 1
                    continue
            begins, ends = zip(*((item.begin, item.end) for item in mention.items if not item.inner), strict=True)
            for item in mention.items:
                over = [] if item.inner else known.overlapping(item.begin, item.end, empty=True)
                if not over and not item.inner and len(mention.items) == 1:
                    # The link is on the keyword alone: "<xref>Fig.</xref> 2".
                    over = [k for k in known.overlapping(mention.begin, mention.end, empty=True)
                            if mention.begin <= known.links[k].begin]  # fmt: skip
                used |= set(over)
                over_links = [known.links[k] for k in over]
                # Several items overlap one link. Items are in the order of the text.
                shared = any(
                    bisect.bisect_left(begins, x.end) - bisect.bisect_right(ends, x.begin) > 1 for x in over_links
                )
                tied += [(mention.begin, figure) for figure in self._resolve(mention, item, over_links, shared, line)]
        for k, link in enumerate(known.links):
            if k not in used:
                tied += [(link.begin, figure) for figure in self._resolve_link(text, link)]
        return sorted(tied, key=lambda f: f[0])

    def _problem(self, line: int, reason: str) -> None:
        if (line, reason) not in self._reported:
            self._reported.add((line, reason))
            self.problems.append((line, reason))

    def _contradiction(self, line: int, stated: str, linked: str) -> list[Figure]:
        self._problem(line, f"a reference contradicts its link: {stated} in the text, {linked} in the link")
        self.counts["references that contradict their link"] += 1
        return []

    def _targets(self, link: Link) -> list[Figure]:
        out: list[Figure] = []
        for target in link.targets:
            if target not in self._by_key:
                self._problem(link.line, f"a reference leads to no figure: {target!r}")
            elif not self._by_key[target]:
                self._problem(link.line, f"a reference leads to a repeated id: {target!r}")
            out += self._by_key.get(target, ())
        return out

    def _resolve(self, mention, item, links: list[Link], shared: bool, line: int) -> list[Figure]:
        """Return the figures of an item of a mention. `shared`: one link covers several items."""
        linked = [figure for link in links for figure in self._targets(link)]
        labelled = self._by_label(mention.word, item, bool(linked), mention.supplement)
        if not linked:
            return self._resolve_unlinked(mention, item, bool(links), labelled, line)
        same = [f for f in linked if f in labelled]
        if same:
            self.counts["references tied by their link"] += 1
            return same
        if mention.supplement and not shared:
            # "Supplemental Material, Figure 1", which the publisher linked to Figure 1 of the body.
            return self._contradiction(links[0].line, "a supplement", "a figure of the body")
        if shared:
            # One link over several numbers, such as "Figs. 1-3" linked to F1.
            tied = labelled or [f for f in linked if not f.number]
            if tied:
                self.counts["references tied by their number" if labelled else "references tied by their link"] += 1
            return tied
        other = [f for f in linked if f.number and f.full_number != item.number]
        if other and (labelled or len(other) == len(linked)) and item.number not in ("", *(f.number for f in linked)):
            return self._contradiction(links[0].line, item.number, other[0].shown)
        self.counts["references tied by their link"] += 1
        return linked

    def _resolve_unlinked(self, mention, item, has_dead_link: bool, labelled: list[Figure], line: int) -> list[Figure]:
        """Return the figures of an item without a link to a figure."""
        if mention.elsewhere and not has_dead_link:
            self.counts["figures of other papers"] += 1
            return []
        if labelled:
            self.counts["references tied by their number"] += 1
            return labelled
        if has_dead_link:
            self.counts["references to no figure"] += 1
        elif mention.supplement or not item.number[:1].isdigit():
            self.counts["references to supplements"] += 1
        elif mention.word == "figure":
            self._problem(line, f"no figure has the number: {item.number}")
            self.counts["references to no figure"] += 1
        return []

    def _by_label(self, word: str, item, linked: bool, supplement: bool) -> list[Figure]:
        """Return the figures with this word and the number of an item. For a linked item, the number is sufficient."""
        number = f"SUPPLEMENT {item.number}" if supplement else item.number
        figures = self._by_number.get((word, number))
        if figures is None and word == "image":
            return []
        if figures is None and linked:
            figures = next((f for (_, other), f in self._by_number.items() if other == number), None)
        figures = figures or []
        if item.panels:
            panels = [f for f in figures if f.panel in item.panels]
            if panels and {f.panel for f in panels} >= set(item.panels):
                return panels
        return figures

    def _resolve_link(self, text: str, link: Link) -> list[Figure]:
        """Return the figures of a link without a keyword: "(2A)", "arrow", "" or "see here"."""
        linked = self._targets(link)
        if not linked:
            self.counts["references to no figure"] += 1
            return []
        items = [item for item in references.bare_items(text[link.begin : link.end]) if item.number.isdigit()]
        if items:
            by_label = [f for item in items for f in self._by_label("figure", item, True, False)]
            same = [f for f in linked if f in by_label]
            if by_label and not same and all(f.number for f in linked):
                return self._contradiction(link.line, text[link.begin : link.end], linked[0].shown)
            if same:
                linked = same + [f for f in by_label if f not in same and len(items) > 1]
        self.counts["references tied by their link"] += 1
        return linked
