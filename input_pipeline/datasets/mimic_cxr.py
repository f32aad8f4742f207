"""MIMIC-CXR reports: csv `image_path, label`.

The label is the report. image_path is one path, or a list literal with all paths of the study.
"""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts


@dataclasses.dataclass(kw_only=True, eq=False)
class MimicCXR(TableDataset):
    name = "mimic_cxr"
    task = "report"
    required = ("image_path", "label")

    def parse(self, row):
        return row.scans("image_path"), row.text("label")

    def parts(self, value, rng):
        scans, report = value
        question = prompts.draw("report_cxr", rng)
        return self.task, self.study_of(scans[0].path), instruction_parts(rng, scans, question, report)

    def scans_of(self, value):
        return value[0]
