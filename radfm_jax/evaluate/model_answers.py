"""Generate a checkpoint's answers to questions, or read the answers of any model from a file.

    answers/NAME.jsonl          an answer per line: id, prompt, answer, p_yes (yes/no questions), tokens, made_with
    answers/NAME.failed.jsonl   a question without an answer per line: id, error

Files of other models need `id` and `answer`. `p_yes`, the probability of "yes" relative to "yes" and "no", and `error`,
why there is no answer, are optional.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from input_pipeline.datasets.json_tables import text_lines
from input_pipeline.files import parse_json, write_json_lines
from input_pipeline.text.chat import answer_separator
from input_pipeline.text.tokenizer import Tokenizer
from radfm_jax.evaluate.radbench import Question
from radfm_jax.evaluate.radbench_build import roots_of, write_questions, write_roots
from radfm_jax.inference import Answer, Generator, Sampling
from radfm_jax.inference.batch_files import raise_problems
from radfm_jax.inference.batch_run import BatchResult, answer_file

FAILED = ".failed.jsonl"
SPELLINGS = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}


@dataclasses.dataclass(frozen=True)
class RecordedAnswer:
    """The answer of a model to a question, as its file records it. A value that the file lacks is None or ""."""

    text: str
    p_yes: float | None = None  # probability of "yes" relative to "yes" and "no"
    tokens: int | None = None  # length of the answer
    ended: str = ""  # see inference.Answer
    error: str = ""  # why there is no answer
    refused: bool = False  # marked by the endpoint as a refusal


def generate_answers(
    generator: Generator,
    questions: Sequence[Question],
    answers_file: Path,
    questions_file: Path,
    *,
    model: str,
    checkpoint: str = "",
    sampling: Sampling = Sampling(),  # noqa: B008
    batch: int = 8,
    progress: Callable[[int, int, int], None] = lambda answered, failed, total: None,
) -> BatchResult:
    """Answer the questions that have no answer in `answers_file`, and list failures in the `.failed` file next to it.

    Args:
      questions_file: overwritten with `questions` after all checks have passed.
      model, checkpoint: see batch_run.answer_file.
    Raises:
      ValueError: `answers_file` has answers that were made with other settings, or to other questions.
    """
    yes, no = first_tokens(generator.tokenizer, generator.template)
    closed = {q.row_id for q in questions if q.task == "diagnosis"}

    def probability_fields(row_id: str, answer: Answer) -> dict:
        if row_id not in closed or not (yes and no):
            return {}
        p_yes, p_no = (sum(map(math.exp, part)) for part in (answer.watched[: len(yes)], answer.watched[len(yes) :]))
        return {"p_yes": p_yes / (p_yes + p_no), "p_yes_or_no": p_yes + p_no} if p_yes + p_no > 0 else {}

    def replace_questions() -> None:
        new_file.replace(questions_file)
        write_roots(questions, questions_file.parent)

    new_file = questions_file.with_suffix(".new.jsonl")
    write_questions(questions, new_file)
    try:
        # Reject unknown ids now. Scoring would reject them after hours of generation.
        result = answer_file(
            generator, new_file, answers_file, sampling, root=Path("/"), roots=roots_of(questions), batch=batch,
            model=model, checkpoint=checkpoint, progress=progress, watch=(*yes, *no), extra_fields=probability_fields,
            reject_unknown_ids=True, on_start=replace_questions,
        )  # fmt: skip
    finally:
        new_file.unlink(missing_ok=True)
    failures = ({"id": row_id, "error": error} for row_id, error in result.failed.items())
    write_json_lines(answers_file.with_suffix(FAILED), failures)
    return result


def first_tokens(tokenizer: Tokenizer, template: str = "radfm") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first tokens of the answers yes and no. Both are empty if the two answers begin with the same token.

    The lower-case spelling of the data sets always counts. Other spellings count with two exceptions: their first token
    also begins the other answer, or it is a bare word-start mark, which begins any word in single letters.
    """
    before = answer_separator(tokenizer, template)
    yes, no = (
        [tokenizer.encode(spelling, separator=before)[0] for spelling in SPELLINGS[answer]] for answer in ("yes", "no")
    )
    if yes[0] == no[0]:
        return (), ()

    def distinct(own: list[int], other: list[int]) -> tuple[int, ...]:
        spellings = (token for token in own[1:] if token not in other and tokenizer.decode([token]).strip())
        return tuple(dict.fromkeys([own[0], *spellings]))

    return distinct(yes, no), distinct(no, yes)


def read_answers(file: Path, questions: Sequence[Question]) -> dict[str, RecordedAnswer]:
    """Return id -> answer; questions without a line have no entry.

    Raises ValueError for invalid lines, duplicate or unknown ids, and answers to another wording; lists the first ten.
    """
    known = {q.row_id: q for q in questions}
    failures = file.with_suffix(FAILED)
    try:
        lines = [(f"line {n}", line) for n, line in enumerate(text_lines(file), 1)]
        if failures.exists():
            lines += [(f"{failures.name}, line {n}", line) for n, line in enumerate(text_lines(failures), 1)]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): pass JSON Lines in UTF-8 with {{id, answer}} per line"
        ) from None
    answers: dict[str, RecordedAnswer] = {}
    problems = []
    for position, line in lines:
        if not line.strip():
            continue
        try:
            row_id, answer = _recorded_answer(parse_json(line), known)
            if row_id in answers:
                raise ValueError(f"duplicate id {row_id!r}")
            answers[row_id] = answer
        except ValueError as error:
            problems.append(f"{position}: {error}")
    raise_problems(problems, f"{file}: ")
    return answers


def _recorded_answer(line: object, known: dict[str, Question]) -> tuple[str, RecordedAnswer]:
    if not isinstance(line, dict) or not isinstance(line.get("id"), str):
        raise ValueError("expected an object with `id` and `answer`")
    row_id, text, error = line["id"], line.get("answer"), line.get("error") or ""
    if row_id not in known:
        raise ValueError(f"id {row_id!r} is not in this benchmark: was the file made with another config?")
    if not isinstance(text, str) and not error:
        raise ValueError(f"{row_id}: `answer` must be a text, unless there is an `error`")
    for key in ("prompt", "context"):
        recorded, expected = line.get(key), getattr(known[row_id], key)
        if recorded and recorded != expected:
            raise ValueError(f"{row_id}: answers the {key} {str(recorded)[:60]!r}, but it is {expected[:60]!r}")
    try:
        f"{text}{error}".encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{row_id}: text is not valid Unicode ({e.reason}, character {e.start})") from None
    p_yes = line.get("p_yes")
    if p_yes is not None and (isinstance(p_yes, bool) or not isinstance(p_yes, int | float) or not 0 <= p_yes <= 1):
        raise ValueError(f"{row_id}: p_yes must be a probability (got {p_yes!r})")
    tokens = line.get("tokens")
    return row_id, RecordedAnswer(
        text if isinstance(text, str) else "", p_yes, tokens if type(tokens) is int else None,
        str(line.get("ended") or ""), str(error), line.get("refused") is True,
    )  # fmt: skip
