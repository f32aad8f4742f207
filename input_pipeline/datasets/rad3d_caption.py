"""Rad3D-Caption and -Rationale: JSON list of {pre, pat, npy_path, finding, impression, title, articles,
radiographic_features}; npy_path is a stack [S, 3, H, W, D] of S scans. Here: the caption."""

from __future__ import annotations

import dataclasses
from typing import Literal

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import LeftOut, TableDataset, ask
from input_pipeline.text.measurements import without_sizes
from input_pipeline.text.sentences import closed, join


@dataclasses.dataclass(kw_only=True, eq=False)
class Rad3DCaption(TableDataset):
    """Patient's data and presentation are the context, findings and impression the answer; either of these may lack.

    Attributes:
      sizes: `remove` takes phrases of size out of the answer (paper, Table 2: so is RadMD made, as a volume resized to
        256x256 does not show how big anything is); what has nothing else to say is left out and counted.
    """

    name = "rad3d_caption"
    task = "report"
    required = ("npy_path", "finding", "impression")
    layout = "json"

    sizes: Literal["keep", "remove"] = "keep"

    def __post_init__(self):
        if self.sizes not in ("keep", "remove"):
            raise ValueError(f"{self.name}: sizes {self.sizes!r} is unknown: keep or remove")
        super().__post_init__()

    def parse(self, row):
        finding, impression = (" ".join(row.texts(column, literal=False)) for column in ("finding", "impression"))
        if not finding and not impression:
            raise row.error("finding and impression are both blank")
        if self.sizes == "remove":
            finding, impression = without_sizes(finding), without_sizes(impression)
            if not finding and not impression:
                return LeftOut("nothing but sizes")
        report = join(
            f"Findings: {closed(finding)}" if finding else "", f"Impression: {closed(impression)}" if impression else ""
        )
        return row.path(row.text("npy_path")), patient(row), report

    def parts(self, value, rng):
        path, context, report = value
        return (
            self.task,
            self.study_of(path),
            ask(rng, self.scans_of(value), prompts.draw("report", rng), report, context),
        )

    def scans_of(self, value):
        return self.npy_scans(value[0])


def patient(row) -> str:
    """The patient's data (`pat`: age, sex), then the presentation (`pre`); '' if there is neither."""
    return join(*(closed(" ".join(row.texts(column, literal=False))) for column in ("pat", "pre")))
