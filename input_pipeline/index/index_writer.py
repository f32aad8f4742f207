"""Writes scans.parquet and rows.parquet, and composes index.json. `index.Index` reads them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from input_pipeline.files import atomic_write, fingerprint
from input_pipeline.index import index
from input_pipeline.index.results import GOOD, Results
from input_pipeline.index.resume_state import ResumeState

BATCH = 16384
PACKAGES = (
    "numpy nibabel pydicom pylibjpeg-openjpeg pyjpegls python-gdcm pillow tifffile opencv-python-headless scipy "
    "sentencepiece tokenizers jinja2 pyarrow array-record tensorflow-datasets"
).split()
# Fields of `data` that determine a scan, a sample, or the position of a sample in a row.
FIELDS = (
    "tokenizer template terms umls_types preprocess intensity fit storage size_2d size_3d depth text_length "
    "vision_rows patch_length planes scans max_scans num_latents seed"
).split()


def write_scans(file: Path, results: Results, metadata: dict[bytes, bytes]) -> str:
    """Write scans.parquet. Returns a checksum of the columns that decide how scans are read."""
    schema, digest = index.SCANS.with_metadata(metadata), hashlib.sha256()

    def lines():
        for source, scan in results.scans():
            patches, planes = (0, 0) if scan.fault else results.sizes(scan)
            names = {"source": source, "key": index.key_hash(*scan.key[1:])}
            yield scan._asdict() | names | {"patches": patches, "planes": planes}
            shape = scan.height, scan.width, scan.depth, scan.channels
            values = source, *scan.key[1:4], scan.fault, scan.sha256, *shape, scan.record
            values += (scan.series,) if scan.series else ()  # without one, as in earlier versions
            digest.update(json.dumps(values).encode())

    _write_table(file, schema, lines())
    return digest.hexdigest()


def write_rows(file: Path, results: Results) -> str:
    """Write rows.parquet. Returns a checksum of the columns that decide which rows are used."""
    digest = hashlib.sha256()

    def lines():
        for name, row in results.rows():
            yield {field: row[field] for field in index.ROWS.names} | {"source": name}
            digest.update(json.dumps([name, row["row_id"], row["state"] == GOOD]).encode())

    _write_table(file, index.ROWS, lines())
    return digest.hexdigest()


def _write_table(file: Path, schema: pa.Schema, lines: Iterable[dict]) -> None:
    """Write a table in batches, so that only one batch is in memory."""
    with (
        atomic_write(file) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        batch = []
        for line in lines:
            batch.append(line)
            if len(batch) == BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema))


def index_description(results: Results, state: ResumeState, scans: str, rows: str, report: dict) -> dict:
    """Return the content of index.json without the fingerprint of the tokenizer.

    `scans` and `rows` are the checksums from `write_scans` and `write_rows`, `report` is the content of summary.json.
    """
    sources = {}
    for name, table in results.tables.items():
        fields = results.config.sources()[name]
        sources[name] = {
            "family": fields["family"],
            "fields": fields,
            "table": str(fields["table"]),
            "root": table.root,
            "sha256": results.checksums[name],
            "split": results.split[name],
            "rows": table.rows,
            "good_rows": report["sources"][name]["good"],
        }
    identities = {
        name: {k: v for k, v in source["fields"].items() if k not in index.NOT_IDENTITY} | {"sha256": source["sha256"]}
        for name, source in sources.items()
    }
    data = results.config.to_dict()
    records = None
    if state.settings is not None:
        records = state.settings | {"shards": len(state.shards), "records": sum(state.shards)}
    return {
        "version": index.VERSION,
        "created": {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "sources": sources,
        "data": {name: data[name] for name in FIELDS} | results.config.own_patches,
        "counts": {key: report[key] for key in ("rows", "scans", "quarantine", "leaks")},
        "records": records,
        "identity": fingerprint({"tables": identities, "scans": scans, "rows": rows}),
    }
