"""The files of a published data set: tables in the formats of their owners, and the paths of scans."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.curate.jobs import Result
from input_pipeline.curate.labels import first_files, read_rows, reject
from input_pipeline.curate.layouts import good_rows
from input_pipeline.datasets.json_tables import load_json, stream_json, stream_jsonl
from input_pipeline.datasets.rows import EMPTY_WORDS, NO_PROSE, present
from input_pipeline.datasets.unpacked import ScanFolder
from input_pipeline.samples import RowError, Task
from input_pipeline.text.sentences import closed, join

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".rar", ".7z")


@dataclasses.dataclass(slots=True)
class Case:
    """A sample of a published data set, and the row that it comes from."""

    id: str
    task: Task
    scans: tuple[str, ...]  # relative to the folder of the set
    answer: str
    question: str = ""  # "": the tool draws a sentence from the group `prompts`
    prompts: str = ""
    context: str = ""
    study: str = ""  # what must not be divided between splits; "": the path of the first scan
    split: str = ""  # train, validation or test; "" if the owners publish no split


class SourceFiles:
    """The folder of a data set, as downloaded and unpacked.

    Args:
      root: directory of all data sets. folder: of this one, relative to the root.
    """

    def __init__(self, root: Path, folder: str, result: Result):
        self.root, self.folder, self.result = root / folder, folder, result
        self.found = self.missing = 0  # scans
        self.unpacked = ScanFolder(self.root, "unpacked")

    def find(self, pattern: str) -> Path:
        """Return the file below the folder that matches a pattern. Raises ValueError if there is none, or several."""
        files = first_files(self.root, pattern)
        if len(files) > 1:
            names = ", ".join(os.path.relpath(file, self.root) for file in files[:5])
            raise ValueError(f"{self.root} has several files {pattern} ({names}): keep one")
        return files[0]

    def rows(self, file: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and cells of each row of a table in CSV, TSV (both also .gz), JSON, JSON Lines or XLSX.

        A JSON file is a list of objects, or an object of objects, whose keys become the cell `key`. Rows that cannot be
        read become problems. Raises RowError if a required column is missing.
        """
        if file.suffix == ".xlsx":
            yield from self._sheet(file, required)
        elif file.suffix in (".json", ".jsonl"):
            yield from self._objects(file, required)
        else:
            yield from read_rows(file, required, self.result, None)

    def _objects(self, file: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
        if file.suffix == ".jsonl":
            rows = stream_jsonl(file)
        elif _first_character(file) == "{":
            objects = {key: value for key, value in load_json(file).items() if isinstance(value, dict)}
            rows = ((i, {"key": key} | value) for i, (key, value) in enumerate(objects.items(), 1))
        else:
            rows = stream_json(file, ())
        for number, cells in good_rows(rows, self.result):
            if missing := [key for key in required if key not in cells]:
                reject(self.result, file, number, f"{', '.join(missing)} missing", f"required: {', '.join(required)}")
            else:
                yield number, cells

    def _sheet(self, file: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
        try:
            import openpyxl
        except ImportError:
            raise ValueError(f"{file} needs openpyxl: pip install openpyxl") from None
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        try:
            rows = book.worksheets[0].iter_rows(values_only=True)
            header = [str(name or "").strip() for name in next(rows, ())]
            if missing := [name for name in required if name not in header]:
                reason = f"column {', '.join(missing)} is missing; the header has {', '.join(header)[:200]}"
                raise RowError(file, 0, reason, f"required columns: {', '.join(required)}")
            for number, values in enumerate(rows, 1):
                yield number, {name: value for name, value in zip(header, values, strict=False) if name}
        finally:
            book.close()

    def scan(self, *candidates: str) -> str:
        """Return the first candidate that exists, or else a file with its unique name anywhere below the folder.

        A scan that is not found is counted, and the first candidate is returned: `prepare` reports it.
        """
        for path in candidates:
            if (self.root / path).exists():
                self.found += 1
                return path
        for path in candidates:
            if other := self._by_name.get(path.rpartition("/")[2]):
                self.found += 1
                return other
        self.missing += 1
        return candidates[0]

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def stack(self, array: np.ndarray, axes: str) -> str:
        """Write voxels as a file of the unpacked scans. Returns its path relative to the folder."""
        self.found += 1
        return self.unpacked.add_array(array, axes)

    @functools.cached_property
    def _by_name(self) -> dict[str, str]:
        """File name -> path relative to the folder; "" for a name that occurs more than once."""
        paths: dict[str, str] = {}
        for directory, subfolders, names in os.walk(self.root):
            subfolders.sort()
            for name in names:
                path = os.path.relpath(os.path.join(directory, name), self.root)
                paths[name] = "" if name in paths else path
        return paths

    def check(self) -> None:
        """Count missing scans. Raises ValueError if no scan was found."""
        if self.missing:
            self.result.count(f"{self.folder}: scans that are not in the folder", self.missing)
        if self.missing and not self.found:
            archives = sorted(name for name in os.listdir(self.root) if name.endswith(ARCHIVES))
            remedy = f"unpack {', '.join(archives[:5])} there" if archives else "copy the scans there"
            raise ValueError(f"{self.root} has none of the {self.missing:,} scans: {remedy}")


def _first_character(file: Path) -> str:
    with open(file, encoding="utf-8-sig", errors="replace") as text:
        return text.read(1 << 12).lstrip()[:1]


def text(cells: dict[str, Any], column: str) -> str:
    """Return a cell as text; "" if it is absent or a placeholder such as `nan`. Numbers become text."""
    value = cells.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else present(str(value), EMPTY_WORDS)


def prose(cells: dict[str, Any], column: str) -> str:
    """Return a cell of prose on one line; "" for placeholders, `N/A` and `-`."""
    value = cells.get(column)
    return " ".join(present(value, NO_PROSE).split()) if isinstance(value, str) else ""


def report(findings: str, impression: str) -> str:
    """Return the two parts of a report in the layout of Rad3D-Caption; "" if both are blank."""
    parts = (("Findings", findings), ("Impression", impression))
    return join(*(f"{name}: {closed(part)}" for name, part in parts if part))
