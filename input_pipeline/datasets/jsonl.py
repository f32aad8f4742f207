"""The user's own data: JSON Lines, one object a line.

    {"id": "case-17", "task": "report", "scans": ["ct.nii.gz", "old_cxr.png"], "context": "65-year-old, chest pain.",
     "instruction": "<image-1> Compare with <image-2>. What are the findings?", "response": "..."}
    {"id": "paper-3", "task": "interleaved", "scans": ["fig1.jpg"], "text": "... shown in <image-1> ..."}
    {"id": "chat-5", "task": "vqa", "scans": ["ct.nii.gz"], "messages": [
        {"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "<image-1> Any effusion?"},
        {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Which side?"},
        {"role": "assistant", "content": "Left."}]}
    {"id": "pair-8", "task": "vqa", "scans": ["ct.nii.gz"], "instruction": "Which side?", "chosen": "Left.",
     "rejected": "Right."}

A scan is a path below the root or {"path": ..., "volume": 0, "window": "lung" or [-160, 240], "series": "axial lung"}.
`series` selects a series of a DICOM study; a key `series` of the row does so for its other scans. `<image-i>` marks the
position of scan i (from 1) in the context, the instruction, the text or a message of the user. Marks come in any order
and may repeat; each scan needs at least one. Without any mark, all scans come first. `context` and `study` are
optional: "" is the same as an absent key. A study must not be divided between training and test; the default is the
study that the path of the first scan names, or that path. Every message of the assistant is an answer to train on; a
system message is optional and comes first. `chosen` and `rejected`, the better and the worse of two answers, replace
`response`; `chosen` is the response wherever a single answer is needed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re

import numpy as np

from input_pipeline.datasets.base import SkippedRow, TableDataset
from input_pipeline.datasets.rows import MISSING_WORDS, Row, bad_text, clean_text
from input_pipeline.datasets.store import digest, first_equal
from input_pipeline.samples import SPEAKERS, TASKS, RowError, Scan, Text
from input_pipeline.text.marks import parse_marks, place_scans

PAIR = ("chosen", "rejected")
KEYS = ("id", "task", "scans", "context", "instruction", "response", "text", "messages", "study", "series", *PAIR)
_REMEDY = "see docs/data_layouts.md"


@dataclasses.dataclass(kw_only=True, eq=False)
class JSONL(TableDataset):
    """JSON Lines in the schema at the top of this module."""

    name = "jsonl"
    layout = "jsonl"

    tasks: tuple[str, ...] = ()  # use only rows of these tasks; () for all. Several sources can weight parts of a file
    ids: tuple[str, ...] = ()  # use rows whose id matches one of these glob patterns only (`*-side`); () for all

    def __post_init__(self):
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"jsonl: tasks {unknown} are unknown; known: {', '.join(TASKS)}")
        self._id_pattern = re.compile("|".join(map(fnmatch.translate, self.ids)))
        super().__post_init__()

    def parse(self, row):
        # Checked first, because many sources may read the same table.
        task, row_id = row.cells.get("task"), row.cells.get("id")
        if self.tasks and task in TASKS and task not in self.tasks:
            return SkippedRow("another task")
        if self.ids and isinstance(row_id, str) and not self._id_pattern.match(row_id.strip()):
            return SkippedRow("another id")
        return parse_object(row)

    def _good(self, digests):
        self._ids = bytearray()
        for value in super()._good(digests):
            self._ids += digest(value[0])
            yield value

    def finish(self):
        """Report repeated ids; the later rows are removed."""
        first = first_equal(self._ids)
        del self._ids
        unique = first == np.arange(len(first))
        problems = []
        for k in np.flatnonzero(~unique).tolist():
            reason = f"id {self._rows[k][0]!r} is already used in row {self._numbers[first[k]]}"
            problems.append(RowError(self.file, self._numbers[k], reason, "use a unique id for each row"))
        self._select(unique)
        return problems

    def row_id(self, i):
        """Return the object's `id`."""
        return self._rows[i][0]

    def parts(self, value, rng):
        """Return task, study and parts; rng is unused."""
        _, task, study, parts, *_ = value
        if study is None:
            study = next((self.study_of(part.path) for part in parts if isinstance(part, Scan)), None)
        return task, study, parts

    def rejected(self, value):
        return value[4] if len(value) > 4 else None

    def content(self, value):
        return value[1:]  # without the id

    def scans_of(self, value):
        return tuple(dict.fromkeys(p for p in value[3] if isinstance(p, Scan)))


def parse_object(row: Row) -> tuple:
    """Return id, task, study and parts of one object of the schema, and the rejected answer of a pair.

    Raises RowError.
    """
    cells = row.cells
    if unknown := row.unknown_keys(KEYS):
        raise row.error(unknown, f"known: {', '.join(KEYS)}")
    row_id, task = row.text("id", MISSING_WORDS), row.choice("task", TASKS)
    if min(row_id) < " ":
        raise row.error(f"id {row_id!r} has a control character")
    scans = scans_of_row(row)
    required, forbidden = ("instruction", "response"), ("text", "messages")
    if task == "interleaved":
        required, forbidden = ("text",), ("context", "instruction", "response", "messages", *PAIR)
    elif any(_has(row, key) for key in PAIR):
        required, forbidden = ("instruction", *PAIR), ("response", "text", "messages")
    elif cells.get("messages") is not None:
        required, forbidden = (), ("context", "instruction", "response", "text")
    problems = [f"{key} is required" for key in required if cells.get(key) is None]
    problems += [f"{key} is not allowed" for key in forbidden if _has(row, key)]
    if problems:
        raise row.error(f"task {task}: {', '.join(problems)}", _REMEDY)
    if not required:
        return row_id, task, row.optional("study") or None, conversation_parts(row, messages_of_row(row), scans)
    texts = {role: row.text(role, MISSING_WORDS) for role in required}
    if task == "interleaved":
        templates = {"interleaved": texts["text"]}
    else:
        templates = {"context": row.optional("context", MISSING_WORDS), "instruction": texts["instruction"]}
        for role in required[1:]:
            _refuse_marks(row, texts[role], f"the {role} answer" if role in PAIR else "the response")
    fields = list(zip(templates, _placed(row, list(templates.values()), len(scans)), strict=True))
    if not any(isinstance(p, str) for p in fields[-1][1]):
        raise row.error(f"{required[0]} has image marks but no words", _REMEDY)
    parts = tuple(scans[p] if isinstance(p, int) else Text(p, role) for role, pieces in fields for p in pieces)
    if task != "interleaved":
        parts += (Text(texts[required[1]], "response"),)
    value = row_id, task, row.optional("study") or None, parts
    if "rejected" not in texts:
        return value
    if texts["rejected"] == texts["chosen"]:
        raise row.error("chosen and rejected are the same answer", "write two different answers, or remove the row")
    return *value, texts["rejected"]


def _has(row: Row, key: str) -> bool:
    return bool(row.cells.get(key) if key == "messages" else row.optional(key, MISSING_WORDS))


def _refuse_marks(row: Row, text: str, where: str) -> None:
    try:
        parse_marks(text, 0)
    except ValueError:
        remedy = "put image marks into the context, the instruction or a message of the user"
        raise row.error(f"{where} has an image mark", remedy) from None


def _placed(row: Row, templates: list[str], n_scans: int) -> list[list]:
    """Return the texts and scan numbers of each template, as `place_scans`, without blank texts."""
    try:
        parsed = place_scans(templates, n_scans)
    except ValueError as error:
        raise row.error(str(error)[:300], "mark every scan or none; the first mark is <image-1>") from None
    # White space next to a mark carries no meaning; the code that joins texts and scans adds its own.
    return [
        [p if isinstance(p, int) else p.strip() for p in pieces if isinstance(p, int) or p.strip()] for pieces in parsed
    ]


def messages_of_row(row: Row) -> list[tuple[str, str]]:
    """Return (role, content) of each item of `messages`: an optional system message, then user and assistant in turn.

    Raises RowError.
    """
    messages = row.cells.get("messages")
    if not isinstance(messages, list) or not messages:
        raise row.error("messages must be a list with at least one message", _REMEDY)
    found: list[tuple[str, str]] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise row.error(f"message {number} must have the fields role and content, and no others", _REMEDY)
        role, content = message["role"], message["content"]
        if role not in SPEAKERS:
            raise row.error(f"message {number} has the role {str(role)[:40]!r}", f"use one of {', '.join(SPEAKERS)}")
        if not isinstance(content, str):
            raise row.error(f"the content of message {number} must be text, got {type(content).__name__}", _REMEDY)
        if reason := bad_text(content):
            raise row.error(f"message {number} {reason}", "write the table as UTF-8 text")
        if not (content := clean_text(content)):
            raise row.error(f"message {number} ({role}) is blank", "write its content, or remove the row")
        found.append((role, content))
    turns = [role for role, _ in found if role != "system"]
    if "system" in [role for role, _ in found[1:]] or any(role != SPEAKERS[1 + i % 2] for i, role in enumerate(turns)):
        raise row.error(
            f"the roles are {', '.join(role for role, _ in found)[:200]}",
            "write an optional system message, then user and assistant in turn",
        )
    return found


def conversation_parts(row: Row, messages: list[tuple[str, str]], scans: tuple[Scan, ...]) -> tuple[Text | Scan, ...]:
    """Return the parts of a conversation that ends with an answer. Raises RowError."""
    if messages[-1][0] != "assistant":
        raise row.error(f"the last message is of {messages[-1][0]}", "end with the answer of the assistant")
    for number, (role, content) in enumerate(messages, 1):
        if role != "user":
            _refuse_marks(row, content, f"message {number} ({role})")
    placed = iter(_placed(row, [content for role, content in messages if role == "user"], len(scans)))
    parts: list[Text | Scan] = []
    for role, content in messages:
        if role == "user":
            parts += [scans[p] if isinstance(p, int) else Text(p, "instruction") for p in next(placed)]
        else:
            parts.append(Text(content, "system" if role == "system" else "response"))
    return tuple(parts)


def scans_of_row(row: Row) -> tuple[Scan, ...]:
    values = row.cells.get("scans")
    if not isinstance(values, list):
        raise row.error(f"scans must be a list, got {type(values).__name__}", "use [] for a text without scans")
    series = _series(row, row.cells.get("series"))
    return tuple(_scan(row, value, series) for value in values)


def _series(row: Row, value) -> str | None:
    """Return the words of a `series` key, or None. A number may be JSON text or a JSON number."""
    if value is None or value == "":
        return None
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not text.strip() or bad_text(text):
        raise row.error(f"series {str(value)[:40]!r} must be a number or words", _REMEDY)
    return " ".join(text.split())


def _scan(row: Row, value, default_series: str | None) -> Scan:
    if isinstance(value, str):
        value = {"path": value}
    has_path = isinstance(value, dict) and isinstance(value.get("path"), str)
    if not has_path or value.keys() - {"path", "volume", "window", "series"}:
        raise row.error(f"scan {str(value)[:60]!r} must be a path or {{path, volume, window, series}}", _REMEDY)
    volume, window = value.get("volume"), value.get("window") or None
    if volume is not None and (type(volume) is not int or volume < 0):
        raise row.error(f"volume {volume!r} of a scan must be an integer of at least 0", _REMEDY)
    if isinstance(window, list):
        numbers = len(window) == 2 and all(type(w) in (int, float) and abs(w) < 1e9 for w in window)
        if not numbers or not window[0] < window[1]:
            raise row.error(f"window {window!r} of a scan must be [low, high]", _REMEDY)
        window = (float(window[0]), float(window[1]))
    elif window is not None and not (isinstance(window, str) and window.strip()):
        raise row.error(f"window {window!r} of a scan must be a name or [low, high]", _REMEDY)
    return Scan(row.path(value["path"].strip()), volume, window, _series(row, value.get("series")) or default_series)
