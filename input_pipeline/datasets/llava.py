"""Conversations in the layout of LLaVA and ShareGPT: a JSON list or JSON Lines, with image lists."""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets.json_tables import stream_json, stream_jsonl
from input_pipeline.datasets.mapped import Mapped


@dataclasses.dataclass(kw_only=True, eq=False)
class LLaVA(Mapped):
    r"""Rows like {"image": "a.png" or ["a.png", ...], "conversations": [{"from": "human", "value": "<image>\nWhy?"}, ...]}.

    Other names of the two keys are mapped with `columns`. Other keys are ignored. The task is `vqa` unless `constants`
    or a column states another.
    """  # noqa: E501

    name = "llava"
    default_columns = {"scans": "image", "messages": "conversations", "id": ""}  # ids are often not unique
    default_constants = {"task": "vqa"}

    def files(self):
        return [self.file]

    def features(self):
        return None

    def records(self, names):
        return stream_jsonl(self.file) if self.file.suffix == ".jsonl" else stream_json(self.file, ())
