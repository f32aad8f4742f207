"""Text of table files. Bytes that are not UTF-8 become lone surrogates, so that errors can name their row."""

from __future__ import annotations

import contextlib
import gzip
import io
import pathlib
import zlib
from collections.abc import Callable, Iterator

from input_pipeline.samples import RowError


@contextlib.contextmanager
def open_text(file: pathlib.Path, newline: str = "") -> Iterator[io.TextIOBase]:
    """Open a table, which may be in a gzip file (.gz). Raises RowError with row 0 if it cannot be read or is UTF-16."""
    open_file: Callable = gzip.open if file.suffix == ".gz" else open
    try:
        with open_file(file, "rb") as start:
            if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise RowError(file, 0, "the table is UTF-16", "save it as UTF-8")
        with open_file(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
            yield text
    except (OSError, EOFError, zlib.error) as error:
        reason = f"the table cannot be read: {getattr(error, 'strerror', None) or error}"
        raise RowError(file, 0, reason, "check the path of the table") from error


def read_text(file: pathlib.Path) -> str:
    """Return the text of a table. Raises RowError as `open_text` does."""
    with open_text(file) as text:
        return text.read()


def read_lines(file: pathlib.Path, newline: str = "") -> Iterator[str]:
    """Yield the lines of a table, line ends included."""
    with open_text(file, newline) as text:
        yield from text
