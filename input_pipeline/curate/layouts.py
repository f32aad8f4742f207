"""Tables in the layouts of the families, read and written row by row: none is ever whole in memory."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from input_pipeline.curate.jobs import Result
from input_pipeline.datasets import FAMILIES, tables
from input_pipeline.datasets.base import TableDataset
from input_pipeline.files import atomic_write
from input_pipeline.samples import RowError


class Named(NamedTuple):
    """A table of the command line: `FAMILY=TABLE`, or `FAMILY=FOLDER:TABLE`.

    Attributes:
      file: below the folder. root: the folder, below which its scans lie. folder: the same, below --root.
    """

    family: str
    file: Path
    root: Path
    folder: str

    @property
    def name(self) -> str:
        return self.file.name

    def below(self, path: str) -> str:
        """A path of the table as it stands below --root: scans of several folders are told apart by it."""
        return f"{self.folder}/{path}" if self.folder else path


HELP = "a table below --root and its family; FOLDER:TABLE where the paths in it begin in a folder below --root"


def add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="+", metavar="FAMILY=[FOLDER:]TABLE", help=HELP)
    parser.add_argument("--root", required=True, metavar="DIR", help="below which the tables and all scans lie")


def named(spec: str, root: Path) -> Named:
    """Raises ValueError."""
    family, equals, place = spec.partition("=")
    folder, colon, table = place.rpartition(":")
    known = [name for name, kind in FAMILIES.items() if issubclass(kind, TableDataset) and kind.layout != "jsonl"]
    if not equals or family not in known:
        raise ValueError(f"{spec!r}: FAMILY=[FOLDER:]TABLE is needed, the family being one of {', '.join(known)}")
    found = Named(family, root / folder / table, root / folder, folder.strip("/"))
    if tables.bad_path(folder) and folder:
        raise ValueError(f"{spec!r}: {tables.bad_path(folder)}, but it must lie below --root {root}")
    if not found.file.is_file():
        raise ValueError(f"{found.file}: there is no such table")
    return found


def all_named(specs: list[str], root: Path, directory: Path | None = None) -> list[Named]:
    """The same of several, each to be written to `directory` under its name, if one is given. Raises ValueError."""
    found = [named(spec, root) for spec in specs]
    names = [table.name for table in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tables are called {', '.join(twice)}: rename one")
    if directory is not None and any(table.file.parent.resolve() == directory.resolve() for table in found):
        raise ValueError(f"--out {directory} holds the tables that are read: choose another")
    return found


def read(family: str, file: Path, result: Result) -> tuple[list[str] | None, Iterator[tuple[int, dict]]]:
    """(header, None for JSON; number and cells of each row, with all its columns); bad rows go to the result.

    Raises:
      RowError: a table without its columns, or one whose rest has no meaning (while it is read).
    """
    required = FAMILIES[family].required
    if FAMILIES[family].layout == "json":
        return None, _good(tables.stream_json(file, required), result)
    header, rows = tables.stream_csv(file, required, None)
    return header, _good(rows, result)


def read_lines(file: Path, result: Result) -> Iterator[tuple[int, dict]]:
    """The same of JSON Lines."""
    return _good(tables.stream_jsonl(file), result)


def _good(rows: Iterator[tuple[int, dict] | RowError], result: Result) -> Iterator[tuple[int, dict]]:
    for row in rows:
        if isinstance(row, RowError):
            result.problem(row.file, row.row, row.reason, row.remedy)
        else:
            yield row


@contextlib.contextmanager
def written(file: Path, header: list[str] | None) -> Iterator[Callable[[dict], None]]:
    """A function that writes a row; the table takes its place when all are written. JSON where there is no header."""
    with atomic_write(file) as partial, open(partial, "w", encoding="utf-8", newline="") as out:
        if header is not None:
            table = csv.DictWriter(out, header)
            table.writeheader()
            yield table.writerow
            return
        before = "[\n"

        def write(row: dict) -> None:
            nonlocal before
            out.write(before + json.dumps(row, ensure_ascii=False))
            before = ",\n"

        yield write
        out.write("[]\n" if before == "[\n" else "\n]\n")


class Tables:
    """Tables that come to be with their first row; the ones of an earlier run that get none are removed.

        with Tables(directory, {"a.csv": ["x", "y"], "b.json": None}) as out:
            out.write("a.csv", {"x": 1, "y": 2})

    Attributes: rows: how many each has.
    """

    def __init__(self, directory: Path, headers: dict[str, list[str] | None]):
        self.directory, self.headers = directory, headers
        self.rows = dict.fromkeys(headers, 0)
        self._open: dict[str, Callable[[dict], None]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Tables:
        return self

    def write(self, name: str, row: dict) -> None:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(written(self.directory / name, self.headers[name]))
        self._open[name](row)
        self.rows[name] += 1

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
        if error == (None, None, None):
            for name in self.headers:
                if name not in self._open:
                    (self.directory / name).unlink(missing_ok=True)
