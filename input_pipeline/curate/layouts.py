"""Tables in the layouts of the families, read and written row by row."""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from input_pipeline.curate.jobs import Result
from input_pipeline.datasets import FAMILIES
from input_pipeline.datasets.base import TableDataset
from input_pipeline.datasets.csv_tables import stream_csv
from input_pipeline.datasets.json_tables import stream_json
from input_pipeline.datasets.rows import bad_path
from input_pipeline.files import atomic_write
from input_pipeline.samples import RowError


class NamedTable(NamedTuple):
    """A table named on the command line as `FAMILY=TABLE` or `FAMILY=FOLDER:TABLE`."""

    family: str
    file: Path
    root: Path  # the folder, which contains the table's scans
    folder: str  # relative to --root

    @property
    def name(self) -> str:
        return self.file.name

    def below(self, path: str) -> str:
        """Return a path of the table, relative to --root. Such paths are unique over all tables."""
        return f"{self.folder}/{path}" if self.folder else path


def add_tables(parser: argparse.ArgumentParser) -> None:
    text = "family and path of a table below --root; FOLDER:TABLE if the paths in the table start in a "
    text += "folder below --root"
    parser.add_argument("tables", nargs="+", metavar="FAMILY=[FOLDER:]TABLE", help=text)
    parser.add_argument("--root", required=True, metavar="DIR", help="directory of the tables and all scans")


def named_table(spec: str, root: Path) -> NamedTable:
    """Parse FAMILY=[FOLDER:]TABLE. Raises ValueError."""
    family, equals, path = spec.partition("=")
    folder, _, table = path.rpartition(":")
    known = [name for name, kind in FAMILIES.items() if issubclass(kind, TableDataset) and kind.layout != "jsonl"]
    if not equals or family not in known:
        raise ValueError(f"{spec!r}: write FAMILY=[FOLDER:]TABLE, with one of the families {', '.join(known)}")
    named = NamedTable(family, root / folder / table, root / folder, folder.strip("/"))
    if folder and bad_path(folder):
        raise ValueError(f"{spec!r}: {bad_path(folder)}; it must be below --root {root}")
    if not named.file.is_file():
        raise ValueError(f"{named.file}: table not found")
    return named


def named_tables(specs: list[str], root: Path, directory: Path | None = None) -> list[NamedTable]:
    """Parse several tables. Raises ValueError if names repeat, or if an input table is in the output `directory`."""
    tables = [named_table(spec, root) for spec in specs]
    names = [table.name for table in tables]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two tables have the name {', '.join(repeated)}: rename one")
    if directory is not None and any(table.file.parent.resolve() == directory.resolve() for table in tables):
        raise ValueError(f"--out {directory} contains the input tables: choose another directory")
    return tables


def read(family: str, file: Path, result: Result) -> tuple[list[str] | None, Iterator[tuple[int, dict]]]:
    """Return the header of a table (None for JSON), and number and cells of each row; bad rows become problems.

    Raises RowError if a required column is missing, or during iteration if the rest of the file cannot be read.
    """
    required = FAMILIES[family].required
    if FAMILIES[family].layout == "json":
        return None, good_rows(stream_json(file, required), result)
    header, rows = stream_csv(file, required, None)
    return header, good_rows(rows, result)


def good_rows(rows: Iterator[tuple[int, dict] | RowError], result: Result) -> Iterator[tuple[int, dict]]:
    """Yield the good rows; bad rows become problems of the result."""
    for row in rows:
        if isinstance(row, RowError):
            result.error(row)
        else:
            yield row


@contextlib.contextmanager
def row_writer(file: Path, header: list[str] | None) -> Iterator[Callable[[dict], None]]:
    """Yield a function that writes a row: CSV if there is a header, JSON Lines for .jsonl, else an item of a JSON list.

    The file is written atomically.
    """
    with atomic_write(file) as partial, open(partial, "w", encoding="utf-8", newline="") as out:
        if header is not None:
            table = csv.DictWriter(out, header)
            table.writeheader()
            yield table.writerow
            return
        if file.suffix == ".jsonl":
            yield lambda row: out.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        separators = itertools.chain(["[\n"], itertools.repeat(",\n"))
        yield lambda row: out.write(next(separators) + json.dumps(row, ensure_ascii=False))
        out.write("[]\n" if next(separators) == "[\n" else "\n]\n")


class Tables:
    """Writers of tables. A table is created with its first row. A table of an earlier run is removed if it gets no row.

    with Tables(directory, {"a.csv": ["x", "y"], "b.json": None}) as out:
        out.write("a.csv", {"x": 1, "y": 2})
    """

    def __init__(self, directory: Path, headers: dict[str, list[str] | None]):
        self.directory, self.headers = directory, headers
        self.rows = dict.fromkeys(headers, 0)  # name -> number of rows
        self._open: dict[str, Callable[[dict], None]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Tables:
        return self

    def write(self, name: str, row: dict) -> None:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(row_writer(self.directory / name, self.headers[name]))
        self._open[name](row)
        self.rows[name] += 1

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
        if error == (None, None, None):
            for name in self.headers.keys() - self._open:
                (self.directory / name).unlink(missing_ok=True)
