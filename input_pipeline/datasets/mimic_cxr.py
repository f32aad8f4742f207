"""MIMIC-CXR reports: csv `image_path, label`; the label is the report. One path, or a list literal of a study's."""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, ask


@dataclasses.dataclass(kw_only=True, eq=False)
class MimicCXR(TableDataset):
    name = "mimic_cxr"
    task = "report"
    required = ("image_path", "label")

    def parse(self, row):
        return row.scans("image_path"), row.text("label")

    def parts(self, value, rng):
        scans, report = value
        return self.task, self.study_of(scans[0].path), ask(rng, scans, prompts.draw("report_cxr", rng), report)

    def scans_of(self, value):
        return value[0]
