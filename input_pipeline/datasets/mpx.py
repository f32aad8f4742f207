"""MPx-Single, MPx-Multi and the MPx questions (csv)."""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, choose, instruction_parts
from input_pipeline.datasets.modalities import ModalityDataset
from input_pipeline.datasets.rows import NO_PROSE
from input_pipeline.samples import Scan
from input_pipeline.text.sentences import closed, join

# type -> (task, prompts)
SINGLE = {
    "modality": ("modality", "modality_open"),
    "plane": ("vqa", "plane_open"),
    "caption": ("report", "caption_single"),
}
# type -> prompts
MULTI = {
    "txFollowup": "mpx_followup",
    "ddx": "mpx_ddx",
    "dxHow": "mpx_how",
    "diagnosis": "mpx_diagnosis",
    "findings": "mpx_findings",
    "exam": "mpx_exam",
    "discussion": "mpx_discussion",
}


@dataclasses.dataclass(kw_only=True, eq=False)
class MPxSingle(ModalityDataset):
    """Modality, plane or caption of one image, csv `name, type, context`. `type` is the kind of text in `context`."""

    name = "mpx_single"
    required = ("name", "type", "context")
    released_fraction = 0.2

    images: str = ""  # folder of the images below the root
    types: dict[str, str] = dataclasses.field(default_factory=dict)  # other types, e.g. {"Image caption": "caption"}

    def parse(self, row):
        kind = row.text("type")
        kind = self.types.get(kind, kind.casefold())
        if kind not in SINGLE:
            raise row.error(f"type {kind!r} is unknown", f"use one of {', '.join(SINGLE)}, or map it with `types`")
        label = row.text("context")
        names = self.names(row, label) if kind == "modality" else None
        return (row.scan("name", self.images),), kind, label, names

    def parts(self, value, rng):
        scans, kind, label, names = value
        task, group = SINGLE[kind]
        question, answer = self.ask(names, label, rng) if names else (prompts.draw(group, rng), label)
        return task, self.study_of(scans[0].path), instruction_parts(rng, scans, question, answer)


@dataclasses.dataclass(kw_only=True, eq=False)
class _MPxCase(TableDataset):
    """Rows about several images of one case; `name` has the images, separated by commas."""

    images: str = ""  # folder of the images below the root
    max_scans: int = 10  # images in a sample; the sample's generator chooses among more, keeping their order

    def __post_init__(self):
        if self.max_scans < 1:
            raise ValueError(f"{self.name}: max_scans must be at least 1, got {self.max_scans}")
        super().__post_init__()

    def _scans(self, row) -> tuple[Scan, ...]:
        names = [part.strip() for text in row.names("name") for part in text.split(",")]
        if not names or not all(names):
            raise row.error(f"name {row.cells.get('name')!r} has a blank image name")
        return tuple(Scan(row.path(name, self.images)) for name in names)

    def _chosen(self, scans, rng) -> tuple[Scan, ...]:
        return tuple(scans[k] for k in choose(rng, len(scans), self.max_scans))


class MPxMulti(_MPxCase):
    """Cases, csv `name, type, context, history`; the context is the answer."""

    name = "mpx_multi"
    task = "report"
    required = ("name", "type", "context", "history")

    def parse(self, row):
        return self._scans(row), row.choice("type", MULTI), row.text("context"), row.optional("history", NO_PROSE)

    def parts(self, value, rng):
        scans, kind, answer, history = value
        chosen, question = self._chosen(scans, rng), prompts.draw(MULTI[kind], rng)
        return self.task, self.study_of(scans[0].path), instruction_parts(rng, chosen, question, answer, history)


class MPxQuestions(_MPxCase):
    """Questions, csv `name, question, answer, explanation`; the explanation, if there is one, follows the answer."""

    name = "mpx_questions"
    task = "vqa"
    required = ("name", "question", "answer")
    extra = ("explanation",)

    def parse(self, row):
        answer, explanation = row.answer("answer"), row.optional("explanation", NO_PROSE)
        full = join(closed(answer), explanation) if explanation else answer
        return self._scans(row), row.text("question"), full

    def parts(self, value, rng):
        scans, question, answer = value
        chosen = self._chosen(scans, rng)
        return self.task, self.study_of(scans[0].path), instruction_parts(rng, chosen, question, answer)
