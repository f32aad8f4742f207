"""The label files of public X-ray sets, as their owners publish them -> images with findings. Each reader is small:

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
    vindr_pcxr                image_labels_train.csv, image_labels_test.csv     1 / 0
    vindr_spinexr             annotations/train.csv, annotations/test.csv       lesion_type / No finding
    vindr_mammo               finding_annotations.csv                           finding_categories / No Finding

Nothing is filled in: a finding that a set never speaks of is in no answer.
"""  # noqa: E501

from __future__ import annotations

import ast
import csv
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from input_pipeline.curate.jobs import Result
from input_pipeline.datasets import diseases, tables
from input_pipeline.samples import RowError

NORMAL = "No finding"
UNCERTAIN = ("ignore", "positive", "negative")


@dataclasses.dataclass(slots=True)
class Image:
    """Attributes:
    path: below the member's folder. study: what must stay on one side of a split (a patient, where the set says).
    findings: disease -> True, False, None (uncertain). complete: what is not True is absent, as every finding of
      the set was looked for; so an image without any is normal.
    """

    path: str
    study: str
    findings: dict[str, bool | None]
    split: str = ""
    complete: bool = False
    row: int = 0
    file: str = ""

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(d for d, present in self.findings.items() if present and not diseases.is_normal(d))

    @property
    def is_normal(self) -> bool:
        """It was said to be normal, or everything was looked for and nothing found."""
        if self.positives or None in self.findings.values():
            return False
        return any(p and diseases.is_normal(d) for d, p in self.findings.items()) or self.complete


@dataclasses.dataclass
class Policy:
    """Attributes: uncertain: what CheXpert's -1 counts as (ignore, positive, negative); by disease where named."""

    uncertain: str = "ignore"
    of_disease: dict[str, str] = dataclasses.field(default_factory=dict)

    def decide(self, disease: str) -> bool | None:
        return {"ignore": None, "positive": True, "negative": False}[self.of_disease.get(disease, self.uncertain)]


Reader = Callable[[Path, Policy, Result], Iterator[Image]]


def _rows(file: Path, required, result: Result, optional=()) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV file, those that cannot be read being reported."""
    for row in tables.stream_csv(file, required, optional)[1]:
        if isinstance(row, RowError):
            result.problem(row.file, row.row, row.reason, row.remedy)
            continue
        number, cells = row
        bad = next(((name, why) for name, text in cells.items() if (why := tables.bad_text(text))), None)
        if bad:
            result.count("rows that cannot be used")
            result.problem(file, number, f"{bad[0]} {bad[1]}", "write the table as UTF-8 text")
        else:
            yield number, cells


def _files(folder: Path, *patterns: str) -> list[Path]:
    for pattern in patterns:
        found = sorted(f for f in folder.rglob(pattern) if f.is_file())
        if found:
            return found
    raise ValueError(f"{folder} has no {' or '.join(patterns)}: give the folder of the set as it was published")


def _index(folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Stem of every picture below a folder -> its path below it."""
    found: dict[str, str] = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(endings):
                found.setdefault(Path(name).stem, os.path.relpath(os.path.join(place, name), folder))
    return found


def _where(index: dict[str, str], name: str, ending: str) -> str:
    """Where the picture lies; where the set has it if pictures are not there (yet): `prepare` will say so."""
    return index.get(Path(name).stem, name if name.endswith(ending) else name + ending)


def _refuse(result: Result, file: Path, row: int, reason: str) -> None:
    result.count("rows that cannot be used")
    result.problem(file, row, reason, "correct or remove the row")


def _flag(value: str) -> bool | None:
    return {"1": True, "1.0": True, "0": False, "0.0": False}.get(value.strip())


# --- members of CXR-Mix -----------------------------------------------------------------------------------------------

CHESTXRAY14 = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema Emphysema "
    "Fibrosis Pleural_Thickening Hernia"
).split()


def chestxray14(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, test = _index(folder, (".png",)), set()
    for file in folder.rglob("test_list.txt"):
        test |= set(tables.decode(file).split())
    for file in _files(folder, "Data_Entry_2017*.csv"):
        for row, cells in _rows(file, ("Image Index", "Finding Labels"), result, ("Patient ID",)):
            name = cells["Image Index"].strip()
            labels = [label.strip() for label in cells["Finding Labels"].split("|") if label.strip()]
            unknown = [label for label in labels if label not in (*CHESTXRAY14, "No Finding")]
            if not labels or unknown or ("No Finding" in labels and len(labels) > 1):
                said = cells["Finding Labels"][:60]
                _refuse(result, file, row, f"labels are missing, unknown or contradictory: {said!r}")
                continue
            findings: dict = {d.replace("_", " "): d in labels for d in CHESTXRAY14}
            split = "" if not test else "test" if name in test else "train"
            study = f"chestxray14-{cells.get('Patient ID', '').strip() or name.split('_')[0]}"
            yield Image(_where(index, name, ".png"), study, findings, split, True, row, str(file))


CHEXPERT = (
    "No Finding|Enlarged Cardiomediastinum|Cardiomegaly|Lung Opacity|Lung Lesion|Edema|Consolidation|Pneumonia|"
    "Atelectasis|Pneumothorax|Pleural Effusion|Pleural Other|Fracture|Support Devices"
).split("|")


def chexpert(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    for file in [f for name in ("train.csv", "valid.csv", "test.csv") for f in sorted(folder.rglob(name))] or _files(
        folder, "train.csv"
    ):
        for row, cells in _rows(file, ("Path", *CHEXPERT), result):
            findings: dict[str, bool | None] = {}
            bad = []
            for disease in CHEXPERT:
                value = cells[disease].strip()
                if value in ("-1", "-1.0"):
                    decided = policy.decide(disease)
                    result.count(
                        f"chexpert: uncertain labels counted as {policy.of_disease.get(disease, policy.uncertain)}"
                    )
                    findings[disease] = decided
                elif _flag(value) is not None:
                    findings[disease] = _flag(value)
                elif value:
                    bad.append(f"{disease} {value[:20]!r}")
            path = re.sub(r"^CheXpert-v1\.0(?:-small)?/", "", cells["Path"].strip())
            if bad or not path:
                _refuse(result, file, row, f"a label is none of 1, 0, -1: {', '.join(bad)}" if bad else "Path is blank")
                continue
            beside = [d for d, present in findings.items() if present and d not in ("No Finding", "Support Devices")]
            if findings.get("No Finding") and beside:
                _refuse(result, file, row, f"No Finding beside a finding: {', '.join(beside)}: {path[:60]}")
                continue
            if findings.pop("No Finding", None):
                findings[NORMAL] = True
            patient = re.search(r"patient\d+", path)
            split = {"train.csv": "train", "valid.csv": "test", "test.csv": "test"}[file.name]
            study = f"chexpert-{patient.group()}" if patient else f"chexpert-{path}"
            yield Image(path, study, findings, split, False, row, str(file))


def rsna(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, found = _index(folder, (".dcm", ".png", ".jpg")), {}
    for file in _files(folder, "stage_2_train_labels.csv", "*train_labels.csv"):
        for row, cells in _rows(file, ("patientId", "Target"), result):
            name, flag = cells["patientId"].strip(), _flag(cells["Target"])
            if not name or flag is None:
                _refuse(result, file, row, f"Target {cells['Target'][:20]!r} is neither 0 nor 1")
            elif name in found and found[name][0] != flag:
                _refuse(result, file, row, f"Target contradicts row {found[name][1]} for {name}")
                found[name] = (None, row)
            else:
                found.setdefault(name, (flag, row))
    normal = _rsna_normal(folder, result)
    for name, (flag, row) in found.items():
        if flag is not None:
            findings = {"Pneumonia": flag} | ({NORMAL: True} if normal.get(name) == "normal" and not flag else {})
            yield Image(
                _where(index, name, ".dcm"), f"rsna-{name}", findings, "", False, row, "stage_2_train_labels.csv"
            )


def _rsna_normal(folder: Path, result: Result) -> dict[str, str]:
    """Of the images without an opacity, which are normal: "No Lung Opacity / Not Normal" is no normal image."""
    found = {}
    for file in sorted(folder.rglob("stage_2_detailed_class_info.csv")):
        for _, cells in _rows(file, ("patientId", "class"), result):
            found[cells["patientId"].strip()] = cells["class"].strip().lower()
    return found


def siim_acr(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, found = _index(folder, (".dcm", ".png", ".jpg")), {}
    for file in _files(folder, "stage_2_train.csv", "*train*rle*.csv", "*train*.csv"):
        for row, cells in _rows(file, ("ImageId", "EncodedPixels"), result) if _has(file, "EncodedPixels") else ():
            name, mask = cells["ImageId"].strip(), cells["EncodedPixels"].strip()
            if not name or not (mask == "-1" or re.fullmatch(r"\d+(?: -?\d+)*", mask)):
                _refuse(result, file, row, f"EncodedPixels {mask[:20]!r} is neither -1 nor a mask")
                continue
            present = mask != "-1"
            if name in found and found[name][0] is not None and found[name][0] != present:
                _refuse(result, file, row, f"a mask and -1 for one image, {name}; see row {found[name][1]}")
                found[name] = (None, row, file)
            else:
                found.setdefault(name, (present, row, file))
    for name, (present, row, file) in found.items():
        if present is not None:
            yield Image(
                _where(index, name, ".dcm"), f"siim-{name}", {"Pneumothorax": present}, "", False, row, str(file)
            )


def _has(file: Path, column: str) -> bool:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        return column in [c.strip() for c in next(csv.reader(lines), [])]


def _voted(folder: Path, result: Result, kind: str) -> Iterator[Image]:
    """One row a reader of an image, a column a finding, 0 or 1."""
    index = _index(folder, (".dicom", ".dcm", ".png", ".jpg"))
    for file in _files(folder, "image_labels_*.csv"):
        with open(file, encoding="utf-8-sig", newline="") as lines:
            header = [c.strip() for c in next(csv.reader(lines), [])]
        columns = [c for c in header if c and c.lower() not in ("image_id", "rad_id")]
        votes: dict[str, list[dict[str, bool]]] = {}
        first: dict[str, int] = {}
        for row, cells in _rows(file, ("image_id", *columns), result):
            said = {column: _flag(cells[column]) for column in columns}
            bad = [column for column, flag in said.items() if flag is None]
            if bad:
                _refuse(result, file, row, f"{', '.join(bad[:3])}: neither 0 nor 1")
                continue
            name = cells["image_id"].strip()
            votes.setdefault(name, []).append(said)
            first.setdefault(name, row)
        split = "test" if "test" in file.name else "train"
        for name, said in votes.items():
            findings: dict[str, bool | None] = {}
            for column in columns:
                yes = sum(vote[column] for vote in said)
                findings[column] = True if 2 * yes > len(said) else False if yes == 0 else None
                if findings[column] is None:
                    result.count(f"{kind}: findings that too few of an image's readers saw (ignored)")
            nothing = next((c for c in columns if diseases.is_normal(c)), None)
            normal = findings.pop(nothing, None) if nothing else None
            seen = any(p and not diseases.is_vague(d) for d, p in findings.items())
            if normal and seen:
                _refuse(result, file, first[name], f"'{nothing}' beside a finding: {name}")
                continue
            if normal and not any(p is None for p in findings.values()):
                findings[NORMAL] = True
            yield Image(_where(index, name, ".dicom"), f"{kind}-{name}", findings, split, False, first[name], str(file))


def vindr_cxr(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    yield from _voted(folder, result, "vindr-cxr")


def vindr_pcxr(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    yield from _voted(folder, result, "vindr-pcxr")


def covid_cxr2(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    files = [f for name in ("train.txt", "test.txt", "val.txt") for f in sorted(folder.rglob(name))]
    for file in files or _files(folder, "train.txt"):
        for row, line in enumerate(tables.decode(file).splitlines(), 1):
            cells = line.split()
            # Patient id, file, class, source; some patient ids hold blanks.
            if len(cells) < 3 or not {"positive", "negative"} & set(cells[2:]):
                _refuse(result, file, row, f"not 'patient file positive|negative source': {line[:60]!r}")
                continue
            at = next(k for k in range(len(cells) - 1, 1, -1) if cells[k] in ("positive", "negative"))
            split = "test" if file.stem in ("test", "val") else "train"
            path = (file.parent / file.stem / cells[at - 1]).relative_to(folder).as_posix()
            study = f"covid-cxr2-{' '.join(cells[: at - 1])}"
            yield Image(path, study, {"COVID-19": cells[at] == "positive"}, split, False, row, str(file))


def nlm_tb(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    found = [f for f in _files(folder, "*.png") if "mask" not in f.as_posix().lower()]
    for row, file in enumerate(found, 1):
        named = re.fullmatch(r"((?:MCU|CHN)CXR_\d+)_([01])", file.stem)
        if named is None:
            _refuse(result, file, row, "a name like MCUCXR_0001_0.png is needed")
            continue
        present = named[2] == "1"
        findings = {"Tuberculosis": present} | ({} if present else {NORMAL: True})
        yield Image(file.relative_to(folder).as_posix(), f"nlm-tb-{named[1]}", findings, "", False, row, str(file))


def object_cxr(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index = _index(folder, (".jpg", ".png"))
    for name in ("train.csv", "dev.csv", "test.csv"):
        for file in sorted(folder.rglob(name)) or (_files(folder, "train.csv") if name == "train.csv" else ()):
            for row, cells in _rows(file, ("image_name", "annotation"), result):
                image = cells["image_name"].strip()
                if not image:
                    _refuse(result, file, row, "image_name is blank")
                    continue
                split = "train" if name == "train.csv" else "test"
                findings = {"Foreign object": bool(cells["annotation"].strip())}
                yield Image(_where(index, image, ".jpg"), f"object-cxr-{image}", findings, split, False, row, str(file))


def openi(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    index, problems = _index(folder, (".png", ".dcm")), {}
    for file in _files(folder, "indiana_reports.csv"):
        for row, cells in _rows(file, ("uid", "Problems"), result):
            labels = [part.strip() for part in cells["Problems"].split(";") if part.strip()]
            if cells["uid"].strip() in problems:
                _refuse(result, file, row, f"uid {cells['uid']} stands twice")
            else:
                problems[cells["uid"].strip()] = (labels, row, file)
    for file in _files(folder, "indiana_projections.csv"):
        for row, cells in _rows(file, ("uid", "filename"), result):
            labels, number, reports = problems.get(cells["uid"].strip(), ([], row, file))
            if not labels:
                _refuse(result, file, row, f"uid {cells['uid'][:20]!r} has no Problems")
            elif any(label.lower() == "no indexing" for label in labels):
                result.count("openi: images whose report is not indexed")
            elif len(labels) > 1 and any(map(diseases.is_normal, labels)):
                _refuse(result, reports, number, "'normal' beside a problem")
            else:
                findings = {NORMAL if diseases.is_normal(label) else label: True for label in labels}
                path = _where(index, cells["filename"].strip(), ".png")
                yield Image(path, f"openi-{cells['uid'].strip()}", findings, "", False, number, str(reports))


# --- the other VinDr sets ---------------------------------------------------------------------------------------------


def vindr_spinexr(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    yield from _boxes(folder, result, "vindr-spinexr", ("train.csv", "test.csv"), "lesion_type")


def vindr_mammo(folder: Path, policy: Policy, result: Result) -> Iterator[Image]:
    yield from _boxes(folder, result, "vindr-mammo", ("finding_annotations.csv",), "finding_categories")


def _boxes(folder: Path, result: Result, kind: str, names, column: str) -> Iterator[Image]:
    """One row a box of an image, every finding of the set having been looked for."""
    index = _index(folder, (".dicom", ".dcm", ".png"))
    found: dict[str, tuple[set[str], str, str, int, Path]] = {}
    for file in [f for name in names for f in sorted(folder.rglob(name))] or _files(folder, names[0]):
        for row, cells in _rows(file, ("image_id", column), result, ("study_id", "split")):
            text = cells[column].strip()
            try:
                labels = ast.literal_eval(text) if text.startswith("[") else [text]
            except (ValueError, SyntaxError):
                labels = []
            if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
                _refuse(result, file, row, f"{column} {text[:40]!r} names no finding")
                continue
            name = cells["image_id"].strip()
            split = {"training": "train", "test": "test"}.get(cells.get("split", ""), "") or (
                "test" if "test" in file.name else "train"
            )
            study = cells.get("study_id", "").strip() or name
            found.setdefault(name, (set(), study, split, row, file))[0].update(label.strip() for label in labels)
    known = {d for labels, *_ in found.values() for d in labels if not diseases.is_normal(d)}
    for name, (labels, study, split, row, file) in found.items():
        if len(labels) > 1 and any(map(diseases.is_normal, labels)):
            _refuse(result, file, row, f"'No finding' beside a finding: {name}")
            continue
        findings = {disease: disease in labels for disease in sorted(known)}
        path = index.get(name, f"{study}/{name}.dicom" if kind == "vindr-mammo" else f"{name}.dicom")
        yield Image(path, f"{kind}-{study}", findings, split, True, row, str(file))


CXR_MIX: dict[str, Reader] = {
    "vindr_cxr": vindr_cxr,
    "chestxray14": chestxray14,
    "chexpert": chexpert,
    "covid_cxr2": covid_cxr2,
    "nlm_tb": nlm_tb,
    "object_cxr": object_cxr,
    "openi": openi,
    "rsna": rsna,
    "siim_acr": siim_acr,
}
MEMBERS: dict[str, Reader] = CXR_MIX | {
    "vindr_pcxr": vindr_pcxr,
    "vindr_spinexr": vindr_spinexr,
    "vindr_mammo": vindr_mammo,
}


def read(member: str, folder: Path, policy: Policy, result: Result) -> list[Image]:
    """All images of a set, each once. Contradictory and repeated ones are reported and left out.

    Raises:
      ValueError: the set's label file is not there, or is no such file.
    """
    if not folder.is_dir():
        raise ValueError(f"{member}: {folder} is no folder")
    images: dict[str, Image] = {}
    bad: set[str] = set()
    # Few sets of findings, and few names of files, serve all images.
    findings: dict[tuple, dict[str, bool | None]] = {}
    try:
        for image in MEMBERS[member](folder, policy, result):
            reason = tables.bad_path(image.path)
            other = images.get(image.path)
            if reason:
                _refuse(result, Path(image.file), image.row, f"the path cannot be used: {reason}")
            elif other is not None:
                same = other.findings == image.findings
                twice = "the image stands twice" if same else "the image stands twice, with other labels"
                _refuse(result, Path(image.file), image.row, f"{twice}: {image.path} (row {other.row})")
                if not same:
                    bad.add(image.path)
            else:
                image.findings = findings.setdefault(tuple(image.findings.items()), image.findings)
                image.file = sys.intern(image.file)
                images[image.path] = image
    except RowError as error:
        error.add_note(f"member {member}")
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{member}: a label file is not UTF-8 ({error})") from None
    return [image for path, image in images.items() if path not in bad]
