"""What the families of data sets share: a table read once and checked, rows that are samples, reproducible choices."""

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
from typing import ClassVar, Protocol

import numpy as np

from input_pipeline.datasets import tables
from input_pipeline.datasets.store import Store, digest, first_equal
from input_pipeline.datasets.tables import Row, TableError
from input_pipeline.samples import RowError, Sample, Scan, Task, Text

# What a path says about who must stay on one side of a split: a paper, a patient or a case of the public sets.
_STUDY = re.compile(
    r"(PMC\d+)|(?:^|/)(p\d{8})(?:/|$)|(patient\d+)|(MPX\d+)|(?:^|/)(\d{8})_\d{3}\.(?:png|jpe?g)$", re.IGNORECASE
)


class Dataset(Protocol):
    """What the pipeline asks of a data set. Row i is a pure function of the table, i and the generator passed in."""

    name: str
    root: pathlib.Path
    fraction: float

    def __len__(self) -> int: ...
    def row_id(self, i: int) -> str: ...

    def number(self, i: int) -> int | None: ...
    def sample(self, i: int, rng: np.random.Generator) -> Sample: ...
    def scans(self, i: int) -> tuple[Scan, ...]: ...


def sample_rng(seed: int, epoch: int, dataset: str, row_id: str) -> np.random.Generator:
    """The generator of all random choices of one sample: the same on every machine, run and host."""
    key = f"{int(seed)}\x1f{int(epoch)}\x1f{dataset}\x1f{row_id}".encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")))


def pick(rng: np.random.Generator, items):
    """One item, each as likely."""
    return items[int(rng.random() * len(items))]


def choose(rng: np.random.Generator, count: int, most: int) -> list[int]:
    """At most `most` of range(count), each set as likely, in order."""
    if count <= most:
        return list(range(count))
    return sorted(np.argsort(rng.random(count))[:most].tolist())


def ask(rng: np.random.Generator, scans: tuple[Scan, ...], question: str, answer: str, context: str = "") -> tuple:
    """Parts of an instruction sample: the scans stand before or after the question, half of the time each."""
    asked = Text(question, "instruction")
    middle = (*scans, asked) if rng.random() < 0.5 else (asked, *scans)
    if context:
        middle = (Text(context, "context"), *middle)
    return (*middle, Text(answer, "response"))


def npy_scans(root: pathlib.Path, path: str) -> tuple[Scan, ...]:
    """The scans in a file: [S, 3, H, W, D] in .npy holds S; any other file one. Reads the header only.

    Raises:
      ValueError: the .npy file is missing, no array file, holds Python objects, or no array of 2 to 5 axes.
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
        raise ValueError(f"{path} below {root} cannot be read: {error.strerror}") from error
    except Exception as error:
        # numpy hands a damaged header to its expression parser, which raises what it likes (SyntaxError, TokenError).
        raise ValueError(f"{path} is no .npy file: {str(error)[:120]}") from error
    if dtype.hasobject or not 2 <= len(shape) <= 5 or 0 in shape:
        raise ValueError(f"{path} holds {dtype} {list(shape)}, not volumes [S, 3, H, W, D]")
    if len(shape) < 5 or shape[0] == 1:
        return (Scan(path),)
    return tuple(Scan(path, volume=s) for s in range(shape[0]))


@dataclasses.dataclass(kw_only=True, eq=False)
class TableDataset(abc.ABC):
    """A data set whose rows stand in one CSV or JSON file.

    A family says which columns it needs, how a row becomes a compact value (`parse`, once, when the table is read) and
    how that value becomes the parts of a sample (`parts`, for each epoch). The values lie on disk (store.py).

    Attributes:
      table: the file; a relative path is below the root.
      root: the directory below which all scans lie.
      split: which split this is. If the table has a column `split`, only its rows of this split are used.
      strip: a prefix to remove from the paths of the table (published tables hold their authors' absolute paths).
      study: regular expression with one group that finds the study in a path; default: the patterns of the public sets.
      fraction: share of the rows used in an epoch (RadFM: 0.2 for MPx-Single and Rad3D-Modality).
      quarantine: go on without the bad rows, which stay in `problems`; without it opening raises TableError.
      problems: a RowError for each bad row.
      left_out: why good rows are not used -> how many (another split, another language).
      duplicates: (row, earlier row with the same content); they are kept.
    Raises:
      RowError, TableError: see `quarantine`; a table without a single good row always raises.
    """

    name: ClassVar[str]
    task: ClassVar[Task]
    required: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[str] = "csv"

    table: str | pathlib.Path
    root: str | pathlib.Path
    split: str | None = None
    strip: str = ""
    study: str | None = None
    fraction: float = 1.0
    quarantine: bool = False

    def __post_init__(self):
        self.root = pathlib.Path(self.root).absolute()
        self.file = self.root / self.table
        if not 0 < self.fraction <= 1:
            raise ValueError(f"{self.name}: fraction must lie above 0 and not above 1, got {self.fraction}")
        self._study = re.compile(self.study) if self.study else _STUDY
        if self.study and self._study.groups != 1:
            raise ValueError(f"{self.name}: study {self.study!r} must have exactly one group")
        self.left_out: dict[str, int] = {}
        self.duplicates: list[tuple[int, int]] = []
        self.problems: list[RowError] = []
        # Of a path of this data set. A header is asked for several times in a row, seldom again.
        self.npy_scans = functools.lru_cache(1 << 12)(functools.partial(npy_scans, self.root))
        self._numbers = array("q")
        self._read()
        self.problems.sort(key=lambda p: p.row if isinstance(p.row, int) else 0)
        counted = f"{self.file}: {len(self.problems)} bad rows, {len(self._rows)} good ones"
        if self.problems and not self.quarantine:
            raise TableError(self.problems, f"{counted} (open with quarantine=True to go on without the bad ones)")
        if not len(self):
            if self.problems:
                raise TableError(self.problems, counted)
            reason = f"no row is left ({self.left_out})" if self.left_out else "the table has no rows"
            raise RowError(self.file, 0, reason, "check the table and the split")

    def name_unreadable_stacks(self) -> None:
        """From now on a .npy file that is missing or damaged is one scan, which fails when it is read, as in any other
        format; else its rows are bad ones."""
        found = self.npy_scans

        def named(path: str) -> tuple[Scan, ...]:
            try:
                return found(path)
            except ValueError:
                return (Scan(path),)

        self.npy_scans = named

    def _read(self) -> None:
        digests = bytearray()
        self._rows = Store(self._good(digests))
        first = first_equal(digests)
        repeated = np.flatnonzero(first != np.arange(len(first))).tolist()
        self.duplicates = [(self._numbers[k], self._numbers[first[k]]) for k in repeated]
        self.problems += self.finish()

    def _stream(self) -> Iterator[tuple[int, dict] | RowError]:
        if self.layout == "csv":
            self.header, rows = tables.stream_csv(self.file, self.required, (*self.extra, "split"))
            return rows
        if self.layout == "json":
            return tables.stream_json(self.file, self.required)
        return tables.stream_jsonl(self.file)

    def _good(self, digests: bytearray) -> Iterator:
        """The values of the good rows, whose numbers and digests are noted, and what becomes of the others."""
        for row in self._stream():
            if isinstance(row, RowError):
                self.problems.append(row)
                continue
            number, cells = row
            try:
                value = self._parse(Row(self.file, number, cells, self.root, self.strip))
            except RowError as error:
                self.problems.append(copy.copy(error))  # the error itself holds the stack, and in it the row
                continue
            if isinstance(value, LeftOut):
                self.left_out[value] = self.left_out.get(value, 0) + 1
                continue
            self._numbers.append(number)
            digests += digest(repr(self.content(value)))
            yield value

    def _select(self, kept: np.ndarray) -> None:
        """Goes on with those of the good rows for which bool[rows] is true."""
        if not kept.all():
            self._rows = self._rows.select(kept)
            self._numbers = array("q", np.asarray(self._numbers)[kept].tobytes())

    def _parse(self, row: Row):
        split = row.cells.get("split")
        if split is not None and self.split is not None and row.optional("split") != self.split:
            return LeftOut(f"split {row.optional('split')!r}")
        return self.parse(row)

    # What a family defines.

    @abc.abstractmethod
    def parse(self, row: Row):
        """A row -> the compact value that is kept, or LeftOut(reason). Raises RowError."""

    def finish(self) -> list[RowError]:
        """After all rows are read: what needs the whole table. Returns further problems."""
        return []

    @abc.abstractmethod
    def parts(self, value, rng: np.random.Generator) -> tuple[Task, str | None, tuple[Text | Scan, ...]]:
        """A kept value -> task, study and parts of the sample."""

    def content(self, value):
        """What of a kept value makes two rows duplicates."""
        return value

    @abc.abstractmethod
    def scans_of(self, value) -> tuple[Scan, ...]:
        """All scans that a kept value can use."""

    # What the pipeline calls.

    def __len__(self) -> int:
        return len(self._rows)

    def row_id(self, i: int) -> str:
        """Row number in the table, the first row below the header being 1."""
        return str(self._numbers[i])

    def number(self, i: int) -> int | None:
        """The row of the table that this one is, as in `problems`; None where it is made of several."""
        return self._numbers[i]

    def sample(self, i: int, rng: np.random.Generator) -> Sample:
        """The sample of row i. Raises RowError for what only a look into a file beside the table can show."""
        try:
            task, study, parts = self.parts(self._rows[i], rng)
        except RowError:
            raise
        except ValueError as error:
            raise self._blame(i, error) from error
        return Sample(self.row_id(i), self.name, task, study, parts)

    def scans(self, i: int) -> tuple[Scan, ...]:
        """All scans that row i can use in any epoch."""
        try:
            return self.scans_of(self._rows[i])
        except RowError:
            raise
        except ValueError as error:
            raise self._blame(i, error) from error

    def study_of(self, path: str) -> str:
        """What must stay on one side of a split: the study named in the path, or the path itself."""
        match = self._study.search(path)
        return next((g for g in match.groups() if g), path) if match else path

    def _blame(self, i: int, error: ValueError) -> RowError:
        return RowError(self.file, self.row_id(i), str(error), "correct the file or remove the row")


class LeftOut(str):
    """Why a good row is not used."""
