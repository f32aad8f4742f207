"""MPx-Single: csv `name, type, context`; the type says whether context is a modality, a plane or a caption."""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts
from input_pipeline.datasets.modalities import ModalityQuestions
from input_pipeline.datasets.rad3d_modality import modality_names, modality_question

# type -> (task, prompts)
TYPES = {
    "modality": ("modality", "modality_open"),
    "plane": ("vqa", "plane_open"),
    "caption": ("report", "caption_single"),
}


@dataclasses.dataclass(kw_only=True, eq=False)
class MPxSingle(TableDataset):
    """Modality, plane or caption of one image. RadFM uses a fifth of the rows in an epoch: `fraction=0.2`.

    Attributes:
      images: folder of the images below the root.
      types: other names of types -> modality, plane or caption, e.g. {"Image caption": "caption"}.
      modalities: labels that the built-in words do not cover -> a modality, e.g. {"Quantitative map": "MRI"}.
      judgement: share of yes/no questions among the modality questions.
    """

    name = "mpx_single"
    required = ("name", "type", "context")

    images: str = ""
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    modalities: dict[str, str] = dataclasses.field(default_factory=dict)
    judgement: float = 0.5

    def parse(self, row):
        kind = row.text("type")
        kind = self.types.get(kind, kind.casefold())
        if kind not in TYPES:
            raise row.error(f"type {kind!r} is unknown", f"use one of {', '.join(TYPES)}, or map it with `types`")
        label = row.text("context")
        names = modality_names(row, label, self.modalities) if kind == "modality" else None
        return row.scan("name", self.images), kind, label, names

    def finish(self):
        self._questions = ModalityQuestions(names for *_, names in self._rows if names)
        return []

    def parts(self, value, rng):
        scan, kind, label, names = value
        task, group = TYPES[kind]
        if kind == "modality":
            question, answer = modality_question(self._questions, names, label, self.judgement, rng)
        else:
            question, answer = prompts.draw(group, rng), label
        return task, self.study_of(scan.path), instruction_parts(rng, (scan,), question, answer)

    def scans_of(self, value):
        return value[:1]
