"""CSV and JSON tables -> rows, each fault with its file and row.

A row is counted from 1, the header not included; in JSON Lines it is the line. Faults of one row are collected as
problems; a fault after which the rest of a file has no meaning (no header, not UTF-8 at all, an open quote) raises.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import csv
import dataclasses
import io
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

from input_pipeline.datasets.store import Store
from input_pipeline.samples import RowError, Scan

# Longer than any caption, report or case history by a factor of ten; a cell beyond it is a broken quote or an attack.
MAX_CELL = 1_000_000
# What a table program writes for an empty cell. Not text: a model would learn to say it.
EMPTY_WORDS = frozenset({"", "nan", "none", "null", "<na>"})
_LITERAL = EMPTY_WORDS - {"none"}
_LONGEST = max(map(len, EMPTY_WORDS))
SHOWN = 20
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class TableError(RowError):
    """All faults of a table in one error; `problems` holds every one."""

    def __init__(self, problems: list[RowError], counted: str = ""):
        self.problems, self.counted = tuple(problems), counted
        first = problems[0]
        super().__init__(first.file, first.row, first.reason, first.remedy)
        lines = [str(p) for p in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"and {len(problems) - SHOWN} more")
        if counted:
            lines.insert(0, counted)
        self.args = ("\n  ".join(lines),)

    def __reduce__(self):
        return type(self), (list(self.problems), self.counted)


def bad_text(value: str) -> str | None:
    """Why a string cannot be used as text, or None."""
    if "\x00" in value:
        return "holds a NUL character"
    if len(value) > MAX_CELL:
        return f"has {len(value)} characters, more than {MAX_CELL}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return None


def bad_path(value: str) -> str | None:
    """Why a path of a table is refused below a root, or None. Links are looked at when the file is opened."""
    parts = value.replace("\\", "/").split("/")
    if ".." in parts:
        return f"path {value!r} climbs with '..'"
    if value.startswith("/") or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return f"path {value!r} is absolute"
    if _CONTROL.search(value):
        return f"path {value!r} holds a control character"
    if not any(part not in ("", ".") for part in parts):
        return f"path {value!r} names no file"
    return None


@dataclasses.dataclass
class Row:
    """One row while it is read: checked access to its fields.

    Attributes:
      cells: column -> value as read (str from CSV, any JSON value from JSON).
      root, strip: what paths are relative to, and the prefix that is removed from them first.
    """

    file: pathlib.Path
    number: int
    cells: dict
    root: pathlib.Path
    strip: str = ""

    def error(self, reason: str, remedy: str = "correct or remove the row") -> RowError:
        return RowError(self.file, self.number, reason, remedy)

    def text(self, column: str, literal: bool = False) -> str:
        """The text of a field that must have one, without outer white space.

        literal: "None" is text, where the format has a null of its own; it is an answer as good as any.
        """
        if column not in self.cells:
            raise self.error(f"{column} is missing")
        value = self.optional(column, literal)
        if not value:
            raise self.error(f"{column} is blank: {str(self.cells.get(column))[:40]!r}")
        return value

    def optional(self, column: str, literal: bool = False) -> str:
        """The text of a field that may be empty; an absent, blank, None or nan one is ''."""
        value = self.cells.get(column)
        if value is None or (isinstance(value, float) and value != value):
            return ""
        if not isinstance(value, str):
            raise self.error(f"{column} must be text, got {type(value).__name__} {str(value)[:40]!r}")
        reason = bad_text(value)
        if reason:
            raise self.error(f"{column} {reason}", "write the table as UTF-8 text")
        value = value.replace("\r\n", "\n").strip()
        blank = _LITERAL if literal else EMPTY_WORDS
        return "" if len(value) <= _LONGEST and value.casefold() in blank else value

    def choice(self, column: str, choices) -> str:
        value = self.text(column)
        if value not in choices:
            raise self.error(f"{column} {value!r} is unknown", f"one of {', '.join(choices)}")
        return value

    def texts(self, column: str, literal: bool = True) -> list[str]:
        """A field that is a list of texts: a JSON list, a list literal (if these are possible), or one text."""
        value = self.cells.get(column)
        if literal and isinstance(value, str) and value.lstrip().startswith("["):
            reason = bad_text(value)
            if reason:
                raise self.error(f"{column} {reason}")
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise self.error(f"{column} is no list literal: {value[:60]!r}") from error
        if not isinstance(value, list):
            one = self.optional(column)
            return [one] if one else []
        out = []
        for item in value:
            if not isinstance(item, str) or bad_text(item) or item.strip().casefold() in EMPTY_WORDS:
                raise self.error(f"{column} holds {str(item)[:40]!r}, which is no text")
            out.append(item.strip())
        return out

    def path(self, value: str, folder: str = "") -> str:
        """A path of the table -> the path below the root."""
        if self.strip and value.startswith(self.strip):
            value = value[len(self.strip) :].lstrip("/")
        try:
            if value.startswith("/"):
                value = pathlib.PurePosixPath(value).relative_to(self.root).as_posix()
        except ValueError:
            reason = f"path {value!r} is not below the root {self.root}"
            raise self.error(reason, "give `root`, or `strip`, the prefix to remove") from None
        if folder:
            value = f"{folder.rstrip('/')}/{value}"
        reason = bad_path(value)
        if reason:
            raise self.error(f"{reason}; the root is {self.root}", "name files below the root")
        return value

    def scan(self, column: str, folder: str = "") -> Scan:
        return Scan(self.path(self.text(column), folder))

    def scans(self, column: str, folder: str = "") -> tuple[Scan, ...]:
        """One path, or a list of paths written as a list literal."""
        values = self.texts(column)
        if not values:
            raise self.error(f"{column} is blank")
        return tuple(Scan(self.path(value, folder)) for value in values)


def read_bytes(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        reason = f"the table cannot be read: {error.strerror}"
        raise RowError(file, 0, reason, "check the path of the table") from error


def decode(file: pathlib.Path) -> str:
    """The text of a table. Bytes that are not UTF-8 stay visible as lone surrogates, so that their row is named."""
    data = read_bytes(file)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RowError(file, 0, "the table is UTF-16", "save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _open(file: pathlib.Path, newline: str = "") -> Iterator[io.TextIOBase]:
    """The text that `decode` has."""
    try:
        with open(file, "rb") as start:
            if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise RowError(file, 0, "the table is UTF-16", "save it as UTF-8")
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
            yield text
    except OSError as error:
        reason = f"the table cannot be read: {error.strerror}"
        raise RowError(file, 0, reason, "check the path of the table") from error


def _lines(file: pathlib.Path, newline: str = "") -> Iterator[str]:
    with _open(file, newline) as text:
        yield from text


def _records(text: Iterable[str]) -> Iterator[tuple[int, list[str], str]]:
    """Of lines. Yields (first line, cells, fault) of each record.

    A lenient reader finds where records end, a strict one then looks for broken quotes in those that have quotes: after
    an error a strict reader would go on in the next line, in the middle of a cell, and count from there.
    """
    raw: list[str] = []

    def lines():
        for line in text:
            raw.append(line)
            yield line

    first, reader = 1, csv.reader(lines())
    while True:
        # Where a row ends must not depend on how long its cells are: their length is checked once the row is whole.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            cells = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        fault = ""
        if any('"' in line for line in raw):
            limit = csv.field_size_limit(sys.maxsize)
            try:
                next(csv.reader(raw, strict=True))
            except csv.Error as error:
                fault = str(error)
            finally:
                csv.field_size_limit(limit)
        yield first, cells, fault
        first += len(raw)
        raw.clear()


def stream_csv(file: pathlib.Path, required, optional=()) -> tuple[list[str], Iterator[tuple[int, dict] | RowError]]:
    """Reads a CSV file with a header row by row.

    Args:
      optional: None: every column that stands there once; cells that are no text are problems then, as they go on.
    Returns:
      header: the column names; those that rows have, in their order, if `optional` is None.
      rows: (number, {column: cell}) with the required and optional columns only, or a problem.
    Raises:
      RowError: row 0 for the header, at once; the row in which a quote stays open until the end of the file.
    """
    records = _records(_lines(file))
    try:
        _, cells, fault = next(records)
    except StopIteration:
        raise RowError(file, 0, "the table is empty", f"it needs the columns {', '.join(required)}") from None
    if fault:
        raise RowError(file, 0, f"the header cannot be read: {fault}", "correct the quotes of the first line")
    header = [name.strip() for name in cells]
    every = optional is None
    if every:
        optional = [name for name in header if name and name not in required and header.count(name) == 1]
    missing = [name for name in required if name not in header]
    twice = sorted({name for name in header if header.count(name) > 1 and name in (*required, *optional)})
    if missing or twice:
        reason = "; ".join(
            [f"column {n} is missing" for n in missing] + [f"column {n} stands there twice" for n in twice]
        )
        shown = ascii(", ".join(header))[:200]
        raise RowError(file, 0, f"{reason}; the header has {shown}", f"needed: {', '.join(required)}")
    wanted = [(name, header.index(name)) for name in (*required, *optional) if name in header]
    if every:
        wanted.sort(key=lambda one: one[1])
    return [name for name, _ in wanted] if every else header, _rows(file, records, len(header), wanted, every)


def _rows(file, records, length: int, wanted, checked: bool) -> Iterator[tuple[int, dict] | RowError]:
    for number, (line, cells, fault) in enumerate(records, 1):
        if "unexpected end of data" in fault:
            reason = f"a quote opened in this row (line {line}) is never closed: everything after it is lost"
            raise RowError(file, number, reason, "close or double the quote")
        if fault:
            yield RowError(file, number, f"{fault} (line {line})", "double quotes inside a quoted cell")
        elif not cells:
            yield RowError(file, number, f"the row is blank (line {line})", "remove it")
        elif len(cells) != length:
            reason = f"{len(cells)} cells, but the header has {length} (line {line})"
            yield RowError(file, number, reason, "quote cells that hold commas or line breaks")
        elif checked and (bad := next(((n, why) for n, i in wanted if (why := bad_text(cells[i]))), None)):
            yield RowError(file, number, f"{bad[0]} {bad[1]}", "write the table as UTF-8 text")
        else:
            yield number, {name: cells[i] for name, i in wanted}


def parse_json(text: str):
    """json.loads that refuses NaN, infinities and a key that stands twice. Raises ValueError."""
    return _DECODER.decode(text)


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
    return out


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _bad_byte(text: str) -> tuple[int, str] | None:
    """Where the first byte stands that `decode` found to be no UTF-8, and which it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start, f"byte 0x{ord(text[error.start]) - 0xDC00:02x}"
    return None


def load_json(file: pathlib.Path):
    """The value of a whole JSON file. Raises RowError with row 0."""
    text = decode(file)
    if bad := _bad_byte(text):
        line = text.count("\n", 0, bad[0]) + 1
        raise RowError(file, 0, f"line {line} is not UTF-8 ({bad[1]})", "save it as UTF-8")
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(file, 0, f"the file is not valid JSON: {_short(error)}", "write it anew as UTF-8 JSON") from None


def stream_json(file: pathlib.Path, required) -> Iterator[tuple[int, dict] | RowError]:
    """Reads a JSON file that is a list of objects row by row; rows are counted from 1, each a problem or good.

    Raises:
      RowError: with the number of the row from which on the file is no JSON.
    """
    blocks, text, at, number, whole = _blocks(file), "", 0, 0, False
    lines, characters = 1, 0  # before `text`

    def more() -> None:
        nonlocal text, at, lines, characters, whole
        block = next(blocks, "")
        lines, characters = lines + text.count("\n", 0, at), characters + at
        text, at, whole = text[at:] + block, 0, not block

    def following() -> str:
        nonlocal at
        while True:
            at = _SPACE.match(text, at).end()
            if at < len(text) or whole:
                return text[at : at + 1]
            more()

    def line(place: int) -> int:
        return lines + text.count("\n", 0, place)

    def broken(reason: str, place: int) -> RowError:
        reason = f"the file is not valid JSON: {reason}: line {line(place)} (char {characters + place})"
        return RowError(file, number, reason, "write it anew as UTF-8 JSON")

    first = following()
    if first != "[":
        found = {"{": "dict", "": "nothing"}.get(first, repr(first))
        raise RowError(file, 0, f"a list of objects is needed, got {found}", "see docs/data_layouts.md")
    at += 1
    if following() != "]":
        while True:
            number += 1
            following()
            while True:
                try:
                    value, end = _DECODER.raw_decode(text, at)
                    if end < len(text) or whole:  # else a number may go on in the next block
                        break
                except (ValueError, RecursionError) as error:
                    if whole or len(text) - at > _MOST:
                        # What JSON itself says of the place counts from the block's beginning.
                        raise broken(getattr(error, "msg", _short(error)), getattr(error, "pos", at)) from None
                more()
            bad = _bad_byte(text[at:end])
            if bad:
                yield RowError(file, number, f"line {line(at + bad[0])} is not UTF-8 ({bad[1]})", "save it as UTF-8")
            else:
                yield _object(file, number, value, required)
            at = end
            mark = following()
            at += 1
            if mark == "]":
                break
            if mark != ",":
                raise broken("',' or ']' is missing after the row", at - 1)
    else:
        at += 1
    if following():
        raise broken("something follows the list", at)


_SPACE = re.compile(r"[ \t\n\r]*")
_MOST = 64 * MAX_CELL  # characters of a row: a quote or brace that is never closed would take the whole file


def _blocks(file: pathlib.Path) -> Iterator[str]:
    with _open(file) as text:
        while block := text.read(1 << 20):
            yield block


# Each thread's own: without workers, the training and the test data are opened side by side.
_kept: contextvars.ContextVar[dict[pathlib.Path, Store] | None] = contextvars.ContextVar("_kept", default=None)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it, a file of JSON Lines that is read several times in a row is parsed once."""
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def text_lines(file: pathlib.Path) -> list[str]:
    """Lines of a small JSON Lines file; str.splitlines would divide at U+2028 and U+0085 as well, which texts hold."""
    with open(file, encoding="utf-8-sig") as opened:
        return list(opened)


def stream_jsonl(file: pathlib.Path) -> Iterator[tuple[int, dict] | RowError]:
    """Reads JSON Lines row by row: one object a line, blank lines are problems; rows are lines."""
    stores = _kept.get()
    if stores is None:
        return _json_rows(file)
    if file not in stores:
        stores.clear()  # one table at a time: they can be large
        rows = _json_rows(file)
        stores[file] = Store(iter(lambda: list(itertools.islice(rows, 64)), []))  # a third faster than one by one
    return itertools.chain.from_iterable(stores[file])


def _json_rows(file) -> Iterator[tuple[int, dict] | RowError]:
    # Not "universal" line ends: a lone carriage return is white space of JSON, no line end.
    for number, line in enumerate(_lines(file, "\n"), 1):
        if not line.endswith("\n") and not line.strip():
            return  # white space after the last line
        line = line.removesuffix("\n")
        reason = bad_text(line)
        if not reason and not line.strip():
            reason = "is blank"
        if reason:
            yield RowError(file, number, f"the line {reason}", "one JSON object a line, as UTF-8")
            continue
        try:
            value = parse_json(line)
        except (ValueError, RecursionError) as error:
            yield RowError(file, number, f"not valid JSON: {_short(error)}", "one JSON object a line")
            continue
        yield _object(file, number, value)


def _object(file, number: int, value, required=()) -> tuple[int, dict] | RowError:
    if not isinstance(value, dict):
        return RowError(file, number, f"an object is needed, got {type(value).__name__}", "see the layout")
    missing = [key for key in required if key not in value]
    if missing:
        return RowError(file, number, f"{', '.join(missing)} missing", "every object needs these keys")
    return number, value


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:120]
