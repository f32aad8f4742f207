"""PMC-OA: csv `Figure_path, Caption`; captioning of figures of papers."""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts


@dataclasses.dataclass(kw_only=True, eq=False)
class PMCOA(TableDataset):
    """Figures with captions.

    Attributes:
      images: folder of the figures below the root.
    """

    name = "pmc_oa"
    task = "report"
    required = ("Figure_path", "Caption")

    images: str = ""

    def parse(self, row):
        return row.scan("Figure_path", self.images), row.text("Caption")

    def parts(self, value, rng):
        scan, caption = value
        question = prompts.draw("caption_figure", rng)
        return self.task, self.study_of(scan.path), instruction_parts(rng, (scan,), question, caption)

    def scans_of(self, value):
        return value[:1]
