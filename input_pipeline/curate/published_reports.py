"""Published sets of studies with reports, or with the labels of reports.

The file and column names are those of the owners' pages, which docs/data_layouts.md cites.
"""

from __future__ import annotations

import ast
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

from input_pipeline.curate import report_sections
from input_pipeline.curate.labels import reject
from input_pipeline.curate.source_files import Case, SourceFiles, prose, report, text
from input_pipeline.images import scans

Reader = Callable[[SourceFiles], Iterator[Case]]
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("val", "valid", "validate", "validation"), "validation")
FRONTAL = ("PA", "AP", "AP AXIAL", "PA LLD", "AP LLD", "AP RLD", "PA RLD")  # first among the views of a study


def mimic_cxr_jpg(files: SourceFiles) -> Iterator[Case]:
    """Yield the studies of MIMIC-CXR-JPG with findings and impression of mimic-cxr-reports, frontal views first."""
    keys = ("dicom_id", "study_id", "subject_id")
    metadata = files.find("mimic-cxr-2.0.0-metadata.csv*")
    views = {text(c, "dicom_id"): text(c, "ViewPosition") for _, c in files.rows(metadata, (*keys, "ViewPosition"))}
    table, studies = files.find("mimic-cxr-2.0.0-split.csv*"), {}
    for number, cells in files.rows(table, (*keys, "split")):
        subject, study, image = (text(cells, key) for key in ("subject_id", "study_id", "dicom_id"))
        if (split := SPLITS.get(text(cells, "split"))) is None:
            reject(files.result, table, number, f"split {text(cells, 'split')[:20]!r} is unknown")
            continue
        studies.setdefault((subject, study), (split, []))[1].append(image)
    for (subject, study), (split, images) in studies.items():
        folder = f"files/p{subject[:2]}/p{subject}/s{study}"
        file = next((f for f in (f"{folder}.txt", f"mimic-cxr-reports/{folder}.txt") if files.exists(f)), None)
        if file is None:
            files.result.count(f"{files.folder}: studies without a report file")
            continue
        parts = _sections(files, files.root / file)
        if not (answer := report(parts.get("findings", ""), parts.get("impression", ""))):
            files.result.count(f"{files.folder}: reports without findings and impression")
            continue
        images.sort(key=lambda image: (views.get(image, "") not in FRONTAL, image))
        yield Case(
            id=f"s{study}", task="report", scans=tuple(files.scan(f"{folder}/{image}.jpg") for image in images),
            answer=answer, prompts="report_cxr", context=parts.get("indication", ""), study=f"p{subject}", split=split,
        )  # fmt: skip


def _sections(files: SourceFiles, file: Path) -> dict[str, str]:
    """Return the named sections of a report file, and count every heading."""
    found = report_sections.sections(file.read_text(encoding="utf-8", errors="replace"))
    for heading in {heading for heading, _ in found}:
        known = heading if heading in report_sections.NAMES else "others"
        files.result.count(f"{files.folder}: reports with the heading {known}")
    return report_sections.named(found)


def openi(files: SourceFiles) -> Iterator[Case]:
    """Yield the reports of OpenI (Indiana University): ecgen-radiology/*.xml, images as PNG or DICOM."""
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    for file in sorted(files.root.rglob("ecgen-radiology/*.xml")) or [files.find("*.xml")]:
        try:
            root = etree.parse(str(file), parser).getroot()
        except etree.XMLSyntaxError as error:
            reject(files.result, file, 0, f"the XML is broken: {str(error)[:100]}", "download it again")
            continue
        parts = {e.get("Label", ""): " ".join("".join(e.itertext()).split()) for e in root.iter("AbstractText")}
        names = [image.get("id", "") for image in root.iter("parentImage")]
        answer = report(prose(parts, "FINDINGS"), prose(parts, "IMPRESSION"))
        if not names or not answer:
            files.result.count(f"{files.folder}: reports without {'images' if answer else 'findings and impression'}")
            continue
        # NLMCXR_dcm/1/1_IM-0001-3001.dcm is the DICOM file of CXR1_1_IM-0001-3001.
        dicom = [name.split("_", 1)[-1] for name in names]
        yield Case(
            id=file.stem, task="report", answer=answer, prompts="report_cxr", context=prose(parts, "INDICATION"),
            scans=tuple(files.scan(f"NLMCXR_png/{name}.png", f"NLMCXR_dcm/{other.split('_')[0]}/{other}.dcm")
                        for name, other in zip(names, dicom, strict=True)),
            study=f"openi-{file.stem}",
        )  # fmt: skip


def openi_kaggle(files: SourceFiles) -> Iterator[Case]:
    """Yield the same reports in the layout of Kaggle: indiana_reports.csv and indiana_projections.csv."""
    images: dict[str, list[tuple[bool, str]]] = {}
    for _, cells in files.rows(files.find("indiana_projections.csv"), ("uid", "filename", "projection")):
        lateral = text(cells, "projection") != "Frontal"
        images.setdefault(text(cells, "uid"), []).append((lateral, text(cells, "filename")))
    table = files.find("indiana_reports.csv")
    for _, cells in files.rows(table, ("uid", "findings", "impression", "indication")):
        uid, answer = text(cells, "uid"), report(prose(cells, "findings"), prose(cells, "impression"))
        if not answer or uid not in images:
            files.result.count(f"{files.folder}: reports without {'images' if answer else 'findings and impression'}")
            continue
        yield Case(
            id=uid, task="report", answer=answer, prompts="report_cxr", context=prose(cells, "indication"),
            scans=tuple(files.scan(f"images/images_normalized/{name}") for _, name in sorted(images[uid])),
            study=f"openi-{uid}",
        )  # fmt: skip


def chexpert_plus(files: SourceFiles) -> Iterator[Case]:
    """Yield the studies of CheXpert Plus: the rows of df_chexpert_plus_240401.csv with one folder of images."""
    table, studies = files.find("df_chexpert_plus_*.csv"), {}
    required = ("path_to_image", "deid_patient_id", "section_findings", "section_impression", "split")
    for number, cells in files.rows(table, required):
        path, split = text(cells, "path_to_image"), SPLITS.get(text(cells, "split"))
        if not path or split is None:
            reject(files.result, table, number, "path_to_image is blank, or the split is unknown")
            continue
        study = studies.setdefault(posixpath.dirname(path), (cells, split, []))
        study[2].append((text(cells, "frontal_lateral") != "Frontal", path, text(cells, "path_to_dcm")))
    for folder, (cells, split, images) in studies.items():
        if not (answer := report(prose(cells, "section_findings"), prose(cells, "section_impression"))):
            files.result.count(f"{files.folder}: reports without findings and impression")
            continue
        yield Case(
            id=folder, task="report", answer=answer, prompts="report_cxr",
            scans=tuple(files.scan(*_chexpert_files(path, dicom)) for _, path, dicom in sorted(images)),
            context=prose(cells, "section_clinical_history") or prose(cells, "section_history"),
            study=text(cells, "deid_patient_id"), split=split,
        )  # fmt: skip


def _chexpert_files(path: str, dicom: str) -> list[str]:
    """Return where an image may be: the set is published as PNG, as DICOM, and with the JPEG files of CheXpert."""
    png = posixpath.splitext(path)[0] + ".png"
    return [path, png, f"PNG/{png}", *([dicom, f"DICOM/{dicom}"] if dicom else [])]


def ct_rate(files: SourceFiles) -> Iterator[Case]:
    """Yield the volumes of CT-RATE with their reports. Volumes that lost their rescaling become problems."""
    for split, name in (("train", "train"), ("validation", "valid")):
        metadata = files.find(f"{split}_metadata.csv")
        scaling = {
            text(cells, "VolumeName"): (float(cells["RescaleSlope"] or 1), float(cells["RescaleIntercept"] or 0))
            for _, cells in files.rows(metadata, ("VolumeName", "RescaleSlope", "RescaleIntercept"))
        }
        table = files.find(f"{split}_reports.csv")
        for number, cells in files.rows(table, ("VolumeName", "Findings_EN", "Impressions_EN")):
            volume = text(cells, "VolumeName")
            if not (answer := report(prose(cells, "Findings_EN"), prose(cells, "Impressions_EN"))):
                files.result.count(f"{files.folder}: reports without findings and impression")
                continue
            patient, scan = volume.rsplit("_", 2)[0], volume.rsplit("_", 1)[0]  # train_1_a_1.nii.gz
            path = files.scan(*(f"{base}/{patient}/{scan}/{volume}" for base in
                                (f"dataset/{name}_fixed", f"{name}_fixed", f"dataset/{name}", name)))  # fmt: skip
            if lost := _lost_scaling(files.root / path, *scaling.get(volume, (1, 0))):
                reject(files.result, table, number, lost, "download the folders train_fixed and valid_fixed")
                continue
            yield Case(
                id=volume.removesuffix(".nii.gz"), task="report", scans=(path,), answer=answer, prompts="report",
                context=prose(cells, "ClinicalInformation_EN"), study=f"ct-rate-{patient}", split=split,
            )  # fmt: skip


def _lost_scaling(file: Path, slope: float, intercept: float) -> str:
    """Return why the voxels of a CT are not in Hounsfield units, or "".

    The first release of CT-RATE has the stored values without the intercept, which is only in its metadata. A header
    with a scaling needs no check; otherwise the minimum of the voxels shows whether they are in Hounsfield units.
    """
    if (slope, intercept) == (1, 0) or not file.exists():
        return ""
    try:
        if scans.header(file).rescaled or scans.read(file)[1].value_range[0] < 0:
            return ""
    except scans.ScanError as error:
        return error.reason
    missing = f"slope {slope:g} and intercept {intercept:g} of the metadata are not applied"
    return f"the volume is not in Hounsfield units: {missing}"


def inspect(files: SourceFiles) -> Iterator[Case]:
    """Yield the CT pulmonary angiographies of INSPECT with their impressions."""
    splits = {
        text(c, "impression_id"): SPLITS.get(text(c, "split"), "")
        for _, c in files.rows(files.find("splits_*.tsv"), ("impression_id", "split"))
    }
    images = {
        text(c, "impression_id"): (text(c, "image_id"), text(c, "person_id"))
        for _, c in files.rows(files.find("study_mapping_*.tsv"), ("impression_id", "image_id", "person_id"))
    }
    table = files.find("impressions_*.tsv")
    for number, cells in files.rows(table, ("impression_id", "impressions")):
        key, answer = text(cells, "impression_id"), report("", prose(cells, "impressions"))
        if not answer or key not in images or not splits.get(key):
            reject(files.result, table, number, f"impression {key} has no text, no image or no split")
            continue
        image, person = images[key]
        yield Case(
            id=key, task="report", scans=(files.scan(f"CTPA/{image}.nii.gz"),), answer=answer, prompts="report",
            study=f"inspect-{person}", split=splits[key],
        )  # fmt: skip


def merlin(files: SourceFiles) -> Iterator[Case]:
    """Yield the abdominal CTs of Merlin with the findings of reports_final.xlsx."""
    table = files.find("reports_final.xlsx")
    for number, cells in files.rows(table, ("study id", "Findings", "Split")):
        study, split = text(cells, "study id"), SPLITS.get(text(cells, "Split").lower())
        findings, _, impression = prose(cells, "Findings").partition("IMPRESSION:")
        answer = report(findings.strip(), impression.strip())
        if not study or not answer or split is None:
            reject(files.result, table, number, "study id or Findings is blank, or the split is unknown")
            continue
        path = files.scan(*(f"merlin_data/{study}{end}" for end in (".nii.gz", ".nii")))
        yield Case(id=study, task="report", scans=(path,), answer=answer, prompts="report", split=split)


def rexgradient(files: SourceFiles) -> Iterator[Case]:
    """Yield the studies of ReXGradient-160K."""
    for split in ("train", "valid", "test"):
        table = files.find(f"{split}_metadata_view_position.json")
        for _, cells in files.rows(table, ("ImagePath", "Findings", "Impression", "PatientID")):
            if not (answer := report(prose(cells, "Findings"), prose(cells, "Impression"))):
                files.result.count(f"{files.folder}: reports without findings and impression")
                continue
            yield Case(
                id=text(cells, "key"), task="report", scans=_deid_png(files, cells["ImagePath"]), answer=answer,
                prompts="report_cxr", context=prose(cells, "Indication"),
                study=f"rexgradient-{text(cells, 'PatientID')}", split=SPLITS[split],
            )  # fmt: skip


def rexvqa(files: SourceFiles) -> Iterator[Case]:
    """Yield the multiple-choice questions of ReXVQA, which are about the images of ReXGradient-160K."""
    for split in ("train", "valid", "test"):
        table = files.find(f"{split}_vqa_data.json")
        for number, cells in files.rows(table, ("question", "options", "correct_answer", "ImagePath")):
            question, letter, options = text(cells, "question"), text(cells, "correct_answer"), cells["options"]
            right = [str(o) for o in options if str(o).startswith(letter)] if isinstance(options, list) else []
            if not question or not letter or len(right) != 1:
                reject(files.result, table, number, "the options do not have the correct answer exactly once")
                continue
            yield Case(
                id=text(cells, "key") or str(number), task="vqa", scans=_deid_png(files, cells["ImagePath"]),
                question=" ".join([question, *map(str, options)]), answer=right[0], split=SPLITS[split],
                study=f"rexgradient-{text(cells, 'PatientID')}" if text(cells, "PatientID") else "",
            )  # fmt: skip


def _deid_png(files: SourceFiles, paths) -> tuple[str, ...]:
    """Return the scans of "../deid_png/...": the folder is next to `metadata`."""
    paths = paths if isinstance(paths, list) else [paths]
    return tuple(files.scan(f"deid_png/{str(path).rpartition('deid_png/')[2]}") for path in paths)


def padchest(files: SourceFiles) -> Iterator[Case]:
    """Yield the studies of PadChest with their labels: its reports are Spanish, and reduced to stems of words."""
    table, studies = files.find("PADCHEST_chest_x_ray_images_labels*.csv*"), {}
    for number, cells in files.rows(table, ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Labels")):
        if (labels := _labels(cells)) is None:
            reject(files.result, table, number, "Labels is not a list of texts")
            continue
        study = studies.setdefault(text(cells, "StudyID"), (text(cells, "PatientID"), labels, []))
        projection, name = text(cells, "Projection"), text(cells, "ImageID")
        study[2].append((projection not in FRONTAL, f"{text(cells, 'ImageDir')}/{name}", name))
    for study, (patient, labels, images) in studies.items():
        paths = tuple(files.scan(path, name) for _, path, name in sorted(images))
        yield from _labelled(files, study, paths, labels, f"padchest-{patient}")


def bimcv_covid19(files: SourceFiles) -> Iterator[Case]:
    """Yield the sessions of BIMCV-COVID19+ and - with their labels, which have the form of PadChest's."""
    images: dict[str, list[str]] = {}
    for _, cells in files.rows(files.find("partitions.tsv"), ()):
        _, session, path, *_ = (str(value) for value in cells.values())
        images.setdefault(session, []).append(path)
    table = files.find("[Ll]abels_covid_*.tsv")
    for number, cells in files.rows(table, ("ReportID", "PatientID", "Labels")):
        session, labels = text(cells, "ReportID"), _labels(cells)
        if labels is None or session not in images:
            reject(files.result, table, number, "Labels is not a list of texts, or the session has no image")
            continue
        paths = tuple(files.scan(path) for path in sorted(images[session]))
        yield from _labelled(files, session, paths, labels, f"bimcv-{text(cells, 'PatientID')}")


NO_LABELS = ("exclude", "unchanged", "suboptimal study")


def _labels(cells) -> list[str] | None:
    """Return the labels of a cell like "['normal', 'pleural effusion']"; None if it is not a list of texts."""
    try:
        labels = ast.literal_eval(text(cells, "Labels") or "[]")
    except (ValueError, SyntaxError):
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return None
    return list(dict.fromkeys(" ".join(label.split()) for label in labels if label.strip()))


def _labelled(files: SourceFiles, case_id: str, paths, labels: list[str], study: str) -> Iterator[Case]:
    """Yield a diagnosis sample with the labels of a study, unless they state no finding and not that it is normal."""
    findings = [label for label in labels if label not in NO_LABELS]
    if not findings or ("normal" in findings and len(findings) > 1):
        files.result.count(f"{files.folder}: studies without usable labels")
        return
    answer = "No finding" if findings == ["normal"] else ", ".join(findings)
    yield Case(id=case_id, task="diagnosis", scans=paths, answer=answer, prompts="diagnosis_open_cxr", study=study)


REPORTS: dict[str, Reader] = {
    reader.__name__: reader
    for reader in (
        mimic_cxr_jpg, openi, openi_kaggle, chexpert_plus, ct_rate, inspect, merlin, rexgradient, rexvqa, padchest,
        bimcv_covid19,
    )
}  # fmt: skip
