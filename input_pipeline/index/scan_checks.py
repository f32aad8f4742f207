"""Worker tasks for scans: read each scan completely, check it, and convert it to a record if requested."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from input_pipeline.files import parse_json, sha256_of_file
from input_pipeline.images import scans
from input_pipeline.images.intensity import one_channel_if_gray
from input_pipeline.images.planes import Sizes
from input_pipeline.images.scans.base import printable
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.parallel import workers
from input_pipeline.samples import Scan

Key = tuple[str, str, int, str, str]  # root, path, volume, window, series: see index.scan_key
ScanTask = tuple[Key, str]  # a scan, and the stamp of its files when they were last read ("" if never)


class ScanCheck(NamedTuple):
    """The columns of index.SCANS that depend only on the key of a scan and its files."""

    root: str
    path: str
    volume: int
    window: str
    fault: str = ""
    reason: str = ""
    remedy: str = ""
    format: str = ""
    modality: str = ""
    height: int = 0
    width: int = 0
    depth: int = 0
    channels: int = 0
    spacing: Sequence[float | None] = ()
    dtype: str = ""
    low: float = 0.0
    high: float = 0.0
    notices: Sequence[str] = ()
    bytes: int = 0
    sha256: str = ""
    record: int = -1
    stamp: str = ""  # "" if the next run must read the file again
    record_digest: int = 0  # records.digest of the record; 0 if there is none. Older progress files end before it.
    series: str = ""  # part of the key, but the last field, because older progress files end before it

    @property
    def key(self) -> Key:
        return (*self[:4], self.series)

    @classmethod
    def of(cls, key: Key, **facts) -> ScanCheck:
        """Return the check of the scan with this key."""
        return cls(*key[:4], series=key[4], **facts)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How scans become volumes, and whether the volumes are returned as records."""

    sizes: Sizes
    storage: str
    records: bool
    fit: str = "stretch"

    @property
    def chunk(self) -> int:
        """Scans per task; fewer with records, because the volumes are sent between processes."""
        return 4 if self.records else 16


def preload() -> None:
    """Do nothing. As a pool's state factory, this imports the module once, in the process that forks the workers."""


def scan_from_key(key: Key) -> Scan:
    """Return the scan of a key (the inverse of `index.scan_key`)."""
    _, path, volume, window, series = key
    window = parse_json(window) if window else None
    window = tuple(window) if isinstance(window, list) else window
    return Scan(path, None if volume < 0 else volume, window, series or None)


def task_label(task: ScanTask) -> str:
    """Return a readable name of the scan, unique among the scans of a root."""
    (root, path, volume, window, series), _ = task
    name = f"{printable(root)}/{printable(path)}" + (f", series {printable(series)}" if series else "")
    return name + (f", volume {volume}" if volume >= 0 else "") + (f", window {window}" if window else "")


def failed_check(task: ScanTask, reason: str) -> tuple[ScanCheck, None]:
    """Return the result for a scan that killed or hung its worker."""
    remedy = "check it with another program; use fewer --workers (little memory) or a longer data.worker_timeout"
    return ScanCheck.of(task[0], fault="damaged", reason=reason, remedy=remedy), None


def check_scans(
    state, tasks: Sequence[ScanTask], conversion: Conversion
) -> list[tuple[ScanCheck | None, bytes | None]]:
    """Read scans completely.

    Returns:
      For each scan its check (None if its files have not changed), and its record if records are requested and the
      scan is good.
    """
    results = []
    for task in tasks:
        workers.heartbeat(task_label(task))
        results.append(_check_scan(*task, conversion))
    return results


def map_checks(
    pool, tasks: Iterable[ScanTask], conversion: Conversion
) -> Iterator[tuple[list[ScanTask], list[tuple[ScanCheck | None, bytes | None]]]]:
    """Yield chunks of scans and their results from `check_scans` in a ResilientPool, in order."""
    return pool.map(check_scans, tasks, conversion.chunk, conversion, label=task_label, failed=failed_check)


def _check_scan(key: Key, known_stamp: str, conversion: Conversion) -> tuple[ScanCheck | None, bytes | None]:
    scan, facts = scan_from_key(key), {}
    try:
        path = scans.resolve(key[0], scan.path)
        stamp, facts["bytes"] = stamp_of(path)
        if known_stamp and known_stamp == stamp:
            return None, None
        facts["stamp"] = stamp
        facts["sha256"] = scan_sha256(path)
        voxels, header = scans.read(path, **scan.selection)
        voxels = one_channel_if_gray(voxels)
        low, high = map(float, header.value_range)
        facts |= dict(zip(("height", "width", "depth", "channels"), voxels.shape, strict=True))
        facts |= {"format": header.format, "modality": header.modality or "", "spacing": header.spacing_mm or ()}
        facts |= {"dtype": header.dtype, "low": low, "high": high}
        volume = _convert(voxels, header, scan, path, conversion)
        facts |= {"channels": volume.voxels.shape[3], "notices": (*header.notices, *volume.notices)}
        if stamp_of(path)[0] != stamp:
            facts["stamp"] = ""
            raise scans.ScanError(path, "changed while it was read", "run again when no process writes to it")
        if not conversion.records:
            return ScanCheck.of(key, **facts), None
        # Imported late: TFDS takes half a second to import, and most runs write no records.
        from input_pipeline.index.records import digest, serialize

        record = serialize(volume, facts["sha256"])
        return ScanCheck.of(key, **facts, record_digest=digest(record)), record
    except scans.ScanError as error:
        kept = {name: facts[name] for name in ("bytes", "sha256", "stamp") if name in facts}
        return ScanCheck.of(key, fault=error.fault, reason=error.reason, remedy=error.remedy, **kept), None


def _convert(voxels, header, scan: Scan, path, conversion: Conversion):
    """Return the scan's volume. Raises ScanError for every failure, including a bad window."""
    try:
        settings = {"storage": conversion.storage, "sizes": conversion.sizes, "fit": conversion.fit}
        return prepare_volume(voxels, window=scan.window, measure=True, **settings, **header.facts)
    except MemoryError as error:
        raise scans.ScanError(path, "not enough memory to convert it", "use fewer --workers", "limit") from error
    except ValueError as error:
        remedy = "correct its window in the table or the intensity of its source, or leave the scan out"
        raise scans.ScanError(path, str(error), remedy, "unsupported") from error
    except Exception as error:  # a library may raise any exception on unusual voxels; only this scan is affected
        text = f"conversion failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise scans.ScanError(path, text, "leave the scan out", "unsupported") from error


def stamp_of(path: Path) -> tuple[str, int]:
    """Return the stamp of a file, a series or a study, and its total bytes. It changes when a file is rewritten.

    It consists of sizes and modification times, as in `make` and `rsync`.
    """
    files = scans.files_of(path)
    if files == [os.fspath(path)]:
        status = os.stat(path)
        return f"{status.st_size}-{status.st_mtime_ns}", status.st_size
    digest, total = hashlib.blake2b(digest_size=16), 0
    for file in files:
        status, name = os.stat(file), os.path.relpath(file, path)
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        total += status.st_size
    return digest.hexdigest(), total


def scan_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; of a series or a study, of its files in name order.

    Raises ScanError if a file is unreadable.
    """
    try:
        return sha256_of_file(*map(Path, scans.files_of(path)))
    except OSError as error:
        file = Path(error.filename or path)
        raise scans.ScanError(file, f"cannot be read: {error.strerror}", "check its permissions", "missing") from None
