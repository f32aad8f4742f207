"""Files: exclusive locks, atomic writes, digests, and the nearest name to a misspelt one.

Standard library only. `radfm_jax` uses this module as well; it is in this package because `input_pipeline` never
imports `radfm_jax`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"  # suffix of a file that is not complete yet


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
    """Create a directory and keep other writers out of it. `command` is what writes there, for the error message.

    Raises ValueError if another process writes to it, or it cannot be created.
    """
    make_directory(directory)
    with open(directory / ".lock", "w") as file:
        if not try_lock(file):
            raise ValueError(f"another {command} is writing {directory}: wait for it, or stop it first")
        yield


@contextlib.contextmanager
def atomic_write(file: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `file`; when the block ends well, sync it and rename it to `file`.

    With `unique`, the temporary name is new each time, for writers that may run twice at once. An OSError, for instance
    on a full disk, has the name of `file`.
    """
    middle = f".{uuid.uuid4().hex}" if unique else ""
    partial = file.with_name(f"{file.name}{middle}{PARTIAL}")
    try:
        yield partial
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


def write_json_lines(file: Path, lines: Iterable[dict]) -> int:
    """Write a JSON Lines file atomically. Returns the number of lines."""
    count = 0
    with atomic_write(file) as partial, open(partial, "w", encoding="utf-8") as opened:
        for line in lines:
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


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
    """Return " (did you mean X?)" for the known name that is most like `name`, or "" if none is."""
    near = difflib.get_close_matches(str(name), [str(word) for word in known], 1, 0.4)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""
