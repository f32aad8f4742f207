"""The rules of Table 2, one by one and on tables that the families' readers accept."""

from __future__ import annotations

import json

import pytest

from input_pipeline.curate import filters, radiology, radmd
from input_pipeline.curate.__main__ import main
from input_pipeline.curate.filters import Settings
from input_pipeline.datasets import open_dataset
from input_pipeline.text import measurements
from tests.dataset_tables import CASE, every_family, volumes, write_csv, write_json


@pytest.mark.parametrize(
    ("text", "radiologic"),
    [
        ("Axial contrast-enhanced CT of the chest.", True),
        ("Chest X-ray on admission", True),
        ("T2-weighted image of the knee", True),
        ("Photomicrograph of the specimen (hematoxylin-eosin).", False),
        ("Photograph of the patient's face.", False),
        ("CT-guided biopsy: histology of the node.", False),
        ("(a) Axial CT. (b) Histology.", True),
        ("Flowchart of the 212 patients who had CT.", False),
        ("Kaplan-Meier curves", False),
        ("The lesion at presentation.", None),
        ("Eosinophilia was found.", None),
        ("Autoradiography of the horn", None),
        ("Endoscopic ultrasound of the duct", True),
        ("The actor met the petite director.", None),
        ("Lumbar curve; a drain that curves superiorly to the gastric fundus under EKG leads.", None),
        ("Cough, status post bronchoscopy and s/p left VATS biopsy.", None),
        ("Learning curves", False),
        ("EKG on admission", False),
        ("Fundus photograph", False),
        ("Fundus of the left eye", False),
        ("Biopsy of the lung", False),
    ],
)
def test_captions(text, radiologic):
    assert radiology.by_caption(text) is radiologic


def test_labels_of_modality():
    assert radiology.by_label("CT - noncontrast") is True
    assert radiology.by_label("Pathology") is False and radiology.by_label("thing") is None


def dropped(rule, family="rad3d_vqa", **row) -> bool:
    return filters.FILTERS[rule](row, family, Settings(None)).row is None


@pytest.mark.parametrize(
    ("question", "answer", "size", "age"),
    [
        ("What is the size of the nodule?", "Small", True, False),
        ("How large is the mass?", "3 cm", True, False),
        ("How wide is the gap?", "Less than 2 mm.", True, False),
        ("Which gap is seen?", "A: About 2.5 x 3 cm", True, False),
        ("How long has the patient had pain?", "Two days", False, False),
        ("What is seen?", "A 3 cm mass in the liver", False, False),
        ("Is the liver enlarged?", "Yes", False, False),
        ("What is the patient's age?", "54", False, True),
        ("How old is the patient?", "54", False, True),
        ("How old is the fracture?", "Acute", False, False),
        ("What is the bone age?", "Delayed", False, False),
        ("What stage is shown?", "II", False, False),
        ("Which image shows the lesion?", "The first", False, False),
    ],
)
def test_questions(question, answer, size, age):
    assert dropped("size_questions", question=question, answer=answer) is size
    assert dropped("age_questions", question=question, answer=answer) is age


@pytest.mark.parametrize(
    ("context", "answer", "away"),
    [
        ("A man fell. MRI showed a rupture of the Achilles tendon.", "A: Rupture of the Achilles tendon.", True),
        ("A man fell. He could not walk.", "Rupture of the Achilles tendon", False),
        ("The Achilles tendon was tender.", "Rupture of the Achilles tendon", False),
        ("Pulmonary embolism was suspected.", "Yes", False),
        ("He had two hydatid cysts.", "Hydatid cyst", True),
        ("", "Cyst", False),
    ],
)
def test_cheating(context, answer, away):
    row = {"question": "Q: What?", "answer": answer, "context": context}
    assert dropped("cheating_contexts", "pmc_casereport", **row) is away
    cut = filters.cheating_contexts(row, "pmc_casereport", Settings(None, cheating="cut")).row
    assert cut["context"] == (context if not away else "A man fell." if "fell" in context else "")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("There is a 1.7 x 1.9 mm, irregular mass.", "There is an irregular mass."),
        ("An 8 to 10-centimeter tubular structure.", "A tubular structure."),
        ("A 10 cm diameter firm tumor was felt.", "A firm tumor was felt."),
        ("A node measured at 2 x 4 cm, 3 mm and 5 mm in size in the hilum.", "A node in the hilum."),
        ("Of 16 nodes, 2 cm of the cranial one was cut. No bleeding.", "No bleeding."),
        ("At 25 mm Hg, 5 mM of it and a flow of 3 cm/s, all was well.",) * 2,
        ("Holes of 0.5, 1.0, or 1.5 cm were seen.", "Holes were seen."),
        ("A cyst with dimensions of 5 x 4 cm.", "A cyst."),
        ("An MRI of an hour showed a unilateral cyst.", "An MRI of an hour showed a unilateral cyst."),
    ],
)
def test_sizes_taken_out(text, left):
    assert measurements.without_sizes(text) == left


def test_sizes_leave_whole_sentences():
    row = CASE | {"finding": "A 3 x 2.5 cm mass. It measures 4 mm.", "impression": "1.2 cm."}
    verdict = filters.size_phrases(row, "rad3d_caption", Settings(None))
    assert verdict.row["finding"] == "A mass." and verdict.row["impression"] == ""
    assert dropped("size_phrases", "rad3d_caption", finding="It measures 4 mm.", impression="")


def test_the_classifier_decides_what_words_do_not(tmp_path):
    asked = []

    def classifier(path):
        asked.append(path)
        return 0.9 if "F1" in path else 0.1

    row = {"PMC_id": "PMC5", "img_ref": "['F1']", "question": "Q: Seen?", "answer": "A: A mass", "context": ""}
    captions = filters.Captions()
    captions.register("PMC5", "F3")
    captions.add("PMC5", "F3", "Histology.")
    settings = Settings(tmp_path, captions, classifier)
    keep = lambda ref, s=settings: filters.radiologic(row | {"img_ref": ref}, "pmc_casereport", s).row is not None  # noqa: E731
    assert keep("['F1']") and not keep("['F2']") and not keep("['F3']") and keep("['F2', 'F1']")
    assert len(asked) == 4 and asked[0].endswith("figures/PMC5_F1.jpg")
    assert not keep("['F1']", Settings(tmp_path)) and keep("['F1']", Settings(tmp_path, unknown="keep"))
    with pytest.raises(ValueError, match="cannot be imported"):
        radiology.open_classifier("no_such_module:f")


HEADER = ("PMC_id", "img_ref", "context", "question", "answer", "extra")


def test_tables(tmp_path, capsys):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    volumes(root, "v/1.npy", 1)
    write_csv(
        root / "case.csv", HEADER,
        ("PMC5", "['F1']", "A man fell.", "Q: What does the CT show?", "A: A fracture.", "kept, as it is"),
        ("PMC5", "['F1']", "CT showed a fracture of the hip.", "Q: What?", "A: A fracture of the hip on CT.", ""),
        ("PMC5", "['F1']", "", "Q: How large is it on CT?", "A: 3 cm", ""),
        ("PMC5", "['F1']", "", "Q: How old is the man on the CT?", "A: 3", ""),
        ("PMC5", "['F1']", "", "Q: What does the histology show?", "A: A cyst", ""),
        ("PMC5", "too few cells"),
    )  # fmt: skip
    write_json(root / "cap.json", [CASE, CASE | {"finding": "It measures 4 mm.", "impression": "3 cm."},
                                   CASE | {"modality": "Pathology"}])  # fmt: skip
    write_csv(root / "oa.csv", ("Figure_path", "Caption"), ("a.jpg", "CT"))
    write_csv(
        root / "open.csv", ("image_path", "label"), ("a.png", "No finding"), ("b.png", "No Finding"), ("c.png", "Edema")
    )
    write_csv(
        root / "vqa.csv", ("img_root_dir", "Figure_path", "Question", "Answer"), ("", "a.png", "How big?", "3 cm")
    )
    specs = [
        "pmc_casereport=case.csv",
        "rad3d_caption=cap.json",
        "pmc_oa=oa.csv",
        "cxr_mix=open.csv",
        "pmc_vqa=vqa.csv",
    ]
    assert main(["radmd", "--root", str(root), "--out", str(out), *specs]) == 0
    report = json.loads((out / "report.json").read_text())
    found = {name: (t["rows"], t["kept"]) for name, t in report["tables"].items()}
    assert found == {"case.csv": (5, 1), "cap.json": (3, 1), "oa.csv": (1, 0), "open.csv": (3, 2), "vqa.csv": (1, 1)}
    rules = report["tables"]["case.csv"]["rules"]
    assert [rules[r]["dropped"] for r in ("radiologic", "size_questions", "age_questions", "cheating_contexts")] == [
        1
    ] * 4
    assert report["problems"] == 1 and report["counts"]["case.csv: rows"] == 5
    assert "kept, as it is" in (out / "case.csv").read_text() and not (out / "oa.csv").exists()
    assert len(open_dataset("pmc_casereport", table=out / "case.csv", root=root)) == 1
    assert json.loads((out / "cap.json").read_text())[0]["finding"] == "A mass. No effusion."
    assert len(open_dataset("rad3d_caption", table=out / "cap.json", root=root)) == 1
    examples = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert {e["outcome"] for e in examples} == {"kept", "dropped", "changed"}
    again = (out / "open.csv").read_text(), (out / "examples.jsonl").read_text()
    assert main(["radmd", "--root", str(root), "--out", str(out), *specs]) == 0
    assert again == ((out / "open.csv").read_text(), (out / "examples.jsonl").read_text())
    capsys.readouterr()
    for wrong, words in (
        (["radmd", "--root", str(root), "--out", str(root), "pmc_oa=oa.csv"], "choose another"),
        (["radmd", "--root", str(root), "--out", str(out), "oa.csv"], "FAMILY=[FOLDER:]TABLE"),
        (["radmd", "--root", str(root), "--out", str(out), "pmc_oa=x.csv"], "table not found"),
        (["radmd", "--root", str(root), "--out", str(out), "pmc_oa=oa.csv", "--without", "x"], "is unknown"),
    ):
        assert main(wrong) == 2
        assert words in capsys.readouterr().err


def test_balance_is_of_each_set_and_split(tmp_path):
    """Balance holds within each set; otherwise the look of a set would predict the answer."""
    (tmp_path / "in").mkdir()
    header = ("image_path", "disease", "label", "source", "split")
    counts = {("a", "train"): (3, 1), ("b", "train"): (1, 3), ("a", "test"): (2, 0), ("b", "test"): (0, 2)}
    rows = [
        (f"{source}/{split}{label}{k}.png", "Edema", label, source, split)
        for (source, split), many in counts.items() for label, n in zip("10", many, strict=True) for k in range(n)
    ]  # fmt: skip
    write_csv(tmp_path / "in" / "yes_no.csv", header, *rows)
    radmd.curate(["cxr_mix=yes_no.csv"], tmp_path / "in", tmp_path / "out", {})
    kept = [line.split(",")[2:] for line in (tmp_path / "out" / "yes_no.csv").read_text().splitlines()[1:]]
    assert sorted(kept) == [[label, source, "train"] for label in "01" for source in "ab"]


def test_a_label_that_is_neither_yes_nor_no_is_no_no(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [(f"{k}.png", "Edema", label) for k, label in enumerate(("1", "0", "-1", "yes", "1.0", "0.0", ""))]
    write_csv(tmp_path / "in" / "yes_no.csv", ("image_path", "disease", "label"), *rows, ("9.png", "", "1"))
    report = radmd.curate(["cxr_mix=yes_no.csv"], tmp_path / "in", tmp_path / "out", {})
    problems = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    assert [p["row"] for p in problems] == ["3", "4", "7", "8"] and "'-1'" in problems[0]["reason"]
    assert report["counts"]["yes_no.csv: kept"] == 4 and report["counts"]["yes_no.csv: dropped by balance"] == 0


def test_every_family_passes(tmp_path):
    """The tool accepts the table of every family, and the reader accepts its output."""
    root = tmp_path / "in"
    root.mkdir()
    families = every_family(root)
    for name, fields in families.items():
        if name == "jsonl":
            continue
        out = tmp_path / name
        out.mkdir()
        radmd.curate([f"{name}={fields['table'].name}"], root, out, {"without": ["balance"], "unknown": "keep"})
        if name not in ("pmc_oa", "pmc_inline"):
            assert len(open_dataset(name, table=out / fields["table"].name, root=root))


def test_sizes_and_ages_are_removed_from_pairs():
    """RadMD has no information about sizes and ages (paper, 3.2), also where the question is about something else."""
    row = {"question": "Q: What is the 3 cm lesion?", "answer": "A: A 2.5 cm cyst."}
    verdict = filters.size_questions(row, "pmc_casereport", Settings(None))
    assert verdict.row == {"question": "Q: What is the lesion?", "answer": "A: A cyst."}
    assert dropped("age_questions", question="Who is shown?", answer="A 54-year-old man")
    assert dropped("size_questions", question="What is seen?", answer="It measures 4 mm.")


def test_scans_of_another_kind_leave_the_case(tmp_path):
    """The labels of a case are those of its scans; what they do not decide, the classifier does for all scans."""
    settings = Settings(tmp_path, unknown="drop")
    case = CASE | {"finding": "A mass.", "impression": "", "npy_path": ["a.png", "b.png", "c.png"]}
    verdict = filters.radiologic(case | {"modality": ["CT", "Pathology", ""]}, "rad3d_caption", settings)
    assert verdict.row["npy_path"] == ["a.png", "c.png"] and verdict.row["modality"] == ["CT", ""] and verdict.reason
    assert filters.radiologic(case | {"modality": ["Pathology"] * 3}, "rad3d_caption", settings).row is None
    assert filters.radiologic(case | {"modality": ["MRI"] * 3}, "rad3d_caption", settings).row == case | {
        "modality": ["MRI"] * 3
    }
    asked = []
    settings.classifier = lambda path: asked.append(path) or float(path.endswith("c.png"))
    assert filters.radiologic(case, "rad3d_caption", settings).row is case
    row = {"image_path": "['a.png', 'b.png']", "question": "Where?", "answer": "Left."}
    assert filters.radiologic(row, "rad3d_vqa", settings).row is None
    assert [path.rsplit("/", 1)[1] for path in asked] == ["a.png", "b.png", "c.png", "a.png", "b.png"]
