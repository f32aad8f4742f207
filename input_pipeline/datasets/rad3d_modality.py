"""Rad3D-Modality: csv `image_path, answer`; open and yes/no questions about the modality of a volume."""

from __future__ import annotations

import dataclasses

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts
from input_pipeline.datasets.modalities import WORDS, ModalityQuestions, modalities
from input_pipeline.datasets.rows import Row


def modality_names(row: Row, label: str, own: dict[str, str]) -> frozenset[str]:
    """Return the modalities that a label names; `own` precedes the built-in words. Raises RowError if it names none."""
    names = modalities(own.get(label, label))
    if not names:
        remedy = f"use one of {', '.join(WORDS)}, or map it with `modalities`"
        raise row.error(f"modality {label[:60]!r} is unknown", remedy)
    return names


def modality_question(questions: ModalityQuestions, names, label: str, judgement: float, rng) -> tuple[str, str]:
    """Draw a question and its answer: yes/no for one modality, or which modality it is."""
    if rng.random() < judgement:
        drawn = questions.draw(names, rng)
        if drawn is not None:
            modality, answer = drawn
            return prompts.draw("modality_judge", rng, modality=modality), answer
    return prompts.draw("modality_open", rng), label


@dataclasses.dataclass(kw_only=True, eq=False)
class Rad3DModality(TableDataset):
    """Modality of a volume. RadFM uses a fifth of the rows in an epoch: `fraction=0.2`.

    Attributes:
      modalities: labels that the built-in words do not cover -> a modality.
      judgement: share of yes/no questions.
    """

    name = "rad3d_modality"
    task = "modality"
    required = ("image_path", "answer")

    modalities: dict[str, str] = dataclasses.field(default_factory=dict)
    judgement: float = 0.5

    def parse(self, row):
        label = row.text("answer")
        return row.path(row.text("image_path")), label, modality_names(row, label, self.modalities)

    def finish(self):
        self._questions = ModalityQuestions(names for *_, names in self._rows)
        return []

    def parts(self, value, rng):
        path, label, names = value
        question, answer = modality_question(self._questions, names, label, self.judgement, rng)
        return self.task, self.study_of(path), instruction_parts(rng, self.scans_of(value), question, answer)

    def scans_of(self, value):
        return self.npy_scans(value[0])
