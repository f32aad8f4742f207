"""A row of a table while it is read: checked access to its texts, lists and paths."""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import re

from input_pipeline.files import nearest
from input_pipeline.samples import RowError, Scan

# Ten times longer than any caption, report or case history; a longer cell is a broken quote or an attack.
MAX_CELL = 1_000_000
# What programs write for a missing value. As text, the model would learn to say it.
MISSING_WORDS = frozenset({"", "nan", "null", "<na>"})
# As an answer to a question, "None" is text ("Which lobe is affected?"). Elsewhere it is Python's None.
EMPTY_WORDS = MISSING_WORDS | {"none"}
# Placeholders that people write into empty prose fields (findings, history).
NO_PROSE = EMPTY_WORDS | {"na", "n/a", "n.a.", "-", "--"}
_LONGEST = max(map(len, NO_PROSE))
SHOWN = 20  # groups of equal row errors in one message
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class TableError(RowError):
    """All bad rows of a table in one error; `problems` has every one."""

    def __init__(self, problems: list[RowError], summary: str = ""):
        self.problems, self.summary = tuple(problems), summary
        first = problems[0]
        super().__init__(first.file, first.row, first.reason, first.remedy)
        equal: dict[tuple, list[RowError]] = {}
        for problem in problems:
            equal.setdefault((problem.file, problem.reason, problem.remedy), []).append(problem)
        groups = list(equal.values())
        lines = [_line(group) for group in groups[:SHOWN]]
        if more := sum(map(len, groups[SHOWN:])):
            lines.append(f"and {more} more rows")
        if summary:
            lines.insert(0, summary)
        self.args = ("\n  ".join(lines),)

    def __reduce__(self):
        return type(self), (list(self.problems), self.summary)


def _line(equal: list[RowError]) -> str:
    """Return one line for row errors with the same reason."""
    first = equal[0]
    if len(equal) == 1:
        return str(first)
    rows = ", ".join(str(error.row) for error in equal[:3])
    remedy = f" ({first.remedy})" if first.remedy else ""
    return f"{first.file}, {len(equal)} rows (first: {rows}): {first.reason}{remedy}"


def bad_text(value: str) -> str | None:
    """Return why a string cannot be used as text, or None."""
    if "\x00" in value:
        return "has a NUL character"
    if len(value) > MAX_CELL:
        return f"has {len(value)} characters, more than {MAX_CELL}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return None


def clean_text(value: str) -> str:
    """Return a text without white space around it and with Unix line ends: the one rule for tables and prompts."""
    return value.replace("\r\n", "\n").strip()


def present(value: str, empty: frozenset[str] = EMPTY_WORDS) -> str:
    """Return the `clean_text` of a value; "" if it is one of the words `empty`."""
    value = clean_text(value)
    return "" if len(value) <= _LONGEST and value.casefold() in empty else value


def bad_cell(cells: dict[str, str]) -> str | None:
    """Return the first column whose text cannot be used, with the reason, or None."""
    return next((f"{name} {reason}" for name, text in cells.items() if (reason := bad_text(text))), None)


def bad_path(value: str) -> str | None:
    """Return why a path of a table is rejected, or None. Symbolic links are checked when the file is opened."""
    parts = value.replace("\\", "/").split("/")
    if ".." in parts:
        return f"path {value!r} leaves its folder with '..'"
    if value.startswith("/") or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return f"path {value!r} is absolute"
    if _CONTROL.search(value):
        return f"path {value!r} has a control character"
    if not any(part not in ("", ".") for part in parts):
        return f"path {value!r} names no file"
    return None


@functools.lru_cache(1 << 12)  # the rows of a table name few folders
def _prefix_of_folder(root: pathlib.Path, folder: str) -> str:
    parts = folder.split("/")
    if ".." in parts:
        return ""
    return next(("/".join(parts[:n]) + "/" for n in range(1, len(parts)) if (root / "/".join(parts[n:])).is_dir()), "")


def foreign_prefix(root: pathlib.Path, folder: str, name: str) -> str:
    """Return the prefix of a path on another machine, without which the scan is below the root; "" if there is none.

    "/data0/them/imgs/x", "1.png" -> "/data0/them/" if ROOT/imgs/x is a folder, or
                                     "/data0/them/imgs/x/" if ROOT/1.png exists
    """
    prefix = _prefix_of_folder(root, folder)
    return prefix or (f"{folder}/" if (root / name).exists() else "")


@dataclasses.dataclass
class Row:
    """One row of a table while it is read."""

    file: pathlib.Path
    number: int
    cells: dict  # column -> value as read: str from CSV, any JSON value from JSON
    root: pathlib.Path  # the directory that paths are relative to
    strip: str = ""  # a prefix to remove from paths first

    def error(self, reason: str, remedy: str = "correct or remove the row") -> RowError:
        return RowError(self.file, self.number, reason, remedy)

    def unknown_keys(self, known) -> str:
        """Return "unknown keys: a, b (did you mean c?)" for cells with other keys than `known`, else ""."""
        unknown = [str(key)[:40] for key in self.cells if key not in known]
        # Keys are not quoted, because grouping masks quoted text.
        shown = ", ".join(key if key.isprintable() else ascii(key)[1:-1] for key in unknown[:10])
        return f"unknown keys: {shown}{nearest(unknown[0], known)}" if unknown else ""

    def text(self, column: str, empty: frozenset[str] = EMPTY_WORDS) -> str:
        """Return the text of a required field, stripped. Raises RowError if it is missing or one of `empty`."""
        if column not in self.cells:
            raise self.error(f"{column} is missing")
        value = self.optional(column, empty)
        if not value:
            raise self.error(f"{column} is blank: {str(self.cells.get(column))[:40]!r}")
        return value

    def answer(self, column: str) -> str:
        """Return the required answer to a question: `text`, but "None" is an answer."""
        return self.text(column, MISSING_WORDS)

    def optional(self, column: str, empty: frozenset[str] = EMPTY_WORDS) -> str:
        """Return the text of an optional field; "" if it is absent, null, nan or one of the words `empty`."""
        value = self.cells.get(column)
        if value is None or (isinstance(value, float) and value != value):
            return ""
        if not isinstance(value, str):
            raise self.error(f"{column} must be text, got {type(value).__name__} {str(value)[:40]!r}")
        if reason := bad_text(value):
            raise self.error(f"{column} {reason}", "write the table as UTF-8 text")
        return present(value, empty)

    def choice(self, column: str, choices) -> str:
        value = self.text(column)
        if value not in choices:
            raise self.error(f"{column} {value!r} is unknown", f"use one of {', '.join(choices)}")
        return value

    def prose(self, column: str) -> list[str]:
        """Return the texts of an optional field (one text or a JSON list), without placeholders (NO_PROSE)."""
        value = self.cells.get(column)
        if not isinstance(value, list):
            value = [self.optional(column, NO_PROSE)]
        for item in value:
            if item is not None and (not isinstance(item, str) or bad_text(item)):
                raise self.error(f"{column} has an item that is not text: {str(item)[:40]!r}")
        return [text for item in value if item is not None and (text := present(item, NO_PROSE))]

    def names(self, column: str) -> list[str]:
        """Return a field as a list of names: one name, a JSON list, or a Python list literal."""
        value = self.cells.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            if reason := bad_text(value):
                raise self.error(f"{column} {reason}")
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise self.error(f"{column} is not a valid list literal: {value[:60]!r}") from error
        if not isinstance(value, list):
            text = self.optional(column)
            return [text] if text else []
        for item in value:
            if not isinstance(item, str) or bad_text(item) or not present(item):
                raise self.error(f"{column} has an item that is not text: {str(item)[:40]!r}")
        return [item.strip() for item in value]

    def path(self, value: str, folder: str = "") -> str:
        """Return a path of the table relative to the root."""
        if self.strip and value.startswith(self.strip):
            value = value[len(self.strip) :].lstrip("/")
        try:
            if value.startswith("/"):
                value = pathlib.PurePosixPath(value).relative_to(self.root).as_posix()
        except ValueError:
            reason = f"path {value!r} is not below the root {self.root}"
            prefix = foreign_prefix(self.root, *value.rpartition("/")[::2])
            raise self.error(reason, f"set strip={prefix!r}" if prefix else "set `root`, or `strip`") from None
        if folder:
            value = f"{folder.rstrip('/')}/{value}"
        if reason := bad_path(value):
            raise self.error(f"{reason}; the root is {self.root}", "use a path below the root")
        return value

    def scan(self, column: str, folder: str = "") -> Scan:
        return Scan(self.path(self.text(column), folder))

    def paths(self, column: str, folder: str = "") -> tuple[str, ...]:
        """Return the paths of a required field: one path, a JSON list, or a list literal."""
        values = self.names(column)
        if not values:
            raise self.error(f"{column} is blank")
        return tuple(self.path(value, folder) for value in values)

    def scans(self, column: str, folder: str = "") -> tuple[Scan, ...]:
        """Return the scans of a required field of paths."""
        return tuple(map(Scan, self.paths(column, folder)))
