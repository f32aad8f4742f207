"""rad3d and mpx: case folders -> tables and scans that the readers accept, without identifying data."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from input_pipeline.curate import cases, splits
from input_pipeline.curate.__main__ import main
from input_pipeline.curate.jobs import Result
from input_pipeline.curate.question_answers import caption_requests
from input_pipeline.datasets import open_dataset, sample_rng
from input_pipeline.images import scans
from tests.dataset_tables import draws, write_csv
from tests.scan_files import dicom_file, nifti

CASE = {
    "title": "Lung abscess", "findings": ["A cavity.", "No effusion."], "impression": "Abscess.",
    "patient": "Age: 40 years", "presentation": "Cough.", "articles": ["Lung abscess"], "features": ["CT: cavity."],
}  # fmt: skip


def case(root, name, value, *pictures):
    folder = root / name
    folder.mkdir(parents=True)
    if value is not None:
        (folder / "case.json").write_text(value if isinstance(value, str) else json.dumps(value))
    for k, picture in enumerate(pictures):
        Image.fromarray((np.arange(80).reshape(8, 10) * 3 + k).astype(np.uint8)).save(folder / picture)
    return folder


def test_rad3d(tmp_path):
    root, out = tmp_path / "cases", tmp_path / "out"
    voxels = np.random.default_rng(0).integers(0, 900, (6, 7, 5)).astype(np.int16)
    folder = case(root, "1", CASE | {"scans": [{"path": "a.nii.gz", "modality": "CT"}, {"path": "b.png"}]}, "b.png")
    turned = np.array([[0, -2.0, 0, 3], [0, 0, 3.0, 4], [1.5, 0, 0, 5], [0, 0, 0, 1]])
    nifti(folder / "a.nii.gz", voxels, turned)
    second = case(root, "2", {"findings": "Normal brain.", "title": "Normal brain"})
    shutil.copy(dicom_file("CT_small.dcm"), second / "ct.dcm")
    case(root, "3", CASE | {"scans": [{"path": "../1/b.png"}, {"path": "none.png"}]})
    case(root, "4", "{broken")
    case(root, "5", CASE | {"finding": "a misspelt key"}, "a.png")
    case(root, "6", None, "a.png")
    assert main(["rad3d", str(root), "--out", str(out), "--workers", "0"]) == 0
    captions = open_dataset("rad3d_caption", table="caption.json", root=out)
    assert len(captions) == 2 and len(open_dataset("rad3d_modality", table="modality.csv", root=out)) == 2
    rationale = open_dataset("rad3d_rationale", table="rationale.json", root=out)
    assert len(rationale) == 1 and draws(rationale, n=1)[0].study_id
    sample = captions.sample(0, sample_rng(0, 0, "x", "1"))
    assert [p.text for p in sample.parts if getattr(p, "role", "") == "response"] == [
        "Findings: A cavity. No effusion. Impression: Abscess."
    ]
    before, head = scans.read(folder / "a.nii.gz")
    after, copied = scans.read(out / sample.scans[0].path)
    assert np.array_equal(before, after) and head.spacing_mm == copied.spacing_mm == pytest.approx((3.0, 2.0, 1.5))
    assert copied.orientation == head.orientation
    assert [s.path for s in sample.scans] == ["scans/1_1.nii.gz", "scans/1_2.png"], "one row has all scans of the case"
    first = json.loads((out / "caption.json").read_text())[0]
    assert first["modality"] == ["CT", ""] and first["study"] == "rad3d-1"
    ct = np.asarray(scans.read(second / "ct.dcm")[0])
    assert any(np.array_equal(ct, scans.read(f)[0]) for f in (out / "scans").iterdir())
    problems = (out / "problems.jsonl").read_text()
    for words in (
        "goes up through",
        "there is no such file",
        "not valid JSON",
        "unknown keys: finding",
        "case.json not found",
    ):
        assert words in problems, words
    written = b"".join(f.read_bytes() for f in out.rglob("*") if f.is_file())
    assert b"CompressedSamples" not in written and b"1CT1" not in written, "name and id of the DICOM file"


def test_cases_of_a_csv(tmp_path):
    root = tmp_path / "cases"
    case(root, "a", None, "x.png", "y.png")
    header = ("case", "title", "findings", "features", "articles", "scans")
    write_csv(root / "cases.csv", header, ("a", "Cyst", "A cyst.", "f1|f2", "Cyst|Mass", "x.png|y.png"), ("../a",) * 6)
    report = cases.curate("rad3d", root, tmp_path / "out", {"first": True}, workers=0)
    rows = json.loads((tmp_path / "out" / "caption.json").read_text())
    assert len(rows) == 1 and rows[0]["articles"] == ["Cyst", "Mass"] and report["problems"] == 1


def test_mpx(tmp_path):
    root, out = tmp_path / "cases", tmp_path / "out"
    said = [
        {"path": "a.png", "modality": "CT", "plane": "Axial", "caption": "A mass."},
        {"path": "b.png", "modality": "?"},
    ]
    texts = {
        "title": "Meningioma",
        "discussion": "Benign.",
        "history": "Headache.",
        "findings": "A mass.",
        "ddx": "Glioma",
    }
    case(root, "MPX1", texts | {"scans": said}, "a.png", "b.png")
    assert main(["mpx", str(root), "--out", str(out), "--workers", "0"]) == 0
    single = open_dataset("mpx_single", table="single.csv", root=out)
    multi = open_dataset("mpx_multi", table="multi.csv", root=out)
    assert len(single) == 3 and len(multi) == 4
    sample = multi.sample(0, sample_rng(0, 0, "x", "1"))
    assert len(sample.scans) == 2 and sample.study_id == "MPX1"
    assert all(scans.read(scans.resolve(out, s.path))[1].kind == "2d" for s in sample.scans)
    assert "modality is unknown" in (out / "problems.jsonl").read_text()


def test_a_case_with_three_scans_is_one_row_and_one_group(tmp_path):
    """Its report occurs once, its questions are about all its scans, and `splits` keeps the scans together."""
    root, out = tmp_path / "cases", tmp_path / "out"
    said = [{"path": f"{k}.png", "modality": kind} for k, kind in enumerate(("MRI", "CT", "n/a"))]
    for name in "abcdefgh":
        case(root, name, CASE | {"title": f"Cyst {name}", "scans": said}, "0.png", "1.png", "2.png")
    cases.curate("rad3d", root, out, {"first": False}, workers=0)
    rows = json.loads((out / "caption.json").read_text())
    assert len(rows) == 8 and [len(row["npy_path"]) for row in rows] == [3] * 8 and rows[0]["modality"][2] == ""
    assert len(open_dataset("rad3d_rationale", table="rationale.json", root=out)) == 8
    modality = open_dataset("rad3d_modality", table="modality.csv", root=out)
    assert len(modality) == 16 and all(len(modality.scans(i)) == 1 for i in range(16)), "one row per labelled scan"
    (request,) = list(caption_requests(out / "caption.json", {}, Result()))[:1]
    write_csv(out / "vqa.csv", ("image_path", "question", "answer"), (request.cells["image_path"], "Where?", "Left."))
    assert len(open_dataset("rad3d_vqa", table="vqa.csv", root=out).scans(0)) == 3
    splits.curate(["rad3d_modality=modality.csv"], out, out / "split", {"near": False, "anew": False, "check": False,
                                                                       "seed": 0, "test": 0.5})  # fmt: skip
    with open(out / "split" / "modality.csv", newline="") as file:
        sides = {(row["study"], row["split"]) for row in csv.DictReader(file)}
    assert len(sides) == 8 and {split for _, split in sides} == {"train", "test"}
