"""Safe access to scan files: paths below a root, bounded reads, and library errors turned into ScanError."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from input_pipeline.images.scans.base import COPY_AGAIN, ScanError, ScanLimits, join_offenders, limit_error, printable

# Files and folders that operating systems create, and the list of files of a DICOM medium. In lower case.
SYSTEM_FILES = frozenset(
    ".ds_store .localized .directory .appledouble .spotlight-v100 .trashes .fseventsd .temporaryitems __macosx @eadir "
    ".documentrevisions-v100 .apdisk .volumeicon.icns thumbs.db ehthumbs.db ehthumbs_vista.db desktop.ini $recycle.bin "
    "lost+found dicomdir".split()
) | {"icon\r"}
SYSTEM_STARTS = ("._", ".trash-", ".nfs", ".fuse_hidden")
SYSTEM_ENDS = (":zone.identifier", ":encryptable")  # alternate data streams of NTFS, as files of Linux and Samba


def is_system_file(name: str) -> bool:
    """Return whether an entry of a series directory is not a scan, by its name."""
    lower = name.lower()
    return lower in SYSTEM_FILES or lower.startswith(SYSTEM_STARTS) or lower.endswith(SYSTEM_ENDS)


def stat_scan(path) -> os.stat_result:
    """Stat a path, following links. Raises ScanError unless it is a regular file or a directory."""
    try:
        result = os.stat(path)
    except FileNotFoundError:
        raise ScanError(path, "there is no such file", "check the path and the data set's root", "missing") from None
    except (OSError, ValueError) as error:  # loops, permissions, over-long names; ValueError: NUL in the name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ScanError(path, f"cannot be opened: {why}", "check the path", "missing") from None
    if not (stat.S_ISREG(result.st_mode) or stat.S_ISDIR(result.st_mode)):
        kinds = {stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
        kind = next((name for test, name in kinds.items() if test(result.st_mode)), "not a regular file")
        raise ScanError(path, f"is {kind}", "name a regular file or a DICOM directory", "refused")
    return result


class BoundedFile:
    """A file whose `read(n)` never allocates more than the rest of the file, even if a malicious header asks."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.seek, self.tell, self.readinto = file.seek, file.tell, file.readinto

    def read(self, n: int = -1) -> bytes:
        rest = max(self.size - self.file.tell(), 0)
        return self.file.read(rest if n is None or n < 0 else min(n, rest))

    def close(self) -> None:
        """Do nothing: `open_scan` closes the file, and libraries must not."""


@contextlib.contextmanager
def open_scan(path, limits: ScanLimits) -> Iterator[BoundedFile]:
    """Open a regular, non-empty file within the size limit. Raises ScanError for anything else."""
    stat_scan(path)
    try:  # O_NONBLOCK: a FIFO that replaces the file after the check does not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ScanError(path, f"cannot be opened: {error.strerror}", "check its permissions", "missing") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ScanError(path, "is not a regular file", "name a regular file", "refused")
        if status.st_size == 0:
            raise ScanError(path, "is empty", "copy it again from its source")
        if status.st_size > limits.max_file_bytes:
            reason = f"has {status.st_size:,} bytes, more than the limit of {limits.max_file_bytes:,}"
            raise limit_error(path, reason, "max_file_bytes")
        yield BoundedFile(file, status.st_size)


@dataclasses.dataclass(frozen=True)
class Member:
    """A file of a series or of a study.

    `open` takes the limits and whether all of the file will be read. Then the checksum of an archive is verified.
    """

    name: str  # below its folder or in its archive, safe to print
    path: str | Path  # for messages
    open: Callable[[ScanLimits, bool], contextlib.AbstractContextManager[BoundedFile]]

    @classmethod
    def of_file(cls, path: Path, name: str | None = None) -> Member:
        """Return the member of a file on disk."""
        return cls(printable(path.name if name is None else name), path, lambda limits, whole: open_scan(path, limits))


def read_exactly(path, stream, buffer: memoryview, content: str, chunk: int | None = None) -> None:
    """Fill a buffer from a stream, `chunk` bytes at a time. Raises ScanError if the stream ends first."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done : done + chunk if chunk else None])
        if not count:
            raise ScanError(path, f"ends after {done:,} of {len(buffer):,} bytes of {content}", COPY_AGAIN)
        done += count


@contextlib.contextmanager
def as_scan_error(path, action: str, *, hide_message: bool = False) -> Iterator[None]:
    """Turn any exception of a library into a ScanError that names the file.

    `hide_message` drops the library's message and traceback, which can quote values of a patient's header.
    """
    try:
        yield
    except ScanError:
        raise
    except MemoryError as error:
        remedy = "lower ScanLimits.max_bytes or free memory"
        raise ScanError(path, f"not enough memory while {action}", remedy, "limit") from error
    except Exception as error:  # decoders raise nearly every type on hostile input
        text = " ".join(str(error).split())  # all lines: some libraries name the cause in the last one
        cause = type(error).__name__ + (f": {text[:300]}" if text and not hide_message else "")
        remedy = "the file is damaged or of an unusual kind: copy or export it again"
        raise ScanError(path, f"failed while {action} ({cause})", remedy) from (None if hide_message else error)


def resolve(root, path) -> Path:
    """Return the real path of a table entry, relative to the root of the data set or absolute and below it.

    Raises ScanError if the path contains `..` or NUL, does not exist, or resolves outside the root (as an
    absolute path, through a link, or through a link to a file in a directory). The message names the root.
    """
    remedy = f"paths must be below the root {printable(root)}"
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ScanError(repr(path), "is not a path", remedy, "refused")
    text = os.fsdecode(path)
    if "\0" in text:
        raise ScanError(text, "has a NUL character in its name", remedy, "refused")
    if ".." in Path(text).parts or ".." in text.replace("\\", "/").split("/"):
        raise ScanError(text, "goes up through '..'", remedy, "refused")

    def real(location: Path) -> Path:
        try:
            return location.resolve(strict=True)
        except FileNotFoundError:
            raise ScanError(location, "there is no such file", remedy, "missing") from None
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise ScanError(location, f"cannot be opened: {why}", remedy, "refused") from None

    base = real(Path(root))
    resolved = real(base / text)
    if not resolved.is_relative_to(base):
        raise ScanError(text, f"points outside the root, to {printable(resolved)}", remedy, "refused")
    if resolved.is_dir():
        files = (Path(parent, name) for parent, _, names in os.walk(resolved) for name in names)
        links = [file for file in files if file.is_symlink()]  # links to directories are not followed
        if outside := [printable(link.name) for link in sorted(links) if not real(link).is_relative_to(base)]:
            reason = f"contains links to targets outside the root: {join_offenders(outside)}"
            raise ScanError(text, reason, remedy, "refused")
    return resolved
