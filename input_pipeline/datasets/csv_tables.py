"""CSV tables -> rows, each error with its file and row.

Rows are counted from 1; the header is row 0. A bad row becomes a problem and reading continues. If the rest of the file
cannot be parsed (a bad header, an open quote), a RowError is raised.
"""

from __future__ import annotations

import csv
import pathlib
import sys
from collections.abc import Iterable, Iterator

from input_pipeline.datasets.rows import bad_cell
from input_pipeline.datasets.table_text import read_lines
from input_pipeline.samples import RowError


def _delimiter(file: pathlib.Path) -> str:
    return "\t" if ".tsv" in file.suffixes[-2:] else ","


def _records(text: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield (first line, cells, error) of each record.

    A lenient reader finds the ends of records, and a strict one then checks the records that have quotes. A strict
    reader alone would resume after an error in the middle of a cell and count rows wrongly.
    """
    raw: list[str] = []

    def lines():
        for line in text:
            raw.append(line)
            yield line

    first, reader = 1, csv.reader(lines(), delimiter=delimiter)
    while True:
        # The end of a record must not depend on the length of its cells: `Row` checks the length later.
        limit, problem = csv.field_size_limit(sys.maxsize), ""
        try:
            cells = next(reader, None)
            if any('"' in line for line in raw):
                try:
                    next(csv.reader(raw, strict=True, delimiter=delimiter))
                except csv.Error as error:
                    problem = str(error)
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield first, cells, problem
        first += len(raw)
        raw.clear()


def csv_header(file: pathlib.Path) -> list[str]:
    """Return the column names of a CSV file, or [] for an empty one."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        return [name.strip() for name in next(csv.reader(lines), [])]


def stream_csv(file: pathlib.Path, required, optional=()) -> tuple[list[str], Iterator[tuple[int, dict] | RowError]]:
    """Read a CSV file (or .tsv; both also as .gz) with a header row by row.

    Args:
      optional: columns to read if present. None reads every column with a unique name, for tools that copy rows to
        their output; cells that are not text are then problems.
    Returns:
      header: all column names. If `optional` is None, only the columns that are read, in file order.
      rows: (number, {column: cell}) with the columns that are read, or a problem.
    Raises:
      RowError: raised immediately with row 0 for a bad header, or while reading, for a row with an unclosed quote.
    """
    records = _records(read_lines(file), _delimiter(file))
    _, cells, problem = next(records, (0, None, ""))
    if cells is None:
        raise RowError(file, 0, "the table is empty", f"required columns: {', '.join(required)}")
    if problem:
        raise RowError(file, 0, f"the header cannot be read: {problem}", "correct the quotes of the first line")
    header = [name.strip() for name in cells]
    read_all = optional is None
    if read_all:
        optional = [name for name in header if name and name not in required and header.count(name) == 1]
    missing = [name for name in required if name not in header]
    repeated = sorted({name for name in header if header.count(name) > 1 and name in (*required, *optional)})
    if missing or repeated:
        reasons = [f"column {n} is missing" for n in missing] + [f"column {n} is repeated" for n in repeated]
        shown = ascii(", ".join(header))[:200]
        reason = f"{'; '.join(reasons)}; the header has {shown}"
        raise RowError(file, 0, reason, f"required columns: {', '.join(required)}")
    columns = [(name, header.index(name)) for name in (*required, *optional) if name in header]
    if read_all:
        columns.sort(key=lambda column: column[1])
    rows = _rows(file, records, len(header), columns, read_all)
    return [name for name, _ in columns] if read_all else header, rows


def _rows(file, records, length: int, columns, checked: bool) -> Iterator[tuple[int, dict] | RowError]:
    for number, (line, cells, problem) in enumerate(records, 1):
        if "unexpected end of data" in problem:
            reason = f"a quote opened in this row (line {line}) is never closed: the rest of the file is lost"
            raise RowError(file, number, reason, "close or double the quote")
        if problem:
            yield RowError(file, number, f"{problem} (line {line})", "double quotes inside a quoted cell")
        elif not cells:
            yield RowError(file, number, f"the row is blank (line {line})", "remove it")
        elif len(cells) != length:
            reason = f"{len(cells)} cells, but the header has {length} (line {line})"
            yield RowError(file, number, reason, "quote cells that contain commas or line breaks")
        else:
            row = {name: cells[i] for name, i in columns}
            if checked and (bad := bad_cell(row)):
                yield RowError(file, number, bad, "write the table as UTF-8 text")
            else:
                yield number, row
