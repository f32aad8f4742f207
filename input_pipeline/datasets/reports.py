"""MIMIC-CXR and PMC-OA: a text about scans."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts


class _Report(TableDataset):
    task = "report"
    prompt: ClassVar[str]  # group of prompts

    def parts(self, value, rng):
        scans, report = value
        question = prompts.draw(self.prompt, rng)
        return self.task, self.study_of(scans[0].path), instruction_parts(rng, scans, question, report)


class MimicCXR(_Report):
    """Reports, csv `image_path, label`. image_path is one path, or a list literal with all paths of the study."""

    name = "mimic_cxr"
    required = ("image_path", "label")
    prompt = "report_cxr"

    def parse(self, row):
        return row.scans("image_path"), row.text("label")


@dataclasses.dataclass(kw_only=True, eq=False)
class PMCOA(_Report):
    """Captions of figures of papers, csv `Figure_path, Caption`. Figure_path is one path, or a list literal."""

    name = "pmc_oa"
    required = ("Figure_path", "Caption")
    prompt = "caption_figure"

    images: str = ""  # folder of the figures below the root

    def parse(self, row):
        return row.scans("Figure_path", self.images), row.text("Caption")
