"""The index directory: the facts about every scan and row that training needs.

    index.json         version, tables and their checksums, counts, digests of all files below; written last
    scans.parquet      one line per scan: source, path, volume, window, series, shape, record number
    rows.parquet       one line per row of every table: study, task, token count at epoch 0, state
    records/           with --records: the volumes at their final size, as a TFDS data set

`prepare` also writes reports (command.EPILOG). Opening an index verifies the SHA-256 of the content of index.json, of
the two tables and of the description of the records. Records are verified when they are read, by the digests in
scans.parquet, so that opening does not read all voxels. `Index.check` verifies that the tables of the sources have not
changed since `prepare`.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from input_pipeline.config import DataConfig
from input_pipeline.files import fingerprint, nearest, parse_json, read_json, sha256_of_file
from input_pipeline.images.planes import PATCH
from input_pipeline.samples import Scan

VERSION = 3
UNVERIFIED = 2  # the version before this one, without digests; it can still be opened
KEYS = frozenset("version created sources data tokenizer counts records identity".split())  # if UNVERIFIED
SOURCE = {"fields": dict, "root": str, "sha256": str, "split": str, "rows": int}  # keys of a source that are read
PARTS = ("scans.parquet", "rows.parquet", "records/dataset_info.json")  # verified when an index is opened
# Fields of a source that do not change what its rows are: sampling shares, and locations.
NOT_IDENTITY = ("weight", "fraction", "root", "table", "quarantine")

# A scan is a path with a volume, a window and a series: another window of the same file is another scan.
SCANS = pa.schema(
    [
        ("source", pa.string()),  # the first source that names it
        ("root", pa.string()),
        ("path", pa.string()),
        ("volume", pa.int32()),  # -1: the only volume of the file
        ("window", pa.string()),  # JSON of a name or [low, high]; "" for none
        ("key", pa.uint64()),  # key_hash of path, volume, window and series
        ("fault", pa.string()),  # "" if usable, else one of scans.FAULTS; the columns below may then be empty
        ("reason", pa.string()),
        ("remedy", pa.string()),
        ("format", pa.string()),
        ("modality", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("depth", pa.int32()),
        ("channels", pa.int32()),  # channels of the volume; 1 if the three channels of the file are equal
        ("spacing", pa.list_(pa.float32())),  # mm along height, width, depth; empty if unknown
        ("dtype", pa.string()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("notices", pa.list_(pa.string())),  # faults of a usable scan
        ("bytes", pa.int64()),
        ("sha256", pa.string()),  # SHA-256 of the file, or of the files of a series in name order
        ("patches", pa.int32()),  # in `paper` mode
        ("planes", pa.int32()),
        ("record", pa.int64()),  # record number, or -1
        ("stamp", pa.string()),  # sizes and times of its files; `prepare` reads a scan again if they change
        ("record_digest", pa.int64()),  # records.digest of its record; 0 if there is none
        ("series", pa.string()),  # words that select a series of a DICOM study; "" for none
    ]
)
ROWS = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),  # number in the opened data set
        ("row_id", pa.string()),
        ("task", pa.string()),
        ("study", pa.string()),
        ("tokens", pa.int32()),  # number of tokens at epoch 0
        ("trained", pa.int32()),  # tokens with a weight
        ("scans", pa.int32()),  # number of distinct scans it can use
        ("state", pa.string()),  # "good", or why it cannot be used
        ("windows", pa.int32()),  # samples that show all of its scans (PMC-Inline); these two are new in 0.2
        ("study_group", pa.int64()),  # study_groups.py; null outside the training sources
    ]
)


@dataclasses.dataclass(frozen=True)
class IndexedScan:
    """Facts about a scan that planning and loading need."""

    shape: tuple[int, int, int, int]  # (H, W, D) as read, and the channels of the volume
    bytes: int = -1  # size of its file, or of all files of its series
    record: int = -1  # record number, or -1
    record_digest: int = 0  # records.digest of the record; 0 if unknown


def scan_key(root, scan: Scan) -> tuple[str, str, int, str, str]:
    """Return the key of a scan: root, path, volume, window, series."""
    window = "" if scan.window is None else json.dumps(scan.window)
    return str(root), scan.path, -1 if scan.volume is None else scan.volume, window, scan.series or ""


@functools.lru_cache(maxsize=1024)
def key_hash(*values) -> int:
    """Return a 64-bit hash of a root, or of path, volume, window and series. Training identifies a scan by their XOR.

    An empty series is not hashed, as in indexes of earlier versions.
    """
    values = values[:3] if len(values) == 4 and not values[3] else values
    digest = hashlib.blake2b("\0".join(map(str, values)).encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class Scans:
    """The good scans, 56 bytes each, because a dict of all scans of MedMD would take 16 GB per process.

        scans = index.scans(sources)
        number = scans.number(scan_key(root, scan))
        scans[number].shape

    The columns are keys uint64[n], sizes, records and digests int64[n], and shapes int32[n, 4]. A repeated key must
    have the same values: ValueError is raised if two different scans have one key.
    """

    def __init__(
        self, keys: np.ndarray, sizes: np.ndarray, records: np.ndarray, digests: np.ndarray, shapes: np.ndarray
    ):
        self.sizes, self.records, self.digests, self.shapes = sizes, records, digests, shapes
        order = np.argsort(keys, kind="stable")
        repeated = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        for column in (sizes, records, digests, shapes):
            if (column[order[repeated]] != column[order[repeated + 1]]).any():
                raise ValueError("the index has two scans with one key: rename a file, or use different roots")
        self.first = np.delete(order, repeated + 1)
        self.keys = keys[self.first]

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, key: tuple[str, str, int, str, str]) -> int | None:
        """Return the number of a scan_key, or None if it is unknown or not a good scan."""
        root, *rest = key
        hashed = np.uint64(key_hash(root) ^ key_hash(*rest))
        position = self.keys.searchsorted(hashed)
        return int(self.first[position]) if position < len(self.keys) and self.keys[position] == hashed else None

    def __getitem__(self, number: int) -> IndexedScan:
        shape = tuple(self.shapes[number].tolist())
        return IndexedScan(shape, int(self.sizes[number]), int(self.records[number]), int(self.digests[number]))


def table_checksum(file: Path) -> str:
    """Return a checksum of a table: the SHA-256 of a file.

    Of a directory (TFDS), of Parquet files and of a pattern of files, which may be larger than memory: the SHA-256 of
    their names, sizes, JSON files and Parquet footers.
    """
    if file.is_file() and file.suffix != ".parquet":
        return sha256_of_file(file)
    if file.is_dir():
        parts, root = sorted(file.glob("*.parquet")) or sorted(file.rglob("*")), file
    else:
        parts, root = [Path(part) for part in sorted(glob.glob(str(file)))] or [file], file.parent
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{os.path.relpath(part, root)}\0{part.stat().st_size}\0".encode())
        if part.suffix == ".json":
            digest.update(part.read_bytes())
        elif part.suffix == ".parquet":
            digest.update(_parquet_footer(part))
    return digest.hexdigest()


def _parquet_footer(file: Path) -> bytes:
    """Return the last bytes of a Parquet file: its footer, with positions and sizes of all columns, up to 1 MiB."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - (1 << 20)))
        return opened.read()


def sealed(directory: Path, description: dict) -> dict:
    """Return the content of index.json: a description, the digests of the other files, and its own digest."""
    plain = parse_json(json.dumps(description, default=list))
    plain["files"] = {name: sha256_of_file(directory / name) for name in PARTS if (directory / name).is_file()}
    return plain | {"sha256": fingerprint(plain)}


def read_description(directory: Path) -> dict:
    """Return the content of index.json. Raises ValueError if it is missing, damaged or of another version."""
    file = directory / "index.json"
    if not file.is_file():
        raise ValueError(
            f"{directory} is not an index: index.json is missing; create it with "
            f"`python -m input_pipeline.prepare --config=... --out {directory}`"
        )
    try:
        description = read_json(file, kind=dict)
    except ValueError as error:
        raise ValueError(f"{error}; {RESTORE}") from None
    if description.get("version") == UNVERIFIED and description.keys() <= KEYS:
        return _complete(file, description)
    if description.get("version") not in (VERSION, UNVERIFIED):
        raise ValueError(f"{file} has version {description.get('version')}, not {VERSION}: run prepare again")
    content = {name: value for name, value in description.items() if name != "sha256"}
    if description.get("sha256") != fingerprint(content):
        raise ValueError(f"{file} is damaged: its content does not match its digest; {RESTORE}")
    return _complete(file, description)


def _complete(file: Path, description: dict) -> dict:
    """Return the content of index.json. Raises ValueError that names every key without a value of its type."""
    bad = [name for name, kind in (("identity", str), ("sources", dict)) if not isinstance(description.get(name), kind)]
    for name, source in description["sources"].items() if "sources" not in bad else ():
        stored = source if isinstance(source, dict) else {}
        bad += [f"sources.{name}.{key}" for key, kind in SOURCE.items() if not isinstance(stored.get(key), kind)]
    if bad:
        raise ValueError(f"{file} is damaged: {', '.join(bad)} missing or of another type; {RESTORE}")
    return description


def verify(directory: Path, description: dict, names: Iterable[str] = PARTS) -> None:
    """Compare files of an index with their digests. Raises ValueError that names every damaged file."""
    digests = description.get("files", {})
    problems = []
    for name in names:
        file = directory / name
        if name in digests and not file.is_file():
            problems.append(f"{file} is missing")
        elif name in digests and _sha256(file, os.stat(file)) != digests[name]:
            problems.append(f"{file} is damaged")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; {RESTORE}")


def _sha256(file: Path, status: os.stat_result) -> str:
    return _cached_sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=16)  # the training and the test data of a process share an index
def _cached_sha256(file: Path, *_) -> str:
    return sha256_of_file(file)


RESTORE = "restore it from a copy, or run prepare again"


class Index:
    """An opened and verified index directory.

    Raises ValueError if the index is missing, damaged, or of another version. An index of the previous version, which
    has no digests, only causes a warning.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.description = read_description(self.directory)
        verify(self.directory, self.description)
        if self.description["version"] == UNVERIFIED:
            warnings.warn(
                f"{self.directory / 'index.json'} is of an older version without digests, so damage to the index is "
                "not detected: run prepare again (unchanged scans are not read again)",
                stacklevel=2,
            )
        self.tables: dict[str, dict] = self.description["sources"]  # source -> {"family", "table", "sha256", ...}
        self.identity: str = self.description["identity"]  # SHA-256 of everything that decides what training reads

    def check(self, sources: Mapping[str, Mapping]) -> None:
        """Check that the index was made from these sources. Raises ValueError with every difference."""
        problems = []
        for name, fields in sources.items():
            known = self.tables.get(name)
            if known is None:
                problems.append(f"source {name} is not in it{nearest(name, self.tables)}")
                continue
            for field in sorted((fields.keys() | known["fields"].keys()) - set(NOT_IDENTITY)):
                now, then = _plain(fields.get(field)), _plain(known["fields"].get(field))
                if now != then:
                    problems.append(f"source {name}: {field} is {now!r}, was {then!r}")
            table = Path(fields["root"]).absolute() / fields["table"]
            try:
                if table_checksum(table) != known["sha256"]:
                    problems.append(f"source {name}: {table} has changed since")
            except FileNotFoundError:
                problems.append(f"source {name}: {table} is missing")
        if problems:
            raise ValueError(
                f"the index {self.directory} was made from other data: {'; '.join(problems)}; run prepare again"
            )

    def scans(self, sources: Mapping[str, Mapping]) -> Scans:
        """Return the good scans of these sources, under their current roots."""
        moved: dict[str, set[str]] = {}
        for name, fields in sources.items():
            moved.setdefault(self.tables[name]["root"], set()).add(str(Path(fields["root"]).absolute()))
        current = {root: [key_hash(r) for r in sorted(roots)] for root, roots in moved.items()}
        columns = ("key", "bytes", "record", "record_digest", "height", "width", "depth", "channels")
        parts = [(np.empty(0, np.uint64), *np.empty((3, 0), np.int64), np.empty((0, 4), np.int32))]
        # Arrow's threads would not survive the fork of a worker pool.
        with pq.ParquetFile(self.directory / "scans.parquet", page_checksum_verification=True) as table:
            stored = [name for name in columns if name in table.schema_arrow.names]  # older tables have no digests
            for batch in table.iter_batches(columns=["root", "fault", *stored], use_threads=False):
                batch = batch.filter(pc.equal(batch["fault"], ""))
                root = batch["root"].dictionary_encode()
                hashes = [current.get(name, []) for name in root.dictionary.to_pylist()]
                # If one root was replaced by several, its scans are repeated under each of them.
                root_index = root.indices.to_numpy()
                line = np.repeat(np.arange(len(batch)), np.array([*map(len, hashes), 0])[root_index])
                root_hash = np.array([value for k in root_index.tolist() for value in hashes[k]], np.uint64)
                zeros = pa.nulls(len(batch), pa.int64())
                values = (batch[name] if name in stored else zeros for name in columns)
                key, size, record, digest, *shape = (pc.fill_null(x, 0).to_numpy()[line] for x in values)
                parts.append((key ^ root_hash, size, record, digest, np.stack(shape, -1)))
        return Scans(*map(np.concatenate, zip(*parts, strict=True)))

    def first_colour_scan(self, channels: int, roots: Iterable[str]) -> str:
        """Return the path of a good scan with more channels than `channels`, or "". `roots` are those of `prepare`."""
        filters = [("channels", ">", channels), ("fault", "=", ""), ("root", "in", set(roots))]
        scans = pq.read_table(self.directory / "scans.parquet", columns=["path"], filters=filters, use_threads=False)
        return scans["path"][0].as_py() if len(scans) else ""

    def notices(self, keys: Iterable[int]) -> dict[int, list[str]]:
        """Return {key: notices} of the good scans with these keys. Indexes of earlier versions have no notices."""
        file, keys = self.directory / "scans.parquet", list(keys)
        if not keys or "notices" not in pq.read_schema(file).names:
            return {}
        chosen = pc.field("key").isin(pa.array(keys, pa.uint64())) & (pc.field("fault") == "")
        table = pq.read_table(file, columns=["key", "notices"], filters=chosen, use_threads=False)
        return dict(zip(table["key"].to_pylist(), table["notices"].to_pylist(), strict=True))

    def check_records(self, settings: Mapping[str, object]) -> None:
        """Check that the records exist and have these settings. Raises ValueError with every difference."""
        records = self.description.get("records")
        if not records:
            raise ValueError(f"the index {self.directory} has no records: run prepare with --records")
        if changed := changed_settings(records, settings):
            raise ValueError(
                f"the records of {self.directory} have other settings: {changed}; run prepare with --records "
                "--recheck, or read the scans' files (data.records=False)"
            )

    def bad_rows(self, source: str) -> np.ndarray:
        """Return bool[rows of the opened data set]: the rows that cannot be used."""
        file, filters = self.directory / "rows.parquet", [("source", "=", source)]
        table = pq.read_table(file, columns=["row", "state"], filters=filters, use_threads=False)
        bad = np.zeros(self.tables[source]["rows"], bool)
        bad[table["row"].to_numpy()] = pc.not_equal(table["state"], "good").to_numpy()
        return bad

    def studies(self, source: str) -> list[str]:
        """Return the study of each row of a source at epoch 0; "" if it is unknown."""
        return self._column(source, "study").to_pylist()

    def windows(self, source: str) -> np.ndarray | None:
        """Return the samples that show all scans of each row, int32[rows]; None in an index of an earlier version."""
        column = self._column(source, "windows")
        return None if column is None else column.to_numpy()

    def study_groups(self, source: str) -> np.ndarray | None:
        """Return the study group of each row, int64[rows]; None if `prepare` stored none."""
        column = self._column(source, "study_group")
        return None if column is None or column.null_count else column.to_numpy()

    def _column(self, source: str, name: str) -> pa.ChunkedArray | None:
        """Return a column of rows.parquet for all rows of a source, in order; None if it does not exist."""
        file = self.directory / "rows.parquet"
        if name not in pq.read_schema(file).names:
            return None
        table = pq.read_table(file, columns=["row", name], filters=[("source", "=", source)], use_threads=False)
        return table.sort_by("row")[name]


def record_settings(config: DataConfig) -> dict:
    """Return the settings that all records of a directory must share. A scan's intensity is part of its key instead."""
    settings = {name: getattr(config, name) for name in ("storage", "size_2d", "size_3d", "depth", "fit")}
    return settings | {name: value for name, value in config.own_patches.items() if name == "patch"}


def changed_settings(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Return "data.storage is int16, was uint8; ..." for the settings of records that differ, or ""."""
    default = {"fit": "stretch", "patch": list(PATCH)}  # of settings that may be absent
    old, new = default | dict(old), default | dict(new)
    return "; ".join(f"data.{k} is {v}, was {old.get(k)}" for k, v in new.items() if old.get(k) != v)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
