"""The files of a study: in a folder of any depth, listed by a DICOMDIR, or in a zip or tar archive.

Nothing is unpacked under a name of the archive: members are read in place, and a compressed tar is unpacked into one
unnamed temporary file. Links, special files, encrypted members and names that leave the container are not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pydicom

from input_pipeline.images.scans.access import BoundedFile, Member, as_scan_error, is_system_file, open_scan
from input_pipeline.images.scans.base import COPY_AGAIN, ScanError, ScanLimits, limit_error, printable
from input_pipeline.images.scans.dicom_file import file_layout
from input_pipeline.images.scans.fields import Fields, tag_of

ZIP, GZIP, TAR = b"PK\x03\x04", b"\x1f\x8b", b"ustar"
SNIFFED = 4096  # bytes of a file that `sniff` needs
MAX_TAR_HEADER = 1 << 20  # bytes of one header of a tar archive, which tarfile reads into memory
MAX_TAR_HEADERS = 256 << 20  # bytes of all headers
CHUNK = 1 << 20
PARTIAL = (".part", ".partial", ".filepart", ".crdownload")  # ends of the names of unfinished downloads


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file that is not read, and why. `may_be_slice`: whether it may belong to a series."""

    name: str
    reason: str
    may_be_slice: bool = False


@dataclasses.dataclass
class Container:
    """The members of a study, sorted by name, and the files that are not read."""

    members: list[Member]
    skipped: list[Skipped]

    def add(self, member: Member) -> None:
        """Add a member, or skip a file that an interrupted copy left."""
        base = os.path.basename(member.name)
        if base.startswith(".") or base.lower().endswith(PARTIAL):
            self.skip(member.name, "is a partial copy by its name", may_be_slice=True)
        else:
            self.members.append(member)

    def skip(self, name: str, reason: str, *, may_be_slice: bool = False) -> None:
        self.skipped.append(Skipped(printable(name), reason, may_be_slice))

    def check_count(self, path, limits: ScanLimits) -> None:
        if len(self.members) + len(self.skipped) > limits.max_instances:
            raise limit_error(path, f"has more than {limits.max_instances:,} files", "max_instances")


def sniff(start: bytes) -> bool:
    """Return whether a file is a zip archive or a tar archive, from its first SNIFFED bytes."""
    return start[:4] == ZIP or start[257:262] == TAR or is_packed_tar(start)


def is_packed_tar(start: bytes) -> bool:
    """Return whether a file is a tar archive in a gzip stream, from its first bytes."""
    if start[:2] != GZIP:
        return False
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(31).decompress(start, 512)[257:262] == TAR
    return False


@contextlib.contextmanager
def open_container(path, limits: ScanLimits) -> Iterator[Container]:
    """Open a study. A file that is neither an archive nor a DICOMDIR is its only member."""
    if os.path.isdir(path):
        yield folder(path, limits)
        return
    with open_scan(path, limits) as file:
        start = file.read(SNIFFED)
        file.seek(0)
        if start[:4] == ZIP:
            with contextlib.ExitStack() as stack:
                with as_scan_error(path, "reading the zip archive"):
                    archive = stack.enter_context(zipfile.ZipFile(file.file))
                    container = zip_members(path, archive, limits)
                yield container
        elif start[257:262] == TAR:
            yield tar_members(path, file.file, limits)
        elif is_packed_tar(start):
            with unpacked(path, file, limits) as plain:
                yield tar_members(path, plain, limits)
        elif is_dicomdir(path) and (listed := dicomdir_files(path, limits)) is not None:
            yield medium(path, listed)
        else:
            yield Container([Member.of_file(Path(path))], [])


def folder(path, limits: ScanLimits) -> Container:
    """Return the files of a folder at any depth, without those of operating systems. Links to folders are skipped."""
    container = Container([], [])

    def fail(error: OSError):
        raise ScanError(error.filename or path, f"cannot be listed: {error.strerror}", "check permissions", "missing")

    for parent, folders, names in os.walk(path, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_system_file(name))
        for name in [*folders]:
            if os.path.islink(os.path.join(parent, name)):
                folders.remove(name)
                container.skip(name, "is a link to a folder")
        for name in sorted(names):
            if is_system_file(name):
                continue
            file = Path(parent, name)
            shown = os.path.relpath(file, path)
            try:
                regular = stat.S_ISREG(os.stat(file).st_mode)
            except OSError:
                container.skip(shown, "is a link to a file that does not exist", may_be_slice=True)
                continue
            if regular:
                container.add(Member.of_file(file, shown))
            else:
                container.skip(shown, "is not a regular file")
            container.check_count(path, limits)
    return container


def is_dicomdir(path) -> bool:
    """Return whether a path has the name that PS3.10 prescribes for the list of files of a medium."""
    return os.path.basename(path).upper() == "DICOMDIR"


def dicomdir_files(path, limits: ScanLimits) -> list[tuple[str, tuple[str, ...]]] | None:
    """Return (type of record, parts of the path) of each file that a DICOMDIR lists; None for another file."""
    with open_scan(path, limits) as file:
        layout = file_layout(path, file)
        if not layout.stated:
            return None
        file.seek(0)
        with as_scan_error(path, "reading the DICOMDIR", hide_message=True):
            tags = [tag_of("DirectoryRecordSequence")]
            dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        fields = Fields(path, dataset)
        if fields.raw("DirectoryRecordSequence") is None:
            return None
        records = [(r.soft("code", "DirectoryRecordType"), r.soft("text", "ReferencedFileID"))
                   for r in fields.items("DirectoryRecordSequence")]  # fmt: skip
    return [(kind or "", tuple(part.strip() for part in name.split("\\"))) for kind, name in records if name]


def medium(path, listed: list[tuple[str, tuple[str, ...]]]) -> Container:
    """Return the files that a DICOMDIR lists, which must be below its folder."""
    root, container = Path(path).resolve().parent, Container([], [])
    for kind, parts in sorted(set(listed)):
        name = "/".join(parts)
        found = next((p for p in (root.joinpath(*parts), root.joinpath(*map(str.lower, parts))) if p.is_file()), None)
        if any(part in ("", ".", "..") or "/" in part for part in parts):
            container.skip(name, "its name leaves the folder of the DICOMDIR", may_be_slice=kind == "IMAGE")
        elif found is None:
            container.skip(name, "is listed by the DICOMDIR, but does not exist", may_be_slice=kind == "IMAGE")
        elif not found.resolve().is_relative_to(root):
            container.skip(name, "is a link out of the folder of the DICOMDIR", may_be_slice=kind == "IMAGE")
        else:
            container.members.append(Member.of_file(found, name))
    return container


def leaves(name: str) -> bool:
    """Return whether the name of a member is absolute or goes up through '..'."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]


def is_hidden(name: str) -> bool:
    """Return whether a member is a file of an operating system, or in such a folder."""
    return any(is_system_file(part) for part in name.split("/"))


def member_of(path, name: str, opener) -> Member:
    """Return the member of an archive."""
    name = printable(name)
    return Member(name, f"{printable(path)}: {name}", opener)


def zip_members(path, archive: zipfile.ZipFile, limits: ScanLimits) -> Container:
    container = Container([], [])
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        if info.is_dir() or is_hidden(info.filename):
            continue
        if leaves(info.filename):
            container.skip(info.filename, "its name leaves the archive")
        elif stat.S_ISLNK(info.external_attr >> 16):
            container.skip(info.filename, "is a link")
        elif info.flag_bits & 1:
            container.skip(info.filename, "is encrypted", may_be_slice=True)
        elif info.file_size > limits.max_file_bytes:
            container.skip(info.filename, f"has more than {limits.max_file_bytes:,} bytes", may_be_slice=True)
        else:
            container.add(member_of(path, info.filename, zip_opener(path, archive, info)))
        container.check_count(path, limits)
    return container


def zip_opener(path, archive: zipfile.ZipFile, info: zipfile.ZipInfo):
    @contextlib.contextmanager
    def opened(limits: ScanLimits, whole: bool) -> Iterator[BoundedFile]:
        # zipfile never returns more bytes than the directory states, and verifies the checksum at the end.
        with as_scan_error(path, f"unpacking {printable(info.filename)}"):
            with archive.open(info) as stream:
                file = io.BytesIO(stream.read()) if whole else stream
                yield BoundedFile(file, info.file_size)

    return opened


class LimitedHeaders:
    """A file for tarfile, which reads the headers of members into memory. Raises ScanError above the limits."""

    def __init__(self, path, file):
        self.path, self.file, self.total, self.listing = path, file, 0, True
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.listing:
            self.total += max(size, 0)
            if size < 0 or size > MAX_TAR_HEADER or self.total > MAX_TAR_HEADERS:
                raise ScanError(self.path, "has too large headers for a tar archive of scans", "unpack it", "refused")
        return self.file.read(size)


@contextlib.contextmanager
def unpacked(path, file: BoundedFile, limits: ScanLimits) -> Iterator:
    """Unpack a gzip stream into an unnamed temporary file."""
    size = 0
    with tempfile.TemporaryFile() as plain:
        with as_scan_error(path, "unpacking the gzip stream"), gzip.open(file.file) as stream:
            while chunk := stream.read(CHUNK):
                size += len(chunk)
                if size > limits.max_file_bytes:
                    reason = f"unpacks to more than {limits.max_file_bytes:,} bytes"
                    raise limit_error(path, reason, "max_file_bytes")
                plain.write(chunk)
        plain.seek(0)
        yield plain


def tar_members(path, file, limits: ScanLimits) -> Container:
    container, limited = Container([], []), LimitedHeaders(path, file)
    with as_scan_error(path, "reading the tar archive"):
        archive = tarfile.open(fileobj=limited, mode="r:")
        for info in archive:
            if info.isdir() or is_hidden(info.name):
                continue
            if leaves(info.name):
                container.skip(info.name, "its name leaves the archive")
            elif not info.isreg() or info.issparse():
                container.skip(info.name, "is a link" if info.issym() or info.islnk() else "is not a regular file")
            elif info.size > limits.max_file_bytes:
                container.skip(info.name, f"has more than {limits.max_file_bytes:,} bytes", may_be_slice=True)
            else:
                container.add(member_of(path, info.name, tar_opener(path, archive, info)))
            container.check_count(path, limits)
        check_end(path, file, archive.offset)
    limited.listing = False
    container.members.sort(key=lambda member: member.name)
    return container


def check_end(path, file, offset: int) -> None:
    """Raise unless a tar archive ends at this offset, with zeros. tarfile takes a damaged header for the end."""
    file.seek(offset)
    size = 0
    while chunk := file.read(CHUNK):
        size += len(chunk)
        if chunk.strip(b"\0"):
            raise ScanError(path, "has a damaged header of a tar archive", COPY_AGAIN)
    if size < tarfile.BLOCKSIZE:
        raise ScanError(path, "is a tar archive without its end", COPY_AGAIN)


def tar_opener(path, archive: tarfile.TarFile, info: tarfile.TarInfo):
    @contextlib.contextmanager
    def opened(limits: ScanLimits, whole: bool) -> Iterator[BoundedFile]:
        with as_scan_error(path, f"reading {printable(info.name)}"), archive.extractfile(info) as stream:
            yield BoundedFile(stream, info.size)

    return opened
