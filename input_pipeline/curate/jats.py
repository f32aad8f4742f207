"""JATS XML -> a paper: its sentences with the figures they refer to (figure_ties.py), and its figures with captions."""

from __future__ import annotations

import dataclasses
import re

from lxml import etree

from input_pipeline.curate import references
from input_pipeline.curate.figure_ties import Figure, Ties
from input_pipeline.curate.jats_text import BLOCKS, FlatText, JatsError, text_of
from input_pipeline.text.sentences import sentences

XLINK = "{http://www.w3.org/1999/xlink}href"
LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_QUOTES = frozenset({"disp-quote", "statement", "speech", "verse-group"})
_SECTIONS = BLOCKS | {"app", "app-group", "ack-not"}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
CASE_TITLE = re.compile(
    r"\bcase\s+(?:reports?|series|study|presentation)\b|\ba case of\b|\breport of (?:a|two|three) cases?\b", re.I
)


@dataclasses.dataclass
class Sentence:
    text: str
    figures: list[Figure]
    section: str


@dataclasses.dataclass
class Paper:
    """A paper, with its sentences and figures."""

    key: str  # PMC1234567, or "" if the article has none
    language: str  # in lower case; "" if it is not declared
    kind: str
    title: str
    abstract: str
    sentences: list[Sentence]
    figures: list[Figure]
    problems: list[tuple[int, str]]  # (line of the XML, reason)
    counts: dict[str, int]  # label -> number of references

    @property
    def is_case_report(self) -> bool:
        return self.kind in ("case-report", "case-study") or bool(CASE_TITLE.search(self.title))


def read(data: bytes) -> Paper:
    """Parse an article. Raises JatsError; errors of single references and figures are in `problems`."""
    article = _parse(data)
    for nested in article.findall("sub-article") + article.findall("response"):
        article.remove(nested)
    figures = _figures(article)
    groups = {g.get("id"): {f.get("id") for f in g.findall("fig")} for g in article.iter("fig-group") if g.get("id")}
    ties = Ties(figures, groups)
    out: list[Sentence] = []
    for part in (article.find("body"), *article.findall("back/app-group"), *article.findall("back/app")):
        if part is not None:
            _add_section(part, "", ties, out)
    language, kind = (article.get(LANG) or "").lower()[:2], (article.get("article-type") or "").lower()
    title = text_of(article.find("front/article-meta/title-group/article-title"))
    abstract = " ".join(map(text_of, article.iterfind("front/article-meta/abstract[1]//p")))
    return Paper(_key(article), language, kind, title, abstract, out, figures, ties.problems, ties.counts)


def _parse(data: bytes) -> etree._Element:
    """Return the root of the article. Entities are not expanded, and no file is fetched. libxml2's limits apply."""
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_comments=True, remove_pis=True
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise JatsError(f"the XML is broken: {str(error)[:160]}", "download it again") from None
    dtd = root.getroottree().docinfo.internalDTD
    if dtd is not None and any(True for _ in dtd.iterentities()):
        raise JatsError("the XML declares its own entities, which are not safe to expand")
    if etree.QName(root).localname == "pmc-articleset" or root.tag in ("articles", "pmc-articleset"):
        articles = root.findall("article")
        if len(articles) != 1:
            raise JatsError(f"the file has {len(articles)} articles", "use one file per paper")
        root = articles[0]
    if root.tag != "article":
        raise JatsError(f"the root is <{root.tag}>, not <article>", "use JATS without a namespace")
    return root


def _key(article) -> str:
    for kind in ("pmc", "pmcid"):
        text = article.findtext(f"front/article-meta/article-id[@pub-id-type='{kind}']") or ""
        if digits := re.sub(r"\D", "", text.partition(".")[0]):
            return f"PMC{digits}"
    return ""


def _figures(article) -> list[Figure]:
    figures, names = [], set()
    for k, element in enumerate(article.iter("fig"), 1):
        group = element.getparent() if element.getparent().tag == "fig-group" else None
        label, caption = _label(element), _caption(element)
        parsed = references.label(label) if label else None
        group_label = _label(group) if group is not None else ""
        if group_label:
            whole = references.label(group_label)
            panel = (parsed.panel or ("" if parsed.number.isdigit() else parsed.number.lower())) if parsed else ""
            if whole is not None:
                parsed = dataclasses.replace(whole, panel=panel)
            label = f"{group_label} {label}".strip()
            caption = " ".join(t for t in (_caption(group), caption) if t)
        key = element.get("id") or ""
        name = base = _UNSAFE.sub("_", key).strip("._") or f"fig{k}"
        repeat = 2
        while name in names:
            name, repeat = f"{base}_{repeat}", repeat + 1
        names.add(name)
        number = vars(parsed) if parsed is not None else {}
        figures.append(Figure(key, name, label, caption, _graphics(element), element.sourceline or 0, **number))
    return figures


def _label(element) -> str:
    label = element.find("label")
    if label is not None:
        return text_of(label)
    # Some publishers print the label as the bold start of the caption.
    first = element.find("caption/p/bold")
    if first is None:
        first = element.find("caption/title/bold")
    if first is not None and not (first.getparent().text or "").strip():
        text = text_of(first)
        if re.match(r"(?:figure|fig|scheme|chart|plate)s?\b", text, re.I) and references.label(text):
            return text
    return ""


def _caption(element) -> str:
    caption = element.find("caption")
    if caption is None:
        return ""
    parts = [text_of(child) for child in caption if child.tag in ("title", "p", "list")]
    return " ".join(part for part in parts if part)


def _graphics(element) -> list[str]:
    out = []
    for child in element.iter("graphic", "alternatives"):
        if child.tag == "alternatives":
            # One image in several formats: PMC converts the first that is not a vector drawing.
            links = [g.get(XLINK) or "" for g in child.findall("graphic")]
            out += [link for link in links if not link.lower().endswith((".svg", ".eps"))][:1] or links[:1]
        elif child.getparent().tag not in ("alternatives", "caption"):
            out.append(child.get(XLINK) or "")
    return list(dict.fromkeys(out))


def _add_section(element, section: str, ties: Ties, out: list[Sentence]) -> None:
    title = element.find("title") if element.tag in ("sec", "app", "boxed-text") else None
    if title is not None:
        section = text_of(title)
    for child in element:
        if child.tag == "p" or (child.tag in _QUOTES and child.find("p") is None):
            _add_paragraph(child, section, ties, out)
        elif isinstance(child.tag, str) and child.tag in _SECTIONS:
            _add_section(child, section, ties, out)


def _add_paragraph(element, section: str, ties: Ties, out: list[Sentence]) -> None:
    flat = FlatText(split_blocks=True)
    flat.add(element)
    text = flat.text
    if text:
        tied = ties.tie(text, flat.links, element.sourceline or 0)
        end = 0
        for sentence in sentences(text):
            begin = text.index(sentence, end)
            end = begin + len(sentence)
            figures = dict.fromkeys(figure for position, figure in tied if begin <= position < end)
            out.append(Sentence(sentence, list(figures), section))
    for block in flat.blocks:
        if block.tag == "p":
            _add_paragraph(block, section, ties, out)
        else:
            _add_section(block, section, ties, out)
