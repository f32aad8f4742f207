"""Work in parts, on one machine or on Apache Beam (beam.py): what is done lies in files that are whole or not there.

    items      PMC1.tar.gz  PMC2.tar.gz | PMC3.tar.gz  PMC4.tar.gz | PMC5.tar.gz      parts/items.txt
    chunks     0                        | 1                        | 2
    parts      parts/00000000.jsonl       parts/00000001.jsonl       parts/00000002.jsonl

A part follows from its chunk's items alone, so it does not matter who makes it, or how often a run was ended. Nothing
here grows with the number of items but a list of offsets, 8 bytes a chunk.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

CHUNK = 64
_PARTIAL = ".partial"


@contextlib.contextmanager
def held(directory: Path, what: str) -> Iterator[None]:
    """Makes the directory and keeps other writers out of it; the operating system ends that with the process.

    Args:
      what: the kind of writer, for the error.
    Raises:
      ValueError: another process writes to it, or it cannot be made.
    """
    make_directory(directory)
    with open(directory / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another {what} is writing {directory}: wait for it, or end it first") from None
        yield


def make_directory(directory: Path) -> None:
    """Makes a directory to write to, if it is missing. Raises ValueError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be written to ({error.strerror}): give --out a directory that is there, or can be made"
        ) from error


class Items(Sequence):
    """The items of a job, in a file, one a line; a slice is read when it is asked for."""

    def __init__(self, file: Path):
        self.file, self._starts, self._length = file, array.array("Q"), 0
        digest = hashlib.sha256()
        with open(file, "rb") as lines:
            at = 0
            for line in lines:
                if self._length % CHUNK == 0:
                    self._starts.append(at)
                self._length += 1
                at += len(line)
                digest.update(line)
        self.checksum = digest.hexdigest()

    @classmethod
    def write(cls, directory: Path, items: Iterable[str]) -> Items:
        """The items of an iterable, which may be longer than memory, below `directory`."""
        file = directory / "parts" / "items.txt"
        file.parent.mkdir(exist_ok=True)
        with whole(file) as partial, open(partial, "w", encoding="utf-8", errors="surrogateescape") as out:
            for item in items:
                if "\n" in item:
                    raise ValueError(f"{item!r}: a name must not hold a line end; rename it")
                out.write(item + "\n")
        return cls(file)

    @property
    def chunks(self) -> int:
        return len(self._starts)

    def chunk(self, number: int) -> list[str]:
        return self[number * CHUNK : (number + 1) * CHUNK]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k):
        if isinstance(k, int):
            if not 0 <= k < self._length:
                raise IndexError(k)
            return self[k : k + 1][0]
        low, high, step = k.indices(self._length)
        assert step == 1, step
        if low >= high:
            return []
        first = low // CHUNK
        with open(self.file, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            lines.seek(self._starts[first])
            for _ in range(low - first * CHUNK):
                lines.readline()
            return [lines.readline().rstrip("\n") for _ in range(high - low)]


def part(directory: Path, chunk: int, ending: str = ".jsonl") -> Path:
    return directory / "parts" / f"{chunk:08d}{ending}"


def write(directory: Path, chunk: int, lines: Iterable[str]) -> None:
    with whole(part(directory, chunk)) as partial, open(partial, "w", encoding="utf-8") as out:
        out.writelines(line + "\n" for line in lines)


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` when all is written.

    It is another one each time: a runner that takes a worker for dead may have two at the same work.
    """
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep(directory: Path, folder: str = "parts") -> None:
    """Removes what killed workers left half-written in a folder of it, or in those that fit a pattern."""
    for left in directory.glob(f"{folder}/*{_PARTIAL}"):
        left.unlink()


def clean(directory: Path) -> None:
    """Afterwards: what only a resumed run needs."""
    shutil.rmtree(directory / "parts", ignore_errors=True)
