"""Questions, answers and reports of a phantom, as rows of tables in the formats of RadFM's data.

Each table is named after its task and has the columns of the family in brackets:

    modality.csv          image_path, answer                            (Rad3D-Modality)
    diagnosis_yes_no.csv  image_path, disease, label                    (yes/no diagnosis)
    diagnosis.csv         image_path, label                             (open diagnosis)
    report.csv            image_path, label                             (MIMIC-CXR)
    vqa.csv               img_root_dir, Figure_path, Question, Answer   (PMC-VQA, VQA-RAD, SLAKE)
    rationale.json        a list of {pre, pat, npy_path, ...}           (Rad3D-Caption, Rad3D-Rationale)
    all.jsonl             every question again, in the project's schema (the user's own data)
"""

from __future__ import annotations

import re

from input_pipeline.phantoms import plan
from input_pipeline.phantoms.plan import Labels, Study

NUMBERS = ("zero", "one", "two")
FEATURES = {
    "normal": "The tissue is even throughout.",
    "nodule": "One small round area is {than} the tissue around it.",
    "mass": "One big round area is {than} the tissue around it.",
    "multiple lesions": "Two round areas are {than} the tissue around them.",
}
VQA = {
    "count": "How many lesions are there?",
    "side": "On which side of the patient is the lesion?",
    "level": "Is the lesion in the upper or the lower half of the image?",
    "size": "Is the lesion small or big?",
}
COLUMNS = {
    "modality": ("image_path", "answer"),
    "diagnosis_yes_no": ("image_path", "disease", "label"),
    "diagnosis": ("image_path", "label"),
    "report": ("image_path", "label"),
    "vqa": ("img_root_dir", "Figure_path", "Question", "Answer"),
}
INSTRUCTIONS = {
    "modality": "<image-1> What kind of scan is this?",
    "diagnosis": "<image-1> What is the diagnosis?",
    "report": "<image-1> Write the report of this scan.",
    "rationale": "<image-1> What is the diagnosis, and which features of the scan speak for it?",
}


def findings(labels: Labels) -> str:
    if labels.count == 1:
        return f"{labels.modality}. One {labels.size} lesion on the {labels.side}, in the {labels.level} half."
    return f"{labels.modality}. {('No lesion', '', 'Two lesions')[labels.count]}."


def impression(labels: Labels) -> str:
    return labels.diagnosis.capitalize() + "."


def features(labels: Labels) -> str:
    """Return the visible evidence for the diagnosis, such as "One small round area is brighter than ..."."""
    return FEATURES[labels.diagnosis].format(than="brighter than" if plan.SIGNS[labels.modality] > 0 else "darker than")


def report(labels: Labels) -> str:
    """Return a report: "Findings: CT. One small lesion on the left, in the upper half. Impression: Nodule."."""
    return f"Findings: {findings(labels)} Impression: {impression(labels)}"


_REPORT = re.compile(
    rf"findings: (?P<modality>{'|'.join(plan.MODALITIES)})\. "
    rf"(?:(?P<none>no lesion)|(?P<two>two lesions)|one (?P<size>{'|'.join(plan.SIZES)}) lesion "
    rf"on the (?P<side>{'|'.join(plan.SIDES)}), in the (?P<level>{'|'.join(plan.LEVELS)}) half)\. "
    rf"impression: (?P<diagnosis>{'|'.join(plan.DIAGNOSES)})\.",
    re.IGNORECASE,
)


def parse_report(text: str) -> Labels:
    """Return the labels that a report states (the inverse of `report`). Case and white space do not matter.

    Raises:
      ValueError: the text is not such a report, or its impression contradicts its findings.
    """
    match = _REPORT.fullmatch(" ".join(text.split()))
    if not match:
        raise ValueError(f"not a report of a phantom: {text!r} (expected e.g. {report(Labels('CT', 0))!r})")
    modality = next(m for m in plan.MODALITIES if m.lower() == match["modality"].lower())
    if match["size"]:
        labels = Labels(modality, 1, *(match[k].lower() for k in ("side", "level", "size")))
    else:
        labels = Labels(modality, 0 if match["none"] else 2)
    if labels.diagnosis != match["diagnosis"].lower():
        raise ValueError(f"the impression contradicts the findings, which imply {labels.diagnosis!r}: {text!r}")
    return labels


def vqa_answers(study: Study) -> dict[str, str]:
    """Return attribute -> answer. Side, level and size are asked only of a solitary lesion."""
    labels = study.labels
    answers = {"count": NUMBERS[labels.count]}
    if labels.count == 1:
        answers |= {"side": labels.side, "level": labels.level, "size": labels.size}
    return answers


def disease_labels(study: Study) -> dict[str, int]:
    """Return disease -> 0 or 1. The answers are balanced: half of the scans have a lesion."""
    present = {"lesion": int(study.labels.count > 0)}
    if study.labels.count == 1:
        disease = ("nodule", "mass")[
            plan.random_generator((study.seed, study.split, study.index), stream=2).integers(2)
        ]
        present[disease] = int(study.labels.diagnosis == disease)
    return present


def rows(study: Study) -> dict[str, list]:
    """Return table -> rows of this study: tuples in the order of COLUMNS, dicts for `rationale` and `all`."""
    labels, path = study.labels, study.path
    folder, name = path.rsplit("/", 1)
    rationale = {
        "pre": "",
        "pat": "",
        "npy_path": path,
        "finding": findings(labels),
        "impression": impression(labels),
        "title": labels.diagnosis.capitalize(),
        "articles": [labels.diagnosis.capitalize()],
        "radiographic_features": features(labels),
    }
    return {
        "modality": [(path, labels.modality)],
        "diagnosis_yes_no": [(path, disease, label) for disease, label in disease_labels(study).items()],
        "diagnosis": [(path, labels.diagnosis)],
        "report": [(path, report(labels))],
        "vqa": [(folder, name, VQA[attribute], answer) for attribute, answer in vqa_answers(study).items()],
        "rationale": [rationale],
        "all": list(_own_rows(study)),
    }


def _own_rows(study: Study):
    labels = study.labels

    def row(name, task, instruction, response):
        identity = f"{study.study_id}-{name}"
        row = {"id": identity, "study": study.study_id, "task": task, "scans": [study.path]}
        return row | {"instruction": instruction, "response": response}

    yield row("modality", "modality", INSTRUCTIONS["modality"], labels.modality)
    for disease, label in disease_labels(study).items():
        yield row(f"has-{disease}", "diagnosis", f"<image-1> Does this scan show a {disease}?", ("no", "yes")[label])
    yield row("diagnosis", "diagnosis", INSTRUCTIONS["diagnosis"], labels.diagnosis)
    for attribute, answer in vqa_answers(study).items():
        yield row(attribute, "vqa", f"<image-1> {VQA[attribute]}", answer)
    yield row("report", "report", INSTRUCTIONS["report"], report(labels))
    response = f"{labels.diagnosis.capitalize()}. {features(labels)}"
    yield row("rationale", "rationale", INSTRUCTIONS["rationale"], response)
