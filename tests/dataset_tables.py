"""Small tables and scans in the published layouts, and helpers to inspect samples."""

from __future__ import annotations

import csv
import json
import pathlib

import numpy as np
from PIL import Image

from input_pipeline.datasets import sample_rng
from input_pipeline.samples import Scan, Text


def write_csv(file: pathlib.Path, header, *rows) -> pathlib.Path:
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])
    return file


def write_json(file: pathlib.Path, value) -> pathlib.Path:
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def draws(dataset, i=0, n=200, seed=0):
    return [dataset.sample(i, sample_rng(seed, epoch, dataset.name, dataset.row_id(i))) for epoch in range(n)]


def texts(sample, role):
    return [p.text for p in sample.parts if isinstance(p, Text) and p.role == role]


def answer(sample) -> str:
    return texts(sample, "response")[0]


def shape(sample) -> str:
    """Return the parts as letters: s scan, i instruction, r response, c context, n interleaved text."""
    return "".join("s" if isinstance(p, Scan) else {"interleaved": "n"}.get(p.role, p.role[0]) for p in sample.parts)


VQA_HEADER = ("img_root_dir", "Figure_path", "Question", "Answer")
CASE = {
    "pre": "Sudden chest pain.",
    "pat": "Age: 40 years Gender: Male",
    "npy_path": "v/1.npy",
    "finding": "A 3 x 2.5 cm mass. No effusion.",
    "impression": "Lung abscess",
    "title": "Lung abscess",
    "articles": ["Lung abscess", "Pulmonary cavity"],
    "radiographic_features": ["CT: cavity with a level.", "X-ray: same"],
}


def volumes(root: pathlib.Path, name: str, scans: int):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    np.save(root / name, np.zeros((scans, 3, 4, 4, 2), np.uint8))


def every_family(tmp_path) -> dict[str, dict]:
    """Return family -> fields of one small data set per family, with real files where headers are read."""
    root = tmp_path
    volumes(root, "v/1.npy", 2)
    (root / "img").mkdir()
    Image.new("L", (4, 4)).save(root / "img" / "a.png")
    paper = [{"text": "First sentence.", "img_ref": []}, {"text": "As shown in Fig. 1, it grows.", "img_ref": ["f1"]}]
    write_json(root / "PMC77.json", paper)
    vqa = write_csv(root / "vqa.csv", VQA_HEADER, ("img", "a.png", 'Is "it", so\nto say, big?', "yes, 2.5 cm"))
    open_table = write_csv(root / "open.csv", ("image_path", "label"), ("img/a.png", "Edema, Pneumothorax"))
    cases = write_json(root / "cases.json", [CASE])
    jsonl = root / "own.jsonl"
    jsonl.write_text(
        '{"id": "a", "task": "report", "scans": ["img/a.png"], "instruction": "<image-1> Report?", "response": "X"}\n'
    )
    tables = {
        "pmc_inline": write_csv(root / "inline.csv", ("PMC_path",), ("PMC77.json",)),
        "pmc_oa": write_csv(root / "oa.csv", ("Figure_path", "Caption"), ("PMC12_f.jpg", "CT, axial.")),
        "pmc_casereport": write_csv(
            root / "case.csv",
            ("PMC_id", "img_ref", "context", "question", "answer"),
            ("PMC5", "['F1', 'F2']", "A man came.", "Q: What is it?", "A: An abscess."),
        ),
        "pmc_vqa": vqa,
        "vqa_rad": vqa,
        "slake": vqa,
        "mimic_cxr": write_csv(root / "mimic.csv", ("image_path", "label"), ("p10/p10000032/s5/x.jpg", "No\nchange.")),
        "cxr_mix": open_table,
        "vindr_pcxr": open_table,
        "vindr_mammo": open_table,
        "vindr_spinexr": open_table,
        "diagnosis": open_table,
        "mpx_single": write_csv(
            root / "single.csv", ("name", "type", "context"), ("MPX1_a.png", "modality", "CT - noncontrast")
        ),
        "mpx_multi": write_csv(
            root / "multi.csv",
            ("name", "type", "context", "history"),
            ("MPX1_a.png, MPX1_b.png", "ddx", "Cyst.", "nan"),
        ),
        "mpx_questions": write_csv(
            root / "q.csv",
            ("name", "question", "answer", "explanation"),
            ("MPX1_a.png", "Which?", "B", "Because."),
        ),
        "rad3d_caption": cases,
        "rad3d_rationale": cases,
        "rad3d_modality": write_csv(root / "modality.csv", ("image_path", "answer"), ("a.nii.gz", "MRI")),
        "rad3d_vqa": write_csv(
            root / "r3vqa.csv", ("image_path", "question", "answer"), ("v/1.npy", "Where?", "Left.")
        ),
        "jsonl": jsonl,
    }
    return {name: dict(table=table, root=root) for name, table in tables.items()}


def judged(sample) -> bool:
    return answer(sample) in ("yes", "no")


def own(tmp_path, *objects):
    file = tmp_path / "own.jsonl"
    file.write_text("".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects), encoding="utf-8")
    return dict(table=file, root=tmp_path)
