"""Tables in a schema of their own, whose columns are mapped to the keys of jsonl.py."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from input_pipeline.datasets.base import SkippedRow
from input_pipeline.datasets.jsonl import JSONL, KEYS
from input_pipeline.datasets.unpacked import ScanFolder, bad_axes, unpacked_rows
from input_pipeline.files import nearest
from input_pipeline.samples import RowError

MARK = "<image>"  # of LLaVA and others: the next image. Here marks have numbers.
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}  # other names of roles
Features = Mapping[str, Any]  # name of a feature -> its type in the library that reads it


@dataclasses.dataclass(kw_only=True, eq=False)
class Mapped(JSONL, abc.ABC):
    """Rows whose `columns` are mapped to the keys of the schema of jsonl.py.

    A scan is a path below the root, or is stored in the row: as the bytes of a file, or as an array. Scans in rows are
    unpacked to files (unpacked.py). `<image>` in a question marks the position of the next scan.
    """

    keys: ClassVar[tuple[str, ...]] = (*KEYS, "split")
    default_columns: ClassVar[dict[str, str]] = {}
    default_constants: ClassVar[dict[str, str]] = {}

    # key of the schema -> column, e.g. {"instruction": "question"}; several for scans: {"scans": "frontal, lateral"}.
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    # key of the schema -> a value for every row, e.g. {"task": "vqa"}; the default id is the row number
    constants: dict[str, str] = dataclasses.field(default_factory=dict)
    images: str = ""  # folder below the root that the paths of scans are relative to
    unpacked: str = "unpacked"  # folder below the root for scans that are stored in the rows
    axes: str = ""  # axes of arrays, e.g. DHW; "": as in .npy files

    def __post_init__(self):
        mapped = self.columns.keys() | self.constants.keys()
        if unknown := sorted(mapped - set(self.keys)):
            known = ", ".join(self.keys)
            raise ValueError(
                f"{self.name}: unknown keys {', '.join(unknown)}{nearest(unknown[0], KEYS)}; known: {known}"
            )
        if bad := bad_axes(self.axes):
            raise ValueError(f"{self.name}: {bad}")
        super().__post_init__()

    @abc.abstractmethod
    def files(self) -> list[pathlib.Path]:
        """Return the files of the table. Raises RowError if there are none."""

    @abc.abstractmethod
    def features(self) -> Features | None:
        """Return the columns of the table; None if every row has its own. Raises RowError if it cannot be read."""

    @abc.abstractmethod
    def records(self, names: list[str]) -> Iterator[tuple[int, dict] | RowError]:
        """Yield number, from 1, and values of these columns of each row, or a problem.

        A value is text, bytes or an array of a scan, {"bytes", "path"} of a scan, or a list of such values.
        """

    def has_scans(self, feature: Any) -> bool:
        """Return whether the values of a column are scans, and not their paths."""
        return False

    def _stream(self):
        names = self._names()
        columns = list(dict.fromkeys(name for names_of_key in names.values() for name in names_of_key))
        folder = ScanFolder(self.root, self.unpacked)
        rows = lambda: (self._mapped(row, names, folder) for row in self.records(columns))  # noqa: E731
        features = self.features()
        if features is None or not any(self.has_scans(features[name]) for name in names["scans"]):
            return rows()
        identity = [self.name, self.split, names, self.constants, self.images, self.axes]
        return unpacked_rows(self.file, folder, self.files(), identity, rows)

    def _names(self) -> dict[str, list[str]]:
        """Return key -> columns. Raises RowError for columns that the table does not have."""
        chosen = self.default_columns | self.columns
        names = {
            key: [name.strip() for name in chosen.get(key, key).split(",")]
            if key == "scans"
            else [chosen.get(key, key)]
            for key in self.keys
            if key not in self.constants
        }
        features = self.features()
        if features is None:
            return names
        missing = sorted(n for key in self.columns.keys() & names.keys() for n in names[key] if n not in features)
        names = {key: columns for key, columns in names.items() if all(name in features for name in columns)}
        if missing or "scans" not in names:
            reason = f"features {', '.join(missing or ['scans'])} are missing; it has {', '.join(sorted(features))}"
            raise RowError(self.file, 0, reason, "map them with `columns`")
        return names

    def _mapped(self, row, names: dict[str, list[str]], folder: ScanFolder) -> tuple[int, dict] | RowError:
        if isinstance(row, RowError):
            return row
        number, record = row
        cells: dict[str, Any] = {"id": str(number), **self.default_constants, **self.constants}
        for key, columns in names.items():
            values = [value for name in columns for value in _flat(record.get(name))]
            try:
                if key == "scans":
                    cells[key] = [self._scan(value, folder) for value in values if value is not None]
                elif key == "messages":
                    if record.get(columns[0]):
                        cells[key] = [_message(message) for message in values]
                elif (value := record.get(columns[0])) is not None and not (isinstance(value, str) and not value):
                    cells[key] = str(value) if key == "id" and isinstance(value, int | np.integer) else value
            except ValueError as error:
                return RowError(self.file, number, f"column {', '.join(columns)}: {error}", "correct or remove the row")
        try:
            return number, _with_numbered_marks(cells)
        except ValueError as error:
            return RowError(self.file, number, str(error), f"write one {MARK} per image, or none")

    def _scan(self, value: Any, folder: ScanFolder) -> str:
        if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            return f"{self.images.rstrip('/')}/{value}" if self.images else value
        if isinstance(value, bytes):
            return folder.add(value)
        if isinstance(value, np.ndarray):
            return folder.add_array(value, self.axes)
        raise ValueError(f"a scan must be a path, the bytes of a file or an array (got {type(value).__name__})")

    def _parse(self, row):
        split = row.cells.pop("split", None)
        if split is not None and self.split is not None and split != self.split:
            return SkippedRow(f"split {split!r}")
        return self.parse(row)


def _flat(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _message(message: Any) -> dict:
    """Return a message of a conversation with the keys `role` and `content`.

    Other forms are {"from", "value"} (LLaVA, ShareGPT), and a content that is a list of {"type": "image"} and
    {"type": "text", "text"}.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be an object (got {type(message).__name__})")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(_content(part) for part in content)
    return {"role": SPEAKERS.get(role, role) if isinstance(role, str) else role, "content": content}


def _content(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return MARK
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"a part of a message must be an image or a text (got {str(kind or part)[:40]!r})")


def _with_numbered_marks(cells: dict) -> dict:
    """Return the cells with <image-1>, <image-2>, ... for the marks <image> in the texts of the user, in order.

    Raises ValueError if there are marks, but not as many as scans.
    """
    messages = cells.get("messages")
    if messages is None:
        texts: Iterable[tuple[dict, str]] = [(cells, key) for key in ("context", "instruction", "text") if key in cells]
    else:
        texts = [(message, "content") for message in messages if message["role"] == "user"]
    texts = [(holder, key) for holder, key in texts if isinstance(holder[key], str)]
    marks = sum(holder[key].count(MARK) for holder, key in texts)
    if marks and marks != (scans := len(cells.get("scans", ()))):
        raise ValueError(f"{marks} marks {MARK}, but {scans} images")
    number = 0
    for holder, key in texts:
        first, *others = holder[key].split(MARK)
        holder[key] = first + "".join(f"<image-{number + i}>{text}" for i, text in enumerate(others, 1))
        number += len(others)
    return cells
