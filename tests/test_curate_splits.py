"""Splits by group, near duplicates, leaks, statistics and the card; several tools up to a training index."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline import phantoms
from input_pipeline.config import DataConfig
from input_pipeline.curate import duplicates, splits
from input_pipeline.curate.__main__ import main
from input_pipeline.datasets import open_dataset
from input_pipeline.index import summary_figure as prepare_picture
from input_pipeline.index.prepare import prepare
from tests import jats_papers
from tests.dataset_tables import VQA_HEADER, write_csv
from tests.scan_files import nifti


def picture(file, seed, **encoding):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6)).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(file, **encoding)


def table(file) -> list[dict]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "data"
    place.mkdir()
    for k in range(40):
        picture(place / f"{k}.png", k)
    picture(place / "near.png", 3, format="JPEG", quality=90)
    long = "There is a large consolidation in the right lower lobe with a small effusion beside it"
    rows = [("", f"{k}.png", f"What is seen in {k}?", f"Finding number {k}") for k in range(40)]
    rows += [("", "0.png", "Again?", "Yes"), ("", "near.png", "Near?", "Yes"), ("", "gone.png", "What?", "Nothing")]
    rows[10] = ("", "10.png", "What?", long + ".")
    rows[20] = ("", "20.png", "What is it?", long + " today.")
    write_csv(place / "vqa.csv", VQA_HEADER, *rows)
    return place


def test_hashes(root):
    hashes = {f"{k}.png": duplicates.image_hash(root / f"{k}.png") for k in [*range(40), "near"]}
    assert [pair[:2] for pair in duplicates.near_images(hashes)] == [("3.png", "near.png")]
    values = {str(k): 0x0123456789ABCDEF ^ bits for k, bits in enumerate((0, 7, 1 << 63 | 1 << 30 | 1, 15))}
    assert {(a, b): d for a, b, d in duplicates.near_images(values)} == {("0", "1"): 3, ("0", "2"): 3, ("1", "3"): 1}


def test_splits(root, tmp_path):
    out = tmp_path / "out"
    command = ["splits", "--root", str(root), "--test", "0.3", "vqa_rad=vqa.csv", "--out", str(out)]
    assert main([*command, "--near"]) == 0
    rows = {r["Figure_path"] + r["Question"]: r["split"] for r in table(out / "vqa.csv")}
    assert len(rows) == 43 and 4 <= list(rows.values()).count("test") <= 22
    of = lambda *names: {v for k, v in rows.items() if k.split("png")[0] + "png" in names}  # noqa: E731
    assert len(of("0.png")) == len(of("3.png", "near.png")) == len(of("10.png", "20.png")) == 1
    near = [json.loads(line) for line in (out / "near.jsonl").read_text().splitlines()]
    assert [p["kind"] for p in near] == ["pictures", "texts"]
    assert "gone.png" in (out / "problems.jsonl").read_text()
    train = open_dataset("vqa_rad", table=out / "vqa.csv", root=root, split="train")
    assert len(train) == list(rows.values()).count("train")
    before = (out / "vqa.csv").read_bytes()
    assert main([*command, "--near"]) == 0 and before == (out / "vqa.csv").read_bytes()
    assert main([*command, "--near", "--seed", "5"]) == 0 and before != (out / "vqa.csv").read_bytes()


def test_leaks_are_found(root, tmp_path):
    rows = [(*r.values(), "test" if r["Figure_path"] == "near.png" else "train") for r in table(root / "vqa.csv")]
    write_csv(root / "given.csv", (*VQA_HEADER, "split"), *rows)
    command = ["splits", "--root", str(root), "--check", "vqa_rad=given.csv", "--strict", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0, "without hashing nothing is known of it"
    assert main([*command, str(tmp_path / "b"), "--near"]) == 1
    assert "row given.csv 42" in (tmp_path / "b" / "leaks.jsonl").read_text()
    assert not (tmp_path / "b" / "given.csv").exists()


def test_an_owners_split_is_kept(root, tmp_path):
    """A group takes the split of its rows; of a group in two splits the test rows stay."""
    given = {"1.png": "test", "2.png": "val", "3.png": "train", "near.png": "test", "0.png": ""}
    rows = [(*r.values(), given.get(r["Figure_path"], "")) for r in table(root / "vqa.csv")]
    rows[-3] = (*rows[-3][:-1], "train")  # the second row of 0.png; the first one has no split
    assert rows[-3][1] == "0.png" and rows[-2][1] == "near.png"
    write_csv(root / "given.csv", (*VQA_HEADER, "split"), *rows)
    command = ["splits", "--root", str(root), "vqa_rad=given.csv", "--near", "--test", "0.3", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0
    made = [(r["Figure_path"], r["split"]) for r in table(tmp_path / "a" / "given.csv")]
    assert {"1.png": "test", "2.png": "val", "3.png": "", "near.png": "test"}.items() <= dict(made).items()
    assert [split for name, split in made if name == "0.png"] == ["train", "train"]
    assert {split for name, split in made if name not in given} == {"train", "test"}
    problems = (tmp_path / "a" / "problems.jsonl").read_text()
    assert "the row is in train, but its group is in test" in problems
    assert "3.png" in (tmp_path / "a" / "leaks.jsonl").read_text()
    assert main([*command, str(tmp_path / "b"), "--anew"]) == 0
    assert {r["split"] for r in table(tmp_path / "b" / "given.csv")} == {"train", "test"}


def test_a_group_keeps_its_split():
    assert len({splits.hash_split(0, f"g{k}", 0.5) for k in range(20)}) == 2
    share = sum(splits.hash_split(1, f"g{k}", 0.1) == "test" for k in range(4000)) / 4000
    assert 0.08 < share < 0.12


def test_statistics_and_card(root, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (8, 8, 4)).astype(np.int16)
    nifti(root / "v.nii.gz", voxels, np.eye(4))
    write_csv(root / "modality.csv", ("image_path", "answer"), ("v.nii.gz", "CT - noncontrast"))
    write_csv(root / "open.csv", ("image_path", "label"), ("1.png", "Edema"), ("2.png", "No finding"))
    (tmp_path / "r.json").write_text(json.dumps({"tool": "radmd", "options": {"seed": 3}, "counts": {"kept": 5}}))
    out = tmp_path / "stats"
    tables = ["rad3d_modality=modality.csv", "cxr_mix=open.csv"]
    assert main(["statistics", "--root", str(root), "--out", str(out), "--report", str(tmp_path / "r.json"),
                 "--licence", "open.csv=CC BY 4.0", "--name", "Mine", *tables]) == 0  # fmt: skip
    found = json.loads((out / "statistics.json").read_text())
    assert found["dimensions"] == {"2D": 2, "3D": 1} and found["modalities"] == {"X-ray": 2, "CT": 1}
    assert found["tasks"] == {"diagnosis": 2, "modality": 1}
    card = (out / "card.md").read_text()
    for words in ("# Mine", "| CC BY 4.0 |", "not stated: ask", "| X-ray | 2 | 66.7 % |", '"seed": 3', "- kept: 5"):
        assert words in card, words
    with Image.open(out / "figure4.png") as drawn:
        assert drawn.size[0] > 1000


def test_from_packages_and_cases_to_an_index(tmp_path, monkeypatch):
    """Run pmc-inline, rad3d, diagnosis and splits; `prepare` accepts every row of their output."""
    monkeypatch.setattr(prepare_picture, "draw", lambda report, file: file.write_bytes(b""))
    phantoms.write(tmp_path / "practice", train=8, test=4, size=64, workers=1)
    root = tmp_path / "built"
    jats_papers.packages(tmp_path / "oa", ("PMC9000003", "PMC9000004"))
    for k in range(30):
        case = tmp_path / "cases" / str(k)
        case.mkdir(parents=True)
        voxels = np.random.default_rng(k).integers(0, 99, (8, 8, 4)).astype(np.int16)
        nifti(case / "a.nii.gz", voxels, np.eye(4))
        said = {"findings": f"Finding {k}.", "title": f"Disease {k}", "features": [f"Sign {k}."]}
        (case / "case.json").write_text(json.dumps(said | {"scans": [{"path": "a.nii.gz", "modality": "MRI"}]}))
    for argv in (
        ["pmc-inline", str(tmp_path / "oa"), "--workers", "0", "--out", str(root)],
        ["rad3d", str(tmp_path / "cases"), "--workers", "0", "--out", str(root)],
        ["splits", "--root", str(root), "--test", "0.3", "--out", str(root / "split"),
         "rad3d_caption=caption.json", "rad3d_modality=modality.csv", "rad3d_rationale=rationale.json"],
    ):  # fmt: skip
        assert main([*argv, "--strict"]) == 0
    tables = {"caption": "caption.json", "modality": "modality.csv", "rationale": "rationale.json"}
    train = {k: {"family": f"rad3d_{k}", "table": f"split/{t}", "root": str(root), "split": "train"}
             for k, t in tables.items()}  # fmt: skip
    test = {f"{k}_test": fields | {"split": "test"} for k, fields in train.items()}
    train["inline"] = {"family": "pmc_inline", "table": "inline.csv", "root": str(root)}
    config = DataConfig(
        train=train, test=test, tokenizer=str(tmp_path / "practice" / "tokenizer.model"), terms="none", size_2d=64,
        size_3d=64, depth=16, text_length=1024, vision_rows=2, patch_length=64, planes=400, scans=8, workers=0,
    )  # fmt: skip
    report = prepare(config, tmp_path / "index", workers=0, strict=True)
    assert report["quarantine"] == 0 and report["leaks"] == {"study": 0, "scan": 0}
    assert (tmp_path / "index" / "index.json").is_file()


def test_every_scan_of_a_stack_counts(tmp_path):
    """Statistics count the scans of a stack, and a near duplicate of its second scan is found."""
    rng = np.random.default_rng(0)
    stack = np.repeat(rng.integers(0, 255, (3, 1, 64, 64, 4)), 3, 1).astype(np.float32)
    np.save(tmp_path / "stack.npy", stack)
    np.save(tmp_path / "copy.npy", stack[1:2])
    write_csv(
        tmp_path / "vqa.csv", ("image_path", "question", "answer"), ("stack.npy", "q", "a"), ("copy.npy", "r", "b")
    )
    out = tmp_path / "out"
    assert main(["statistics", "--root", str(tmp_path), "--out", str(out), "rad3d_vqa=vqa.csv"]) == 0
    found = json.loads((out / "statistics.json").read_text())
    assert found["dimensions"] == {"3D": 4} and found["tables"]["vqa.csv"]["scans"] == 4
    assert main(["splits", "--root", str(tmp_path), "--out", str(out), "--near", "rad3d_vqa=vqa.csv"]) == 0
    (pair,) = [json.loads(line) for line in (out / "near.jsonl").read_text().splitlines()]
    assert {pair["a"], pair["b"]} == {"stack.npy, volume 1", "copy.npy"}
    assert len({row["split"] for row in table(out / "vqa.csv")}) == 1


def test_a_blank_study_is_no_study(root, tmp_path):
    """ "nan" in the columns study and split is a missing value, not one group and one split of all rows."""
    rows = [(*r.values(), "nan", "None") for r in table(root / "vqa.csv")]
    write_csv(root / "given.csv", (*VQA_HEADER, "study", "split"), *rows)
    assert main(["splits", "--root", str(root), "--test", "0.3", "--out", str(tmp_path), "vqa_rad=given.csv"]) == 0
    assert {r["split"] for r in table(tmp_path / "given.csv")} == {"train", "test"}
