"""JSON lists and JSON Lines -> rows, each error with its file and row.

Rows are counted from 1; in JSON Lines the row is the line. A bad row becomes a problem and reading continues. If the
rest of the file cannot be parsed, a RowError is raised.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import pathlib
import re
from collections.abc import Iterator

from input_pipeline.datasets.rows import MAX_CELL, bad_text
from input_pipeline.datasets.store import Store
from input_pipeline.datasets.table_text import open_text, read_lines, read_text
from input_pipeline.files import JSON_DECODER, check_json, parse_json
from input_pipeline.samples import RowError

_SPACE = re.compile(r"[ \t\n\r]*")
_MAX_ROW = 64 * MAX_CELL  # characters; without a limit an open quote or brace would read the whole file into memory


def _bad_byte(text: str) -> tuple[int, str] | None:
    """Return the position and value of the first byte that is not UTF-8, or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start, f"byte 0x{ord(text[error.start]) - 0xDC00:02x}"
    return None


def load_json(file: pathlib.Path):
    """Return the value of a JSON file. Raises RowError with row 0."""
    text = read_text(file)
    if bad := _bad_byte(text):
        line = text.count("\n", 0, bad[0]) + 1
        raise RowError(file, 0, f"line {line} is not UTF-8 ({bad[1]})", "save it as UTF-8")
    try:
        return parse_json(text)
    except ValueError as error:
        reason = f"the file is not valid JSON: {_short(error)}"
        raise RowError(file, 0, reason, "write it again as UTF-8 JSON") from None


def stream_json(file: pathlib.Path, required) -> Iterator[tuple[int, dict] | RowError]:
    """Yield (number, object) or a problem for each row of a JSON list. Raises RowError where the file is not JSON."""
    return _ListReader(file, required).rows()


class _ListReader:
    """Parser of a JSON list that keeps about one row of the text in memory."""

    def __init__(self, file: pathlib.Path, required):
        self.file, self.required, self.number = file, required, 0
        self.blocks, self.text, self.at, self.at_end = _blocks(file), "", 0, False
        self.lines, self.characters = 1, 0  # before `text`

    def rows(self) -> Iterator[tuple[int, dict] | RowError]:
        first = self._peek()
        if first != "[":
            kind = {"{": "dict", "": "nothing"}.get(first, repr(first))
            raise RowError(self.file, 0, f"the file must be a list of objects, got {kind}", "see docs/data_layouts.md")
        self.at += 1
        mark = self._peek()
        while mark != "]":
            self.number += 1
            self._peek()
            value, end = self._value()
            if bad := _bad_byte(self.text[self.at : end]):
                reason = f"line {self._line(self.at + bad[0])} is not UTF-8 ({bad[1]})"
                yield RowError(self.file, self.number, reason, "save it as UTF-8")
            else:
                yield self._row(value, self.text[self.at : end])
            self.at = end
            mark = self._peek()
            if mark == ",":
                self.at += 1
            elif mark != "]":
                raise self._broken("',' or ']' is missing after the row", self.at)
        self.at += 1
        if self._peek():
            raise self._broken("text after the list", self.at)

    def _row(self, value, text: str) -> tuple[int, dict] | RowError:
        try:
            check_json(value, text)
        except ValueError as error:
            return RowError(self.file, self.number, f"not valid JSON: {_short(error)}", "correct or remove the row")
        return _object(self.file, self.number, value, self.required)

    def _more(self) -> None:
        block = next(self.blocks, "")
        self.lines += self.text.count("\n", 0, self.at)
        self.characters += self.at
        self.text, self.at, self.at_end = self.text[self.at :] + block, 0, not block

    def _peek(self) -> str:
        """Skip white space and return the next character, or "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.at_end:
                return self.text[self.at : self.at + 1]
            self._more()

    def _value(self) -> tuple[object, int]:
        """Parse the value at the current position. Returns it and its end."""
        while True:
            try:
                value, end = JSON_DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.at_end:  # otherwise a number may continue in the next block
                    return value, end
            except (ValueError, RecursionError) as error:
                if self.at_end or len(self.text) - self.at > _MAX_ROW:
                    # The line and column of the error count from the start of the block.
                    reason, position = getattr(error, "msg", _short(error)), getattr(error, "pos", self.at)
                    raise self._broken(reason, position) from None
            self._more()

    def _line(self, position: int) -> int:
        return self.lines + self.text.count("\n", 0, position)

    def _broken(self, reason: str, position: int) -> RowError:
        where = f"line {self._line(position)} (char {self.characters + position})"
        reason = f"the file is not valid JSON: {reason}: {where}"
        return RowError(self.file, self.number, reason, "write it again as UTF-8 JSON")


def _blocks(file: pathlib.Path) -> Iterator[str]:
    with open_text(file) as text:
        while block := text.read(1 << 20):
            yield block


# A context variable, because without workers two threads open the training and the test data at the same time.
_cache: contextvars.ContextVar[dict[pathlib.Path, Store] | None] = contextvars.ContextVar("_cache", default=None)


@contextlib.contextmanager
def json_lines_cache() -> Iterator[None]:
    """Within this context, parse a JSON Lines file only once if it is read several times in succession."""
    before = _cache.set({})
    try:
        yield
    finally:
        _cache.reset(before)


def text_lines(file: pathlib.Path) -> list[str]:
    """Return the lines of a small JSON Lines file.

    str.splitlines would also split at U+2028 and U+0085, which texts may contain.
    """
    with open(file, encoding="utf-8-sig") as opened:
        return list(opened)


def stream_jsonl(file: pathlib.Path) -> Iterator[tuple[int, dict] | RowError]:
    """Read JSON Lines row by row: one object per line. A blank line is a problem."""
    stores = _cache.get()
    if stores is None:
        return _json_rows(file)
    if file not in stores:
        stores.clear()  # one table at a time: they can be large
        rows = _json_rows(file)
        stores[file] = Store(iter(lambda: list(itertools.islice(rows, 64)), []))  # a third faster than one by one
    return itertools.chain.from_iterable(stores[file])


def _json_rows(file) -> Iterator[tuple[int, dict] | RowError]:
    # newline="\n": a lone carriage return is white space in JSON, not a line end.
    for number, line in enumerate(read_lines(file, "\n"), 1):
        if not line.endswith("\n") and not line.strip():
            return  # white space after the last line
        line = line.removesuffix("\n")
        if reason := bad_text(line) or ("" if line.strip() else "is blank"):
            yield RowError(file, number, f"the line {reason}", "write one JSON object a line, as UTF-8")
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            yield RowError(file, number, f"not valid JSON: {_short(error)}", "write one JSON object a line")
            continue
        yield _object(file, number, value)


def _object(file, number: int, value, required=()) -> tuple[int, dict] | RowError:
    if not isinstance(value, dict):
        reason = f"the row must be an object, got {type(value).__name__}"
        return RowError(file, number, reason, "see docs/data_layouts.md")
    if missing := [key for key in required if key not in value]:
        return RowError(file, number, f"{', '.join(missing)} missing", f"required keys: {', '.join(required)}")
    return number, value


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:120]
