"""Diagnosis: yes/no and open questions, true, and balanced in each epoch."""

from __future__ import annotations

from collections import Counter

import pytest
from dataset_tables import answer, draws, every_family, judged, texts, write_csv

from input_pipeline.batching.mixture import Mixture, by_side
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


def epochs_of(dataset, epochs, fraction=1.0, seed=0) -> list[list[int]]:
    """Return the rows of each epoch, sorted."""
    order, sizes = by_side(dataset.sides())
    source = {"rows": len(dataset), "fraction": fraction, "sides": sizes}
    mixture = Mixture({"a": source}, seed=seed, weights=False)
    return [sorted(order[mixture.epoch(e)].tolist()) for e in range(epochs)]


def test_yes_no_tables_are_balanced_disease_by_disease(tmp_path):
    """Edema: present in x y, absent in a b c d e -> each epoch x y and two others, which take turns."""
    rows = [(f"{i}.png", "Edema", "1") for i in "xy"] + [(f"{i}.png", "Edema", "0") for i in "abcde"]
    rows += [("a.png", "Mass", "1"), ("a2.png", "mass", "1"), ("b.png", "Mass", "0")]
    write_csv(tmp_path / "t.csv", ("image_path", "disease", "label"), *rows)
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path)
    assert [dataset.row_id(i) for i in range(3)] == ["1", "2", "3"] and len(dataset) == 10
    assert dataset.sides().tolist() == [1, 1, 0, 0, 0, 0, 0, 3, 3, 2] and dataset.side_names() == ("no", "yes")
    epochs = epochs_of(dataset, 5)
    for epoch in epochs:
        answers = Counter((row > 6, answer(draws(dataset, row, 1)[0])) for row in epoch)
        assert answers == {(False, "yes"): 2, (False, "no"): 2, (True, "yes"): 1, (True, "no"): 1}
    edema = Counter(row for epoch in epochs for row in epoch if 2 <= row <= 6)
    assert edema == dict.fromkeys(range(2, 7), 2), "five epochs use each of the five rows twice"
    assert epochs == epochs_of(dataset, 5) != epochs_of(dataset, 5, seed=1)
    plain = open_dataset("cxr_mix", table="t.csv", root=tmp_path, balance=False)
    assert len(plain) == 10 and plain.sides() is None


def test_open_tables_are_balanced_by_normality(tmp_path):
    """180 normal and 20 abnormal images: half of the open answers are normal, and nine epochs use every image."""
    rows = [(f"n{k}.png", "No finding") for k in range(180)] + [(f"{k}.png", "Edema, Mass") for k in range(20)]
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows)
    assert open_dataset("vindr_pcxr", table="t.csv", root=tmp_path).sides() is None  # MedMD is not balanced
    for form in (None, "both"):
        dataset = open_dataset("vindr_pcxr", table="t.csv", root=tmp_path, form=form, balance=True)
        assert dataset.side_names() == ("normal", "abnormal")
        epochs = epochs_of(dataset, 9)
        assert all(sum(row < 180 for row in epoch) == 20 == len(epoch) / 2 for epoch in epochs)
        assert {row for epoch in epochs for row in epoch} == set(range(200))
        samples = [s for epoch in epochs for row in epoch for s in draws(dataset, row, 20)]
        open_answers = Counter(answer(s) for s in samples if not judged(s))
        assert open_answers["No finding."] == pytest.approx(open_answers.total() / 2, rel=0.06)
        judgements = Counter(answer(s) for s in samples if judged(s))
        assert judgements["yes"] == pytest.approx(judgements["no"], rel=0.1) and bool(judgements) == (form == "both")
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows[:3])
    with pytest.raises(ValueError, match="balance=True, but all images are normal"):
        open_dataset("vindr_pcxr", table="t.csv", root=tmp_path, balance=True)


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
    assert abs(counts["yes"] - total / 2) < 2 * total**0.5 and total > 1200, counts
    assert counts["open"] > 1500


@pytest.mark.parametrize("normals, balance", [(42, None), (42, True), (400, True), (5, True)])
def test_abnormal_images_are_asked_both_ways(tmp_path, normals, balance):
    """The answer to a yes/no question does not follow from whether the image is abnormal."""
    labels = ("Consolidation", "Pneumothorax", "Cardiomegaly", "Rib fracture")
    rows = [(f"{k}.png", labels[k % 4]) for k in range(42)] + [(f"n{k}.png", "No finding") for k in range(normals)]
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows)
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path, form="both", balance=balance)
    asked, share = Counter(), 42 / normals if balance else 1.0
    for i in range(len(dataset)):
        is_normal = rows[i][1] == "No finding"
        for sample in filter(judged, draws(dataset, i, 7000 // len(dataset))):
            asked[is_normal, answer(sample)] += share if is_normal else 1
    yes, no, of_normal = asked[False, "yes"], asked[False, "no"], asked[True, "no"]
    assert not asked[True, "yes"] and of_normal > 50
    assert 0.45 < yes / (yes + no + of_normal) < 0.55  # balanced over an epoch
    assert no / (yes + no) > 0.3 and no > 0.75 * of_normal


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
    for form, match in (("yes_no", "needs a column disease"), ("half", "form must be one of open, yes_no, both")):
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
