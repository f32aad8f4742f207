"""Rad3D: captions, questions, rationales."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from dataset_tables import CASE, answer, draws, every_family, judged, shape, texts, volumes, write_csv, write_json

from input_pipeline.datasets import open_dataset
from input_pipeline.samples import RowError, Scan


@pytest.fixture
def every(tmp_path):
    return every_family(tmp_path)


def test_rad3d_vqa_lists_the_scans_of_a_stack(every, tmp_path):
    dataset = open_dataset("rad3d_vqa", **every["rad3d_vqa"])
    assert dataset.scans(0) == (Scan("v/1.npy", 0), Scan("v/1.npy", 1))
    assert {shape(s) for s in draws(dataset)} == {"ssir", "issr"}
    np.save(tmp_path / "one.npy", np.zeros((1, 3, 4, 4, 2)))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "junk.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': 'f4', ")
    names = ("one.npy", "gone.npy", "text.npy", "junk.npy")
    write_csv(tmp_path / "t.csv", ("image_path", "question", "answer"), *[(n, "q", "a") for n in names])
    dataset = open_dataset("rad3d_vqa", table="t.csv", root=tmp_path)
    assert dataset.scans(0) == (Scan("one.npy"),)
    for i in (1, 2, 3):
        for call in (dataset.scans, lambda i, d=dataset: d.sample(i, np.random.default_rng(0))):
            with pytest.raises(RowError, match=f"t.csv, row {i + 1}: {names[i]}"):
                call(i)


def test_caption_joins_patient_findings_and_impression(tmp_path):
    cases = [CASE, {**CASE, "pre": None, "pat": "None", "finding": None}, {**CASE, "finding": "", "impression": None}]
    volumes(tmp_path, "v/1.npy", 1)
    write_json(tmp_path / "c.json", cases)
    dataset = open_dataset("rad3d_caption", table="c.json", root=tmp_path, quarantine=True)
    assert [p.row for p in dataset.problems] == [3] and dataset.scans(0) == (Scan("v/1.npy"),)
    first, second = draws(dataset, 0, 1)[0], draws(dataset, 1, 1)[0]
    assert (
        texts(first, "context") == ["Age: 40 years Gender: Male. Sudden chest pain."] and texts(second, "context") == []
    )
    assert answer(first) == "Findings: A 3 x 2.5 cm mass. No effusion. Impression: Lung abscess."
    assert answer(second) == "Impression: Lung abscess."
    write_json(tmp_path / "c.json", [*cases[:2], {**CASE, "finding": "It measures 3 cm.", "impression": ""}])
    dataset = open_dataset("rad3d_caption", table="c.json", root=tmp_path, sizes="remove")
    assert answer(draws(dataset, 0, 1)[0]) == "Findings: A mass. No effusion. Impression: Lung abscess."
    assert dataset.skipped == {"nothing but sizes": 1}


def test_rationale_is_half_questions_half_of_them_no_and_true(tmp_path):
    """Case 0 has an abscess, an article on cavities and mentions a pneumothorax: none of these is ever denied."""
    volumes(tmp_path, "v/1.npy", 1)
    titles = ["Lung abscess", "Pneumothorax", "Abscess", "Crohn disease", "Glioma", "Meningioma"]
    cases = [{**CASE, "title": t, "articles": [t], "finding": "-", "impression": "-"} for t in titles]
    cases[0] |= {"articles": ["Lung abscess", "Pulmonary cavity"], "finding": "There is also a pneumothorax."}
    cases[3]["articles"] = ["Crohn disease", "Ileus", "A text about Crohn disease and the like. " * 9]
    write_json(tmp_path / "c.json", cases)
    dataset = open_dataset("rad3d_rationale", table="c.json", root=tmp_path)
    samples = draws(dataset, 0, 4000)
    kinds = Counter(answer(s) if judged(s) else "open" for s in samples)
    # 4 standard deviations: 126 of 4000 halved, 110 of 4000 quartered.
    assert abs(kinds["open"] - 2000) < 127 and abs(kinds["yes"] - 1000) < 110 and abs(kinds["no"] - 1000) < 110
    denied = {texts(s, "instruction")[0] for s in samples if answer(s) == "no"}
    assert all(any(t in q for q in denied) for t in ("Crohn disease", "Glioma", "Meningioma", "Ileus"))
    assert not [q for q in denied if any(w in q for w in ("bscess", "neumothorax", "cavity", "text"))]
    assert all("Lung abscess" in texts(s, "instruction")[0] for s in samples if answer(s) == "yes")
    assert {s.task for s in samples if judged(s)} == {"diagnosis"} and {s.task for s in samples if not judged(s)} == {
        "rationale"
    }
    opened = next(s for s in samples if not judged(s))
    assert answer(opened) == "Lung abscess. CT: cavity with a level. X-ray: same."
    write_json(tmp_path / "one.json", cases[:1])
    alone = draws(open_dataset("rad3d_rationale", table="one.json", root=tmp_path))
    assert not [s for s in alone if judged(s)]  # nothing to deny: no question that is always answered yes
    cases[4]["title"] = "Normal"
    write_json(tmp_path / "c.json", cases)
    dataset = open_dataset("rad3d_rationale", table="c.json", root=tmp_path)
    assert not [s for s in draws(dataset, 4) if judged(s)]
    assert not [s for s in draws(dataset, 5, 500) if judged(s) and "ormal" in texts(s, "instruction")[0]]


def test_a_row_has_one_path_a_list_or_a_stack(tmp_path):
    """A list and a stack give the scans of the case in order; the study is the first path."""
    volumes(tmp_path, "v/1.npy", 2)
    paths = ["ct.nii.gz", "v/1.npy", "xr.png"]
    scans = (Scan("ct.nii.gz"), Scan("v/1.npy", 0), Scan("v/1.npy", 1), Scan("xr.png"))
    write_json(tmp_path / "c.json", [{**CASE, "npy_path": paths}, {**CASE, "npy_path": "ct.nii.gz"}])
    write_csv(tmp_path / "q.csv", ("image_path", "question", "answer"), (str(paths), "q", "a"), ("a.png", "q", "a"))
    write_csv(tmp_path / "m.csv", ("image_path", "answer"), (str(paths), "CT"), ("a.png", "MRI"))
    tables = {"caption": "c.json", "rationale": "c.json", "vqa": "q.csv", "modality": "m.csv"}
    for name, table in tables.items():
        dataset = open_dataset(f"rad3d_{name}", table=table, root=tmp_path)
        sample = draws(dataset, 0, 1)[0]
        assert dataset.scans(0) == sample.scans == scans and sample.study_id == "ct.nii.gz", name
        assert len(dataset.scans(1)) == 1, name
    for bad, words in (([], "npy_path is blank"), (["a.npy", ""], "not text"), (["../a"], "leaves its folder")):
        write_json(tmp_path / "c.json", [{**CASE, "npy_path": bad}])
        with pytest.raises(RowError, match=words):
            open_dataset("rad3d_caption", table="c.json", root=tmp_path)


def test_fields_of_prose_without_text_are_left_out(tmp_path):
    """ "N/A", "-" and blank items of a list say nothing: they are no context and no finding."""
    case = CASE | {"pre": "n/a", "pat": ["-", "Age: 4", None], "finding": ["N/A", "A cyst.", ""], "impression": "NA"}
    write_json(tmp_path / "c.json", [case | {"npy_path": "a.png"}])
    sample = draws(open_dataset("rad3d_caption", table="c.json", root=tmp_path), 0, 1)[0]
    assert answer(sample) == "Findings: A cyst." and texts(sample, "context") == ["Age: 4."]
