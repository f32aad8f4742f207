"""Folding and matching of terms: offsets by hand, and a plain matcher as the reference."""

from __future__ import annotations

import pickle
import random
import re

import pytest

from input_pipeline.text import terms as terms_module
from input_pipeline.text.terms import Terms, fold_phrase, fold_word, read_list


def matched(terms: Terms, text: str) -> list[str]:
    return [text[begin:end] for begin, end in terms.find(text)]


def test_offsets_drawn_by_hand():
    """The example in terms.py."""
    #       0123456789012345678901234567890123456
    text = "(Oedema\n  and ground-glass opacities."
    assert Terms(["edema", "ground-glass opacity"]).find(text) == [(1, 7), (14, 36)]


@pytest.mark.parametrize(
    ("phrases", "text", "expected"),
    [
        # The released code misses these: after a bracket or a line break, or with a capital.
        (["mass"], "(mass) \nMass, MASS -mass", ["mass", "Mass", "MASS", "mass"]),
        # Never inside another word, on either side.
        (["lung", "mass"], "plunge lunging massive amass lung_mass lung2 mass", ["lung", "mass", "mass"]),
        # The longest phrase wins; a longer phrase that does not match does not hide a shorter one.
        (["lung", "lung cancer", "lung cancer stage"], "lung cancerous, lung cancer stages, lung stage",
         ["lung", "lung cancer stages", "lung"]),
        # Adjacent terms share one space.
        (["pleural", "effusion", "left"], "left pleural effusion", ["left", "pleural", "effusion"]),
        # Hyphens, line breaks and repeated spaces join words; paragraphs, commas and slashes separate them.
        (["pleural effusion"], "pleural-effusion pleural  effusion pleural\neffusion pleural\r\n effusion",
         ["pleural-effusion", "pleural  effusion", "pleural\neffusion", "pleural\r\n effusion"]),
        (["pleural effusion"], "pleural\n\neffusion pleural, effusion pleural/effusion pleural - effusion", []),
        # Plurals in phrase and text, possessives.
        (["opacity", "masses", "metastasis", "vertebra", "crohn's disease"],
         "opacities mass metastases vertebrae Crohn disease, crohn’s diseases",
         ["opacities", "mass", "metastases", "vertebrae", "Crohn disease", "crohn’s diseases"]),
        # Letters whose folding changes the length: ß, ligatures, a dotted capital I, combining accents.
        (["fibrosis", "naive", "sjogren syndrome", "strasse", "mass"],
         "Straße ﬁbrosis İ mass nai\u0308ve Sjögren syndrome ma\u00adss Å mass",
         ["Straße", "ﬁbrosis", "mass", "nai\u0308ve", "Sjögren syndrome", "ma\u00adss", "mass"]),
        (["t1", "l5", "3 cm"], "T1-weighted, L5/S1, 3 cm; 13 cm", ["T1", "L5", "3 cm"]),
        (["mass"], "", []),
        (["mass"], " \n.,", []),
    ],
)  # fmt: skip
def test_matches(phrases, text, expected):
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
def test_british_and_american_spelling_are_equal(british, american):
    assert fold_word(british) == fold_word(american)


def test_folding_keeps_different_words_apart():
    """Similar words of reports fold to distinct results."""
    words = """pus plus gas axis apex iris this thus mass mask masks lass pons lens bone bones tibia fibula ilium ileum
        malleus malleolus hypodense hyperdense hypointense hyperintense anterior interior abduction adduction perineal
        peroneal intra inter afferent efferent dysphagia dysphasia ulna ulnar pleura pleural aorta aortic ureter urethra
        dose disease distal disk toe te does des""".split()
    folded = {}
    for word in words:
        folded.setdefault(fold_word(word), []).append(word)
    assert [group for group in folded.values() if len(group) > 1] == [["mask", "masks"], ["bone", "bones"]]


def test_every_spelling_pair_has_an_effect():
    """No pair is covered by the rules already, and no word is in two pairs."""
    lines = [line.split() for line in read_list(terms_module.HERE / "spelling_pairs.txt")]
    needless = [pair for pair in lines if terms_module._fold_by_rule(pair[0]) == terms_module._fold_by_rule(pair[1])]
    assert needless == []
    assert len({terms_module._fold_by_rule(a) for a, _ in lines}) == len(lines)
    chained = [pair for pair in lines if fold_word(pair[1]) != terms_module._fold_by_rule(pair[1])]
    assert chained == []


def plain_find(phrases: list[str], text: str) -> list[tuple[int, int]]:
    """`Terms.find` for ASCII letters, spaces and commas, written as simply as possible."""
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
    """Random phrases over few letters, so that they often overlap and contain each other."""
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


def test_all_invalid_terms_are_named():
    with pytest.raises(ValueError, match=r"2 terms.*'a, b'.*'!'"):
        Terms(["mass", "a, b", "!"], "mine")
    with pytest.raises(ValueError, match="mine: no terms"):
        Terms([], "mine")


def test_pickles_for_workers():
    terms = Terms(["Lung masses", "oedema"], "mine")
    again = pickle.loads(pickle.dumps(terms))
    assert (again.name, again.phrases) == ("mine", ("edema", "lung mass"))
    assert again.find("LUNG MASS") == terms.find("LUNG MASS") == [(0, 9)]
