"""What `prepare` knows of every scan and every row, and what training needs of it: the index directory.

    index.json         version, the tables and their checksums, counts; written last
    scans.parquet      a line per scan: source, path, volume, window; what its voxels are; its place in the records
    rows.parquet       a line per row of every table: study, task, token count at epoch 0, state
    quarantine.jsonl   a line per bad row or scan: file, row, reason, remedy
    cut.jsonl          a line per row of which text or scans are left out: how many
    summary.txt, summary.json, summary.png
    records/           with --records: the volumes at their final size, a TFDS data set

`Index.open` checks that the tables are still those that were read.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from input_pipeline.samples import Scan

VERSION = 2

# A scan is what a sample asks for: the same file with another window or volume is another scan.
SCANS = pa.schema(
    [
        ("source", pa.string()),  # the source that names it first
        ("root", pa.string()),
        ("path", pa.string()),
        ("volume", pa.int32()),  # -1: the file's only one
        ("window", pa.string()),  # JSON of a name or [low, high]; "" without
        ("key", pa.uint64()),  # place_hash of path, volume and window
        ("fault", pa.string()),  # "" if it can be used, else one of scans.FAULTS; then all below may be empty
        ("reason", pa.string()),
        ("remedy", pa.string()),
        ("format", pa.string()),
        ("modality", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("depth", pa.int32()),
        ("channels", pa.int32()),  # 1 where three channels of the file are equal
        ("spacing", pa.list_(pa.float32())),  # mm along height, width, depth; empty if the file does not say
        ("dtype", pa.string()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),  # of the file; of a series, of its files in the order of their names
        ("patches", pa.int32()),  # in `paper` mode
        ("planes", pa.int32()),
        ("record", pa.int64()),  # its number in the records; -1
        ("stamp", pa.string()),  # sizes and times of its files, by which `prepare` knows what it need not read again
    ]
)
ROWS = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),  # number in the opened data set
        ("row_id", pa.string()),
        ("task", pa.string()),
        ("study", pa.string()),
        ("tokens", pa.int32()),  # at epoch 0
        ("trained", pa.int32()),  # of them with a weight
        ("scans", pa.int32()),  # distinct scans it can use
        ("state", pa.string()),  # "good", or why it is left out
    ]
)


@dataclasses.dataclass(frozen=True)
class IndexedScan:
    """What planning and loading need of a scan.

    Attributes:
      shape: (H, W, D, C) as read, C being 1 where three channels are equal.
      bytes: of its file, or of the files of its series.
      record: its number in the records, -1 without.
    """

    shape: tuple[int, int, int, int]
    bytes: int = -1
    record: int = -1


def scan_key(root, scan: Scan) -> tuple[str, str, int, str]:
    """What makes two scans the same one: root, path, volume, window."""
    window = "" if scan.window is None else json.dumps(scan.window)
    return str(root), scan.path, -1 if scan.volume is None else scan.volume, window


@functools.lru_cache(maxsize=1024)
def place_hash(*place) -> int:
    """64 bits of a root, or of path, volume and window: both together by `^` are what training knows a scan by."""
    digest = hashlib.blake2b("\0".join(map(str, place)).encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class Scans:
    """Facts of good scans, 48 bytes each: a dict of those of MedMD would take 16 GB in every process.

        scans = index.scans(sources)
        number = scans.number(scan_key(root, scan))
        scans[number].shape

    Args:
      keys: uint64[n]; one that stands there again must have the same facts.
      sizes, records: int64[n]. shapes: int32[n, 4].
    Raises:
      ValueError: two scans with one key.
    """

    def __init__(self, keys: np.ndarray, sizes: np.ndarray, records: np.ndarray, shapes: np.ndarray):
        self.sizes, self.records, self.shapes = sizes, records, shapes
        order = np.argsort(keys, kind="stable")
        again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        for facts in (sizes, records, shapes):
            if (facts[order[again]] != facts[order[again + 1]]).any():
                raise ValueError("the index has two scans with one key: rename a file, or keep the roots apart")
        self.first = np.delete(order, again + 1)
        self.keys = keys[self.first]

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, key: tuple[str, str, int, str]) -> int | None:
        """What a scan_key has here, another number than any other; None: it is unknown, or no good scan."""
        root, *rest = key
        wanted = np.uint64(place_hash(root) ^ place_hash(*rest))
        at = self.keys.searchsorted(wanted)
        return int(self.first[at]) if at < len(self.keys) and self.keys[at] == wanted else None

    def __getitem__(self, number: int) -> IndexedScan:
        shape = tuple(self.shapes[number].tolist())
        return IndexedScan(shape, int(self.sizes[number]), int(self.records[number]))


def table_checksum(file: Path) -> str:
    """SHA-256 of a table; of a prepared data set (a directory), of the names, sizes and descriptions of its files."""
    digest = hashlib.sha256()
    if file.is_dir():
        for part in sorted(file.rglob("*")):
            digest.update(f"{part.relative_to(file)}\0{part.stat().st_size}\0".encode())
            if part.suffix == ".json":
                digest.update(part.read_bytes())
        return digest.hexdigest()
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Index:
    """An index directory, read.

    Attributes:
      tables: source -> {"family", "table", "sha256", "rows", ...} as `prepare` found them.
      bad_rows: source -> bool[rows], the rows of the opened data set that are left out.
      identity: SHA-256 of the parts that decide what training reads.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        file = self.directory / "index.json"
        if not file.is_file():
            raise ValueError(
                f"{self.directory} is no index: index.json is missing; make it with "
                f"`python -m input_pipeline.prepare --config=... --out {self.directory}`"
            )
        self.description = json.loads(file.read_text())
        if self.description.get("version") != VERSION:
            raise ValueError(f"{file} is of version {self.description.get('version')}, not {VERSION}: prepare it anew")
        self.tables: dict[str, dict] = self.description["sources"]
        self.identity: str = self.description["identity"]

    def check(self, sources: Mapping[str, Mapping]) -> None:
        """Whether the index was made from these sources. ValueError names every difference."""
        problems = []
        for name, fields in sources.items():
            known = self.tables.get(name)
            if known is None:
                near = difflib.get_close_matches(name, list(self.tables), 1, 0.4)
                problems.append(f"source {name} is not in it" + (f" (did you mean {near[0]}?)" if near else ""))
                continue
            for field in sorted(fields.keys() | known["fields"].keys()):
                # Shares decide how often a row is drawn, not what it is; a root may move.
                if field in ("weight", "fraction", "root", "table", "quarantine"):
                    continue
                now, then = _plain(fields.get(field)), _plain(known["fields"].get(field))
                if now != then:
                    problems.append(f"source {name}: {field} is {now!r}, was {then!r}")
            table = Path(fields["root"]).absolute() / fields["table"]
            if not table.exists():
                problems.append(f"source {name}: {table} is missing")
            elif table_checksum(table) != known["sha256"]:
                problems.append(f"source {name}: {table} has changed since")
        if problems:
            raise ValueError(f"the index {self.directory} is of other data: {'; '.join(problems)}; run prepare again")

    def scans(self, sources: Mapping[str, Mapping]) -> Scans:
        """The good scans of these sources, under the roots the sources have now."""
        moved: dict[str, set[str]] = {}
        for name, fields in sources.items():
            moved.setdefault(self.tables[name]["root"], set()).add(str(Path(fields["root"]).absolute()))
        now = {root: [place_hash(r) for r in sorted(roots)] for root, roots in moved.items()}
        numbers = ("key", "bytes", "record", "height", "width", "depth", "channels")
        parts = [(np.empty(0, np.uint64), *np.empty((2, 0), np.int64), np.empty((0, 4), np.int32))]
        # Threads of Arrow would not survive the fork of a worker pool.
        with pq.ParquetFile(self.directory / "scans.parquet") as table:
            for batch in table.iter_batches(columns=["root", "fault", *numbers], use_threads=False):
                batch = batch.filter(pc.equal(batch["fault"], ""))
                root = batch["root"].dictionary_encode()
                places = [now.get(name, []) for name in root.dictionary.to_pylist()]
                # A scan stands there once for each of the places to which its root has moved.
                of_root = root.indices.to_numpy()
                line = np.repeat(np.arange(len(batch)), np.array([*map(len, places), 0])[of_root])
                place = np.array([place for k in of_root.tolist() for place in places[k]], np.uint64)
                key, size, record, *shape = (batch[name].to_numpy()[line] for name in numbers)
                parts.append((key ^ place, size, record, np.stack(shape, -1)))
        return Scans(*map(np.concatenate, zip(*parts, strict=True)))

    def colour(self, channels: int, roots: Iterable[str]) -> str:
        """The path of a good scan with more channels, of these roots as they were; "" if there is none."""
        wanted = [("channels", ">", channels), ("fault", "=", ""), ("root", "in", set(roots))]
        found = pq.read_table(self.directory / "scans.parquet", columns=["path"], filters=wanted, use_threads=False)
        return found["path"][0].as_py() if len(found) else ""

    def check_records(self, wanted: Mapping[str, object]) -> None:
        """Whether the records are there and of these settings. ValueError names every difference."""
        found = self.description.get("records")
        if not found:
            raise ValueError(f"the index {self.directory} has no records: run prepare with --records")
        wrong = [f"data.{k} is {v}, theirs {found.get(k)}" for k, v in wanted.items() if found.get(k) != v]
        if wrong:
            raise ValueError(
                f"the records of {self.directory} are of another kind: {'; '.join(wrong)}; run prepare with --records "
                "--recheck, or go by the files (data.records=False)"
            )

    def bad_rows(self, source: str) -> np.ndarray:
        """bool[rows of the opened data set]: those that are left out."""
        table = pq.read_table(
            self.directory / "rows.parquet",
            columns=["row", "state"],
            filters=[("source", "=", source)],
            use_threads=False,
        )
        bad = np.zeros(self.tables[source]["rows"], bool)
        bad[table["row"].to_numpy()] = pc.not_equal(table["state"], "good").to_numpy()
        return bad


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
