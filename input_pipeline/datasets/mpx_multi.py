"""MPx-Multi and the MPx questions.

MPx-Multi: csv `name` (comma-separated images), `type`, `context` (the answer), `history`.
MPx questions: csv `name, question, answer, explanation`.
"""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, choose, instruction_parts
from input_pipeline.samples import Scan
from input_pipeline.text.sentences import closed, join

# type -> prompts
TYPES = {
    "txFollowup": "mpx_followup",
    "ddx": "mpx_ddx",
    "dxHow": "mpx_how",
    "diagnosis": "mpx_diagnosis",
    "findings": "mpx_findings",
    "exam": "mpx_exam",
    "discussion": "mpx_discussion",
}


@dataclasses.dataclass(kw_only=True, eq=False)
class _MPxCase(TableDataset):
    """Rows about several images of one case.

    Attributes:
      images: folder of the images below the root.
      max_scans: maximum images in a sample; the sample's generator chooses among more, keeping their order.
    """

    images: str = ""
    max_scans: int = 10

    def __post_init__(self):
        if self.max_scans < 1:
            raise ValueError(f"{self.name}: max_scans must be at least 1, got {self.max_scans}")
        super().__post_init__()

    def _scans(self, row) -> tuple[Scan, ...]:
        names = [part.strip() for text in row.texts("name") for part in text.split(",")]
        if not names or not all(names):
            raise row.error(f"name {row.cells.get('name')!r} has a blank image name")
        return tuple(Scan(row.path(name, self.images)) for name in names)

    def _chosen(self, scans, rng) -> tuple[Scan, ...]:
        return tuple(scans[k] for k in choose(rng, len(scans), self.max_scans))

    def scans_of(self, value):
        return value[0]


@dataclasses.dataclass(kw_only=True, eq=False)
class MPxMulti(_MPxCase):
    name = "mpx_multi"
    task = "report"
    required = ("name", "type", "context", "history")

    def parse(self, row):
        return self._scans(row), row.choice("type", TYPES), row.text("context"), row.optional("history")

    def parts(self, value, rng):
        scans, kind, answer, history = value
        chosen, question = self._chosen(scans, rng), prompts.draw(TYPES[kind], rng)
        return self.task, self.study_of(scans[0].path), instruction_parts(rng, chosen, question, answer, history)


@dataclasses.dataclass(kw_only=True, eq=False)
class MPxQuestions(_MPxCase):
    """Questions whose answer is followed by its explanation, if there is one."""

    name = "mpx_questions"
    task = "vqa"
    required = ("name", "question", "answer")
    extra = ("explanation",)

    def parse(self, row):
        answer, explanation = row.text("answer"), row.optional("explanation")
        full = join(closed(answer), explanation) if explanation else answer
        return self._scans(row), row.text("question"), full

    def parts(self, value, rng):
        scans, question, answer = value
        chosen = self._chosen(scans, rng)
        return self.task, self.study_of(scans[0].path), instruction_parts(rng, chosen, question, answer)
