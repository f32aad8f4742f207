"""The JSON Lines format of batch generation.

    {"id": "case-17", "scans": ["ct.nii.gz", "old_cxr.png"], "prompt": "Compare <image-1> with <image-2>."}

`prompt` may be called `instruction`, and `context` is optional. A conversation has `messages` instead: the last message
of the user is the prompt, and an answer after it is ignored. Fields in `IGNORED` are allowed, so training data in JSON
Lines (input_pipeline/datasets/jsonl.py, which also describes `scans`) and the questions of
`python -m radfm_jax.evaluate radbench --export` are batch files. A file `roots.json` next to the batch file may give
the directory of relative scan paths for each `dataset`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from input_pipeline import files
from input_pipeline.datasets import jsonl
from input_pipeline.datasets.json_tables import text_lines
from input_pipeline.datasets.rows import MISSING_WORDS, Row
from input_pipeline.images import scans
from input_pipeline.reasons import pattern
from input_pipeline.samples import Scan

ROOTS = "roots.json"  # {data set: directory of its relative scan paths}
READ = ("id", "prompt", "instruction", "context", "messages", "scans", "series")
IGNORED = ("task", "response", "study", "dataset", "modality", "anatomy", "references", "closed", "slices")


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """One line of a batch file."""

    row_id: str
    prompt: str = ""
    context: str = ""
    scans: tuple[Scan, ...] = ()  # paths are absolute
    listed_scans: tuple[Scan, ...] = ()  # as written in the line
    error: str = ""  # why the line has no prompt; "" if it has one
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()  # earlier questions and answers

    def echo(self, absolute: bool = False) -> dict:
        """Return the fields that are copied to an answer's line. `absolute`: with absolute paths (old versions)."""
        scans = self.scans if absolute else self.listed_scans
        fields = {"prompt": self.prompt, "context": self.context, "scans": [_scan_cell(s) for s in scans]}
        if self.system or self.history:
            fields |= {"system": self.system, "history": [list(turn) for turn in self.history]}
        return fields


def _scan_cell(scan: Scan) -> str | dict:
    window = list(scan.window) if isinstance(scan.window, tuple) else scan.window
    options = {"volume": scan.volume, "window": window, "series": scan.series}
    options = {key: value for key, value in options.items() if value is not None}
    return {"path": scan.path, **options} if options else scan.path


def raise_problems(problems: list[str], prefix: str = "") -> None:
    """Raise ValueError with the first ten kinds of problems, if there are any."""
    kinds = collections.Counter(map(pattern, problems))
    first = {pattern(problem): problem for problem in reversed(problems)}
    lines = [first[kind] + (f" (and {n - 1} more like it)" if n > 1 else "") for kind, n in kinds.items()]
    if lines:
        raise ValueError(prefix + "; ".join(lines[:10]) + (" ..." if len(lines) > 10 else ""))


def read_roots(file: Path) -> dict[str, Path]:
    """Return data set -> directory of its relative scan paths, from the roots.json next to a file, if there is one.

    Raises ValueError if it cannot be read.
    """
    roots_file = file.with_name(ROOTS)
    if not roots_file.is_file():
        return {}
    try:
        roots = files.read_json(roots_file, kind=dict)
        return {dataset: file.parent / root for dataset, root in roots.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{roots_file} cannot be read ({error}): write {{data set: directory}}") from None


def read_batch_file(file: Path, root: Path, roots: Mapping[str, Path] | None = None) -> list[BatchLine]:
    """Read all lines; relative scan paths are below the root of the line's data set, or else below `root`.

    roots: data set -> root; None: `read_roots`.

    Raises ValueError if the file cannot be read, or if an id is missing or repeated, because a resumed run matches
    answers to lines by id.
    """
    try:
        text = text_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): pass a JSON Lines file in UTF-8") from None
    lines: dict[str, BatchLine] = {}
    problems = []
    roots = read_roots(file) if roots is None else roots
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        surrogate = None
        try:
            cells = files.parse_json(line)
        except files.LoneSurrogate as error:
            cells, surrogate = error.value, error
        except ValueError as error:
            problems.append(f"line {number} is not JSON ({error})")
            continue
        row_id = cells.get("id") if isinstance(cells, dict) else None
        if not isinstance(row_id, str) or not row_id.strip():
            problems.append(f"line {number} has no `id`")
        elif row_id in lines:
            problems.append(f"line {number}: duplicate id {row_id!r}")
        elif surrogate is not None:  # only this line fails
            lines[row_id] = BatchLine(row_id, error=f"line {number}: {surrogate}")
        else:
            line_root = roots.get(str(cells.get("dataset")), root)
            scan_list = [] if cells.get("scans") is None else cells["scans"]
            lines[row_id] = _batch_line(Row(file, number, cells | {"scans": scan_list}, line_root), row_id, cells)
    raise_problems(problems, f"{file}: ")
    return list(lines.values())


def _batch_line(row: Row, row_id: str, cells: dict) -> BatchLine:
    try:
        if unknown := row.unknown_keys((*READ, *IGNORED)):
            raise row.error(unknown, f"known: {', '.join((*READ, *IGNORED))}")
        asked = [key for key in ("prompt", "instruction") if row.optional(key, MISSING_WORDS)]
        asked += ["messages"] if cells.get("messages") else []
        if len(asked) > 1:
            raise row.error(f"has both {' and '.join(f'`{key}`' for key in asked)}", "keep one of them")
        system, history = "", ()
        if asked == ["messages"]:
            system, history, prompt = _conversation(row)
        else:
            key = asked[0] if asked else "instruction" if "instruction" in cells else "prompt"
            prompt = row.text(key, MISSING_WORDS)
        context = row.optional("context", MISSING_WORDS)
        row_scans = jsonl.scans_of_row(row)
        resolved = (dataclasses.replace(s, path=str(scans.resolve(row.root, s.path))) for s in row_scans)
        paths = [cell if isinstance(cell, str) else cell["path"] for cell in row.cells["scans"]]
        listed = tuple(dataclasses.replace(s, path=path) for s, path in zip(row_scans, paths, strict=True))
        return BatchLine(row_id, prompt, context, tuple(resolved), listed, system=system, history=history)
    except ValueError as error:
        return BatchLine(row_id, error=str(error))


def _conversation(row: Row) -> tuple[str, tuple[tuple[str, str], ...], str]:
    """Return the system message, the earlier turns and the last question of `messages`. Raises RowError."""
    messages = jsonl.messages_of_row(row)
    system = messages.pop(0)[1] if messages[0][0] == "system" else ""
    if messages and messages[-1][0] == "assistant":
        messages.pop()
    if not messages:
        raise row.error("messages has no question", "end with a message of the user")
    texts = [content for _, content in messages]
    return system, tuple(zip(texts[:-1:2], texts[1:-1:2], strict=True)), texts[-1]


def existing_answers(
    out: Path, made_with: dict, lines: Mapping[str, BatchLine], reject_unknown_ids: bool = False
) -> set[str]:
    """Return the ids that have an answer in `out`. An incomplete last line is removed from the file.

    Raises ValueError if a complete line is damaged, has a duplicate id, was made with other settings, or answers a
    prompt that has since changed under the same id. With `reject_unknown_ids`, also if an id is not in `lines`.
    """
    content = out.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    ids = set()
    for number, line in enumerate(complete.splitlines(), 1):
        where = f"{out}, line {number}"
        try:
            answer = files.parse_json(line)
            row_id, made = answer["id"], answer["made_with"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is not an answer ({error!r}): use another --out") from None
        if row_id in ids:
            raise ValueError(f"{where}: duplicate id {row_id!r}; did two runs write the file? Use another --out")
        _check_settings(where, made, made_with)
        current = lines.get(row_id)
        if current is None and reject_unknown_ids:
            raise ValueError(
                f"{where}: id {row_id!r} is not in the batch file: use another --out, or add the line again"
            )
        echo, older = (current.echo(), current.echo(absolute=True)) if current and not current.error else ({}, {})
        if differing := [key for key, value in echo.items() if answer.get(key, "") not in (value, older[key])]:
            raise ValueError(
                f"{where} has an answer to {row_id!r}, but the batch file has changed ({', '.join(differing)}): use "
                "another --out, or give the changed line another id"
            )
        ids.add(row_id)
    if len(complete) < len(content):
        with open(out, "r+b") as file:
            file.truncate(len(complete))
    return ids


def _check_settings(where: str, made: dict, made_with: dict) -> None:
    """Raise ValueError if an answer was made with other settings than those of this run."""
    differing = sorted(k for k in {**made, **made_with} if made.get(k) != made_with.get(k))
    if "checkpoint" in differing:  # the same path may have other weights now
        raise ValueError(
            f"{where} was made with another checkpoint, or by a version that did not record it "
            f"({made.get('model')} then, {made_with['model']} now): use another --out"
        )
    if made_with["checkpoint"] and "model" in differing:  # the same weights may have moved
        differing.remove("model")
    if differing:
        raise ValueError(
            f"{where} was made with other settings ({', '.join(differing)}): use another --out, or set "
            f"{', '.join(f'{k}={made.get(k)!r}' for k in differing)}"
        )


@contextlib.contextmanager
def locked_output(out: Path) -> Iterator[TextIO]:
    """Open a file to append to, locked against other processes.

    A file that this call creates is removed if the block fails before anything is written. Raises ValueError if another
    process writes to the file, or it is not a regular file.
    """
    existed = out.exists()
    if existed and not out.is_file():
        raise ValueError(f"{out} is not a regular file: use another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        try:
            if not files.try_lock(file):
                raise ValueError(f"another process is writing {out}: wait for it, or use another --out")
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{out} cannot be locked ({error.strerror}): make sure that no other process writes it", stacklevel=3
            )
        if not (out.exists() and os.path.samestat(os.fstat(file.fileno()), out.stat())):
            raise ValueError(f"{out} was removed by another process: run the command again")
        try:
            yield file
        except BaseException:
            file.flush()
            if not existed and not os.fstat(file.fileno()).st_size:
                out.unlink(missing_ok=True)
            raise
