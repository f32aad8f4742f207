"""Tables in the layouts of the families, read and written row by row: none is ever whole in memory."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from input_pipeline.build.jobs import Result
from input_pipeline.datasets import FAMILIES, tables
from input_pipeline.datasets.base import TableDataset
from input_pipeline.prepare.writing import replacing
from input_pipeline.samples import RowError


def named(spec: str, root: Path) -> tuple[str, Path]:
    """FAMILY=TABLE -> the family and the file. Raises ValueError."""
    family, equals, table = spec.partition("=")
    known = [name for name, kind in FAMILIES.items() if issubclass(kind, TableDataset) and kind.layout != "jsonl"]
    if not equals or family not in known:
        raise ValueError(f"{spec!r}: FAMILY=TABLE is needed, the family being one of {', '.join(known)}")
    if not (root / table).is_file():
        raise ValueError(f"{root / table}: there is no such table")
    return family, root / table


def all_named(specs: list[str], root: Path, directory: Path | None = None) -> list[tuple[str, Path]]:
    """The same of several, each to be written to `directory` under its name, if one is given. Raises ValueError."""
    found = [named(spec, root) for spec in specs]
    names = [file.name for _, file in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tables are called {', '.join(twice)}: rename one")
    if directory is not None and any(file.parent.resolve() == directory.resolve() for _, file in found):
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
    with replacing(file) as partial, open(partial, "w", encoding="utf-8", newline="") as out:
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
