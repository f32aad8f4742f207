"""The data set families of MedMD and the user's own data: tables -> samples. `open_dataset` is the entry point.

This package reads tables and words questions. It does not read voxels (`images`) and does not tokenize (`text`).
"""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets.base import TableDataset as Dataset
from input_pipeline.datasets.base import sample_rng
from input_pipeline.datasets.diagnosis import AnyDiagnosis, CXRMix, VinDrMammo, VinDrPCXR, VinDrSpineXR
from input_pipeline.datasets.hugging_face import HuggingFace
from input_pipeline.datasets.jsonl import JSONL
from input_pipeline.datasets.llava import LLaVA
from input_pipeline.datasets.mpx import MPxMulti, MPxQuestions, MPxSingle
from input_pipeline.datasets.pmc import PMCCaseReport, PMCInline
from input_pipeline.datasets.rad3d import Rad3DCaption, Rad3DModality, Rad3DRationale, Rad3DVQA
from input_pipeline.datasets.reports import PMCOA, MimicCXR
from input_pipeline.datasets.rows import TableError
from input_pipeline.datasets.tfds import TFDS
from input_pipeline.datasets.vqa import PMCVQA, VQARAD, Slake
from input_pipeline.field_rules import raise_problems, value_problems
from input_pipeline.files import nearest

__all__ = ["FAMILIES", "Dataset", "TableError", "open_dataset", "sample_rng"]

FAMILIES = {
    family.name: family
    for family in (
        PMCInline, PMCOA, PMCCaseReport, PMCVQA, VQARAD, Slake, MimicCXR, CXRMix, VinDrPCXR, VinDrMammo, VinDrSpineXR,
        AnyDiagnosis, MPxSingle, MPxMulti, MPxQuestions, Rad3DCaption, Rad3DModality, Rad3DVQA, Rad3DRationale, JSONL,
        TFDS, HuggingFace, LLaVA,
    )
}  # fmt: skip


def open_dataset(name: str, **fields) -> Dataset:
    """Open a data set of the family `name`: read its table and check every row.

        open_dataset("vqa_rad", table="train.csv", root="/data/VQA-RAD", split="train")

    Args:
      fields: fields of the family's class. `table` and `root` are required.
    Raises:
      ValueError: an unknown family or field (with the nearest known name), or a missing field.
      TableError (a ValueError): bad rows, all of them in `problems`, unless `quarantine=True`.
      RowError (a ValueError): the table cannot be read at all.
    """
    if name not in FAMILIES:
        raise ValueError(f"data set {name!r} is unknown{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    known = {f.name: f for f in dataclasses.fields(family)}
    problems = [f"field {key!r} is unknown{nearest(key, known)}" for key in fields if key not in known]
    problems += [
        f"field {key!r} is required"
        for key, field in known.items()
        if key not in fields and field.default is field.default_factory is dataclasses.MISSING
    ]
    if problems:
        raise ValueError(f"data set {name}: {'; '.join(problems)}; known: {', '.join(known)}")
    raise_problems(f"data set {name}: {problem}" for problem in value_problems(family, fields, ""))
    return family(**fields)
