"""Packages of the PubMed Central open-access subset: one .tar.gz or one folder a paper, with its XML and its pictures.

    PMC1234567.tar.gz                      or a folder PMC1234567 (also PMC1234567.1: a version) with
      PMC1234567/paper.nxml                  paper.nxml or PMC1234567.1.xml
      PMC1234567/paper-g001.jpg              paper-g001.jpg
      PMC1234567/paper.pdf                   (ignored)

Nothing is unpacked to disk: members are read by name, within a budget, and no name of an archive becomes a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"(PMC\d{1,10})(?:\.\d+)?(?:\.tar\.gz|\.tgz)?")
XML = (".nxml", ".xml")
PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif")  # the better one first, of a figure that has several
MAX_XML = 64 << 20
MAX_PACKAGE = 1 << 30  # bytes of all members, unpacked
MAX_KEPT = 256 << 20  # bytes of the pictures of one paper that are in memory at once
MAX_MEMBERS = 20_000


class PackageError(ValueError):
    """A package that cannot be used at all: why, and what to do."""

    def __init__(self, reason: str, remedy: str = "download it again"):
        self.reason, self.remedy = reason, remedy
        super().__init__(f"{reason} ({remedy})")


def paper_id(path: str) -> str | None:
    """PMC1234567 for a package named so."""
    found = _NAME.fullmatch(os.path.basename(path))
    return found.group(1) if found else None


def find_packages(root: Path) -> Iterator[str]:
    """Paths of all packages below a folder, in the order of their names, folder by folder."""
    with os.scandir(root) as entries:
        listed = sorted(entries, key=lambda e: e.name)
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            if paper_id(entry.name):
                yield entry.path
            else:
                yield from find_packages(Path(entry.path))
        elif entry.name.endswith((".tar.gz", ".tgz")) and entry.is_file():
            yield entry.path


@dataclasses.dataclass
class Package:
    """Attributes:
    xml: the article. xml_name: its file, for reports.
    refused: names of members that were not looked at, with the reason.
    """

    path: str
    xml: bytes
    xml_name: str
    pictures: dict[str, bytes | Path]
    refused: list[tuple[str, str]]

    def picture(self, href: str) -> str | None:
        """The name of the picture that a figure's link means; JATS often leaves the ending out. None: it is missing.

        Raises:
          ValueError: the link leads out of the package.
        """
        if "/" in href or "\\" in href or "\0" in href or href in ("", ".", ".."):
            raise ValueError(f"picture name {href[:80]!r} is no plain file name")
        stem, ending = os.path.splitext(href)
        if ending.lower() in PICTURES:
            # The pictures beside an article have been converted: a .tif in the XML is a .jpg in the package.
            tries = [href, *(stem + e for e in PICTURES)]
        else:
            tries = [href + e for e in PICTURES]
        for name in tries:
            if name in self.pictures:
                return name
        folded = {name.lower(): name for name in reversed(self.pictures)}
        return next((folded[name.lower()] for name in tries if name.lower() in folded), None)

    def data(self, name: str) -> bytes:
        value = self.pictures[name]
        return value if isinstance(value, bytes) else value.read_bytes()


def open_package(path: str, pictures: bool = True) -> Package:
    """Reads a package's XML and finds its pictures.

    Args:
      pictures: False: their names only (for a tar file, no more than that is read).
    Raises:
      PackageError: a broken archive, no or several articles in it, more bytes than the budget.
    """
    if os.path.isdir(path):
        return _open_folder(Path(path))
    try:
        with tarfile.open(path, "r:gz") as archive:
            return _open_archive(path, archive, pictures)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PackageError(f"the archive cannot be read: {why}") from None


def _open_folder(folder: Path) -> Package:
    found: dict[str, bytes | Path] = {}
    refused, articles = [], []
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda e: e.name)
    for entry in listed:
        name = entry.name
        if name.lower().endswith((*XML, *PICTURES)):
            if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
                refused.append((name, "is a link or no regular file"))
            elif name.lower().endswith(XML):
                articles.append(name)
            else:
                found[name] = Path(entry.path)
    name = _only_article(articles)
    with contextlib.suppress(OSError):
        if os.stat(folder / name).st_size <= MAX_XML:
            return Package(str(folder), (folder / name).read_bytes(), name, found, refused)
        raise PackageError(f"{name} has more than {MAX_XML:,} bytes", "leave it out")
    raise PackageError(f"{name} cannot be read")


def _open_archive(path: str, archive: tarfile.TarFile, pictures: bool) -> Package:
    found: dict[str, bytes | Path] = {}
    xml: dict[str, bytes] = {}
    refused: list[tuple[str, str]] = []
    total = kept = 0
    for number, member in enumerate(archive):
        total += member.size
        if number >= MAX_MEMBERS or total > MAX_PACKAGE:
            raise PackageError(f"more than {MAX_MEMBERS:,} members or {MAX_PACKAGE:,} bytes", "leave it out")
        name = member.name
        if not name.lower().endswith((*XML, *PICTURES)):
            continue
        if not member.isreg():
            refused.append((name, "is a link or no regular file"))
        elif name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            refused.append((name, "its name leads out of the package"))
        elif name.lower().endswith(XML):
            if member.size > MAX_XML:
                raise PackageError(f"{name} has more than {MAX_XML:,} bytes", "leave it out")
            xml[os.path.basename(name)] = archive.extractfile(member).read()
        else:
            base = os.path.basename(name)
            kept += member.size if pictures else 0
            if kept > MAX_KEPT:
                raise PackageError(f"its pictures have more than {MAX_KEPT:,} bytes", "unpack it into a folder")
            if base in found:
                refused.append((name, "another member has the same name"))
            else:
                found[base] = archive.extractfile(member).read() if pictures else b""
    name = _only_article(sorted(xml))
    return Package(path, xml[name], name, found, refused)


def _only_article(names: list[str]) -> str:
    best = [n for n in names if n.lower().endswith(".nxml")] or names
    if len(best) != 1:
        what = "holds no article (.nxml or .xml)" if not best else f"holds {len(best)} articles: {', '.join(best[:3])}"
        raise PackageError(what, "one package a paper")
    return best[0]
