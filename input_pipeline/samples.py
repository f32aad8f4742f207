"""Samples: texts and scans in reading order, each text with its role in training."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

Role = Literal["context", "instruction", "response", "interleaved", "system"]
Task = Literal["modality", "diagnosis", "vqa", "report", "rationale", "interleaved"]
ROLES: tuple[str, ...] = get_args(Role)
TASKS: tuple[str, ...] = get_args(Task)
SPEAKERS = ("system", "user", "assistant")  # roles of the messages of a conversation


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text.

    `context` is shortened first if a sample is too long; `instruction` is the user's question; `response` is the target
    of training; `interleaved` text is a target throughout (paper, equations 3 and 4). `system` text comes first, says
    how to answer, and is never shortened.
    """

    text: str
    role: Role

    def __reduce__(self):
        """Pickle only the arguments of the constructor, in half the time of the default. Table rows are pickled."""
        return Text, (self.text, self.role)


@dataclasses.dataclass(frozen=True)
class Scan:
    """One volume of a scan file, of a DICOM series, or of a series of a study."""

    path: str  # relative to the data set's root, as in its table
    volume: int | None = None  # index of the volume in a 4D file or a dynamic series; None if it has only one
    # How intensities become 0 to 1: (low, high) to clip to, or a setting of images/intensity.py; None: minmax, or the
    # setting of the source or the model.
    window: str | tuple[float, float] | None = None
    series: str | None = None  # words that select a series of a DICOM study (images/scans/study/selection.py)

    def __reduce__(self):
        """Pickle only the arguments of the constructor, as in `Text`."""
        return Scan, (self.path, self.volume, self.window, self.series)

    @property
    def selection(self) -> dict:
        """The keyword arguments of `scans.read` that select the volume."""
        return {"volume": self.volume, "series": self.series}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training or test case."""

    row_id: str  # unique within the data set and stable across runs; it seeds the sample's random choices
    dataset: str  # name of the family, e.g. `pmc_vqa`
    task: Task
    study_id: str | None  # the study or paper, which must not be split between training and test; None if unknown
    parts: tuple[Text | Scan, ...]  # the same scan may occur more than once
    rejected: str | None = None  # an answer that is worse than the last part, the response; None without one

    @property
    def scans(self) -> tuple[Scan, ...]:
        """Every scan in reading order, including repetitions."""
        return tuple(p for p in self.parts if isinstance(p, Scan))


class ScanNotice(UserWarning):
    """A scan was read, but its contrast, its shape or its metadata are doubtful."""


class RowError(ValueError):
    """A row cannot become a sample: names the file, the row, the reason, and what the user can do."""

    def __init__(self, file, row, reason: str, remedy: str = ""):
        self.file, self.row, self.reason, self.remedy = str(file), row, reason, remedy
        super().__init__(f"{file}, row {row}: {reason}" + (f" ({remedy})" if remedy else ""))

    def __reduce__(self):
        """Pickle all attributes: BaseException would pickle only the message."""
        return type(self), (self.file, self.row, self.reason, self.remedy)
