"""Questions in a JSON Lines file -> answers in another one; it can be stopped at any time and goes on.

    {"id": "case-17", "scans": ["ct.nii.gz", "old_cxr.png"], "prompt": "Compare <image-1> with <image-2>."}

`prompt` may be called `instruction`, `context` may stand beside it, and so may what `NOT_READ` names: the data that a
model was trained on are such a file (input_pipeline/datasets/jsonl.py says what a scan may be), and the questions that
`python -m radfm_jax.evaluate radbench --export` writes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from input_pipeline.datasets import jsonl
from input_pipeline.datasets.json_tables import text_lines
from input_pipeline.datasets.rows import Row
from input_pipeline.images import scans
from input_pipeline.images.planes import Volume
from input_pipeline.samples import Scan
from radfm_jax.inference import inputs
from radfm_jax.inference.engine import Answer, EncodedScans, Generator, Prompt, Request
from radfm_jax.inference.sampling import Sampling

KEPT_BYTES = 2**30  # of visual tokens: at full size, 1,600 scans in float32
READ = ("id", "prompt", "instruction", "context", "scans")
NOT_READ = ("task", "response", "study", "dataset", "modality", "anatomy", "references", "closed", "slices")


@dataclasses.dataclass(frozen=True)
class QuestionLine:
    """A line of the file.

    Attributes:
      scans: to be read; given: as the line has them.
      problem: why it cannot be asked; "" if it can.
    """

    row_id: str
    prompt: str = ""
    context: str = ""
    scans: tuple[Scan, ...] = ()
    given: tuple[Scan, ...] = ()
    problem: str = ""

    def said(self) -> dict:
        """What an answer's line repeats of it."""
        return {"prompt": self.prompt, "context": self.context, "scans": [_written(scan) for scan in self.given]}


def _written(scan: Scan) -> str | dict:
    """A scan in a line: its path, or more where more is said of it."""
    more = {"volume": scan.volume, "window": list(scan.window) if isinstance(scan.window, tuple) else scan.window}
    more = {key: value for key, value in more.items() if value is not None}
    return {"path": scan.path, **more} if more else scan.path


def read_questions(file: Path, root: Path) -> list[QuestionLine]:
    """Every line; scans are looked for below `root`.

    Raises:
      ValueError: a file that cannot be read, lines without an id or with one that stands twice: they could not be told
        apart when the run is resumed.
    """
    try:
        lines = text_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give a JSON Lines file in UTF-8") from None
    found: dict[str, QuestionLine] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number} is no JSON ({error})")
            continue
        row_id = cells.get("id") if isinstance(cells, dict) else None
        if not isinstance(row_id, str) or not row_id.strip():
            problems.append(f"line {number} has no `id`")
        elif row_id in found:
            problems.append(f"line {number}: id {row_id!r} stands twice")
        else:
            found[row_id] = _question(file, number, root, row_id, cells)
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems[:10])}" + (" ..." if len(problems) > 10 else ""))
    return list(found.values())


def _question(file: Path, number: int, root: Path, row_id: str, cells: dict) -> QuestionLine:
    row = Row(file, number, {"scans": []} | cells, root)
    try:
        if unknown := [k for k in cells if k not in (*READ, *NOT_READ)]:
            raise row.error(f"unknown keys: {', '.join(unknown[:10])}", f"known: {', '.join((*READ, *NOT_READ))}")
        if "prompt" in cells and "instruction" in cells:
            raise row.error("has both `prompt` and `instruction`", "give one of them")
        prompt = row.text("instruction" if "instruction" in cells else "prompt", literal=True)
        context = row.optional("context", literal=True)
        found = jsonl.scans_of_row(row)
        resolved = (dataclasses.replace(s, path=str(scans.resolve(root, s.path))) for s in found)
        paths = [cell if isinstance(cell, str) else cell["path"] for cell in row.cells["scans"]]
        given = tuple(dataclasses.replace(s, path=path) for s, path in zip(found, paths, strict=True))
        return QuestionLine(row_id, prompt, context, tuple(resolved), given)
    except ValueError as error:
        return QuestionLine(row_id, problem=str(error))


# --- the answers ------------------------------------------------------------------------------------------------------


def answered(out: Path, made_with: dict, questions: Mapping[str, QuestionLine], no_others: bool = False) -> set[str]:
    """Ids that have an answer already; a last line that was cut short is removed from the file.

    Raises:
      ValueError: a line before the last is damaged or stands twice, its answer was made with other settings, or its id
        is now that of another question; with `no_others`, an id that is none of theirs.
    """
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    found = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            answer = json.loads(line)
            row_id, made = answer["id"], answer["made_with"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{out}, line {number} is no answer ({error!r}): name another file") from None
        if row_id in found:
            raise ValueError(
                f"{out}, line {number}: id {row_id!r} stands twice, did two runs write it? Name another file"
            )
        differing = sorted(k for k in {**made, **made_with} if made.get(k) != made_with.get(k))
        if "checkpoint" in differing:  # the same place may hold other weights
            raise ValueError(
                f"{out}, line {number} was made with another checkpoint, or by a version that did not note which "
                f"({made.get('model')} then, {made_with['model']} now): name another file"
            )
        if made_with["checkpoint"] and "model" in differing:  # the same weights may have moved
            differing.remove("model")
        if differing:
            raise ValueError(
                f"{out}, line {number} was made with another {', '.join(differing)}: name another file, or use "
                f"{', '.join(f'{k}={made.get(k)!r}' for k in differing)}"
            )
        now = questions.get(row_id)
        if now is None and no_others:
            raise ValueError(
                f"{out}, line {number}: {row_id!r} is no question any more: write elsewhere, or ask it again"
            )
        said = now.said() if now and not now.problem else {}
        if differing := [key for key, value in said.items() if answer.get(key, "") != value]:
            raise ValueError(
                f"{out}, line {number} answers {row_id!r} with another {', '.join(differing)} than it has now: name "
                "another file, or give the changed question another id"
            )
        found.add(row_id)
    if len(whole) < len(text):
        with open(out, "r+b") as file:
            file.truncate(len(whole))
    return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a file of questions. failed: {id: reason}."""

    answered: int
    before: int
    failed: dict[str, str]
    seconds: float


def answer_file(
    generator: Generator,
    file: Path,
    out: Path,
    sampling: Sampling,
    *,
    root: Path | None = None,
    batch: int = 8,
    place: str = "first",
    model: str = "",
    checkpoint: str = "",
    progress: Callable[[int, int, int], None] = lambda done, failed, total: None,
    watch: Sequence[int] = (),
    more: Callable[[str, Answer], dict] = lambda row_id, answer: {},
    no_others: bool = False,
    accepted: Callable[[], None] = lambda: None,
) -> Outcome:
    """Answers every question that has no answer in `out` yet, `batch` at a time; scans of the next ones are read while
    the device computes, and those that were asked about before are not encoded again. A question that fails is left out
    of `out`, so that a later start tries it again.

    Args:
      root: of the scans' paths; None: the directory of `file`.
      model: what made the answers, for people. checkpoint: what tells its weights from others (checkpoint.digest); ""
        if that is `model` itself. Answers of another one in `out` are refused.
      progress: called with how many questions are answered, have failed, and are to be asked.
      watch: tokens whose probability of being the first an answer's `watched` is to say.
      more: id and answer -> what else is to stand in the line.
      no_others: refuse an `out` that holds answers to questions that are not in `file`.
      accepted: called when nothing is refused any more, before anything is asked.
    Raises:
      ValueError: a file that cannot be read, answers in `out` that were made with other settings or to another
        question of the same id, another process that writes `out`, more new tokens than the cache could ever hold.
    """
    if (sampling.max_new_tokens or 0) >= generator.length:
        raise ValueError(
            f"max_new_tokens is {sampling.max_new_tokens}: prompt and answer together have {generator.length} places"
        )
    prepared = None if generator.preparation is None else dataclasses.asdict(generator.preparation)
    computed = {"dtype": generator.config.llama.dtype, "weights": generator.weights}
    if generator.tokenizer is not None:
        with open(generator.tokenizer.path, "rb") as opened:
            computed["tokenizer"] = hashlib.file_digest(opened, "sha256").hexdigest()
    made_with = {"model": model, "checkpoint": checkpoint, **computed, "place": place, "prepared": prepared}
    made_with |= dataclasses.asdict(sampling)
    made_with = json.loads(json.dumps(made_with))  # as it is read back: a tuple is a list
    questions = read_questions(file, (root or file.parent).absolute())
    numbers = {q.row_id: number for number, q in enumerate(questions)}
    failed: dict[str, str] = {}
    done, began, kept = 0, time.perf_counter(), _Kept()
    with _alone(out) as results, concurrent.futures.ThreadPoolExecutor(1) as reader:
        before = answered(out, made_with, {q.row_id: q for q in questions}, no_others)
        accepted()
        todo = [q for q in questions if q.row_id not in before]
        for some, loaded in _loaded(todo, generator, batch, reader, kept):
            prompts: dict[str, Prompt] = {}
            for question, scans_of in zip(some, _encoded(generator, some, loaded, kept), strict=True):
                try:
                    prompts[question.row_id] = _prompt(generator, question, scans_of, sampling, place)
                except ValueError as error:
                    failed[question.row_id] = str(error)
            # A draw belongs to the question, whatever was answered before it.
            seeds = [(sampling.seed + numbers[row_id]) % 2**31 for row_id in prompts]
            answers = generator.answers(list(prompts.values()), sampling, seeds=seeds, watch=watch)
            asked = [q for q in some if q.row_id in prompts]
            for question, answer in zip(asked, answers, strict=True):
                if answer.error:
                    failed[question.row_id] = answer.error
                    continue
                line = {
                    "id": question.row_id,
                    **{key: value for key, value in question.said().items() if key != "context" or value},
                    "answer": answer.text,
                    "ended": answer.ended,
                    "tokens": len(answer.ids),
                    "logprob": sum(answer.logprobs),
                    **more(question.row_id, answer),
                    "made_with": made_with,
                }
                results.write(json.dumps(line, ensure_ascii=False) + "\n")
                done += 1
            results.flush()
            progress(done, len(failed), len(todo))
    return Outcome(done, len(questions) - len(todo), failed, time.perf_counter() - began)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[TextIO]:
    """The file of answers, to add to, kept from other processes; if it was made for nothing, it is removed.

    Raises ValueError: another process adds to it, or it is no file.
    """
    there = out.exists()
    if there and not out.is_file():
        raise ValueError(f"{out} is no file: name one for the answers")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being written by another process: wait for it, or name another file") from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(f"{out} cannot be locked ({error.strerror}): let no other process write it", stacklevel=2)
        if not (out.exists() and os.path.samestat(os.fstat(file.fileno()), out.stat())):
            raise ValueError(f"{out} was removed by another process at this moment: start again")
        try:
            yield file
        except BaseException:
            file.flush()
            if not there and not os.fstat(file.fileno()).st_size:
                out.unlink(missing_ok=True)
            raise


class _Kept:
    """Visual tokens by their question's scans, in the memory of the host: `KEPT_BYTES` of those that were used last."""

    def __init__(self):
        self._found: dict[tuple[Scan, ...], EncodedScans] = {}
        self._bytes = 0

    def add(self, scans_of: tuple[Scan, ...], encoded: EncodedScans) -> None:
        tokens = np.asarray(encoded.tokens)[: len(encoded)].copy()
        self._found[scans_of] = EncodedScans(tokens, encoded.names)
        self._bytes += tokens.nbytes
        while self._bytes > KEPT_BYTES and len(self._found) > 1:
            self._bytes -= self._found.pop(next(iter(self._found))).tokens.nbytes

    def get(self, scans_of: tuple[Scan, ...]) -> EncodedScans | None:
        encoded = self._found.pop(scans_of, None)
        if encoded is not None:
            self._found[scans_of] = encoded  # behind the others
        return encoded


# What is there of the scans of a question: what was read, visual tokens, or why neither.
Found = list[Volume] | EncodedScans | ValueError


def _loaded(
    todo: list[QuestionLine], generator: Generator, batch: int, reader, kept: _Kept
) -> Iterator[tuple[list[QuestionLine], dict[tuple[Scan, ...], Found]]]:
    """`batch` questions with their scans, each read once; those after them are being read meanwhile."""

    def read(scans_of: tuple[Scan, ...]) -> Found:
        try:
            if generator.preparation is None:
                raise ValueError("it is not known how scans are prepared for this model")
            return inputs.read_scans(scans_of, generator.preparation)
        except ValueError as error:
            return error

    ahead: list[tuple[list, dict, concurrent.futures.Future]] = []
    for start in range(0, len(todo), batch):
        some = todo[start : start + batch]
        asked = {q.scans: kept.get(q.scans) for q in some if q.scans and not q.problem}
        fresh = [scans_of for scans_of, encoded in asked.items() if encoded is None]
        ahead.append((some, asked, reader.submit(lambda fresh=fresh: {s: read(s) for s in fresh})))
        if len(ahead) > 1:
            questions, known, future = ahead.pop(0)
            yield questions, known | future.result()
    for questions, known, future in ahead:
        yield questions, known | future.result()


def _encoded(
    generator: Generator, some: list[QuestionLine], loaded: dict[tuple[Scan, ...], Found], kept: _Kept
) -> list[EncodedScans | ValueError]:
    """Visual tokens of each question, or why it has none."""
    named = {q.scans: [scan.path for scan in q.given] for q in some}
    fresh = []
    for scans_of, found in loaded.items():
        if isinstance(found, list):  # unless it was encoded while these were being read
            loaded[scans_of] = kept.get(scans_of) or found
            fresh += [scans_of] if loaded[scans_of] is found else []

    def encode(*those: tuple[Scan, ...]) -> None:
        encoded = generator.encode_volumes([loaded[s] for s in those], [named[s] for s in those])
        for scans_of, tokens in zip(those, encoded, strict=True):
            loaded[scans_of] = tokens
            kept.add(scans_of, tokens)

    try:
        encode(*fresh)
    except ValueError:  # one of them is not finite: each by itself, to see which
        for scans_of in fresh:
            try:
                encode(scans_of)
            except ValueError as error:
                loaded[scans_of] = error
    loaded[()] = generator.encode_volumes([[]])[0]
    return [ValueError(q.problem) if q.problem else loaded[q.scans] for q in some]


def _prompt(generator: Generator, question: QuestionLine, encoded, sampling: Sampling, place: str) -> Prompt:
    """Raises ValueError for whatever keeps a question from being asked."""
    if isinstance(encoded, ValueError):
        raise encoded
    prompt = generator.prompt(Request(question.prompt, encoded, question.context, place))
    generator.check(prompt, sampling)
    return prompt
