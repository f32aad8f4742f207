"""Whether a run of `prepare` would write the index that is there: nothing that it depends on has changed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from input_pipeline.config import DataConfig
from input_pipeline.datasets import FAMILIES
from input_pipeline.files import fingerprint, read_json
from input_pipeline.images import scans
from input_pipeline.index import index
from input_pipeline.index.scan_checks import stamp_of

PACKAGE = Path(__file__).parents[1]
REPORTS = "quarantine.jsonl notices.jsonl cut.jsonl duplicates.jsonl leaks.jsonl summary.txt summary.json summary.png"


def inputs(config: DataConfig, checksums: Mapping[str, str], tokenizer: str, **options: bool) -> str:
    """Return a digest of all that an index depends on, except the scan files; "" if it cannot be known.

    Args:
      checksums: source -> index.table_checksum. tokenizer: its fingerprint.
      options: those of `prepare` that decide whether the index is written, and with records or without.
    """
    if any(FAMILIES[source["family"]].reads_other_files for source in config.sources().values()):
        return ""
    kind, _, directory = config.terms.partition(":")
    terms = [_stamp(file) for file in sorted(Path(directory).glob("MR*.RRF"))] if kind == "umls" else []
    packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    return fingerprint([config.to_dict(), dict(checksums), tokenizer, options, terms, packages, _source_code()])


def _source_code() -> str:
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix in (".py", ".json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _stamp(file: Path) -> tuple[str, int, int]:
    status = os.stat(file)
    return str(file), status.st_size, status.st_mtime_ns


def unchanged_report(directory: Path, expected: str) -> dict | None:
    """Return the content of summary.json if the index was made from the same `inputs` and its scans are unchanged.

    Otherwise, or if a file of the directory is missing or damaged, return None.
    """
    try:
        description = index.read_description(directory)
        if not expected or description.get("inputs") != expected:
            return None
        index.verify(directory, description)
        report = read_json(directory / "summary.json", kind=dict)
    except (OSError, ValueError):
        return None
    complete = all((directory / name).is_file() for name in REPORTS.split())
    if not complete or not _has_records(directory, description.get("records")) or not _scans_unchanged(directory):
        return None
    return report


def colour_scans(directory: Path, channels: int) -> int:
    """Return the number of good scans with more channels than the network reads."""
    filters = [("channels", ">", channels), ("fault", "=", "")]
    return pq.read_table(directory / "scans.parquet", columns=["path"], filters=filters, use_threads=False).num_rows


def _has_records(directory: Path, records: Mapping | None) -> bool:
    if not records:
        return True
    # Imported late: TFDS takes half a second to import, and most runs write no records.
    from input_pipeline.index.records import shard_name

    return all((directory / "records" / shard_name(number)).is_file() for number in range(records["shards"]))


def _scans_unchanged(directory: Path) -> bool:
    """Return whether every scan has the stamp of the index. A scan that was missing must still be missing."""
    seen: set[tuple[str, str]] = set()
    with pq.ParquetFile(directory / "scans.parquet") as table:
        for batch in table.iter_batches(columns=["root", "path", "fault", "stamp"]):
            for root, path, fault, stamp in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if (root, path) in seen:
                    continue
                seen.add((root, path))
                if _stamp_now(root, path) != (stamp or None if fault == "missing" else stamp):
                    return False
    return True


def _stamp_now(root: str, path: str) -> str | None:
    """Return the stamp of a scan, or None if it is missing. A stamp of "" in the index equals neither."""
    try:
        return stamp_of(scans.resolve(root, path))[0]
    except (OSError, scans.ScanError):
        return None
