"""Phantoms: labels match the images, files have the right orientation, and data sets are complete or absent."""

from __future__ import annotations

import collections
import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pydicom
import pytest
from PIL import Image

from input_pipeline import phantoms
from input_pipeline.datasets import open_dataset, sample_rng
from input_pipeline.images import scans
from input_pipeline.phantoms import drawing, formats, tables, writing
from input_pipeline.phantoms.__main__ import main
from input_pipeline.phantoms.plan import LEVELS, MODALITIES, SIDES, SIZES, Labels

ARGUMENTS = {"train": 48, "test": 24, "seed": 5, "size": 64, "volumes": 0.3}


@pytest.fixture(scope="session")
def practice(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "practice"
    assert phantoms.write(out, workers=1, **ARGUMENTS)["written"]
    return out


def studies(split="train", count=None, **changes):
    a = ARGUMENTS | changes
    return [phantoms.describe(a["seed"], split, i, a["size"], a["volumes"]) for i in range(count or a[split])]


# --- texts ------------------------------------------------------------------------------------------------------------

ALL_LABELS = [
    Labels(modality, *rest)
    for modality in MODALITIES
    for rest in [(0,), (2,), *((1, *labels) for labels in itertools.product(SIDES, LEVELS, SIZES))]
]


def test_reports_survive_a_round_trip():
    assert phantoms.report(Labels("CT", 1, "left", "upper", "small")) == (
        "Findings: CT. One small lesion on the left, in the upper half. Impression: Nodule."
    )
    reports = [phantoms.report(labels) for labels in ALL_LABELS]
    assert len(set(reports)) == len(ALL_LABELS) == 40
    assert [phantoms.parse_report(text) for text in reports] == ALL_LABELS
    assert [phantoms.parse_report(f" {text.lower()}\n".replace(" impression", "\nimpression")) for text in reports] == (
        ALL_LABELS
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Findings: CT. No lesion. Impression: Nodule.", "contradicts"),
        ("Findings: CT. One big lesion on the left, in the upper half. Impression: Nodule.", "contradicts"),
        ("Findings: CT. One big lesion on the left. Impression: Mass.", "not a report"),
        ("Findings: PET. No lesion. Impression: Normal.", "not a report"),
        ("Findings: CT. No lesion. Impression: Normal. Findings:", "not a report"),
        ("", "not a report"),
    ],
)
def test_other_texts_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        phantoms.parse_report(text)


def test_half_of_the_yes_no_answers_are_yes():
    answers = collections.defaultdict(list)
    for study in studies(count=2000):
        for disease, label in tables.disease_labels(study).items():
            answers[disease].append(label)
    assert set(answers) == {"lesion", "nodule", "mass"}
    for disease, labels in answers.items():
        assert abs(np.mean(labels) - 0.5) < 4 * np.sqrt(0.25 / len(labels)), disease


# --- files ------------------------------------------------------------------------------------------------------------


def test_readers_return_what_was_drawn(practice):
    combinations = set()
    for study in studies():
        voxels = drawing.to_stored(study, phantoms.paint(study))
        read, header = scans.read(practice / study.path)
        combinations.add((study.file_format, study.depth > 1, study.stored_as if study.file_format == "nifti" else ""))
        if study.file_format == "jpeg":
            # Quality 92 on noise: measured at most 9 on average over an image's rows of 8x8 blocks, 22 for a pixel.
            assert np.abs(read.astype(int) - voxels).mean() < 4
        else:
            np.testing.assert_array_equal(read, voxels, err_msg=study.path)
        if study.depth > 1:
            assert header.orientation == "PLS" and header.spacing_mm == pytest.approx(study.spacing, abs=1e-3)
    assert len(combinations) >= 7, combinations


def test_the_left_lesion_is_left_in_the_patient():
    """Compute the lesion's world coordinates with nibabel and pydicom only. Left is -x in NIfTI, +x in DICOM."""
    checked = collections.Counter()
    for study in studies(count=250, volumes=0.5):
        if study.labels.count != 1 or study.labels.modality not in ("CT", "MRI"):
            continue
        contents = formats.encode(study, drawing.to_stored(study, phantoms.paint(study)))
        bare = drawing.to_stored(study, phantoms.paint(dataclasses.replace(study, lesions=())))[..., 0].astype(float)
        threshold = 0.2 * (study.value_range[1] - study.value_range[0])
        if study.file_format == "nifti":
            image = nibabel.Nifti1Image.from_bytes(gzip.decompress(contents[study.path]))
            array = np.asanyarray(image.dataobj).astype(float)
            # The image without lesion is moved to the file's axes by their codes, without the project's affine.
            lps = nibabel.orientations.axcodes2ornt("LPS")
            target = nibabel.orientations.axcodes2ornt(nibabel.aff2axcodes(image.affine))
            moved = nibabel.apply_orientation(bare.transpose(1, 0, 2), nibabel.orientations.ornt_transform(lps, target))
            index = np.argwhere(np.abs(array - moved) > threshold).mean(0)
            x, y, _ = nibabel.affines.apply_affine(image.affine, index)
            left, front = x < 0, y > 0
            assert "".join(nibabel.aff2axcodes(image.affine)) == study.stored_as
        elif study.file_format == "dicom":
            points = []
            for content in contents.values():
                file = pydicom.dcmread(io.BytesIO(content))
                heights = (np.arange(study.depth) - (study.depth - 1) / 2) * study.spacing[2]
                k = int(np.argmin(np.abs(heights - file.ImagePositionPatient[2])))
                pixels = file.pixel_array * float(file.get("RescaleSlope", 1)) + float(file.get("RescaleIntercept", 0))
                rows, columns = np.nonzero(np.abs(pixels - bare[:, :, k]) > threshold)
                points += [
                    (
                        file.ImagePositionPatient[0] + c * file.PixelSpacing[1],
                        file.ImagePositionPatient[1] + r * file.PixelSpacing[0],
                    )
                    for r, c in zip(rows, columns, strict=True)
                ]
            x, y = np.mean(points, axis=0)
            left, front = x > 0, y < 0
        else:
            continue
        assert left == (study.labels.side == "left"), study
        assert front == (study.labels.level == "upper"), study
        checked[study.file_format, study.stored_as if study.file_format == "nifti" else ""] += 1
    assert len(checked) == 5 and min(checked.values()) >= 2, checked


def test_ct_is_stored_in_hounsfield_units_and_monochrome1_is_inverted():
    kinds = collections.Counter()
    for study in studies(count=160, volumes=0.0):
        if study.file_format != "dicom":
            continue
        (content,) = formats.encode(study, drawing.to_stored(study, phantoms.paint(study))).values()
        file = pydicom.dcmread(io.BytesIO(content))
        corner = np.median(file.pixel_array[:2])
        if study.labels.modality == "CT":
            assert -1020 <= corner * file.RescaleSlope + file.RescaleIntercept < -500
        elif study.labels.modality == "X-ray":
            dark_is_high = corner > file.pixel_array.mean()
            assert (file.PhotometricInterpretation == "MONOCHROME1") == study.inverted == dark_is_high
        kinds[file.Modality, study.inverted] += 1
    assert set(kinds) == {("CT", False), ("MR", False), ("US", False), ("CR", False), ("CR", True)}


def test_dicom_files_contain_no_identity(practice):
    paths = sorted(practice.rglob("*.dcm"))
    uids, series = set(), collections.defaultdict(set)
    for path in paths:
        file = pydicom.dcmread(path)
        for element in file.iterall():
            assert not element.tag.is_private
            if element.VR in ("PN", "LO", "SH", "ST", "LT", "DA", "TM", "DT", "AE"):
                assert str(element.value) in ("", "PHANTOM", "drawn, no patient", "HU"), element
        assert file.PatientIdentityRemoved == "YES"
        uids.add(file.SOPInstanceUID)
        series[file.SeriesInstanceUID].add(path.parent if "-" in path.parent.name else path)
    assert len(uids) == len(paths) > 50 and all(len(places) == 1 for places in series.values())


def test_images_are_gray_with_8_or_16_bits(practice):
    modes = set()
    for path in practice.rglob("scans/**/*.*"):
        if path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                modes.add(image.mode)
    assert modes == {"L", "I;16"}


# --- the data set -----------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))


@pytest.mark.parametrize("split", ["train", "test"])
def test_tables_agree_with_the_labels(practice, split):
    truth = {row["path"]: row for row in rows_of(practice / split / "labels.jsonl")}
    assert len(truth) == ARGUMENTS[split] and all((practice / path).exists() for path in truth)
    solitary = sum(row["count"] == 1 for row in truth.values())
    table = {name: rows_of(practice / split / name) for name in os.listdir(practice / split)}

    for name in ("modality.csv", "diagnosis.csv", "report.csv"):
        assert [row["image_path"] for row in table[name]] == list(truth)
    assert all(row["answer"] == truth[row["image_path"]]["modality"] for row in table["modality.csv"])
    assert all(row["label"] == truth[row["image_path"]]["diagnosis"] for row in table["diagnosis.csv"])
    for row in table["report.csv"]:
        stated = dataclasses.asdict(phantoms.parse_report(row["label"]))
        assert stated == {key: truth[row["image_path"]][key] for key in stated}
    assert len(table["vqa.csv"]) == len(truth) + 3 * solitary
    for row in table["vqa.csv"]:
        facts = truth[f"{row['img_root_dir']}/{row['Figure_path']}"]
        attribute = next(key for key, question in tables.VQA.items() if question == row["Question"])
        assert row["Answer"] == (("zero", "one", "two")[facts["count"]] if attribute == "count" else facts[attribute])
    assert len(table["diagnosis_yes_no.csv"]) == len(truth) + solitary
    for row in table["diagnosis_yes_no.csv"]:
        facts = truth[row["image_path"]]
        present = facts["count"] > 0 if row["disease"] == "lesion" else facts["diagnosis"] == row["disease"]
        assert row["label"] == str(int(present))
    for row in table["rationale.json"]:
        facts = truth[row["npy_path"]]
        assert row["title"].lower() == facts["diagnosis"]
        stated = phantoms.parse_report(f"Findings: {row['finding']} Impression: {row['impression']}")
        assert stated.count == facts["count"]
    own = table["all.jsonl"]
    counted = sum(len(table[f"{name}.csv"]) for name in tables.COLUMNS) + len(table["rationale.json"])
    assert len(own) == counted == len({row["id"] for row in own})
    assert {row["task"] for row in own} == {"modality", "diagnosis", "vqa", "report", "rationale"}


@pytest.mark.parametrize(
    ("family", "table", "task"),
    [
        ("rad3d_modality", "modality.csv", {"modality"}),
        ("vindr_pcxr", "diagnosis_yes_no.csv", {"diagnosis"}),
        ("vindr_pcxr", "diagnosis.csv", {"diagnosis"}),
        ("mimic_cxr", "report.csv", {"report"}),
        ("vqa_rad", "vqa.csv", {"vqa"}),
        ("rad3d_caption", "rationale.json", {"report"}),
        ("rad3d_rationale", "rationale.json", {"rationale", "diagnosis"}),
        ("jsonl", "all.jsonl", {"modality", "diagnosis", "vqa", "report", "rationale"}),
    ],
)
def test_the_dataset_families_read_the_tables(practice, family, table, task):
    study = {} if family == "jsonl" else {"study": r"(p\d+-\w+-\d+)"}
    data = open_dataset(family, table=f"train/{table}", root=practice, **study)
    samples = [data.sample(i, sample_rng(0, 0, data.name, data.row_id(i))) for i in range(len(data))]
    assert not data.problems and {s.task for s in samples} == task
    known = {s.path: s.study_id for s in studies()}
    assert all(sample.study_id == known[sample.scans[0].path] for sample in samples)


def test_splits_share_nothing(practice):
    sums = dict(line.split("  ", 1) for line in (practice / "SHA256SUMS").read_text().splitlines())
    names = [name for name in sums.values() if name.startswith("scans/")]
    assert len(names) == len({digest for digest, name in sums.items() if name.startswith("scans/")}) > 72
    ids = {
        split: {row["study_id"] for row in rows_of(practice / split / "labels.jsonl")} for split in ("train", "test")
    }
    assert not ids["train"] & ids["test"]


def test_bytes_do_not_depend_on_the_number_of_workers(practice, tmp_path):
    finished = []
    phantoms.write(tmp_path / "again", workers=2, progress=finished.append, **ARGUMENTS)
    assert sum(finished) == 72
    for name in ("SHA256SUMS", "phantoms.json"):
        assert (tmp_path / "again" / name).read_bytes() == (practice / name).read_bytes()
    on_disk = {str(p.relative_to(practice)) for p in practice.rglob("*") if p.is_file()}
    listed = {line.split("  ", 1)[1] for line in (practice / "SHA256SUMS").read_text().splitlines()}
    assert on_disk == listed | {"SHA256SUMS", "phantoms.json"}


SMALL = {"train": 5, "validation": 2, "test": 3, "seed": 1, "size": 64, "volumes": 0.0, "workers": 1}


def test_a_second_run_checks_and_never_overwrites(tmp_path):
    out = tmp_path / "data"
    out.mkdir()  # an empty directory is allowed
    assert phantoms.write(out, **SMALL)["written"]
    assert not phantoms.write(out, **SMALL)["written"]
    with pytest.raises(ValueError, match="train is 5, not 6"):
        phantoms.write(out, **SMALL | {"train": 6})
    table = out / "test" / "vqa.csv"
    table.write_text(table.read_text().replace("zero", "two"))
    (out / "train" / "report.csv").unlink()
    with pytest.raises(ValueError, match="vqa.csv has changed, train/report.csv is missing.*delete it and run again"):
        phantoms.write(out, **SMALL)
    assert "two" in table.read_text()


def test_directories_with_unrelated_files_are_refused(tmp_path):
    for name in ("data", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not a complete phantom data set"):
        phantoms.write(tmp_path / "data", **SMALL)
    with pytest.raises(ValueError, match="not made by this program"):
        phantoms.write(tmp_path / "other", **SMALL)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "other.partial", "thesis.tex", "thesis.tex"]


def test_two_runs_cannot_write_one_directory(tmp_path):
    partial = tmp_path / "data.partial"
    partial.mkdir()
    (partial / ".phantoms").touch()
    with writing._locked(partial), pytest.raises(ValueError, match="another run is writing"):
        phantoms.write(tmp_path / "data", **SMALL)
    assert phantoms.write(tmp_path / "data", **SMALL)["written"] and not partial.exists()


def test_a_killed_run_leaves_no_complete_directory(tmp_path):
    out, partial = tmp_path / "data", tmp_path / "data.partial"
    arguments = {"train": 4000, "validation": 0, "test": 1, "seed": 1, "size": 64, "volumes": 0.1}
    options = [f"--{key}={value}" for key, value in arguments.items()]
    command = [sys.executable, "-m", "input_pipeline.phantoms", f"--out={out}", "--workers=2", *options]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as process:
        try:
            wait_for(lambda: len(list(partial.glob("scans/train/*"))) > 20)
            children = psutil.Process(process.pid).children(recursive=True)
            assert process.poll() is None and len(children) >= 2
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    wait_for(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))
    assert phantoms.write(out, **SMALL)["written"] and not partial.exists()
    assert not phantoms.write(out, **SMALL)["written"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_command_shows_a_summary_and_its_errors(tmp_path, capsys):
    out = tmp_path / "data"
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    assert main([f"--out={out}", *options]) == 0
    printed = capsys.readouterr().out
    assert "Practice data" in printed and "written" in printed and "lesions" in printed
    assert main([f"--out={out}", *options]) == 0
    assert "all checksums agree" in capsys.readouterr().out
    assert main([f"--out={out}", *options, "--train=6"]) == 2
    assert "another phantom data set" in capsys.readouterr().err
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (6 * 132, 4 * 156)
