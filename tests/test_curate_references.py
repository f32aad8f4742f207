"""References of papers: parsed from the text, checked against links, tied to the correct figure or to none."""

from __future__ import annotations

import pytest

from input_pipeline.curate import jats, references
from tests import jats_papers


def said(text: str) -> list[str]:
    return [item.number + "".join(item.panels) for m in references.mentions(text) for item in m.items]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("see Fig. 2.", ["2"]),
        ("Figs. 1-3 and 5b", ["1", "2", "3", "5b"]),
        ("Figures 1, 2, and 4A–C show", ["1", "2", "4abc"]),
        ("(Fig. 1 and 2)", ["1", "2"]),
        ("Fig. 1, 45 patients were seen", ["1"]),
        ("Figs. 1 and 2 patients", ["1"]),
        ("Fig. 2 a normal disc", ["2"]),
        ("Fig. 2 (a, b)", ["2ab"]),
        ("Fig. 3.1 shows", ["3.1"]),
        ("FIG. S2 and Figure A.1", ["S2", "A1"]),
        ("Figures IV and V", ["IV", "V"]),
        ("Fig. 1 to Fig. 3", ["1", "2", "3"]),
        ("Figures 9-2", ["9", "2"]),
        ("Configuration 2 and the figure of 12 patients", []),
        ("Fig. 5 cm", ["5"]),
    ],
)
def test_numbers(text, numbers):
    assert said(text) == numbers


def test_figures_of_other_papers_and_supplements():
    kind = lambda text: [(m.supplement, m.elsewhere) for m in references.mentions(text)]  # noqa: E731
    assert kind("Supplementary Fig. 2") == kind("Extended Data Figs. 1-3") == [(True, False)]
    assert kind("Supplemental Material, Figure 1") == kind("Suppl. Fig. 3") == [(True, False)]
    assert kind("Fig. 2 of ref. 5") == kind("Smith et al. (2010, Fig. 2)") == kind("their Fig. 2") == [(False, True)]
    assert kind("in 12 patients (n = 12, Fig. 2)") == [(False, False)]


@pytest.mark.parametrize("paper", jats_papers.EXPECTED)
def test_annotated_paper(paper):
    """Every reference is tied to the correct figure, and no other is tied."""
    right, invented, missed = jats_papers.score(paper)
    assert (invented, missed) == ([], []) and right


def test_problems_are_named():
    problems = " / ".join(reason for _, reason in jats.read(jats_papers.xml("PMC9000013")).problems)
    assert "2 in the text, Figure 1 (F1) in the link" in problems
    assert "leads to no figure: 'F9'" in problems
    assert "figure id is repeated: F3" in problems and "figure number is repeated: figure 4" in problems
    assert "no figure has the number: 8" in problems


def test_a_link_of_a_supplement_into_the_body():
    """An error of publishers: the text refers to a supplement, the link to Figure 1 of the body."""
    body = (
        b'<p>See Supplemental Material, <xref ref-type="fig" rid="f1">Figure 1</xref>, and '
        b'<xref ref-type="fig" rid="f1">Figure 1</xref>.</p><fig id="f1"><label>Figure 1</label><graphic/></fig>'
        b'<fig id="f2"><label>Figure S1</label></fig>'
    )
    paper = jats.read(b"<article><body>" + body + b"</body></article>")
    assert [f.name for f in paper.sentences[0].figures] == ["f1"]
    assert paper.counts == {"references that contradict their link": 1, "references tied by their link": 1}


def test_text_is_clean():
    text = " ".join(s.text for s in jats.read(jats_papers.xml("PMC9000011")).sentences)
    assert "5.2×10⁹/L" in text and "1).1" not in text and "figure 1). Radio" in text
    nested = [s.text for s in jats.read(jats_papers.xml("PMC9000001")).sentences]
    assert "Box plot" not in " ".join(nested) and "Fig. 9" not in " ".join(nested)
    assert nested[:2] == ["All patients were examined in two positions.", "The probe was placed as shown in Fig. 1a."]


ARTICLE = b"""<article><front><article-meta><article-id pub-id-type="pmc">7</article-id></article-meta></front>
<body><p>Text %s.</p></body></article>"""


def test_entities_never_expand(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRET")
    bomb = b'<!DOCTYPE article [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>' + ARTICLE % b"&b;"
    external = b'<!DOCTYPE article [<!ENTITY x SYSTEM "file://%s">]>' % str(secret).encode() + ARTICLE % b"&x;"
    for hostile in (bomb, external):
        with pytest.raises(jats.JatsError, match="declares its own entities"):
            jats.read(hostile)
    with pytest.raises(jats.JatsError, match="&secret; is unknown"):
        jats.read(b'<!DOCTYPE article SYSTEM "http://127.0.0.1:9/x.dtd">' + ARTICLE % b"&secret;")
    named = jats.read(b'<!DOCTYPE article SYSTEM "http://127.0.0.1:9/x.dtd">' + ARTICLE % b"a&nbsp;b &alpha;")
    assert named.sentences[0].text == "Text a b α."


@pytest.mark.parametrize("data", [b"", b"<html/>", b"<article><body>", b"\xff\xfe\x00", b"<a" * 100_000])
def test_what_is_no_article(data):
    with pytest.raises(jats.JatsError):
        jats.read(data)
