"""The index directory, written so that it is whole or not an index: index.json goes first and comes last."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from input_pipeline.files import fingerprint
from input_pipeline.index import index
from input_pipeline.index.findings import GOOD, Findings
from input_pipeline.index.journal import Journal

BATCH = 16384
PACKAGES = (
    "numpy nibabel pydicom pylibjpeg-openjpeg pyjpegls python-gdcm pillow tifffile opencv-python-headless scipy "
    "sentencepiece pyarrow array-record tensorflow-datasets"
).split()
# Of `data`: what a scan, a sample or its place in a row depends on.
FIELDS = (
    "tokenizer terms preprocess storage size_2d size_3d depth text_length vision_rows patch_length planes scans "
    "max_scans num_latents seed"
).split()
# Shares of a mixture and where the files lie are no part of what a row is.
NOT_IDENTITY = ("weight", "fraction", "root", "table", "quarantine")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` when all is written."""
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(file)) from error
        raise


def write_scans(file: Path, found: Findings, metadata: dict[bytes, bytes]) -> str:
    """scans.parquet; returns a checksum of what decides how scans are read."""
    schema, digest = index.SCANS.with_metadata(metadata), hashlib.sha256()

    def lines():
        for owner, scan in found.scans():
            patches, planes = (0, 0) if scan.fault else found.sizes(scan)
            named = {"source": owner, "key": index.place_hash(*scan.key[1:])}
            yield scan._asdict() | named | {"patches": patches, "planes": planes}
            shape = scan.height, scan.width, scan.depth, scan.channels
            _add(digest, owner, *scan.key[1:], scan.fault, scan.sha256, *shape, scan.record)

    _write(file, schema, lines())
    return digest.hexdigest()


def write_rows(file: Path, found: Findings) -> str:
    """rows.parquet; returns a checksum of what decides which rows are used."""
    digest = hashlib.sha256()

    def lines():
        for name, row in found.rows():
            yield {field: row[field] for field in index.ROWS.names} | {"source": name}
            _add(digest, name, row["row_id"], row["state"] == GOOD)

    _write(file, index.ROWS, lines())
    return digest.hexdigest()


def _add(digest, *values) -> None:
    digest.update(json.dumps(values).encode())


def _write(file: Path, schema: pa.Schema, lines: Iterable[dict]) -> None:
    """A table in pieces, so that one piece at a time is in memory twice."""
    with replacing(file) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        piece = []
        for line in lines:
            piece.append(line)
            if len(piece) == BATCH:
                writer.write_table(pa.Table.from_pylist(piece, schema))
                piece = []
        writer.write_table(pa.Table.from_pylist(piece, schema))


def write_lines(file: Path, lines: Iterable[dict]) -> int:
    """JSON Lines; returns how many."""
    count = 0
    with replacing(file) as partial, open(partial, "w", encoding="utf-8") as opened:
        for line in lines:
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_text(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def index_json(
    found: Findings, journal: Journal, scans: str, rows: str, good: dict[str, int], tokenizer: str, counts: dict
) -> dict:
    """The content of index.json.

    Args:
      scans, rows: what `write_scans` and `write_rows` returned.
      good: source -> how many of its rows are.
      tokenizer: its fingerprint.
    """
    sources = {}
    for name, table in found.tables.items():
        fields = found.config.sources()[name]
        sources[name] = {
            "family": fields["family"],
            "fields": fields,
            "table": str(fields["table"]),
            "root": table.root,
            "sha256": found.checksums[name],
            "split": found.split[name],
            "rows": table.rows,
            "good_rows": good[name],
        }
    same = {
        name: {k: v for k, v in source["fields"].items() if k not in NOT_IDENTITY} | {"sha256": source["sha256"]}
        for name, source in sources.items()
    }
    data = found.config.to_dict()
    records = None
    if journal.settings is not None:
        records = journal.settings | {"shards": len(journal.shards), "records": sum(journal.shards)}
    return {
        "version": index.VERSION,
        "created": {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "sources": sources,
        "data": {name: data[name] for name in FIELDS},
        "tokenizer": tokenizer,
        "counts": counts,
        "records": records,
        "identity": fingerprint({"tables": same, "scans": scans, "rows": rows}),
    }
