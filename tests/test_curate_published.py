"""Published sets: three made rows of each in the layout of its owners -> JSON Lines that the reader accepts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dataset_tables import answer, texts, write_csv, write_json
from PIL import Image

from input_pipeline.curate import labels, published, report_sections, xray_sets
from input_pipeline.curate.__main__ import main
from input_pipeline.curate.jobs import Result
from input_pipeline.datasets import open_dataset, sample_rng
from input_pipeline.images import scans


def png(*files: Path) -> None:
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + i).save(
            file, "PNG" if file.suffix != ".jpg" else None
        )


def write_gz(file: Path, header, *rows) -> None:
    file.write_bytes(gzip.compress("".join(",".join(map(str, row)) + "\n" for row in (header, *rows)).encode()))


def write_tsv(file: Path, *rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def convert(root: Path, name: str, **options) -> tuple[dict[str, list], dict]:
    """Return {split: samples} of a set in the folder root/SET, and the report."""
    report = published.curate([f"{name}=SET"], root, root / "out", {"choices": False} | options)
    samples = {}
    for file in sorted((root / "out").glob(f"{name}*.jsonl")):
        dataset = open_dataset("jsonl", table=file, root=root)
        split = file.stem.removeprefix(name).strip("_")
        samples[split] = [dataset.sample(i, sample_rng(0, 0, "d", "1")) for i in range(len(dataset))]
        assert all((root / scan.path).is_file() for sample in samples[split] for scan in sample.scans)
    return samples, report


def pairs(samples: dict) -> dict:
    """Return {split: [(question, answer)]}."""
    return {split: [(texts(s, "instruction")[0], answer(s)) for s in of_split] for split, of_split in samples.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "SET").mkdir()
    return tmp_path / "SET"


def test_vqa_rad(folder, tmp_path):
    common = {"image_organ": "CHEST", "answer_type": "CLOSED", "question_type": "PRES", "evaluation": "evaluated",
              "image_case_url": "https://medpix.nlm.nih.gov/case?id=1", "qid_linked_id": "03f4"}  # fmt: skip
    rows = [("0", "freeform", "synpic1.jpg", "Is there a mass?", "Yes"), ("1", "test_para", "synpic2.jpg", "Ribs?", 12),
            ("2", "para", "synpic1.jpg", "What is missing?", "None")]  # fmt: skip
    keys = ("qid", "phrase_type", "image_name", "question", "answer")
    write_json(folder / "VQA_RAD Dataset Public.json", [common | dict(zip(keys, row, strict=True)) for row in rows])
    png(folder / "VQA_RAD Image Folder/synpic1.jpg", folder / "VQA_RAD Image Folder/synpic2.jpg")
    samples, report = convert(tmp_path, "vqa_rad")
    assert pairs(samples) == {
        "train": [("Is there a mass?", "Yes"), ("What is missing?", "None")], "test": [("Ribs?", "12")],
    }  # fmt: skip
    assert report["problems"] == 0 and samples["test"][0].row_id == "vqa_rad-1"


def test_slake(folder, tmp_path):
    common = {"img_id": 1, "img_name": "xmlab1/source.jpg", "triple": ["vhead", "_", "_"], "base_type": "vqa"}
    for split, first in (("train", 0), ("validate", 3), ("test", 6)):
        rows = [("What modality?", "MRI", "en"), ("什么模态?", "MRI", "zh"), ("Plane?", "Axial", "en")]
        write_json(folder / f"{split}.json", [
            common | {"qid": first + i, "question": q, "answer": a, "q_lang": lang, "location": "Abdomen"}
            for i, (q, a, lang) in enumerate(rows)
        ])  # fmt: skip
    png(folder / "imgs/xmlab1/source.jpg")
    samples, report = convert(tmp_path, "slake")
    assert pairs(samples) == dict.fromkeys(
        ("test", "train", "validation"), [("What modality?", "MRI"), ("Plane?", "Axial")]
    )
    assert report["counts"]["SET: rows skipped: not English"] == 3


def test_pmc_vqa(folder, tmp_path):
    header = ("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label")
    rows = [
        (f"PMC106409{i}_F1.jpg", "Uptake?", "Focal", "A:Diffuse", "B:Focal", "C:None", "D:?", "B") for i in range(3)
    ]
    write_csv(folder / "train.csv", header, *rows)
    write_csv(folder / "test.csv", header, rows[0][:1] + ("Where?",) + rows[0][2:])
    png(*(folder / "images" / row[0] for row in rows))
    samples, _ = convert(tmp_path, "pmc_vqa")
    assert pairs(samples) == {"train": [("Uptake?", "Focal")] * 3, "test": [("Where?", "Focal")]}
    assert samples["train"][2].study_id == "PMC1064092"
    samples, _ = convert(tmp_path, "pmc_vqa", choices=True)
    assert pairs(samples)["test"] == [("Where? A: Diffuse B: Focal C: None D: ?", "B: Focal")]


def test_pmc_oa_and_rocov2(folder, tmp_path):
    rows = [
        {"image": f"PMC21266{i}_Fig2_60.jpg", "caption": f"CT {i}.", "alignment_type": "ocr", "alignment_score": 0.9}
        for i in range(3)
    ]
    (folder / "pmc_oa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    png(*(folder / "caption_T060_filtered_top4_sep_v0_subfigures" / row["image"] for row in rows))
    samples, _ = convert(tmp_path, "pmc_oa")
    assert [answer(s) for s in samples[""]] == ["CT 0.", "CT 1.", "CT 2."] and samples[""][0].task == "report"
    for split in ("train", "valid", "test"):
        write_csv(folder / f"{split}_captions.csv", ("ID", "Caption"), (f"ROCOv2_2023_{split}_000001", f"{split} CT."))
        png(folder / f"{split}/ROCOv2_2023_{split}_000001.jpg")
    samples, _ = convert(tmp_path, "rocov2")
    assert {split: answer(of_split[0]) for split, of_split in samples.items()} == {
        "train": "train CT.", "validation": "valid CT.", "test": "test CT.",
    }  # fmt: skip


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  Cough and
 fever.

 FINDINGS:

 The lungs are clear.  No effusion

 IMPRESSION:

 Normal.
 NOTIFICATION:  None: see text.
"""


def mimic(folder: Path) -> None:
    images = [("a1", "50", "10000032", "train", "LATERAL"), ("b2", "50", "10000032", "train", "PA"),
              ("c3", "60", "11000033", "validate", "AP"), ("d4", "70", "12000034", "test", "AP")]  # fmt: skip
    keys = ("dicom_id", "subject_id", "study_id")
    write_gz(folder / "mimic-cxr-2.0.0-split.csv.gz", ("dicom_id", "study_id", "subject_id", "split"),
             *(row[:4] for row in images))  # fmt: skip
    write_gz(folder / "mimic-cxr-2.0.0-metadata.csv.gz", (*keys, "PerformedProcedureStepDescription", "ViewPosition"),
             *((d, p, s, "CHEST", view) for d, s, p, _, view in images))  # fmt: skip
    for image, study, patient, *_ in images:
        of_study = folder / f"files/p{patient[:2]}/p{patient}/s{study}"
        png(of_study / f"{image}.jpg")
        of_study.with_suffix(".txt").write_text(REPORT if study != "70" else "WET READ: nothing else")
    blank = [""] * (len(xray_sets.CHEXPERT) - 2)
    for labeller in ("chexpert", "negbio"):
        write_gz(folder / f"mimic-cxr-2.0.0-{labeller}.csv.gz", ("subject_id", "study_id", *xray_sets.CHEXPERT),
                 ("10000032", "50", "1.0", "0.0", *blank), ("11000033", "60", "", "-1.0", *blank),
                 ("12000034", "70", "1.0", "1.0", *blank))  # fmt: skip


def test_mimic_cxr_jpg(folder, tmp_path):
    mimic(folder)
    samples, report = convert(tmp_path, "mimic_cxr_jpg")
    (train,), (validation,) = samples.pop("train"), samples.pop("validation")
    assert samples == {} and answer(train) == "Findings: The lungs are clear. No effusion. Impression: Normal."
    assert [Path(scan.path).stem for scan in train.scans] == ["b2", "a1"], "the frontal view is first"
    assert texts(train, "context") == ["Cough and fever."] and train.study_id == "p10000032"
    counts = report["counts"]
    assert (
        counts["SET: reports with the heading FINDINGS"] == 2 and counts["SET: reports with the heading WET READ"] == 1
    )
    assert counts["SET: reports without findings and impression"] == 1 and validation.row_id == "mimic_cxr_jpg-s60"


def test_labels_of_mimic_cxr(folder):
    mimic(folder)
    for labeller in ("chexpert", "negbio"):
        result = Result()
        images = xray_sets.read(f"mimic_cxr_{labeller}", folder, labels.Policy(), result)
        assert [(i.split, i.study, i.is_normal) for i in images] == [
            ("train", "p10000032", True), ("train", "p10000032", True), ("validation", "p11000033", False),
        ]  # fmt: skip
        assert len(result.problems) == 1 and all((folder / image.path).is_file() for image in images)


def test_sections():
    assert report_sections.sections(REPORT)[2] == ("FINDINGS", "The lungs are clear. No effusion")
    text = "FINDINGS: Addendum.\nFINDINGS: The report: clear.\nIMPRESSION:\n"
    assert report_sections.named(report_sections.sections(text)) == {"findings": "The report: clear."}
    text = "VIEWS: Two.\nFINDINGS:\nLUNGS: Clear.\n BONES:  Intact.\nIMPRESSION: Normal.\nNOTIFICATION(S): Dr. X"
    named = report_sections.named(report_sections.sections(text))
    assert named == {"findings": "LUNGS: Clear. BONES: Intact.", "impression": "Normal.", "notification": "Dr. X"}


XML = """<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{i}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Pain</AbstractText>
<AbstractText Label="FINDINGS">Clear lungs {i}.</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText></Abstract></Article></MedlineCitation>
<parentImage id="CXR{i}_1_IM-000{i}-3001"><caption>PA</caption></parentImage></eCitation>"""


def test_openi(folder, tmp_path):
    (folder / "ecgen-radiology").mkdir()
    for i in (1, 2, 3):
        (folder / f"ecgen-radiology/{i}.xml").write_text(XML.format(i=i, impression="Normal." if i < 3 else ""))
    png(*(folder / f"NLMCXR_png/CXR{i}_1_IM-000{i}-3001.png" for i in (1, 2)))
    (folder / "NLMCXR_dcm/3").mkdir(parents=True)
    (folder / "NLMCXR_dcm/3/1_IM-0003-3001.dcm").touch()
    samples, report = convert(tmp_path, "openi")
    assert [answer(s) for s in samples[""]] == [
        "Findings: Clear lungs 1. Impression: Normal.", "Findings: Clear lungs 2. Impression: Normal.",
        "Findings: Clear lungs 3.",
    ]  # fmt: skip
    assert texts(samples[""][0], "context") == ["Pain"] and samples[""][0].study_id == "openi-1"
    assert samples[""][2].scans[0].path == "SET/NLMCXR_dcm/3/1_IM-0003-3001.dcm"
    names = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
    write_csv(
        folder / "indiana_reports.csv",
        names,
        (1, "normal", "normal", "Xray", "Pain", "None", "Clear.", "Normal."),
        (2, "normal", "normal", "Xray", "", "", "", ""),
        (3, "x", "x", "Xray", "", "", "", "Mass."),
    )
    write_csv(folder / "indiana_projections.csv", ("uid", "filename", "projection"), (1, "1_IM-2.dcm.png", "Lateral"),
              (1, "1_IM-3.dcm.png", "Frontal"), (3, "3_IM-1.dcm.png", "Frontal"))  # fmt: skip
    png(*(folder / f"images/images_normalized/{name}.dcm.png" for name in ("1_IM-2", "1_IM-3", "3_IM-1")))
    samples, report = convert(tmp_path, "openi_kaggle")
    assert [answer(s) for s in samples[""]] == ["Findings: Clear. Impression: Normal.", "Impression: Mass."]
    assert [Path(s.path).name for s in samples[""][0].scans] == ["1_IM-3.dcm.png", "1_IM-2.dcm.png"]
    assert report["counts"]["SET: reports without findings and impression"] == 1


def test_chexpert_plus(folder, tmp_path):
    columns = (
        "path_to_image path_to_dcm frontal_lateral ap_pa deid_patient_id patient_report_date_order report "
        "section_narrative section_clinical_history section_history section_comparison section_technique "
        "section_procedure_comments section_findings section_impression section_end_of_impression section_summary "
        "section_accession_number age sex race ethnicity interpreter_needed insurance_type recent_bmi deceased split"
    ).split()
    blank = dict.fromkeys(columns, "")
    rows = [
        {"path_to_image": "train/patient42142/study5/view2_lateral.jpg", "frontal_lateral": "Lateral", "split": "train",
         "section_impression": "1. NORMAL.", "deid_patient_id": "patient42142"},
        {"path_to_image": "train/patient42142/study5/view1_frontal.jpg", "frontal_lateral": "Frontal", "split": "train",
         "section_impression": "1. NORMAL.", "deid_patient_id": "patient42142"},
        {"path_to_image": "valid/patient64541/study1/view1_frontal.jpg", "frontal_lateral": "Frontal", "split": "valid",
         "section_findings": "Clear.", "section_clinical_history": "Cough.", "deid_patient_id": "patient64541"},
    ]  # fmt: skip
    write_csv(folder / "df_chexpert_plus_240401.csv", columns, *((blank | row).values() for row in rows))
    png(*(folder / "PNG" / row["path_to_image"].replace(".jpg", ".png") for row in rows))
    samples, _ = convert(tmp_path, "chexpert_plus")
    (train,), (validation,) = samples["train"], samples["validation"]
    assert [Path(s.path).stem for s in train.scans] == ["view1_frontal", "view2_lateral"]
    assert answer(train) == "Impression: 1. NORMAL." and train.study_id == "patient42142"
    assert answer(validation) == "Findings: Clear." and texts(validation, "context") == ["Cough."]


def ct(file: Path, voxels: np.ndarray, inter: float = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(1, inter)
    nibabel.save(image, file)


def test_ct_rate(folder, tmp_path):
    stored = np.random.default_rng(0).integers(0, 3000, (12, 10, 6))
    names = [f"train_{i}_a_1.nii.gz" for i in (1, 2, 3)] + ["valid_1_a_1.nii.gz"]
    header = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
    for split, of_split in (("train", names[:3]), ("validation", names[3:])):
        texts_of = [(name, "Cough", "Non-contrast.", "Trachea is open.", "Nodule.") for name in of_split]
        (folder / "reports").mkdir(exist_ok=True)
        write_csv(folder / f"reports/{split}_reports.csv", header, *texts_of)
        write_csv(
            folder / f"reports/{split}_metadata.csv",
            ("VolumeName", "RescaleIntercept", "RescaleSlope", "XYSpacing"),
            *((name, "-1024.0", "1.0", "[0.7, 0.7]") for name in of_split),
        )
    base = folder / "dataset/train_fixed"
    ct(base / "train_1/train_1_a" / names[0], stored, -1024)  # the scaling is in the header
    ct(base / "train_2/train_2_a" / names[1], stored - 1024)  # the voxels are scaled
    ct(base / "train_3/train_3_a" / names[2], stored)  # the scaling is lost
    ct(folder / "dataset/valid_fixed/valid_1/valid_1_a" / names[3], stored, -1024)
    samples, report = convert(tmp_path, "ct_rate")
    assert [s.row_id for s in samples["train"]] == ["ct_rate-train_1_a_1", "ct_rate-train_2_a_1"]
    assert answer(samples["train"][0]) == "Findings: Trachea is open. Impression: Nodule."
    assert samples["train"][0].study_id == "ct-rate-train_1" and len(samples["validation"]) == 1
    (problem,) = map(json.loads, (tmp_path / "out/problems.jsonl").read_text().splitlines())
    assert "not in Hounsfield units: slope 1 and intercept -1024" in problem["reason"] and problem["row"] == "3"


def test_inspect_and_merlin(folder, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    write_tsv(folder / "splits_20250611.tsv", ("impression_id", "split"), (1, "train"), (2, "valid"), (3, "test"))
    write_tsv(folder / "study_mapping_20250611.tsv", ("impression_id", "image_id", "person_id"),
              *((i, f"PE{i}", 70 + i) for i in (1, 2, 3)))  # fmt: skip
    write_tsv(
        folder / "impressions_20250611.tsv",
        ("impression_id", "impressions"),
        (1, "No PE."),
        (2, '"PE, ""left""."'),
        (3, "Equivocal"),
    )
    for i in (1, 2, 3):
        ct(folder / f"CTPA/PE{i}.nii.gz", np.arange(60).reshape(5, 4, 3))
        ct(folder / f"merlin_data/AC{i}.nii.gz", np.arange(60).reshape(5, 4, 3))
    samples, _ = convert(tmp_path, "inspect")
    assert {split: answer(s) for split, (s,) in samples.items()} == {
        "train": "Impression: No PE.", "validation": 'Impression: PE, "left".', "test": "Impression: Equivocal.",
    }  # fmt: skip
    assert samples["test"][0].study_id == "inspect-73"
    book = openpyxl.Workbook()
    for row in (("study id", "Findings", "Split"), ("AC1", "Liver: normal. IMPRESSION: Normal.", "train"),
                ("AC2", "Liver: normal", "val"), ("AC3", "Cyst.", "test")):  # fmt: skip
        book.active.append(row)
    book.save(folder / "reports_final.xlsx")
    samples, report = convert(tmp_path, "merlin")
    assert answer(samples["train"][0]) == "Findings: Liver: normal. Impression: Normal."
    assert {split: len(s) for split, s in samples.items()} == {"train": 1, "validation": 1, "test": 1}


def test_rexgradient_and_rexvqa(folder, tmp_path):
    path = "../deid_png/GRD1/GRDA/studies/1.2/series/1.3/instances/{}.png"
    for split in ("train", "valid", "test"):
        case = {"PatientID": "GRD1", "ImagePath": [path.format(1), path.format(2)], "Indication": "Cough",
                "Findings": "Clear.", "Impression": "None", "ImageViewPosition": ["PA", "LATERAL"]}  # fmt: skip
        (folder / "metadata").mkdir(exist_ok=True)
        write_json(folder / f"metadata/{split}_metadata_view_position.json", {f"p_{split}": case})
        question = {
            "question": "Which?",
            "options": ["A. Mass", "B. Cyst"],
            "correct_answer": "B",
            "task_name": "presence",
            "ImagePath": [path.format(1)],
            "correct_answer_explanation": "...",
            "PatientID": "GRD1",
        }
        write_json(folder / f"metadata/{split}_vqa_data.json", {f"q_{split}": question})
    png(*(folder / path.format(i).removeprefix("../") for i in (1, 2)))
    samples, _ = convert(tmp_path, "rexgradient")
    assert {s.row_id for of_split in samples.values() for s in of_split} == {
        "rexgradient-p_train", "rexgradient-p_valid", "rexgradient-p_test",
    }  # fmt: skip
    assert answer(samples["validation"][0]) == "Findings: Clear." and len(samples["test"][0].scans) == 2
    samples, _ = convert(tmp_path, "rexvqa")
    assert pairs(samples) == dict.fromkeys(("test", "train", "validation"), [("Which? A. Mass B. Cyst", "B. Cyst")])
    assert samples["train"][0].study_id == "rexgradient-GRD1"


def test_padchest_and_bimcv(folder, tmp_path):
    header = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Report", "Labels")
    write_csv(
        folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",
        header,
        ("1.png", "0", "s1", "p1", "L", "sin hallazg", "['normal', ' normal']"),
        ("2.png", "0", "s1", "p1", "PA", "sin hallazg", "['normal']"),
        ("3.png", "7", "s2", "p2", "PA", "x", "['pleural effusion', 'unchanged']"),
        ("4.png", "7", "s3", "p3", "PA", "x", "['exclude']"),
        ("5.png", "7", "s4", "p4", "PA", "x", "nan, "),
    )
    png(folder / "0/1.png", folder / "0/2.png", folder / "7/3.png", folder / "7/4.png")
    samples, report = convert(tmp_path, "padchest")
    assert [answer(s) for s in samples[""]] == ["No finding", "pleural effusion"] and report["problems"] == 1
    assert [Path(s.path).stem for s in samples[""][0].scans] == ["2", "1"] and samples[""][0].study_id == "padchest-p1"
    write_tsv(folder / "derivatives/partitions.tsv", ("sub", "ses", "file"),
              *((f"sub-S{i}", f"ses-E{i}", f"sub-S{i}/ses-E{i}/mod-rx/x{i}.png") for i in (1, 2, 3)))  # fmt: skip
    write_tsv(folder / "derivatives/labels/labels_covid_posi.tsv", ("ReportID", "Report", "PatientID", "Labels"),
              *((f"ses-E{i}", "texto", f"sub-S{i}", f"['{name}']") for i, name in
                ((1, "COVID 19"), (2, "normal"), (3, "infiltrates"))))  # fmt: skip
    png(*(folder / f"sub-S{i}/ses-E{i}/mod-rx/x{i}.png" for i in (1, 2, 3)))
    samples, _ = convert(tmp_path, "bimcv_covid19")
    assert [answer(s) for s in samples[""]] == ["COVID 19", "No finding", "infiltrates"]


def test_m3d(folder, tmp_path):
    array = np.random.default_rng(0).random((1, 6, 12, 10), np.float32)
    slices = (np.random.default_rng(1).random((6, 12, 10)) * 255).astype(np.uint8)
    (folder / "M3D_Cap_npy/ct_case/000006").mkdir(parents=True)
    np.save(folder / "M3D_Cap_npy/ct_case/000006/Axial.npy", array)
    raw = folder / "M3D_Cap/ct_quizze/000007/Axial_C"
    raw.mkdir(parents=True)
    for i, slice_ in enumerate(slices):
        Image.fromarray(slice_).save(raw / f"{i}.png")
    (folder / "M3D_Cap_npy/ct_case/000006/text.txt").write_text("Mass in the\nliver.")
    (raw.parent / "text.txt").write_text("presentation: Pain\nstudy_findings: Cyst of the kidney.\ndiscussion: ...")
    images = ["M3D_Cap_npy/ct_case/000006/Axial.npy", "M3D_Cap_npy/ct_quizze/000007/Axial_C.npy",
              "M3D_Cap_npy/ct_case/000008/Axial.npy"]  # fmt: skip
    cases = [{"image": image, "text": image.rpartition("/")[0] + "/text.txt"} for image in images]
    write_json(folder / "M3D_Cap.json", {"train": cases[:1], "validation": cases[2:], "test": cases[1:2]})
    samples, report = convert(tmp_path, "m3d_cap")
    (train,), (test,) = samples["train"], samples["test"]
    assert answer(train) == "Mass in the liver." and train.study_id == "ct_case/000006" and report["problems"] == 1
    assert "Cyst of the kidney." in answer(test)
    np.testing.assert_array_equal(scans.read(tmp_path / train.scans[0].path)[0][..., 0], array[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(scans.read(tmp_path / test.scans[0].path)[0][..., 0], slices.transpose(1, 2, 0))
    header = (
        "Image Path",
        "Text",
        "Question Type",
        "Question",
        "Choice A",
        "Choice B",
        "Choice C",
        "Choice D",
        "Answer",
        "Answer Choice",
    )
    for name, rows in (("train", images[:1]), ("val", images[1:2]), ("test", images)):
        write_csv(
            folder / f"M3D_VQA_{name}.csv",
            header,
            *((image, "t", 1, "Plane?", "axial", "coronal", "sagittal", "other", "axial", "A") for image in rows),
        )
    samples, report = convert(tmp_path, "m3d_vqa", choices=True)
    expected = ("Plane? A: axial B: coronal C: sagittal D: other", "A: axial")
    assert pairs(samples) == {"train": [expected], "validation": [expected], "test": [expected] * 2}
    assert report["problems"] == 1


def test_the_command(folder, tmp_path, capsys):
    rows = [
        {"img_name": f"xmlab{i}/source.jpg", "question": "Q?", "answer": "A", "q_lang": "en", "qid": 1} for i in (1, 2)
    ]
    for name in ("train", "validate", "test"):
        write_json(folder / f"{name}.json", rows)
    command = ["published", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "slake=SET"]
    (folder / "imgs.zip").touch()
    assert main(command) == 2 and "none of the 6 scans: unpack imgs.zip there" in " ".join(
        capsys.readouterr().err.split()
    )
    png(folder / "imgs/xmlab1/source.jpg", folder / "imgs/xmlab2/source.jpg")
    assert main([*command, "--strict"]) == 1, "the ids are repeated"
    assert "slake_train.jsonl: rows" in capsys.readouterr().out
    for wrong, message in (
        ("slak=SET", "with one of the sets"),
        ("slake=../x", "must be below"),
        ("slake=no", "not a dir"),
    ):
        assert main([*command[:-1], wrong]) == 2 and message in " ".join(capsys.readouterr().err.split())
