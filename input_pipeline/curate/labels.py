"""Images with findings, and helpers to read them from the label files of X-ray sets (xray_sets.py)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from input_pipeline.curate.jobs import Result
from input_pipeline.curate.layouts import good_rows
from input_pipeline.datasets import diseases
from input_pipeline.datasets.csv_tables import stream_csv
from input_pipeline.datasets.rows import bad_cell

NORMAL = "No finding"
UNCERTAIN = {"ignore": None, "positive": True, "negative": False}  # choice -> what a finding counts as


@dataclasses.dataclass(slots=True)
class Image:
    """An image with its findings."""

    path: str  # relative to the member's folder
    study: str  # what must not be divided between splits (a patient, if the set names one)
    findings: dict[str, bool | None]  # disease -> True, False or None (uncertain)
    split: str = ""
    complete: bool = False  # every finding of the set was looked for, so a finding that is not True is absent
    row: int = 0  # row of the label in `file`, for error messages
    file: str = ""

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(d for d, present in self.findings.items() if present and not diseases.is_normal(d))

    @property
    def is_normal(self) -> bool:
        """Whether the image is labeled normal, or every disease of its data set is labeled absent."""
        if self.positives or None in self.findings.values():
            return False
        return any(p and diseases.is_normal(d) for d, p in self.findings.items()) or self.complete


@dataclasses.dataclass
class Policy:
    """The value that CheXpert's uncertain label -1 is mapped to."""

    uncertain: str = "ignore"  # one of UNCERTAIN
    by_disease: dict[str, str] = dataclasses.field(default_factory=dict)  # exceptions

    def choice(self, disease: str) -> str:
        return self.by_disease.get(disease, self.uncertain)


def read_rows(file: Path, required, result: Result, optional=()) -> Iterator[tuple[int, dict]]:
    """Yield number and cells of the rows of a CSV file; rows that cannot be read become problems."""
    for number, cells in good_rows(stream_csv(file, required, optional)[1], result):
        if bad := bad_cell(cells):
            reject(result, file, number, bad, "write the table as UTF-8 text")
        else:
            yield number, cells


def reject(result: Result, file: Path | str, row: int, reason: str, remedy: str = "correct or remove the row") -> None:
    """Add a problem for a row that is not used."""
    result.count("rows that cannot be used")
    result.problem(file, row, reason, remedy)


def first_files(folder: Path, *patterns: str) -> list[Path]:
    """Return the files below a folder that match the first pattern that any file matches. ValueError if none does."""
    for pattern in patterns:
        files = sorted(f for f in folder.rglob(pattern) if f.is_file())
        if files:
            return files
    raise ValueError(f"{folder} has no {' or '.join(patterns)}: use the folder with the files of the set as published")


def all_files(folder: Path, *names: str) -> list[Path]:
    """Return the files below a folder with any of these names. Raises ValueError if there is none."""
    return [f for name in names for f in sorted(folder.rglob(name))] or first_files(folder, names[0])


def index_images(folder: Path, extensions: tuple[str, ...]) -> dict[str, str]:
    """Return stem -> relative path of every image below a folder."""
    paths: dict[str, str] = {}
    for directory, subfolders, names in os.walk(folder):
        subfolders.sort()
        for name in sorted(names):
            if name.lower().endswith(extensions):
                paths.setdefault(Path(name).stem, os.path.relpath(os.path.join(directory, name), folder))
    return paths


def image_path(index: dict[str, str], name: str, extension: str) -> str:
    """Return the relative path of an image. If it is missing, return its file name; `prepare` reports it later."""
    return index.get(Path(name).stem, name if name.endswith(extension) else name + extension)


def flag(value: str) -> bool | None:
    """Return True for 1, False for 0, and None for any other label."""
    return {"1": True, "1.0": True, "0": False, "0.0": False}.get(value.strip())
