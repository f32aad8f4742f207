"""Rad3D-Caption: findings and impression of a case.

JSON list of {pre, pat, npy_path, finding, impression, title, articles, radiographic_features}, shared with
Rad3D-Rationale; npy_path is a stack [S, 3, H, W, D] of S scans.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import SkippedRow, TableDataset, instruction_parts
from input_pipeline.text.measurements import without_sizes
from input_pipeline.text.sentences import closed, join


@dataclasses.dataclass(kw_only=True, eq=False)
class Rad3DCaption(TableDataset):
    """The context is the patient's data and presentation; the answer is the findings, the impression, or both.

    Attributes:
      sizes: `remove` takes size phrases out of the answer, as RadMD does (paper, Table 2): a volume resized to
        256x256 does not show sizes. Rows without any other text are skipped and counted.
    """

    name = "rad3d_caption"
    task = "report"
    required = ("npy_path", "finding", "impression")
    layout = "json"

    sizes: Literal["keep", "remove"] = "keep"

    def __post_init__(self):
        if self.sizes not in ("keep", "remove"):
            raise ValueError(f"{self.name}: sizes {self.sizes!r} is unknown: use keep or remove")
        super().__post_init__()

    def parse(self, row):
        finding, impression = (" ".join(row.texts(column, literal=False)) for column in ("finding", "impression"))
        if not finding and not impression:
            raise row.error("finding and impression are both blank")
        if self.sizes == "remove":
            finding, impression = without_sizes(finding), without_sizes(impression)
            if not finding and not impression:
                return SkippedRow("nothing but sizes")
        report = join(
            f"Findings: {closed(finding)}" if finding else "", f"Impression: {closed(impression)}" if impression else ""
        )
        return row.path(row.text("npy_path")), patient(row), report

    def parts(self, value, rng):
        path, context, report = value
        scans, question = self.scans_of(value), prompts.draw("report", rng)
        return self.task, self.study_of(path), instruction_parts(rng, scans, question, report, context)

    def scans_of(self, value):
        return self.npy_scans(value[0])


def patient(row) -> str:
    """Return the patient's data (`pat`: age, sex), then the presentation (`pre`); "" if both are missing."""
    return join(*(closed(" ".join(row.texts(column, literal=False))) for column in ("pat", "pre")))
