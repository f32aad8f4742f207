"""Label files of public sets -> tables that the diagnosis readers accept; every "no" is true."""

from __future__ import annotations

import csv
import io
import json

import pytest

from input_pipeline.curate import diagnosis, labels, xray_sets
from input_pipeline.curate.__main__ import main
from input_pipeline.curate.jobs import Result
from input_pipeline.datasets import open_dataset
from tests.dataset_tables import write_csv

OPTIONS = {"uncertain": [], "seed": 0, "per_disease": None}


def read(member, folder, **policy):
    result = Result()
    return {i.path: i for i in xray_sets.read(member, folder, labels.Policy(**policy), result)}, result


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def table(file) -> list[dict]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def nih(folder, *rows):
    folder.mkdir(exist_ok=True)
    write_csv(folder / "Data_Entry_2017_v2020.csv", ("Image Index", "Finding Labels", "Patient ID"), *rows)


def test_chestxray14(tmp_path):
    touch(tmp_path, "images_001/00000001_000.png")
    (tmp_path / "test_list.txt").write_text("00000002_000.png\n")
    nih(
        tmp_path,
        ("00000001_000.png", "Cardiomegaly|Effusion", "1"),
        ("00000002_000.png", "No Finding", "2"),
        ("00000003_000.png", "No Finding|Mass", "3"),
        ("00000004_000.png", "Scurvy", "4"),
        ("00000001_000.png", "Mass", "1"),
    )
    images, result = read("chestxray14", tmp_path)
    assert list(images) == ["00000002_000.png"], "the first image contradicts itself"
    assert images["00000002_000.png"].is_normal and images["00000002_000.png"].split == "test"
    assert len(result.problems) == 3 and "other labels" in result.problems[-1]["reason"]


def test_chexpert_uncertain(tmp_path):
    blank = dict.fromkeys(xray_sets.CHEXPERT, "")
    rows = [
        blank | {"Edema": "1.0", "Consolidation": "-1.0", "Pneumothorax": "0.0"},
        blank | {"No Finding": "1.0", "Support Devices": "1.0"},
        blank | {"No Finding": "1.0"},
        blank | {"Edema": "2"},
        blank,
    ]
    paths = [f"CheXpert-v1.0-small/train/patient0000{k}/study1/view1_frontal.jpg" for k in range(5)]
    write_csv(tmp_path / "train.csv", ("Path", *xray_sets.CHEXPERT),
              *[(p, *row.values()) for p, row in zip(paths, rows, strict=True)])  # fmt: skip
    images, result = read("chexpert", tmp_path)
    first = images["train/patient00000/study1/view1_frontal.jpg"]
    assert first.findings == {"Edema": True, "Consolidation": None, "Pneumothorax": False}
    assert first.study == "chexpert-patient00000" and first.split == "train" and first.positives == ("Edema",)
    normal = [i.is_normal for i in images.values()]
    assert normal == [False, False, True, False], "devices beside No Finding are seen; blank is not normal"
    assert len(result.problems) == 1 and result.counts["chexpert: uncertain labels counted as ignore"] == 1
    images, _ = read("chexpert", tmp_path, by_disease={"Consolidation": "positive"})
    assert images["train/patient00000/study1/view1_frontal.jpg"].findings["Consolidation"] is True
    with pytest.raises(ValueError, match="ignore, positive, negative"):
        diagnosis.parse_policy(["perhaps"])


def test_rsna_and_siim(tmp_path):
    touch(tmp_path, "rsna/stage_2_train_images/a.dcm", "siim/dicom/1/2/x.dcm")
    write_csv(tmp_path / "rsna" / "stage_2_train_labels.csv", ("patientId", "x", "Target"),
              ("a", "1", "1"), ("a", "5", "1"),
              ("b", "", "0"), ("c", "", "0"), ("d", "", "0"), ("d", "1", "1"))  # fmt: skip
    write_csv(tmp_path / "rsna" / "stage_2_detailed_class_info.csv", ("patientId", "class"),
              ("b", "Normal"), ("c", "No Lung Opacity / Not Normal"))  # fmt: skip
    images, result = read("rsna", tmp_path / "rsna")
    assert {p: i.is_normal for p, i in images.items()} == {
        "stage_2_train_images/a.dcm": False, "b.dcm": True, "c.dcm": False
    }  # fmt: skip
    assert len(result.problems) == 1
    write_csv(tmp_path / "siim" / "train-rle.csv", ("ImageId", "EncodedPixels"),
              ("x", "10 3 5 2"), ("x", "9 1"), ("y", "-1"), ("z", "?"), ("w", "-1"), ("w", "3 4"))  # fmt: skip
    images, result = read("siim_acr", tmp_path / "siim")
    assert {p: i.findings["Pneumothorax"] for p, i in images.items()} == {"dicom/1/2/x.dcm": True, "y.dcm": False}
    assert len(result.problems) == 2


def test_vindr(tmp_path):
    cxr, spine, mammo = (tmp_path / n for n in ("cxr", "spine", "mammo"))
    for folder in (cxr, spine, mammo):
        folder.mkdir()
    columns = ("image_id", "rad_id", "Cardiomegaly", "Nodule/Mass", "No finding")
    votes = {"a": ("110", "110", "000"), "b": ("001", "001", "001"), "c": ("010", "001", "001"), "d": ("101",)}
    rows = [(n, f"R{k}", *vote) for n, said in votes.items() for k, vote in enumerate(said)]
    write_csv(cxr / "image_labels_train.csv", columns, *rows)
    images, result = read("vindr_cxr", cxr)
    assert images["a.dicom"].findings == {"Cardiomegaly": True, "Nodule/Mass": True}
    assert images["b.dicom"].is_normal and images["c.dicom"].findings["Nodule/Mass"] is None
    assert not images["c.dicom"].is_normal and "d.dicom" not in images and len(result.problems) == 1
    write_csv(spine / "train.csv", ("image_id", "study_id", "lesion_type"),
              ("a", "s", "Osteophytes"), ("a", "s", "Disc space narrowing"), ("b", "t", "No finding"))  # fmt: skip
    images, _ = read("vindr_spinexr", spine)
    assert images["a.dicom"].positives == ("Disc space narrowing", "Osteophytes") and images["b.dicom"].is_normal
    write_csv(mammo / "finding_annotations.csv", ("study_id", "image_id", "finding_categories", "split"),
              ("s", "a", "['Mass', 'Skin Retraction']", "training"), ("s", "b", "['No Finding']", "test"))  # fmt: skip
    images, _ = read("vindr_mammo", mammo)
    assert images["s/a.dicom"].positives == ("Mass", "Skin Retraction") and images["s/b.dicom"].split == "test"


def test_small_members(tmp_path):
    covid, tb, objects, openi = (tmp_path / n for n in ("covid", "tb", "objects", "openi"))
    for folder in (covid, tb, objects, openi):
        folder.mkdir()
    (covid / "train.txt").write_text("3 a.png positive cohen\nrsna 12 b.png negative rsna\nbroken line\n")
    images, result = read("covid_cxr2", covid)
    assert {p: i.findings["COVID-19"] for p, i in images.items()} == {"train/a.png": True, "train/b.png": False}
    assert images["train/b.png"].study == "covid-cxr2-rsna 12" and len(result.problems) == 1
    touch(
        tb,
        "CXR_png/MCUCXR_0001_0.png",
        "CXR_png/CHNCXR_0002_1.png",
        "CXR_png/other.png",
        "ManualMask/MCUCXR_0001_0.png",
    )
    images, result = read("nlm_tb", tb)
    assert [i.findings["Tuberculosis"] for i in images.values()] == [True, False] and len(result.problems) == 1
    write_csv(objects / "train.csv", ("image_name", "annotation"), ("1.jpg", "0 1 2 3 4"), ("2.jpg", ""),
              ("3.jpg", "nan"))  # fmt: skip
    images, _ = read("object_cxr", objects)
    assert [i.findings["Foreign object"] for i in images.values()] == [True, False, False]
    assert not images["2.jpg"].is_normal, "without a foreign object is not without disease"
    write_csv(openi / "indiana_reports.csv", ("uid", "Problems"),
              ("1", "normal"), ("2", "Thickening, pleura;Cardiomegaly"),
              ("3", "No Indexing"), ("4", "normal;Edema"))  # fmt: skip
    write_csv(openi / "indiana_projections.csv", ("uid", "filename"),
              *[(str(k), f"{k}.png") for k in (1, 2, 3, 4, 9)])  # fmt: skip
    images, result = read("openi", openi)
    assert images["1.png"].is_normal and images["2.png"].positives == ("Thickening, pleura", "Cardiomegaly")
    assert len(images) == 2 and len(result.problems) == 2


def test_a_row_that_is_not_utf_8_is_named_and_costs_itself_alone(tmp_path, capsys):
    (tmp_path / "NIH").mkdir()
    lines = ["Image Index,Finding Labels,Patient ID", "a.png,Mass,1", "M\xfcller.png,Mass,2", "b.png,No Finding,3"]
    (tmp_path / "NIH" / "Data_Entry_2017.csv").write_bytes("\n".join(lines).encode("latin-1"))
    command = ["diagnosis", "--root", str(tmp_path), "--out", str(tmp_path / "t"), "chestxray14=NIH"]
    assert main(command) == 0
    assert [row["image_path"] for row in table(tmp_path / "t" / "open.csv")] == ["NIH/a.png", "NIH/b.png"]
    (problem,) = map(json.loads, (tmp_path / "t" / "problems.jsonl").read_text().splitlines())
    assert problem["row"] == "2" and problem["reason"] == "Image Index is not valid UTF-8"
    assert main([*command, "chestxray14=./NIH/"]) == 2 and "a set is repeated" in capsys.readouterr().err


def test_every_member_has_a_reader_and_says_what_it_lacks(tmp_path):
    for member in xray_sets.MEMBERS:
        with pytest.raises(ValueError, match="the set as published"):
            read(member, tmp_path)


def test_tables_are_balanced_true_and_readable(tmp_path, capsys):
    rows = [(f"a{k}.png", "Infiltration", str(k)) for k in range(8)]
    rows += [(f"b{k}.png", "Consolidation", str(20 + k)) for k in range(3)]
    rows += [(f"c{k}.png", "No Finding", str(40 + k)) for k in range(5)]
    nih(tmp_path / "NIH", *rows)
    (tmp_path / "openi").mkdir()
    write_csv(tmp_path / "openi" / "indiana_reports.csv", ("uid", "Problems"), ("1", "Thickening, pleura"))
    write_csv(tmp_path / "openi" / "indiana_projections.csv", ("uid", "filename"), ("1", "1.png"))
    out = tmp_path / "tables"
    assert main(["diagnosis", "--root", str(tmp_path), "--out", str(out), "chestxray14=NIH", "openi=openi"]) == 0
    questions = table(out / "yes_no.csv")
    by_disease: dict = {}
    for row in questions:
        by_disease.setdefault(row["disease"], ([], []))[int(row["label"])].append(row["image_path"])
    assert by_disease.keys() == {"Infiltration", "Consolidation", "No finding"}
    assert all(len(no) == len(yes) for no, yes in by_disease.values())
    # Consolidation may be called an infiltrate, so an image with it is not a safe "no".
    assert not any("/b" in path for path in by_disease["Infiltration"][0])
    assert len(by_disease["Infiltration"][1]) == 5 and len(by_disease["Consolidation"][1]) == 3
    assert len(open_dataset("cxr_mix", table=out / "yes_no.csv", root=tmp_path)) == len(questions)
    opened = open_dataset("cxr_mix", table=out / "open.csv", root=tmp_path)
    assert len(opened) == 17 and "['Thickening, pleura']" in (out / "open.csv").read_text()
    before = (out / "yes_no.csv").read_bytes()
    diagnosis.curate(["chestxray14=NIH", "openi=openi"], tmp_path, out, OPTIONS)
    assert (out / "yes_no.csv").read_bytes() == before
    diagnosis.curate(["chestxray14=NIH", "openi=openi"], tmp_path, out, OPTIONS | {"seed": 1})
    assert (out / "yes_no.csv").read_bytes() != before
    report = json.loads((out / "report.json").read_text())
    assert report["options"]["seed"] == 1
    assert report["diseases"]["chestxray14"]["Infiltration"] == {"present": 8, "absent": 5, "asked": 10}
    assert main(["diagnosis", "--root", str(tmp_path), "--out", str(out), "nih=NIH"]) == 2
    assert "chestxray14" in capsys.readouterr().err
