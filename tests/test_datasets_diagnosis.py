"""Diagnosis: yes/no and open questions, true and balanced."""

from __future__ import annotations

from collections import Counter

import pytest
from dataset_tables import answer, draws, every_family, judged, texts, write_csv

from input_pipeline.datasets import TableError, diseases, open_dataset


@pytest.fixture
def every(tmp_path):
    return every_family(tmp_path)


@pytest.mark.parametrize(
    "name, region",
    [
        ("cxr_mix", "cxr"),
        ("vindr_pcxr", "pcxr"),
        ("vindr_mammo", "mammo"),
        ("vindr_spinexr", "spine"),
        ("diagnosis", "general"),
    ],
)
def test_open_diagnosis_asks_in_the_words_of_its_region(every, name, region):
    from input_pipeline.datasets import prompts

    samples = draws(open_dataset(name, **every[name]))
    assert {answer(s) for s in samples} == {"Edema, Pneumothorax."} and {s.task for s in samples} == {"diagnosis"}
    assert {t for s in samples for t in texts(s, "instruction")} <= set(prompts.load()[f"diagnosis_open_{region}"])


def test_yes_no_tables_are_balanced_pair_by_pair(tmp_path):
    """Edema: present in x y, absent in a b c d e -> pairs (x | a c e) (y | b d); every image is used, none twice."""
    rows = [(f"{i}.png", "Edema", "1") for i in "xy"] + [(f"{i}.png", "Edema", "0") for i in "abcde"]
    write_csv(tmp_path / "t.csv", ("image_path", "disease", "label"), *rows)
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path)
    assert [dataset.row_id(i) for i in range(4)] == [
        "edema/0/present",
        "edema/0/absent",
        "edema/1/present",
        "edema/1/absent",
    ]
    shares = [[s.path[0] for s in dataset.scans(i)] for i in range(len(dataset))]
    assert shares == [["x"], ["a", "c", "e"], ["y"], ["b", "d"]]
    seen = set()
    for i in range(4):
        # The pool does not shrink: after 300 epochs every image of the share is still drawn.
        samples = draws(dataset, i, 300)
        assert {answer(s) for s in samples} == {"no" if i % 2 else "yes"}
        assert all("edema" in texts(s, "instruction")[0] for s in samples)
        late = {s.scans[0].path[0] for s in samples[-60:]}
        assert late == set(shares[i])
        seen |= late
    assert seen == set("xyabcde")
    plain = open_dataset("cxr_mix", table="t.csv", root=tmp_path, balance=False)
    assert len(plain) == 7 and answer(draws(plain, 3, 1)[0]) == "no"


def test_yes_no_tables_reject_contradictions_and_one_sided_diseases(tmp_path):
    header = ("image_path", "disease", "label")
    rows = [
        ("a.png", "Effusion", "1"),
        ("a.png", "Pleural Effusion", "0"),
        ("b.png", "Effusion", "1"),
        ("c.png", "Effusion", "0"),
        ("d.png", "Mass", "1"),
        ("e.png", "Effusion", "2"),
        ("f.png", "No Finding", "1"),
        ("g.png", "No Finding", "0.0"),
    ]
    write_csv(tmp_path / "t.csv", header, *rows)
    with pytest.raises(TableError) as error:
        open_dataset("cxr_mix", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [1, 2, 5, 6]  # both sides of the contradiction
    assert "not in a later row" in error.value.problems[0].reason and "row 1" in error.value.problems[1].reason
    assert "gives the answer away" in error.value.problems[2].reason
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path, quarantine=True)
    assert {s.path for i in range(len(dataset)) for s in dataset.scans(i)} == {"b.png", "c.png", "f.png", "g.png"}
    # "No finding" becomes a question about any abnormality, with the opposite answer.
    got = {draws(dataset, i, 1)[0].scans[0].path: draws(dataset, i, 1)[0] for i in range(4)}
    assert answer(got["f.png"]) == "no" and answer(got["g.png"]) == "yes"
    assert "any abnormality" in texts(got["f.png"], "instruction")[0]


@pytest.mark.parametrize("normals", [0, 8, 30, 120])
def test_open_tables_asked_both_ways_are_balanced_and_true(tmp_path, normals):
    """form="both": yes and no equally often for any share of normal images, and no false "no"."""
    labels = [
        "Consolidation",
        "TB, Pleural effusion",
        "Pneumothorax",
        "Lung opacity",
        "Cardiomegaly, Edema",
        "Other lesion",
        "Rib fracture",
    ]
    rows = [(f"{k}.png", labels[k % len(labels)]) for k in range(42)] + [
        (f"n{k}.png", "No finding") for k in range(normals)
    ]
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows)
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path, form="both")
    counts, n = Counter(), 9000 // len(dataset)
    for i in range(len(dataset)):
        for sample in draws(dataset, i, n):
            counts[answer(sample) if judged(sample) else "open"] += 1
            if answer(sample) == "no":
                question = texts(sample, "instruction")[0].lower()
                kin = {
                    "Consolidation": ("consolidation", "opacity"),
                    "TB, Pleural effusion": ("tb", "tuberculosis", "effusion", "opacity", "consolidation"),
                    "Lung opacity": ("opacity", "consolidation", "tb", "edema"),
                    "Cardiomegaly, Edema": ("cardiomegaly", "edema", "opacity"),
                    "Pneumothorax": ("pneumothorax",),
                    "Rib fracture": ("fracture",),
                    "No finding": (),
                }
                assert not [
                    w for w in kin[rows[i][1]] if w in question.replace("radiograph", "").split("?")[0].split()
                ], (rows[i], question)
    total = counts["yes"] + counts["no"]
    # 4 standard deviations of a fair coin.
    assert abs(counts["yes"] - total / 2) < 2 * total**0.5 and total > 1500, counts
    assert counts["open"] > 1500


def test_labels_of_open_tables(tmp_path):
    rows = [
        ("a", "['Mass', 'Nodule/Mass']"),
        ("b", "Mass; Edema."),
        ("c", "No finding, Mass"),
        ("d", "..."),
        ("e", "Masss"),
    ]
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows)
    fields = dict(
        table="t.csv", root=tmp_path, quarantine=True, vocabulary=("Mass", "Edema", "Nodule/Mass", "No finding")
    )
    dataset = open_dataset("cxr_mix", **fields)
    assert [answer(draws(dataset, i, 1)[0]) for i in range(2)] == ["Mass, Nodule/Mass.", "Mass, Edema."]
    assert [p.row for p in dataset.problems] == [3, 4, 5]
    for form, match in (("yes_no", "needs a column disease"), ("half", "unknown")):
        with pytest.raises(ValueError, match=match):
            open_dataset("cxr_mix", **fields, form=form)


def test_diseases_that_may_coexist():
    kin = [
        ("TB", "Tuberculosis"),
        ("Effusion", "pleural_effusion"),
        ("Fracture", "Rib fracture"),
        ("Pneumonia", "COVID-19"),
        ("Oedema", "Pulmonary edema"),
        ("Appendicitis", "Acute appendicitis"),
        ("Lung Opacity", "Atelectasis"),
    ]
    for a, b in kin:
        assert diseases.may_coexist(a, b) and diseases.may_coexist(b, a), (a, b)
    for a, b in [("Edema", "Pneumothorax"), ("Osteophytes", "Disc space narrowing"), ("Mass", "Cardiomegaly")]:
        assert not diseases.may_coexist(a, b) and not diseases.may_coexist(b, a)
    assert diseases.spoken("Pleural_Thickening") == "pleural thickening" and diseases.spoken("COPD") == "COPD"


def test_a_label_about_several_images(tmp_path):
    views = str(["p1/front.png", "p1/side.png"])
    rows = [(views, "Edema", "1"), ("p2.png", "Edema", "0"), (views, "Mass", "0"), ("p2.png", "Mass", "1")]
    write_csv(tmp_path / "t.csv", ("image_path", "disease", "label"), *rows)
    dataset = open_dataset("diagnosis", table="t.csv", root=tmp_path)
    samples = [draws(dataset, i, 1)[0] for i in range(len(dataset))]
    shown = {(tuple(s.path for s in sample.scans), answer(sample)) for sample in samples}
    front_side = ("p1/front.png", "p1/side.png")
    assert shown == {(front_side, "yes"), (front_side, "no"), (("p2.png",), "yes"), (("p2.png",), "no")}
    assert {sample.study_id for sample in samples} == {"p1/front.png", "p2.png"}
    write_csv(tmp_path / "t.csv", ("image_path", "disease", "label"), *rows, (views, "Mass", "1"))
    with pytest.raises(TableError, match="'Mass' is 0 for p1/front.png, p1/side.png"):
        open_dataset("diagnosis", table="t.csv", root=tmp_path)
