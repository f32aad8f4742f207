"""PMC-CaseReport: csv `PMC_id, img_ref, context, question, answer`; VQA with the patient's history as context."""

from __future__ import annotations

import dataclasses
import re

from input_pipeline.datasets.base import TableDataset, pick
from input_pipeline.samples import Scan, Text
from input_pipeline.text.sentences import shorten

_TAG = re.compile(r"^[QA]\s*:\s*", re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9._-]+")


@dataclasses.dataclass(kw_only=True, eq=False)
class PMCCaseReport(TableDataset):
    """Questions on figures `figures/PMCID_imgref.jpg`, which come before or after the question.

    Attributes:
      figures: folder of the figures below the root.
    """

    name = "pmc_casereport"
    task = "vqa"
    required = ("PMC_id", "img_ref", "context", "question", "answer")

    figures: str = "figures"

    def parse(self, row):
        paper = row.text("PMC_id")
        figures = row.texts("img_ref")
        if not figures:
            raise row.error("img_ref names no figure")
        for name in (paper, *figures):
            if not _ID.fullmatch(name) or name.strip(".") == "":
                raise row.error(f"{name[:60]!r} is not a paper or figure name", "use letters, digits, '.', '_', '-'")
        scans = tuple(Scan(row.path(f"{paper}_{name}.jpg", self.figures)) for name in figures)
        texts = []
        for column in ("question", "answer"):
            text = _TAG.sub("", row.text(column), count=1).strip()
            if not text:
                raise row.error(f"{column} has no text after its 'Q:' or 'A:'")
            texts.append(text)
        return paper, scans, row.optional("context"), *texts

    def parts(self, value, rng):
        paper, scans, context, question, answer = value
        history = (Text(shorten(context), "context"),) if context else ()
        instruction = Text(question, "instruction")
        middle = pick(rng, ((*scans, instruction), (instruction, *scans)))
        return self.task, paper, (*history, *middle, Text(answer, "response"))

    def scans_of(self, value):
        return value[1]
