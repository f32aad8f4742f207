"""The unit of the pipeline: texts and scans in reading order, each text with the part it plays in training."""

from __future__ import annotations

import dataclasses
from typing import Literal

Role = Literal["context", "instruction", "response", "interleaved"]
Task = Literal["modality", "diagnosis", "vqa", "report", "rationale", "interleaved"]
ROLES: tuple[str, ...] = Role.__args__
TASKS: tuple[str, ...] = Task.__args__


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text.

    Attributes:
      role: `context` may be shortened when a sample is too long; `instruction` is what the user asks; `response` is
        what the model learns to say; `interleaved` text is learned throughout (paper, equations 3 and 4).
    """

    text: str
    role: Role

    def __reduce__(self):
        return Text, (self.text, self.role)  # half the time and fewer bytes: rows of tables are kept pickled


@dataclasses.dataclass(frozen=True)
class Scan:
    """A file, or a DICOM series directory, and which of its volumes is meant.

    Attributes:
      path: as the data set's table gives it, below the data set's root.
      volume: index of the volume in a 4D file; None if the file has one.
      window: (low, high) intensities to clip to before scaling, a name of `intensity.CT_WINDOWS`, or None.
    """

    path: str
    volume: int | None = None
    window: str | tuple[float, float] | None = None

    def __reduce__(self):
        return Scan, (self.path, self.volume, self.window)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training or test case. The same scan may stand in `parts` more than once.

    Attributes:
      row_id: unique within the data set, stable over runs (it seeds the sample's random choices and appears in logs).
      dataset: name of the family, e.g. `pmc_vqa`.
      study_id: what must not be split between training and test (a study, a paper); None if the source does not say.
    """

    row_id: str
    dataset: str
    task: Task
    study_id: str | None
    parts: tuple[Text | Scan, ...]

    @property
    def scans(self) -> tuple[Scan, ...]:
        """Every scan in reading order, repetitions included."""
        return tuple(p for p in self.parts if isinstance(p, Scan))


class RowError(ValueError):
    """A row that cannot become a sample: which file, which row, why, and what the user can do."""

    def __init__(self, file, row, reason: str, remedy: str = ""):
        self.file, self.row, self.reason, self.remedy = str(file), row, reason, remedy
        super().__init__(f"{file}, row {row}: {reason}" + (f" ({remedy})" if remedy else ""))

    def __reduce__(self):
        """Errors cross from worker processes pickled, and BaseException would pickle the message alone."""
        return type(self), (self.file, self.row, self.reason, self.remedy)
