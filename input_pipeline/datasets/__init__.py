"""The families of MedMD and the user's own data: tables -> samples. `open_dataset` is the way in."""

from __future__ import annotations

import dataclasses
import difflib

from input_pipeline.datasets.base import Dataset, sample_rng
from input_pipeline.datasets.diagnosis import AnyDiagnosis, CXRMix, VinDrMammo, VinDrPCXR, VinDrSpineXR
from input_pipeline.datasets.jsonl import JSONL
from input_pipeline.datasets.mimic_cxr import MimicCXR
from input_pipeline.datasets.mpx_multi import MPxMulti, MPxQuestions
from input_pipeline.datasets.mpx_single import MPxSingle
from input_pipeline.datasets.pmc_casereport import PMCCaseReport
from input_pipeline.datasets.pmc_inline import PMCInline
from input_pipeline.datasets.pmc_oa import PMCOA
from input_pipeline.datasets.rad3d_caption import Rad3DCaption
from input_pipeline.datasets.rad3d_modality import Rad3DModality
from input_pipeline.datasets.rad3d_rationale import Rad3DRationale
from input_pipeline.datasets.rad3d_vqa import Rad3DVQA
from input_pipeline.datasets.tables import TableError
from input_pipeline.datasets.tfds import TFDS
from input_pipeline.datasets.vqa import PMCVQA, VQARAD, Slake

__all__ = ["FAMILIES", "Dataset", "TableError", "nearest", "open_dataset", "sample_rng"]

FAMILIES = {
    family.name: family
    for family in (
        PMCInline, PMCOA, PMCCaseReport, PMCVQA, VQARAD, Slake, MimicCXR, CXRMix, VinDrPCXR, VinDrMammo, VinDrSpineXR,
        AnyDiagnosis, MPxSingle, MPxMulti, MPxQuestions, Rad3DCaption, Rad3DModality, Rad3DVQA, Rad3DRationale, JSONL,
        TFDS,
    )
}  # fmt: skip


def open_dataset(name: str, **fields) -> Dataset:
    """Opens a data set of the family `name`: reads its table and checks every row.

        open_dataset("vqa_rad", table="train.csv", root="/data/VQA-RAD", split="train")

    Args:
      fields: those of the family's class; `table` and `root` are always needed.
    Raises:
      ValueError: an unknown family or field, with the nearest known one; a missing field.
      TableError (a ValueError): bad rows, all of them in `problems`, unless `quarantine=True`.
      RowError (a ValueError): a table that cannot be read at all.
    """
    if name not in FAMILIES:
        raise ValueError(f"data set {name!r} is unknown{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    known = {f.name: f for f in dataclasses.fields(family)}
    problems = [f"field {key!r} is unknown{nearest(key, known)}" for key in fields if key not in known]
    problems += [
        f"field {key!r} is needed"
        for key, field in known.items()
        if key not in fields and field.default is field.default_factory is dataclasses.MISSING
    ]
    if problems:
        raise ValueError(f"data set {name}: {'; '.join(problems)}; known: {', '.join(known)}")
    return family(**fields)


def nearest(word: str, words) -> str:
    """What was meant, in words, or nothing."""
    near = difflib.get_close_matches(str(word), list(words), 1, 0.4)
    return f" (did you mean {near[0]!r}?)" if near else ""
