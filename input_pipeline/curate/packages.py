"""Packages of the PubMed Central open-access subset: one .tar.gz or folder per paper, with its XML and images.

    PMC1234567.tar.gz                      or a folder PMC1234567 (also PMC1234567.1: a version) with
      PMC1234567/paper.nxml                  paper.nxml or PMC1234567.1.xml
      PMC1234567/paper-g001.jpg              paper-g001.jpg
      PMC1234567/paper.pdf                   (ignored)

Nothing is unpacked to disk. Members are read by name within size limits, and no name of an archive becomes a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_NAME = re.compile(r"(PMC\d{1,10})(?:\.\d+)?(?:\.tar\.gz|\.tgz)?")
XML = (".nxml", ".xml")
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif")  # by preference, for a figure with several files
MAX_XML = 64 << 20
MAX_PACKAGE = 1 << 30  # bytes of all members, unpacked
MAX_KEPT = 256 << 20  # bytes of the images of one paper in memory
MAX_MEMBERS = 20_000
MAX_HEADER = 1 << 20  # bytes of one header of a member: a long name, or the fields of a pax header
MAX_HEADERS = 16 << 20  # bytes of all headers


class PackageError(ValueError):
    """A package that cannot be used: the reason, and what to do."""

    default_remedy = "download it again"

    def __init__(self, reason: str, remedy: str = ""):
        self.reason, self.remedy = reason, remedy or self.default_remedy
        super().__init__(f"{reason} ({self.remedy})")


def paper_id(path: str) -> str | None:
    """Return PMC1234567 for a package with such a name, or None."""
    match = _NAME.fullmatch(os.path.basename(path))
    return match[1] if match else None


def find_packages(root: Path) -> Iterator[str]:
    """Yield the paths of all packages below a folder, sorted by name, folder by folder."""
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            if paper_id(entry.name):
                yield entry.path
            else:
                yield from find_packages(Path(entry.path))
        elif entry.name.endswith((".tar.gz", ".tgz")) and entry.is_file():
            yield entry.path


@dataclasses.dataclass
class Package:
    """A paper with its images."""

    path: str
    xml: bytes  # the article
    xml_name: str  # the name of its file
    images: dict[str, bytes | Path]  # name -> content or path
    rejected: list[tuple[str, str]]  # (name, reason) of members that were not read

    def find_image(self, href: str) -> str | None:
        """Return the name of the image that a link refers to, or None. Raises ValueError if the link is a path."""
        if "/" in href or "\\" in href or "\0" in href or href in ("", ".", ".."):
            raise ValueError(f"image name {href[:80]!r} is not a plain file name")
        stem, extension = os.path.splitext(href)
        if extension.lower() in IMAGES:
            # PMC converts images: a .tif in the XML is a .jpg in the package.
            candidates = [href, *(stem + e for e in IMAGES)]
        else:  # JATS often omits the extension
            candidates = [href + e for e in IMAGES]
        folded = {name.lower(): name for name in reversed(self.images)}
        matches = [name for name in candidates if name in self.images]
        matches += [folded[name.lower()] for name in candidates if name.lower() in folded]
        return matches[0] if matches else None

    def data(self, name: str) -> bytes:
        value = self.images[name]
        return value if isinstance(value, bytes) else value.read_bytes()


def open_package(path: str, images: bool = True) -> Package:
    """Read the XML of a package and its images, or only their names.

    Raises PackageError if the archive is broken, does not have exactly one article, or exceeds the limits.
    """
    if os.path.isdir(path):
        return _open_folder(Path(path))
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=(limited := _LimitedFile(file)), mode="r:") as archive:
            return _open_archive(path, archive, limited, images)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PackageError(f"the archive cannot be read: {reason}") from None
    except RecursionError:  # tarfile reads consecutive headers of one member recursively
        raise PackageError("a member of the archive has too many headers") from None


class _LimitedFile:
    """A file for tarfile, which reads headers of any size into memory. Raises PackageError above the limits."""

    def __init__(self, file: IO[bytes]):
        self.file, self.headers, self.is_content = file, 0, False
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int) -> bytes:
        if not self.is_content:
            self.headers += size
            if size > MAX_HEADER or self.headers > MAX_HEADERS:
                raise PackageError(
                    f"headers with more than {MAX_HEADER:,} or together {MAX_HEADERS:,} bytes", "remove it"
                )
        return self.file.read(size)

    def content(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        """Return the bytes of a member, whose size was checked."""
        self.is_content = True
        try:
            return archive.extractfile(member).read()
        finally:
            self.is_content = False


def _open_folder(folder: Path) -> Package:
    images: dict[str, bytes | Path] = {}
    rejected, articles = [], []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        name = entry.name
        if name.lower().endswith((*XML, *IMAGES)):
            if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
                rejected.append((name, "not a regular file"))
            elif name.lower().endswith(XML):
                articles.append(name)
            else:
                images[name] = Path(entry.path)
    name = _only_article(articles)
    with contextlib.suppress(OSError):
        if os.stat(folder / name).st_size <= MAX_XML:
            return Package(str(folder), (folder / name).read_bytes(), name, images, rejected)
        raise PackageError(f"{name} has more than {MAX_XML:,} bytes", "remove it")
    raise PackageError(f"{name} cannot be read")


def _open_archive(path: str, archive: tarfile.TarFile, file: _LimitedFile, read_images: bool) -> Package:
    images: dict[str, bytes | Path] = {}
    xml: dict[str, bytes] = {}
    rejected: list[tuple[str, str]] = []
    total = kept = 0
    for number, member in enumerate(archive):
        total += member.size
        if number >= MAX_MEMBERS or total > MAX_PACKAGE or member.size < 0:
            raise PackageError(f"more than {MAX_MEMBERS:,} members or {MAX_PACKAGE:,} bytes", "remove it")
        name, base = member.name, os.path.basename(member.name)
        if not name.lower().endswith((*XML, *IMAGES)):
            continue
        if not member.isreg():
            rejected.append((name, "not a regular file"))
        elif name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            rejected.append((name, "its path leaves the package"))
        elif name.lower().endswith(XML):
            if member.size > MAX_XML:
                raise PackageError(f"{name} has more than {MAX_XML:,} bytes", "remove it")
            xml[base] = file.content(archive, member)
        else:
            kept += member.size if read_images else 0
            if kept > MAX_KEPT:
                raise PackageError(f"its images have more than {MAX_KEPT:,} bytes", "unpack it into a folder")
            if base in images:
                rejected.append((name, "another member has the same name"))
            else:
                images[base] = file.content(archive, member) if read_images else b""
    name = _only_article(sorted(xml))
    return Package(path, xml[name], name, images, rejected)


def _only_article(names: list[str]) -> str:
    best = [n for n in names if n.lower().endswith(".nxml")] or names
    if len(best) != 1:
        found = f"{len(best)} articles: {', '.join(best[:3])}" if best else "no article (.nxml or .xml)"
        raise PackageError(f"the package has {found}", "use one package per paper")
    return best[0]
