"""What a worker does: reads scans whole, reads rows and encodes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from input_pipeline.config import DataConfig
from input_pipeline.datasets import Dataset
from input_pipeline.images import scans
from input_pipeline.images.intensity import one_channel_if_gray
from input_pipeline.images.planes import Sizes
from input_pipeline.images.scans.base import printable
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index.index import scan_key
from input_pipeline.parallel import workers
from input_pipeline.samples import RowError, Sample, Scan
from input_pipeline.sources import encode_row, open_sources, terms_of, tokenizer_of
from input_pipeline.text.terms import TERM_WEIGHT
from input_pipeline.text.tokens import Encoded

# --- scans ------------------------------------------------------------------------------------------------------------

Key = tuple[str, str, int, str]  # root, path, volume, window: index.scan_key


class ScanCheck(NamedTuple):
    """The columns of index.SCANS that follow from the file and the scan's own choices alone."""

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
    bytes: int = 0
    sha256: str = ""
    record: int = -1
    stamp: str = ""  # "" where the file has to be read again next time

    @property
    def key(self) -> Key:
        return self[:4]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How volumes are made; with `records` they are handed back as well."""

    sizes: Sizes
    storage: str
    records: bool

    @property
    def chunk(self) -> int:
        """Scans of one task: volumes travel between processes, so they are few at a time."""
        return 4 if self.records else 16


def scan_of(key: Key) -> Scan:
    """The inverse of `scan_key`."""
    _, path, volume, window = key
    window = json.loads(window) if window else None
    return Scan(path, None if volume < 0 else volume, tuple(window) if isinstance(window, list) else window)


def label(key: Key) -> str:
    """A scan in words, another one for each scan of a root."""
    root, path, volume, window = key
    said = f"{printable(root)}/{printable(path)}"
    return said + (f", volume {volume}" if volume >= 0 else "") + (f", window {window}" if window else "")


def item_label(item: tuple[Key, str]) -> str:
    return label(item[0])


def ended(item: tuple[Key, str], reason: str) -> tuple[ScanCheck, None]:
    """In place of a result: the scan ended the process that read it."""
    remedy = "open it by hand; with little memory use fewer --workers, with slow files a longer data.worker_timeout"
    return ScanCheck(*item[0], fault="damaged", reason=reason, remedy=remedy), None


def check_scans(
    state, known: Sequence[tuple[Key, str]], conversion: Conversion
) -> list[tuple[ScanCheck | None, bytes | None]]:
    """Reads scans whole.

    Args:
      known: each scan, and the stamp its files had when they were read before ("" if they were not).
    Returns:
      For each its facts (None: unchanged since), and its record if records are made and the scan is good.
    """
    checked = []
    for key, stamp in known:
        workers.at(label(key))
        checked.append(_check_scan(key, stamp, conversion))
    return checked


def _check_scan(key: Key, known: str, conversion: Conversion) -> tuple[ScanCheck | None, bytes | None]:
    scan, facts = scan_of(key), {}
    try:
        path = scans.resolve(key[0], scan.path)
        before, facts["bytes"] = stamp_of(path)
        if known and known == before:
            return None, None
        facts["stamp"] = before
        facts["sha256"] = file_hash(path)
        voxels, header = scans.read(path, volume=scan.volume)
        voxels = one_channel_if_gray(voxels)
        height, width, depth, channels = voxels.shape
        facts |= {
            "format": header.format,
            "modality": header.modality or "",
            "height": height,
            "width": width,
            "depth": depth,
            "channels": channels,
            "spacing": header.spacing_mm or (),
            "dtype": header.dtype,
            "low": float(header.value_range[0]),
            "high": float(header.value_range[1]),
        }
        volume = _convert(voxels, header, scan, path, conversion)
        if stamp_of(path)[0] != before:
            facts["stamp"] = ""
            raise scans.ScanError(path, "changed while it was read", "run again when nobody writes to it")
        if not conversion.records:
            return ScanCheck(*key, **facts), None
        # Imported late: TFDS takes half a second, and most runs write no records.
        from input_pipeline.index.records import serialize

        return ScanCheck(*key, **facts), serialize(volume, facts["sha256"])
    except scans.ScanError as error:
        bad = {"fault": error.fault, "reason": error.reason, "remedy": error.remedy}
        kept = {name: facts[name] for name in ("bytes", "sha256", "stamp") if name in facts}
        return ScanCheck(*key, **bad, **kept), None


def _convert(voxels, header, scan: Scan, path, conversion: Conversion):
    """Its volume; ScanError for whatever stands against it, its window included."""
    try:
        return prepare_volume(
            voxels,
            window=scan.window,
            storage=conversion.storage,
            sizes=conversion.sizes,
            padding=header.padding,
            value_range=header.value_range,
        )
    except MemoryError as error:
        raise scans.ScanError(path, "not enough memory to convert it", "use fewer --workers", "limit") from error
    except ValueError as error:
        remedy = "correct its window in the table, or leave the scan out"
        raise scans.ScanError(path, str(error), remedy, "unsupported") from error
    except Exception as error:  # whatever a library raises on odd voxels, it is this scan that cannot be used
        text = f"failed while being converted ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise scans.ScanError(path, text, "leave the scan out", "unsupported") from error


def stamp_of(path: Path) -> tuple[str, int]:
    """What changes whenever a file, or a file of a series, is written again; and the bytes in all.

    Sizes and times of modification, as `make` and `rsync` go by.
    """
    found = os.stat(path)
    if not path.is_dir():
        return f"{found.st_size}-{found.st_mtime_ns}", found.st_size
    digest, total = hashlib.blake2b(digest_size=16), 0
    for name, entry in _files(path):
        digest.update(f"{name}\0{entry.st_size}\0{entry.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        total += entry.st_size
    return digest.hexdigest(), total


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of a series, of its files in the order of their names."""
    files = [path / name for name, _ in _files(path)] if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for file in files:
            with open(file, "rb", opener=_never_block) as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise scans.ScanError(file, f"cannot be read: {error.strerror}", "check its permissions", "missing") from None
    return digest.hexdigest()


def _never_block(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would wait for its writer


def _files(directory: Path) -> list[tuple[str, os.stat_result]]:
    with os.scandir(directory) as entries:
        return sorted((e.name, e.stat()) for e in entries if e.is_file())


# --- rows -------------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Why a row is left out."""

    file: str
    row: str
    reason: str
    remedy: str


@dataclasses.dataclass
class SourceCheck:
    """What the opened table of a source says.

    Attributes:
      rows: of the opened data set. problems: rows of the table that are not among them.
      left_out: why good rows of the table are not used -> how many.
      duplicates: (row, earlier row with equal content), by number in the table.
    """

    root: str
    file: str
    rows: int
    problems: list[Problem]
    left_out: dict[str, int]
    duplicates: list[tuple[int, int]]


class RowCheck(NamedTuple):
    """What a row is at epoch 0.

    Attributes:
      trained, terms: tokens with a weight, and of them those with the weight of a medical term.
      instruction: text tokens without a weight (contexts and instructions), BOS not counted.
      used: which of the row's scans are used.
      studies: what must not stand in both splits, the study of the sample first.
      cut: tokens of context, instruction and response that were cut; scans that were dropped.
      problem: why the row is left out, or None; then nothing else need be known.
      number: of the row in the table, -1 where it is made of several.
    """

    row_id: str
    task: str = ""
    study: str = ""
    tokens: int = 0
    trained: int = 0
    terms: int = 0
    instruction: int = 0
    used: tuple[int, ...] = ()
    studies: tuple[str, ...] = ()
    cut: tuple[int, int, int, int] = (0, 0, 0, 0)
    problem: Problem | None = None
    number: int = -1


class Tables:
    """Tables, tokenizer and medical terms, opened once for all workers."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.tokenizer = tokenizer_of(config)
        self.datasets: dict[str, Dataset] = open_sources(config)
        self.terms = terms_of(config.terms)


def open_tables(fields: dict) -> Tables:
    return Tables(DataConfig.from_dict(fields))


def describe(tables: Tables) -> dict[str, SourceCheck]:
    """name -> what its table says."""
    found = {}
    for name, dataset in tables.datasets.items():
        file = str(dataset.file)
        problems = [Problem(file, str(p.row), p.reason, p.remedy) for p in dataset.problems]
        found[name] = SourceCheck(
            str(dataset.root), file, len(dataset), problems, dict(dataset.skipped), list(dataset.duplicates)
        )
    return found


def row_label(name: str, row: int) -> str:
    return f"source {name}, row number {row}"


def list_scans(tables: Tables, rows: Sequence[tuple[str, int]]) -> list[tuple[Key, ...]]:
    """The scans that each row can use in any epoch; of a row that cannot say, none: `encode_rows` says why."""
    listed = []
    for name, row in rows:
        workers.at(row_label(name, row))
        dataset = tables.datasets[name]
        try:
            listed.append(tuple(dict.fromkeys(scan_key(dataset.root, scan) for scan in dataset.scans(row))))
        except RowError:
            listed.append(())
    return listed


def encode_rows(tables: Tables, rows: Sequence[tuple[str, int]]) -> list[RowCheck]:
    """Rows as samples and tokens of epoch 0, and what is wrong with them, their scans' files aside."""
    facts = []
    for name, row in rows:
        workers.at(row_label(name, row))
        dataset = tables.datasets[name]
        row_id = dataset.row_id(row)
        try:
            found = _encode_row(tables, name, dataset, row, row_id)
        except RowError as error:
            found = RowCheck(row_id, problem=_problem(dataset, row_id, error))
        number = dataset.number(row)
        facts.append(found if number is None else found._replace(number=number))
    return facts


def _encode_row(tables: Tables, name: str, dataset: Dataset, row: int, row_id: str) -> RowCheck:
    config = tables.config
    sample, encoded = encode_row(config, name, dataset, row, 0, tables.tokenizer, tables.terms)
    keys = {key: i for i, key in enumerate(dict.fromkeys(scan_key(dataset.root, s) for s in dataset.scans(row)))}
    used = tuple(keys[scan_key(dataset.root, scan)] for scan in encoded.scans)
    latents = int((encoded.visual[:, 0] >= 0).sum())
    marks = 2 * latents // config.num_latents
    trained = int((encoded.weights > 0).sum())
    return RowCheck(
        row_id,
        sample.task,
        sample.study_id or "",
        len(encoded.ids),
        trained,
        int((encoded.weights == TERM_WEIGHT).sum()),
        len(encoded.ids) - 1 - latents - marks - trained,
        used,
        _studies(dataset, sample, keys),
        _cut(encoded),
    )


def _studies(dataset: Dataset, sample: Sample, keys) -> tuple[str, ...]:
    """The sample's study, and those of the other scans that the row can show in other epochs."""
    studies = [sample.study_id] if sample.study_id else []
    if studies and len(keys) > len(set(sample.scans)) and hasattr(dataset, "study_of"):
        studies += [dataset.study_of(path) for _, path, _, _ in keys]
    return tuple(dict.fromkeys(studies))


def _cut(encoded: Encoded) -> tuple[int, int, int, int]:
    return encoded.cut_context, encoded.cut_instruction, encoded.cut_response, encoded.dropped_scans


def _problem(dataset: Dataset, row_id: str, error: RowError) -> Problem:
    """The table and the row, also where the fault lies in a file beside the table."""
    elsewhere = error.file not in (str(dataset.file), dataset.name)
    reason = f"{error.file}: {error.reason}" if elsewhere else error.reason
    return Problem(str(dataset.file), row_id, reason, error.remedy)


def nothing() -> None:
    """The state of workers that need none; that this module is imported serves them all."""
