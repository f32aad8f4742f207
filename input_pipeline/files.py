"""Files: exclusive locks, atomic writes, digests, JSON, and the nearest name to a misspelt one.

Standard library only. `radfm_jax` uses this module as well; it is in this package because `input_pipeline` never
imports `radfm_jax`.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"  # suffix of a file that is not complete yet
MAX_JSON = 256 << 20  # bytes of a JSON file that is read as a whole
MAX_DEPTH = 64  # nested lists and objects in JSON; deeper values exhaust the stack of recursive code


def try_lock(file: IO | int) -> bool:
    """Lock an open file for this process with flock, without waiting. Returns False if another process has the lock.

    The kernel releases the lock when the process ends, so a killed process leaves no stale lock. Raises OSError if the
    file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_directory(directory: Path) -> None:
    """Create a directory for output if it is missing. Raises ValueError if it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be written to ({error.strerror}): give --out a writable directory"
        ) from error


@contextlib.contextmanager
def locked_directory(directory: Path, command: str) -> Iterator[None]:
    """Create a directory and lock it against other writers. `command` names the writer in the error message.

    Raises ValueError if another process writes to it, or it cannot be created.
    """
    make_directory(directory)
    with open(directory / ".lock", "w") as file:
        if not try_lock(file):
            raise ValueError(f"another {command} is writing {directory}: wait for it, or stop it first")
        yield


@contextlib.contextmanager
def atomic_write(file: Path, *, unique: bool = False, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `file`; if the block succeeds, sync it and rename it to `file`.

    With `unique`, the temporary name is new each time, for writers that may run twice at once. Without `sync`, the file
    may be empty after a power cut. An OSError, for instance on a full disk, has the name of `file`.
    """
    middle = f".{uuid.uuid4().hex}" if unique else ""
    partial = file.with_name(f"{file.name}{middle}{PARTIAL}")
    try:
        yield partial
        if sync:
            fsync(partial)
        os.replace(partial, file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(file)) from error
        raise


def fsync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(file: Path, lines: Iterable[dict], *, unique: bool = False) -> int:
    """Write a JSON Lines file as `atomic_write` does. Returns the number of lines."""
    count = 0
    with atomic_write(file, unique=unique) as partial, open(partial, "w", encoding="utf-8") as opened:
        for line in lines:
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        (key, _), *_ = (collections.Counter(key for key, _ in pairs) - collections.Counter(out.keys())).items()
        raise ValueError(f"key {key[:80]!r} is repeated")
    return out


JSON_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys)
_NAN_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """Return the value of a JSON text. All JSON of files is read by this function or `read_json`.

    Raises ValueError for text that is not UTF-8, repeated keys, lone surrogates, and more than MAX_DEPTH levels. NaN
    and infinities are errors too, except with `nan`, for the logs of this project.
    """
    if isinstance(text, bytes):
        text = _decoded(text)
    try:
        value = (_NAN_DECODER if nan else JSON_DECODER).decode(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} nested lists and objects") from None
    check_json(value, text)
    return value


class LoneSurrogate(ValueError):
    """A JSON string has half of a surrogate pair. `value` is the JSON value with "?" in its place."""

    def __init__(self, value: Any):
        self.value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        super().__init__("a string has a lone surrogate (\\ud800 to \\udfff), which is not a character")


def check_json(value: Any, text: str) -> None:
    """Raise ValueError for a value that is nested too deep or has a lone surrogate. `text` is its JSON."""
    level, depth = [value] if text.count("[") + text.count("{") > MAX_DEPTH else [], 0
    while level := [x for x in level if isinstance(x, dict | list)]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} nested lists and objects")
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    if "\\u" in text and re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise LoneSurrogate(value) from None


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})") from None


def read_json(file: Path | str, *, nan: bool = False, kind: type | None = None, limit: int = MAX_JSON) -> Any:
    """Return the value of a JSON file (`parse_json`).

    Args:
      kind: dict or list, if the value must be one.
      limit: maximum size in bytes.
    Raises:
      OSError: the file cannot be read.
      ValueError: it is not JSON, or not of this kind or size. The message names the file.
    """
    # Non-blocking, because opening a FIFO would wait for its writer.
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{file} has more than {limit:,} bytes, too many for this JSON file")
    try:
        value = parse_json(data, nan=nan)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if kind is not None and not isinstance(value, kind):
        expected = {dict: "an object", list: "a list"}[kind]
        raise ValueError(f"{file} has JSON of type {type(value).__name__} where {expected} is expected")
    return value


def read_json_lines(file: Path, *, nan: bool = False) -> list[dict]:
    """Return the objects of a small JSON Lines file, without blank lines. ValueError names the file and the line."""
    out = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig")
                value = parse_json(text, nan=nan) if text.strip() else None
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not valid JSON: {error}") from None
            if isinstance(value, dict):
                out.append(value)
            elif text.strip():
                raise ValueError(f"{file}, line {number} has {type(value).__name__} where an object is expected")
    return out


def sha256_of_file(*paths: Path) -> str:
    """Return the hexadecimal SHA-256 of the bytes of one file, or of several files in this order."""
    digest = hashlib.sha256()
    for path in paths:
        # Non-blocking, because opening a FIFO would wait for its writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a JSON value. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean X?)" for the known name that is most similar to `name`, or "" if none is similar."""
    near = difflib.get_close_matches(str(name), [str(word) for word in known], 1, 0.4)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""
