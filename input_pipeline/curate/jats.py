"""JATS XML -> a paper: its sentences, tied to the figures that they refer to, and its figures with their captions.

A reference is what an author linked (`<xref rid="F2">`) and what he only wrote ("Figure 2"). Paragraphs are first
flattened, with the places of the links kept; numbers are then read off the text: links and words check each other.

    text     as seen in Figs. 1-3 and (Figure 4B).
    links                     |F1|F3          |---F4---|
    items                     1 2 3                   4 b      2 is inside a range: tied by its label

Nothing is guessed: a link that says another number than its text, a number that no figure has, an id that stands twice
are problems with their place, and tie to nothing.
"""

from __future__ import annotations

import dataclasses
import html.entities
import re

from lxml import etree

from input_pipeline.curate import references
from input_pipeline.text.sentences import sentences

XLINK = "{http://www.w3.org/1999/xlink}href"
LANG = "{http://www.w3.org/XML/1998/namespace}lang"
# Never part of running text.
_SKIPPED = frozenset(
    "fig fig-group table-wrap table-wrap-group table disp-formula disp-formula-group tex-math graphic inline-graphic "
    "media supplementary-material fn fn-group author-notes object-id annotation chem-struct-wrap code preformat "
    "floats-group boxed-text-title array".split()
)
# Running text of its own inside a paragraph.
_BLOCKS = frozenset(
    "p list list-item def-list def-item def term boxed-text disp-quote statement sec speech verse-group".split()
)
_SUPER = str.maketrans("0123456789+-−–()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻⁽⁾ⁿ")
_SPACE = re.compile(r"\s+")
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
CASE_TITLE = re.compile(
    r"\bcase\s+(?:reports?|series|study|presentation)\b|\ba case of\b|\breport of (?:a|two|three) cases?\b", re.I
)


class JatsError(ValueError):
    """An article that cannot be used at all: why, and what to do."""

    def __init__(self, reason: str, remedy: str = "leave it out"):
        self.reason, self.remedy = reason, remedy
        super().__init__(f"{reason} ({remedy})")


@dataclasses.dataclass
class Figure:
    """Attributes:
    key: its id in the XML ("" without one). name: unique in the paper, fit for a file name.
    label: as printed. number, panel: read off it.
    graphics: links to its pictures. names: the img_ref of each picture.
    """

    key: str
    name: str
    label: str
    caption: str
    graphics: list[str]
    word: str = "figure"
    number: str = ""
    panel: str = ""
    supplement: bool = False
    row: int = 0

    @property
    def names(self) -> list[str]:
        count = len(self.graphics)
        return [self.name] if count < 2 else [f"{self.name}.{k}" for k in range(1, count + 1)]


@dataclasses.dataclass
class Sentence:
    text: str
    figures: list[Figure]
    section: str = ""


@dataclasses.dataclass
class Paper:
    """Attributes:
    key: PMC1234567, or "" if the article does not say. language: of the article, lower case, "" if it does not say.
    problems: (line of the XML, reason). counts: references by what became of them.
    """

    key: str
    language: str
    kind: str
    title: str
    abstract: str
    sentences: list[Sentence]
    figures: list[Figure]
    problems: list[tuple[int, str]]
    counts: dict[str, int]

    @property
    def is_case_report(self) -> bool:
        return self.kind in ("case-report", "case-study") or bool(CASE_TITLE.search(self.title))


def read(data: bytes) -> Paper:
    """An article. Raises JatsError; what is wrong with a single reference or figure is in `problems`."""
    return _Reader(_parse(data)).paper


def _parse(data: bytes) -> etree._Element:
    """The root of the article, with no entity expanded, nothing fetched, no depth or size beyond libxml2's limits."""
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_comments=True, remove_pis=True
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise JatsError(f"the XML is broken: {str(error)[:160]}", "download it again") from None
    dtd = root.getroottree().docinfo.internalDTD
    if dtd is not None and any(True for _ in dtd.iterentities()):
        raise JatsError("the XML declares entities of its own, which could hold anything")
    if etree.QName(root).localname == "pmc-articleset" or root.tag in ("articles", "pmc-articleset"):
        articles = root.findall("article")
        if len(articles) != 1:
            raise JatsError(f"the file holds {len(articles)} articles", "one file a paper")
        root = articles[0]
    if root.tag != "article":
        raise JatsError(f"the root is <{root.tag}>, not <article>", "JATS without a namespace is needed")
    return root


class _Flat:
    """Running text being put together: white space folded, places of links kept."""

    def __init__(self):
        self.pieces: list[str] = []
        self.length = 0
        self.links: list[tuple[int, int, str, str, int]] = []  # begin, end, kind, rid, line
        self._blank = True

    def add(self, text: str | None) -> None:
        if not text:
            return
        text = _SPACE.sub(" ", text)
        if self._blank and text[0] == " ":
            text = text[1:]
        if text:
            self.pieces.append(text)
            self.length += len(text)
            self._blank = text[-1] == " "

    def done(self) -> tuple[str, list]:
        return "".join(self.pieces).rstrip(), self.links


class _Reader:
    def __init__(self, article: etree._Element):
        self.article = article
        self.problems: list[tuple[int, str]] = []
        self.counts: dict[str, int] = {}
        for foreign in article.findall("sub-article") + article.findall("response"):
            article.remove(foreign)
        self.figures = self._figures()
        self._index()
        out: list[Sentence] = []
        for part in (article.find("body"), *article.findall("back/app-group"), *article.findall("back/app")):
            if part is not None:
                self._section(part, "", out)
        front = article.find("front/article-meta")
        title = front.find("title-group/article-title") if front is not None else None
        abstract = front.find("abstract") if front is not None else None
        self.paper = Paper(
            self._key(front),
            (article.get(LANG) or "").lower()[:2],
            (article.get("article-type") or "").lower(),
            self._text(title),
            " ".join(self._text(p) for p in abstract.iter("p")) if abstract is not None else "",
            out,
            self.figures,
            self.problems,
            self.counts,
        )

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _key(self, front) -> str:
        for kind in ("pmc", "pmcid", "pmcaid"):
            found = front.find(f"article-id[@pub-id-type='{kind}']") if front is not None else None
            digits = re.sub(r"\D", "", (found.text or "").partition(".")[0]) if found is not None else ""
            if digits and kind != "pmcaid":
                return f"PMC{digits}"
        return ""

    def _text(self, element) -> str:
        if element is None:
            return ""
        flat = _Flat()
        self._flatten(element, flat, None)
        return flat.done()[0]

    # Figures.

    def _figures(self) -> list[Figure]:
        figures, names = [], set()
        for k, element in enumerate(self.article.iter("fig"), 1):
            group = element.getparent() if element.getparent().tag == "fig-group" else None
            label, caption = self._label(element), self._caption(element)
            found = references.label(label) if label else None
            outer = self._label(group) if group is not None else ""
            if outer:
                whole = references.label(outer)
                panel = (found.panel or (found.number.lower() if not found.number.isdigit() else "")) if found else ""
                if whole is not None:
                    found = dataclasses.replace(whole, panel=panel)
                label = f"{outer} {label}".strip()
                caption = " ".join(t for t in (self._caption(group), caption) if t)
            key = element.get("id") or ""
            name = base = _NAME.sub("_", key).strip("._") or f"fig{k}"
            repeat = 2
            while name in names:
                name, repeat = f"{base}_{repeat}", repeat + 1
            names.add(name)
            figure = Figure(key, name, label, caption, self._graphics(element), row=element.sourceline or 0)
            if found is not None:
                figure.word, figure.number, figure.panel = found.word, found.number, found.panel
                figure.supplement = found.supplement
            figures.append(figure)
        return figures

    def _label(self, element) -> str:
        label = element.find("label")
        if label is not None:
            return self._text(label)
        # Some publishers print the label as the bold beginning of the caption.
        first = element.find("caption/p/bold")
        if first is None:
            first = element.find("caption/title/bold")
        if first is not None and not (first.getparent().text or "").strip():
            text = self._text(first)
            if re.match(r"(?:figure|fig|scheme|chart|plate)s?\b", text, re.I) and references.label(text):
                return text
        return ""

    def _caption(self, element) -> str:
        caption = element.find("caption")
        if caption is None:
            return ""
        parts = [self._text(child) for child in caption if child.tag in ("title", "p", "list")]
        return " ".join(part for part in parts if part)

    def _graphics(self, element) -> list[str]:
        out = []
        for child in element.iter("graphic", "alternatives"):
            if child.tag == "alternatives":
                # The same picture in several forms: PMC converts the first that is no vector drawing.
                links = [g.get(XLINK) or "" for g in child.findall("graphic")]
                out += [link for link in links if not link.lower().endswith((".svg", ".eps"))][:1] or links[:1]
            elif child.getparent().tag != "alternatives" and child.getparent().tag != "caption":
                out.append(child.get(XLINK) or "")
        return list(dict.fromkeys(out))

    def _index(self) -> None:
        """By id, and by what is printed. A number that two figures have ties by its link only."""
        self.by_key: dict[str, list[Figure]] = {}
        self.by_number: dict[tuple[str, str], list[Figure]] = {}
        twice: dict[str, int] = {}
        for figure in self.figures:
            if figure.key in twice:
                self.problems.append((figure.row, f"figure id stands twice: {figure.key}"))
            elif figure.key:
                twice[figure.key] = figure.row
                self.by_key[figure.key] = [figure]
            if figure.number:
                self.by_number.setdefault((figure.word, _numbered(figure)), []).append(figure)
        for group in self.article.iter("fig-group"):
            if group.get("id"):
                inner = {f.get("id") for f in group.findall("fig")}
                self.by_key[group.get("id")] = [f for f in self.figures if f.key in inner and f.key]
        duplicated = {k for k in twice if sum(f.key == k for f in self.figures) > 1}
        for key in duplicated:
            self.by_key[key] = []
        for (word, number), found in list(self.by_number.items()):
            panels = [f.panel for f in found]
            if len(found) > 1 and (len(set(panels)) < len(panels) or "" in panels):
                self.problems.append((found[1].row, f"figure number stands twice: {word} {number}"))
                self.by_number[word, number] = []

    # Text.

    def _section(self, element, section: str, out: list[Sentence]) -> None:
        title = element.find("title") if element.tag in ("sec", "app", "boxed-text") else None
        if title is not None:
            section = self._text(title)
        for child in element:
            if child.tag == "p" or child.tag in ("disp-quote", "statement", "speech", "verse-group"):
                if child.find("p") is not None and child.tag != "p":
                    self._section(child, section, out)
                else:
                    self._paragraph(child, section, out)
            elif isinstance(child.tag, str) and (child.tag in _BLOCKS or child.tag in ("app", "app-group", "ack-not")):
                self._section(child, section, out)

    def _paragraph(self, element, section: str, out: list[Sentence]) -> None:
        flat, blocks = _Flat(), []
        self._flatten(element, flat, blocks)
        text, links = flat.done()
        if text:
            tied = self._tie(text, links, element.sourceline or 0)
            at = 0
            for sentence in sentences(text):
                begin = text.index(sentence, at)
                at = begin + len(sentence)
                found = [figure for place, figure in tied if begin <= place < at]
                out.append(Sentence(sentence, list({id(f): f for f in found}.values()), section))
        for block in blocks:
            if block.tag == "p":
                self._paragraph(block, section, out)
            else:
                self._section(block, section, out)

    def _flatten(self, element, flat: _Flat, blocks: list | None) -> None:
        """The element's text. `blocks` collects what is running text of its own (None: it is part of this text)."""
        flat.add(element.text)
        for child in element:
            tag = child.tag
            if tag is etree.Entity:
                code = html.entities.name2codepoint.get(child.name)
                if code is None:
                    raise JatsError(f"line {child.sourceline}: the entity &{child.name}; is not known")
                flat.add(chr(code))
            elif not isinstance(tag, str) or tag in _SKIPPED:
                flat.add(" ")
            elif tag in _BLOCKS:
                if blocks is None:
                    flat.add(" ")
                    self._flatten(child, flat, None)
                    flat.add(" ")
                else:
                    blocks.append(child)
                    flat.add(" ")
            elif tag == "xref" and child.get("ref-type") == "bibr" and len(child) == 1 and child[0].tag == "sup":
                pass  # as below, the other way round
            elif tag == "xref":
                begin = flat.length
                self._flatten(child, flat, blocks)
                flat.links.append((begin, flat.length, child.get("ref-type") or "", child.get("rid") or "",
                                   child.sourceline or 0))  # fmt: skip
            elif tag == "sup":
                inner = "".join(child.itertext()).strip()
                if child.find(".//xref[@ref-type='bibr']") is None:
                    has_figure = child.find(".//xref") is not None
                    if not has_figure and re.fullmatch(r"[-0-9+−–()n]+", inner):
                        flat.add(inner.translate(_SUPER))
                    else:
                        self._flatten(child, flat, blocks)
                # A number of the list of literature, set high, would read as part of the word before it.
            elif tag == "break":
                flat.add(" ")
            else:
                self._flatten(child, flat, blocks)
            flat.add(child.tail)

    # References.

    def _tie(self, text: str, links, line: int) -> list[tuple[int, Figure]]:
        """(place in the text, figure) of every reference."""
        known, foreign = [], []
        for link in links:
            begin, end, kind, rids, _ = link
            targets = rids.split()
            if any(rid in self.by_key for rid in targets) or kind == "fig":
                known.append(link)
            elif end > begin and kind != "bibr":
                foreign.append(link)
        linked = lambda b, e: any(x[0] < e and b < x[1] for x in known)  # noqa: E731
        found: list[tuple[int, Figure]] = []
        used: set[int] = set()
        for mention in references.mentions(text, linked):
            if any(x[0] < mention.end and mention.begin < x[1] for x in foreign):
                # "Figure S1" linked to a supplementary file.
                used |= {k for k, x in enumerate(known) if x[0] < mention.end and mention.begin < x[1]
                         and not self._targets(x)}  # fmt: skip
                if not any(x[0] < mention.end and mention.begin < x[1] for x in known):
                    self._count("references to supplements")
                    continue
            for item in mention.items:
                over = [] if item.inner else [
                    k for k, x in enumerate(known) if x[0] < item.end and item.begin < max(x[1], x[0] + 1)
                ]  # fmt: skip
                if not over and not item.inner and len(mention.items) == 1:
                    # The link holds the keyword alone: "<xref>Fig.</xref> 2".
                    over = [k for k, x in enumerate(known) if mention.begin <= x[0] < mention.end]
                used |= set(over)
                shared = sum(
                    any(known[k][0] < other.end and other.begin < known[k][1] for k in over)
                    for other in mention.items if not other.inner
                )  # fmt: skip
                for figure in self._resolve(mention, item, [known[k] for k in over], shared > 1, line):
                    found.append((mention.begin, figure))
        for k, link in enumerate(known):
            if k not in used:
                found += [(link[0], figure) for figure in self._resolve_link(text, link)]
        return sorted(found, key=lambda f: f[0])

    def _targets(self, link) -> list[Figure]:
        out: list[Figure] = []
        for rid in link[3].split():
            if rid not in self.by_key:
                self._problem(link[4], f"a reference leads to no figure: {rid!r}")
            elif not self.by_key[rid]:
                self._problem(link[4], f"a reference leads to an id that stands twice: {rid!r}")
            out += self.by_key.get(rid, ())
        return out

    def _problem(self, line: int, reason: str) -> None:
        if (line, reason) not in self.problems:
            self.problems.append((line, reason))

    def _resolve(self, mention, item, links, shared: bool, line: int) -> list[Figure]:
        linked = [figure for link in links for figure in self._targets(link)]
        labelled = self._by_label(mention.word, item, bool(linked), mention.supplement)
        if not links:
            if mention.elsewhere:
                self._count("figures of other papers")
                return []
            if labelled:
                self._count("references tied by their number")
                return labelled
            if mention.supplement or not item.number[:1].isdigit():
                self._count("references to supplements")
            elif mention.word == "figure":
                self._problem(line, f"no figure has the number: {item.number}")
                self._count("references to no figure")
            return []
        if not linked:
            if labelled:
                self._count("references tied by their number")
                return labelled
            self._count("references to no figure")
            return []
        same = [f for f in linked if any(f is g for g in labelled)]
        if same:
            self._count("references tied by their link")
            return same
        if mention.supplement and not shared:
            # "Supplemental Material, Figure 1", and the publisher's program linked Figure 1.
            self._problem(links[0][4], "a reference contradicts its link: it says supplement, and leads to the body")
            self._count("references that contradict their link")
            return []
        if shared:
            # One link over several numbers, "Figs. 1-3" to F1.
            tied = labelled or [f for f in linked if not f.number]
            if tied:
                self._count("references tied by their number" if labelled else "references tied by their link")
            return tied
        told = [f for f in linked if f.number and _numbered(f) != item.number]
        if told and (labelled or len(told) == len(linked)) and item.number not in ("", *(f.number for f in linked)):
            says = f"{told[0].label.rstrip('.')} ({told[0].key})"
            self._problem(links[0][4], f"a reference contradicts its link: it says {item.number}, and leads to {says}")
            self._count("references that contradict their link")
            return []
        self._count("references tied by their link")
        return linked

    def _by_label(self, word: str, item, linked: bool, supplement: bool) -> list[Figure]:
        key = f"SUPPLEMENT {item.number}" if supplement else item.number
        found = self.by_number.get((word, key))
        if found is None and word == "image":
            return []
        if found is None and linked:
            found = next((f for (_, number), f in self.by_number.items() if number == key), None)
        found = found or []
        if item.panels:
            panels = [f for f in found if f.panel in item.panels]
            if panels and {f.panel for f in panels} >= set(item.panels):
                return panels
        return found

    def _resolve_link(self, text: str, link) -> list[Figure]:
        """A link without a keyword: "(2A)", "arrow", "" or "see here"."""
        begin, end, _, _, line = link
        linked = self._targets(link)
        if not linked:
            self._count("references to no figure")
            return []
        said = [item for item in references.bare(text[begin:end]) if item.number.isdigit()]
        if said:
            by_label = [f for item in said for f in self._by_label("figure", item, True, False)]
            same = [f for f in linked if any(f is g for g in by_label)]
            if by_label and not same and all(f.number for f in linked):
                says = f"{linked[0].label.rstrip('.')} ({linked[0].key})"
                self._problem(line, f"a reference contradicts its link: it says {text[begin:end]}, and leads to {says}")
                self._count("references that contradict their link")
                return []
            if same:
                linked = same + [f for f in by_label if not any(f is g for g in same) and len(said) > 1]
        self._count("references tied by their link")
        return linked


def _numbered(figure: Figure) -> str:
    return f"SUPPLEMENT {figure.number}" if figure.supplement else figure.number
