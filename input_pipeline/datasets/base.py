"""Shared parts of the families: a table that is read and checked once, samples by row, reproducible choices."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import hashlib
import pathlib
import re
from array import array
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from input_pipeline.datasets.csv_tables import stream_csv
from input_pipeline.datasets.json_tables import stream_json, stream_jsonl
from input_pipeline.datasets.rows import Row, TableError
from input_pipeline.datasets.store import Store, digest, first_equal
from input_pipeline.images.intensity import canonical_window
from input_pipeline.samples import RowError, Sample, Scan, Task, Text

# The paper, patient or case in a path of the public sets. It must not be divided between splits.
_STUDY = re.compile(
    r"(PMC\d+)|(?:^|/)(p\d{8})(?:/|$)|(patient\d+)|(MPX\d+)|(?:^|/)(\d{8})_\d{3}\.(?:png|jpe?g)$", re.IGNORECASE
)

# Names that an archive gives once: papers of PubMed Central, patients of MIMIC. Other names are unique in a data set.
_ARCHIVED = re.compile(r"PMC\d+|p\d{8}", re.IGNORECASE)


def study_key(study: str, root) -> str:
    """Return a key that two studies share if they are the same below the same or different roots."""
    return study.casefold() if _ARCHIVED.fullmatch(study) else f"{root}\0{study}"


def study_pattern(study: str | None) -> re.Pattern:
    """Compile the pattern of studies in paths. Its groups match a study. None: the pattern of the public sets."""
    try:
        return re.compile(study) if study else _STUDY
    except re.error as error:
        raise ValueError(f"the pattern study={study!r} is not a regular expression: {error}") from None


def named_study(pattern: re.Pattern, path: str) -> str:
    """Return the study that a path names, or ""."""
    match = pattern.search(path)
    return next(filter(None, match.groups()), "") if match else ""


def sample_rng(seed: int, epoch: int, dataset: str, row_id: str) -> np.random.Generator:
    """Return the generator of all random choices of one sample: the same on every machine, run and host."""
    key = f"{int(seed)}\x1f{int(epoch)}\x1f{dataset}\x1f{row_id}".encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")))


def pick(rng: np.random.Generator, items):
    """Draw one item; all have the same probability."""
    return items[int(rng.random() * len(items))]


def pick_weighted(rng: np.random.Generator, items, edges: np.ndarray):
    """Draw one item with a probability proportional to its weight. `edges` are the cumulative weights."""
    return items[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]


def choose(rng: np.random.Generator, count: int, most: int) -> list[int]:
    """Return a uniform random subset of range(count) with at most `most` elements, sorted."""
    if count <= most:
        return list(range(count))
    return sorted(np.argsort(rng.random(count))[:most].tolist())


def instruction_parts(
    rng: np.random.Generator, scans: tuple[Scan, ...], question: str, answer: str, context: str = ""
) -> tuple:
    """Return the parts of an instruction sample. The scans come before or after the question, with equal chance."""
    instruction = Text(question, "instruction")
    middle = (*scans, instruction) if rng.random() < 0.5 else (instruction, *scans)
    if context:
        middle = (Text(context, "context"), *middle)
    return (*middle, Text(answer, "response"))


def npy_scans(root: pathlib.Path, path: str) -> tuple[Scan, ...]:
    """Return the scans of a file. A .npy stack [S, 3, H, W, D] has S scans; any other file has one.

    Only the header is read.

    Raises:
      ValueError: the .npy file is missing, is not an array file, has Python objects, or does not have 2 to 5 axes.
    """
    if not path.lower().endswith(".npy"):
        return (Scan(path),)
    try:
        with open(root / path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise ValueError(f"format version {version} is unknown")
            shape, _, dtype = read[version](file)
    except OSError as error:
        raise ValueError(f"{path} in {root} cannot be read: {error.strerror}") from error
    except Exception as error:
        # numpy evaluates a damaged header as an expression, so any exception is possible (SyntaxError, TokenError).
        raise ValueError(f"{path} is not a valid .npy file: {str(error)[:120]}") from error
    if dtype.hasobject or not 2 <= len(shape) <= 5 or 0 in shape:
        raise ValueError(f"{path} has {dtype} {list(shape)}, expected volumes [S, 3, H, W, D]")
    if len(shape) < 5 or shape[0] == 1:
        return (Scan(path),)
    return tuple(Scan(path, volume=s) for s in range(shape[0]))


def scan_files(paths: tuple[str, ...]) -> tuple[Scan | str, ...]:
    """Return the scans of files. A .npy file remains a path; `scans_of` reads the number of its scans."""
    return tuple(path if path.lower().endswith(".npy") else Scan(path) for path in paths)


class SkippedRow(str):
    """The reason why a good row is not used."""


@dataclasses.dataclass(kw_only=True, eq=False)
class TableDataset(abc.ABC):
    """A data set whose rows are in one CSV or JSON file.

    A family names the columns that it needs. `parse` turns a row into a compact value, once, when the table is read.
    `parts` turns the value into the parts of a sample, in each epoch. The values are on disk (store.py). Sample i is a
    pure function of the table, i and the generator passed in.

    Raises:
      RowError, TableError: see `quarantine`; a table without a single good row always raises.
    """

    name: ClassVar[str]
    task: ClassVar[Task]
    required: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[tuple[str, ...]] = ()
    released_fraction: ClassVar[float] = 1.0  # share of the rows in an epoch of the released code
    has_windows: ClassVar[bool] = False  # a row may need several samples to show all its scans
    layout: ClassVar[str] = "csv"
    reads_other_files: ClassVar[bool] = False  # files that are neither the table nor scans (papers)

    table: str | pathlib.Path  # a relative path is below the root
    root: str | pathlib.Path  # the directory of all scans
    split: str | None = None  # if the table has a column `split`, only its rows of this split are used
    strip: str = ""  # a prefix to remove from the table's paths: published tables have their authors' absolute paths
    study: str | None = None  # a regex with one group, the study in a path; default: patterns of the public sets
    intensity: str | tuple[float, float] | None = None  # setting of scans without a `window`, see images/intensity.py
    fraction: float = 1.0  # share of the rows to use in an epoch
    quarantine: bool = False  # continue without the bad rows, which are in `problems`; if False, raise TableError

    def __post_init__(self):
        self.root = pathlib.Path(self.root).absolute()
        self.file = self.root / self.table
        if not 0 < self.fraction <= 1:
            raise ValueError(f"{self.name}: fraction must be above 0 and at most 1, got {self.fraction}")
        try:
            self._intensity = canonical_window(self.intensity)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self._study = study_pattern(self.study)
        if self.study and self._study.groups != 1:
            raise ValueError(f"{self.name}: the pattern study={self.study!r} must have exactly one group")
        self.skipped: dict[str, int] = {}  # reason -> number of good rows that are not used (another split, language)
        self.duplicates: list[tuple[int, int]] = []  # (row, earlier row with the same content); duplicates are kept
        self.problems: list[RowError] = []  # one for each bad row
        # The same header is needed several times in succession, then rarely again.
        self.npy_scans = functools.lru_cache(1 << 12)(functools.partial(npy_scans, self.root))
        self._numbers = array("q")
        self._read()
        self.problems.sort(key=lambda p: p.row if isinstance(p.row, int) else 0)
        summary = f"{self.file}: {len(self.problems)} bad rows, {len(self._rows)} good ones"
        if self.problems and not self.quarantine:
            raise TableError(self.problems, f"{summary} (open with quarantine=True to skip the bad rows)")
        if not len(self):
            if self.problems:
                raise TableError(self.problems, summary)
            reason = f"every row is skipped ({self.skipped})" if self.skipped else "the table has no rows"
            raise RowError(self.file, 0, reason, "check the table and the split")

    def defer_stack_errors(self) -> None:
        """Treat a missing or damaged .npy file as one scan that fails when it is read, as files of other formats do.

        Otherwise the rows that name the file are bad rows.
        """
        strict = self.npy_scans

        def lenient(path: str) -> tuple[Scan, ...]:
            try:
                return strict(path)
            except ValueError:
                return (Scan(path),)

        self.npy_scans = lenient

    def _read(self) -> None:
        digests = bytearray()
        self._rows = Store(self._good(digests))
        first = first_equal(digests)
        repeated = np.flatnonzero(first != np.arange(len(first))).tolist()
        self.duplicates = [(self._numbers[k], self._numbers[first[k]]) for k in repeated]
        self.problems += self.finish()

    def _stream(self) -> Iterator[tuple[int, dict] | RowError]:
        if self.layout == "csv":
            self.header, rows = stream_csv(self.file, self.required, (*self.extra, "split"))
            return rows
        if self.layout == "json":
            return stream_json(self.file, self.required)
        return stream_jsonl(self.file)

    def _good(self, digests: bytearray) -> Iterator:
        """Yield the values of the good rows. Records their numbers and digests, the problems and the skipped rows."""
        for row in self._stream():
            if isinstance(row, RowError):
                self.problems.append(row)
                continue
            number, cells = row
            try:
                value = self._parse(Row(self.file, number, cells, self.root, self.strip))
            except RowError as error:
                self.problems.append(copy.copy(error))  # the original keeps the stack, and with it the row, in memory
                continue
            if isinstance(value, SkippedRow):
                self.skipped[value] = self.skipped.get(value, 0) + 1
                continue
            self._numbers.append(number)
            digests += digest(repr(self.content(value)))
            yield value

    def _select(self, kept: np.ndarray) -> None:
        """Keep only the good rows for which bool[rows] is true."""
        if not kept.all():
            self._rows = self._rows.select(kept)
            self._numbers = array("q", np.asarray(self._numbers)[kept].tobytes())

    def _parse(self, row: Row):
        split = row.cells.get("split")
        if split is not None and self.split is not None and row.optional("split") != self.split:
            return SkippedRow(f"split {row.optional('split')!r}")
        return self.parse(row)

    @abc.abstractmethod
    def parse(self, row: Row):
        """Return the compact value of a row, or SkippedRow(reason). Raises RowError."""

    def finish(self) -> list[RowError]:
        """Run the checks that need the whole table, after all rows are read. Return additional problems."""
        return []

    @abc.abstractmethod
    def parts(self, value, rng: np.random.Generator) -> tuple[Task, str | None, tuple[Text | Scan, ...]]:
        """Return task, study and parts of the sample of a value."""

    def rejected(self, value) -> str | None:
        """Return the answer of a value that is worse than its response; None if there is none."""
        return None

    def content(self, value):
        """Return the part of a value that is compared to detect duplicate rows."""
        return value

    def scans_of(self, value) -> tuple[Scan, ...]:
        """Return all scans that a value can use, in order. By default the first item of the value is `scan_files`."""
        scans: list[Scan] = []
        for item in value[0]:
            scans += (item,) if isinstance(item, Scan) else self.npy_scans(item)
        return tuple(scans)

    def __len__(self) -> int:
        return len(self._rows)

    def row_id(self, i: int) -> str:
        """Return the row number in the table as text; the first row below the header is 1."""
        return str(self._numbers[i])

    def number(self, i: int) -> int:
        """Return the row number in the table, as in `problems`."""
        return self._numbers[i]

    def sides(self) -> np.ndarray | None:
        """Return the side of each row, int32[rows], or None if an epoch is not balanced.

        2 k and 2 k + 1 are the sides of pair k; an epoch has as many samples of one as of the other.
        """
        return None

    def side_names(self) -> tuple[str, str] | None:
        """Return the names of the even and of the odd sides, or None if an epoch is not balanced."""
        return None

    def window_count(self, i: int) -> int:
        """Return how many samples show all scans of row i. Raises RowError."""
        return 1

    def sample_id(self, i: int, window: int | None = None) -> str:
        """Return the id of a sample of row i: the row's id, followed by ".1", ".2", ... for its windows."""
        return self.row_id(i) if window is None else f"{self.row_id(i)}.{window + 1}"

    def sample(self, i: int, rng: np.random.Generator, window: int | None = None) -> Sample:
        """Return the sample of row i. Raises RowError for errors in files that the table names.

        window: which of the `window_count` samples; None draws one window.
        """
        value = self._rows[i]
        try:
            task, study, parts = self.window_parts(value, rng, window)
        except ValueError as error:
            raise self._row_error(i, error) from error
        parts = tuple(self._windowed(part) if isinstance(part, Scan) else part for part in parts)
        return Sample(self.sample_id(i, window), self.name, task, study, parts, self.rejected(value))

    def has_pair(self, i: int) -> bool:
        """Return whether row i has a rejected answer next to its response."""
        return self.rejected(self._rows[i]) is not None

    def window_parts(self, value, rng: np.random.Generator, window: int | None):
        """Return task, study and parts, as `parts` does, for one window of a row."""
        return self.parts(value, rng)

    def scans(self, i: int) -> tuple[Scan, ...]:
        """Return all scans that row i can use in any epoch."""
        try:
            return tuple(map(self._windowed, self.scans_of(self._rows[i])))
        except ValueError as error:
            raise self._row_error(i, error) from error

    def _windowed(self, scan: Scan) -> Scan:
        """Return the scan with the source's intensity, unless its row states a window."""
        if self._intensity is None or scan.window is not None:
            return scan
        return dataclasses.replace(scan, window=self._intensity)

    def _row_error(self, i: int, error: ValueError) -> RowError:
        if isinstance(error, RowError):
            return error
        return RowError(self.file, self.row_id(i), str(error), "correct the file or remove the row")

    def study_of(self, path: str) -> str:
        """Return the study named in the path, or the path itself. All rows of a study belong in one split."""
        return named_study(self._study, path) or path
