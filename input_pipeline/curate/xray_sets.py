"""Readers of the label files of public X-ray sets, as published -> images with findings.

    member                    file(s) below its folder                          a finding is True / False / None (uncertain)
    chestxray14               Data_Entry_2017*.csv                              listed / not listed (all 14 were looked for)
    chexpert                  train.csv, valid.csv                              1 / 0 / -1 by policy; blank is unknown
    rsna                      stage_2_train_labels.csv                          Target of any box / Target 0
    siim_acr                  *train*.csv (ImageId, EncodedPixels)              a mask / -1
    vindr_cxr                 image_labels_train.csv, image_labels_test.csv     most of its readers / none / else
    covid_cxr2                train.txt, test.txt, val.txt                      positive / negative
    nlm_tb                    *_0.png, *_1.png                                  1 / 0 in the name
    object_cxr                train.csv, dev.csv                                annotation / blank
    openi                     indiana_reports.csv, indiana_projections.csv      listed; "normal" / all else unknown
    mimic_cxr_chexpert        mimic-cxr-2.0.0-chexpert.csv.gz, -split.csv.gz    as chexpert
    mimic_cxr_negbio          mimic-cxr-2.0.0-negbio.csv.gz, -split.csv.gz      as chexpert
    vindr_pcxr                image_labels_train.csv, image_labels_test.csv     1 / 0
    vindr_spinexr             annotations/train.csv, annotations/test.csv       lesion_type / No finding
    vindr_mammo               finding_annotations.csv                           finding_categories / No Finding

Nothing is inferred: a finding that a set does not label is in no image's findings.
"""  # noqa: E501

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from input_pipeline.curate.jobs import Result
from input_pipeline.curate.labels import (
    NORMAL,
    UNCERTAIN,
    Image,
    Policy,
    all_files,
    first_files,
    flag,
    image_path,
    index_images,
    read_rows,
    reject,
)
from input_pipeline.datasets import diseases
from input_pipeline.datasets.csv_tables import csv_header
from input_pipeline.datasets.rows import bad_path, present
from input_pipeline.datasets.table_text import read_text
from input_pipeline.samples import RowError

Reader = Callable[[Path, Policy, Result], Iterator[Image]]

CHESTXRAY14 = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema Emphysema "
    "Fibrosis Pleural_Thickening Hernia"
).split()


def chestxray14(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, test = index_images(folder, (".png",)), set()
    for file in folder.rglob("test_list.txt"):
        test |= set(read_text(file).split())
    for file in first_files(folder, "Data_Entry_2017*.csv"):
        for row, cells in read_rows(file, ("Image Index", "Finding Labels"), result, ("Patient ID",)):
            name = cells["Image Index"].strip()
            labels = [label.strip() for label in cells["Finding Labels"].split("|") if label.strip()]
            unknown = [label for label in labels if label not in (*CHESTXRAY14, "No Finding")]
            if not labels or unknown or ("No Finding" in labels and len(labels) > 1):
                shown = cells["Finding Labels"][:60]
                reject(result, file, row, f"labels are missing, unknown or contradictory: {shown!r}")
                continue
            findings: dict = {d.replace("_", " "): d in labels for d in CHESTXRAY14}
            split = "" if not test else "test" if name in test else "train"
            study = f"chestxray14-{present(cells.get('Patient ID', '')) or name.split('_')[0]}"
            yield Image(image_path(index, name, ".png"), study, findings, split, True, row, str(file))


CHEXPERT = (
    "No Finding|Enlarged Cardiomediastinum|Cardiomegaly|Lung Opacity|Lung Lesion|Edema|Consolidation|Pneumonia|"
    "Atelectasis|Pneumothorax|Pleural Effusion|Pleural Other|Fracture|Support Devices"
).split("|")


def _chexpert_findings(cells: dict, member: str, policy: Policy, result: Result) -> dict[str, bool | None]:
    """Return the findings of a row with CheXpert's 14 columns. Raises ValueError with the reason why it is not used."""
    findings: dict[str, bool | None] = {}
    bad = []
    for disease in CHEXPERT:
        value = cells[disease].strip()
        if value in ("-1", "-1.0"):
            result.count(f"{member}: uncertain labels counted as {policy.choice(disease)}")
            findings[disease] = UNCERTAIN[policy.choice(disease)]
        elif flag(value) is not None:
            findings[disease] = flag(value)
        elif value:
            bad.append(f"{disease} {value[:20]!r}")
    if bad:
        raise ValueError(f"a label is not 1, 0 or -1: {', '.join(bad)}")
    positives = [d for d, present in findings.items() if present and d not in ("No Finding", "Support Devices")]
    if findings.get("No Finding") and positives:
        raise ValueError(f"No Finding together with a finding: {', '.join(positives)}")
    if findings.pop("No Finding", None):
        findings[NORMAL] = True
    return findings


def chexpert(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    for file in all_files(folder, "train.csv", "valid.csv", "test.csv"):
        for row, cells in read_rows(file, ("Path", *CHEXPERT), result):
            path = re.sub(r"^CheXpert-v1\.0(?:-small)?/", "", cells["Path"].strip())
            if not path:
                reject(result, file, row, "Path is blank")
                continue
            try:
                findings = _chexpert_findings(cells, "chexpert", policy, result)
            except ValueError as error:
                reject(result, file, row, f"{error}: {path[:60]}")
                continue
            patient = re.search(r"patient\d+", path)
            split = "train" if file.name == "train.csv" else "test"
            study = f"chexpert-{patient.group()}" if patient else f"chexpert-{path}"
            yield Image(path, study, findings, split, False, row, str(file))


def _mimic_cxr(labeller: str, folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    """Read the labels that a labeller (chexpert, negbio) gave to the reports of MIMIC-CXR-JPG, one row per study."""
    labels: dict[str, tuple[dict[str, bool | None], int]] = {}
    (table,) = first_files(folder, f"mimic-cxr-2.0.0-{labeller}.csv*")[:1]
    for row, cells in read_rows(table, ("subject_id", "study_id", *CHEXPERT), result):
        try:
            labels[cells["study_id"]] = _chexpert_findings(cells, "mimic_cxr", policy, result), row
        except ValueError as error:
            reject(result, table, row, str(error))
    for file in first_files(folder, "mimic-cxr-2.0.0-split.csv*")[:1]:
        for _, cells in read_rows(file, ("dicom_id", "study_id", "subject_id", "split"), result):
            findings, row = labels.get(cells["study_id"], ({}, 0))
            if not findings:
                result.count("mimic_cxr: images of studies without labels")
                continue
            patient = f"p{cells['subject_id']}"
            path = f"files/{patient[:3]}/{patient}/s{cells['study_id']}/{cells['dicom_id']}.jpg"
            split = {"validate": "validation"}.get(cells["split"], cells["split"])
            yield Image(path, patient, findings, split, False, row, str(table))


def rsna(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, targets = index_images(folder, (".dcm", ".png", ".jpg")), {}
    for file in first_files(folder, "stage_2_train_labels.csv", "*train_labels.csv"):
        for row, cells in read_rows(file, ("patientId", "Target"), result):
            name, target = cells["patientId"].strip(), flag(cells["Target"])
            if not name or target is None:
                reject(result, file, row, f"Target {cells['Target'][:20]!r} is neither 0 nor 1")
            elif name in targets and targets[name][0] != target:
                reject(result, file, row, f"Target contradicts row {targets[name][1]} for {name}")
                targets[name] = (None, row)
            else:
                targets.setdefault(name, (target, row))
    # An image without an opacity is not always normal: there is also "No Lung Opacity / Not Normal".
    normal = set()
    for file in sorted(folder.rglob("stage_2_detailed_class_info.csv")):
        for _, cells in read_rows(file, ("patientId", "class"), result):
            if cells["class"].strip().lower() == "normal":
                normal.add(cells["patientId"].strip())
    for name, (target, row) in targets.items():
        if target is not None:
            findings = {"Pneumonia": target} | ({NORMAL: True} if name in normal and not target else {})
            path = image_path(index, name, ".dcm")
            yield Image(path, f"rsna-{name}", findings, "", False, row, "stage_2_train_labels.csv")


def siim_acr(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, masks = index_images(folder, (".dcm", ".png", ".jpg")), {}
    for file in first_files(folder, "stage_2_train.csv", "*train*rle*.csv", "*train*.csv"):
        if "EncodedPixels" not in csv_header(file):
            continue
        for row, cells in read_rows(file, ("ImageId", "EncodedPixels"), result):
            name, mask = cells["ImageId"].strip(), cells["EncodedPixels"].strip()
            if not name or not (mask == "-1" or re.fullmatch(r"\d+(?: -?\d+)*", mask)):
                reject(result, file, row, f"EncodedPixels {mask[:20]!r} is neither -1 nor a mask")
                continue
            present = mask != "-1"
            if name in masks and masks[name][0] is not None and masks[name][0] != present:
                reject(result, file, row, f"both a mask and -1 for one image, {name}; see row {masks[name][1]}")
                masks[name] = (None, row, file)
            else:
                masks.setdefault(name, (present, row, file))
    for name, (present, row, file) in masks.items():
        if present is not None:
            path = image_path(index, name, ".dcm")
            yield Image(path, f"siim-{name}", {"Pneumothorax": present}, "", False, row, str(file))


def _voted(kind: str, folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    """Read one row per image and reader, with a column of 0 and 1 per finding."""
    index = index_images(folder, (".dicom", ".dcm", ".png", ".jpg"))
    for file in first_files(folder, "image_labels_*.csv"):
        columns = [c for c in csv_header(file) if c and c.lower() not in ("image_id", "rad_id")]
        votes: dict[str, tuple[int, list[dict[str, bool]]]] = {}  # image -> its first row, labels by its readers
        for row, cells in read_rows(file, ("image_id", *columns), result):
            labels = {column: flag(cells[column]) for column in columns}
            bad = [column for column, label in labels.items() if label is None]
            if bad:
                reject(result, file, row, f"{', '.join(bad[:3])}: neither 0 nor 1")
                continue
            votes.setdefault(cells["image_id"].strip(), (row, []))[1].append(labels)
        split = "test" if "test" in file.name else "train"
        normal_column = next((c for c in columns if diseases.is_normal(c)), None)
        for name, (first_row, of_readers) in votes.items():
            findings: dict[str, bool | None] = {}
            for column in columns:
                yes = sum(labels[column] for labels in of_readers)
                findings[column] = True if 2 * yes > len(of_readers) else False if yes == 0 else None
                if findings[column] is None:
                    result.count(f"{kind}: findings that too few of an image's readers saw (ignored)")
            normal = findings.pop(normal_column, None) if normal_column else None
            if normal and any(p and not diseases.is_vague(d) for d, p in findings.items()):
                reject(result, file, first_row, f"'{normal_column}' together with a finding: {name}")
                continue
            if normal and None not in findings.values():
                findings[NORMAL] = True
            path = image_path(index, name, ".dicom")
            yield Image(path, f"{kind}-{name}", findings, split, False, first_row, str(file))


def covid_cxr2(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    for file in all_files(folder, "train.txt", "test.txt", "val.txt"):
        for row, line in enumerate(read_text(file).splitlines(), 1):
            cells = line.split()
            # Patient id, file, class, source; some patient ids have spaces.
            if len(cells) < 3 or not {"positive", "negative"} & set(cells[2:]):
                reject(result, file, row, f"not 'patient file positive|negative source': {line[:60]!r}")
                continue
            label = next(k for k in range(len(cells) - 1, 1, -1) if cells[k] in ("positive", "negative"))
            split = "test" if file.stem in ("test", "val") else "train"
            path = (file.parent / file.stem / cells[label - 1]).relative_to(folder).as_posix()
            study = f"covid-cxr2-{' '.join(cells[: label - 1])}"
            yield Image(path, study, {"COVID-19": cells[label] == "positive"}, split, False, row, str(file))


def nlm_tb(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    files = [f for f in first_files(folder, "*.png") if "mask" not in f.as_posix().lower()]
    for row, file in enumerate(files, 1):
        match = re.fullmatch(r"((?:MCU|CHN)CXR_\d+)_([01])", file.stem)
        if match is None:
            reject(result, file, row, "the file name must be like MCUCXR_0001_0.png")
            continue
        present = match[2] == "1"
        findings = {"Tuberculosis": present} | ({} if present else {NORMAL: True})
        yield Image(file.relative_to(folder).as_posix(), f"nlm-tb-{match[1]}", findings, "", False, row, str(file))


def object_cxr(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index = index_images(folder, (".jpg", ".png"))
    for file in all_files(folder, "train.csv", "dev.csv", "test.csv"):
        for row, cells in read_rows(file, ("image_name", "annotation"), result):
            name = cells["image_name"].strip()
            if not name:
                reject(result, file, row, "image_name is blank")
                continue
            split = "train" if file.name == "train.csv" else "test"
            findings = {"Foreign object": bool(present(cells["annotation"]))}
            path = image_path(index, name, ".jpg")
            yield Image(path, f"object-cxr-{name}", findings, split, False, row, str(file))


def openi(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, problems = index_images(folder, (".png", ".dcm")), {}
    for file in first_files(folder, "indiana_reports.csv"):
        for row, cells in read_rows(file, ("uid", "Problems"), result):
            labels = [part.strip() for part in cells["Problems"].split(";") if part.strip()]
            if cells["uid"].strip() in problems:
                reject(result, file, row, f"uid {cells['uid']} is repeated")
            else:
                problems[cells["uid"].strip()] = (labels, row, file)
    for file in first_files(folder, "indiana_projections.csv"):
        for row, cells in read_rows(file, ("uid", "filename"), result):
            labels, number, reports = problems.get(cells["uid"].strip(), ([], row, file))
            if not labels:
                reject(result, file, row, f"uid {cells['uid'][:20]!r} has no Problems")
            elif any(label.lower() == "no indexing" for label in labels):
                result.count("openi: images whose report is not indexed")
            elif len(labels) > 1 and any(map(diseases.is_normal, labels)):
                reject(result, reports, number, "'normal' together with a problem")
            else:
                findings = {NORMAL if diseases.is_normal(label) else label: True for label in labels}
                path = image_path(index, cells["filename"].strip(), ".png")
                yield Image(path, f"openi-{cells['uid'].strip()}", findings, "", False, number, str(reports))


def _boxes(kind: str, names, column: str, folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    """Read a set with one row per bounding box, in which every image was checked for all findings."""
    index = index_images(folder, (".dicom", ".dcm", ".png"))
    images: dict[str, tuple[set[str], str, str, int, Path]] = {}
    for file in all_files(folder, *names):
        for row, cells in read_rows(file, ("image_id", column), result, ("study_id", "split")):
            text = cells[column].strip()
            try:
                labels = ast.literal_eval(text) if text.startswith("[") else [text]
            except (ValueError, SyntaxError):
                labels = []
            if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
                reject(result, file, row, f"{column} {text[:40]!r} names no finding")
                continue
            name = cells["image_id"].strip()
            split = {"training": "train", "test": "test"}.get(cells.get("split", ""))
            split = split or ("test" if "test" in file.name else "train")
            study = present(cells.get("study_id", "")) or name
            images.setdefault(name, (set(), study, split, row, file))[0].update(label.strip() for label in labels)
    known = sorted({d for labels, *_ in images.values() for d in labels if not diseases.is_normal(d)})
    for name, (labels, study, split, row, file) in images.items():
        if len(labels) > 1 and any(map(diseases.is_normal, labels)):
            reject(result, file, row, f"'No finding' together with a finding: {name}")
            continue
        findings = {disease: disease in labels for disease in known}
        path = index.get(name, f"{study}/{name}.dicom" if kind == "vindr-mammo" else f"{name}.dicom")
        yield Image(path, f"{kind}-{study}", findings, split, True, row, str(file))


_READERS = (chestxray14, chexpert, covid_cxr2, nlm_tb, object_cxr, openi, rsna, siim_acr)
CXR_MIX: dict[str, Reader] = {"vindr_cxr": functools.partial(_voted, "vindr-cxr")}
CXR_MIX |= {reader.__name__: reader for reader in _READERS}
MEMBERS: dict[str, Reader] = CXR_MIX | {
    "mimic_cxr_chexpert": functools.partial(_mimic_cxr, "chexpert"),
    "mimic_cxr_negbio": functools.partial(_mimic_cxr, "negbio"),
    "vindr_pcxr": functools.partial(_voted, "vindr-pcxr"),
    "vindr_spinexr": functools.partial(_boxes, "vindr-spinexr", ("train.csv", "test.csv"), "lesion_type"),
    "vindr_mammo": functools.partial(_boxes, "vindr-mammo", ("finding_annotations.csv",), "finding_categories"),
}


def read(member: str, folder: Path, policy: Policy, result: Result) -> list[Image]:
    """Return all images of a set, each once. Contradictory and repeated images become problems and are dropped.

    Raises ValueError if the label file of the set is missing or has another format.
    """
    if not folder.is_dir():
        raise ValueError(f"{member}: {folder} is not a directory")
    images: dict[str, Image] = {}
    contradictory: set[str] = set()
    # Share the few distinct sets of findings and file names between images, to save memory.
    findings: dict[tuple, dict[str, bool | None]] = {}
    try:
        for image in MEMBERS[member](folder, policy, result):
            reason = bad_path(image.path)
            other = images.get(image.path)
            if reason:
                reject(result, image.file, image.row, f"the path cannot be used: {reason}")
            elif other is not None:
                same = other.findings == image.findings
                repeated = "the image is repeated" if same else "the image is repeated, with other labels"
                reject(result, image.file, image.row, f"{repeated}: {image.path} (row {other.row})")
                if not same:
                    contradictory.add(image.path)
            else:
                image.findings = findings.setdefault(tuple(image.findings.items()), image.findings)
                image.file = sys.intern(image.file)
                images[image.path] = image
    except RowError as error:
        error.add_note(f"member {member}")
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{member}: a label file is not UTF-8 ({error})") from None
    return [image for path, image in images.items() if path not in contradictory]
