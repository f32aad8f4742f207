"""Rad3D-VQA: csv `image_path, question, answer`; the image is a .npy stack [S, 3, H, W, D] of S scans."""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets.vqa import VQA


@dataclasses.dataclass(kw_only=True, eq=False)
class Rad3DVQA(VQA):
    name = "rad3d_vqa"
    required = ("image_path", "question", "answer")

    def parse(self, row):
        return self.value(row.path(row.text("image_path")), row.text("question"), row.text("answer"))
