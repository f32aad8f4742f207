"""Questions -> answers: of a checkpoint, or of anybody's file.

    answers/NAME.jsonl          a line an answer: id, prompt, answer, p_yes (yes/no questions), tokens, made_with
    answers/NAME.failed.jsonl   a line a question that got none: id, error

Anybody's file needs `id` and `answer`; `p_yes`, the probability of "yes" against "no", and `error`, why there is no
answer, may stand there too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from input_pipeline.datasets.json_tables import text_lines
from input_pipeline.text.tokenizer import Tokenizer
from radfm_jax.evaluate.radbench import Question, write_lines, write_questions
from radfm_jax.inference import Answer, Generator, Sampling
from radfm_jax.inference.batch_files import Outcome, answer_file

SPELLINGS = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}


@dataclasses.dataclass(frozen=True)
class Given:
    """What a model said to a question.

    Attributes:
      p_yes: probability of "yes", those of "yes" and "no" making 1; None if it was not asked for, or not given.
      tokens: of the answer; None if the file does not say.
      ended: how it ended (generate.Answer); "" if the file does not say.
      error: why there is no answer; "" if there is one.
    """

    text: str
    p_yes: float | None = None
    tokens: int | None = None
    ended: str = ""
    error: str = ""


# --- a checkpoint -----------------------------------------------------------------------------------------------------


def answer_all(
    generator: Generator,
    questions: Sequence[Question],
    file: Path,
    asked: Path,
    *,
    model: str,
    checkpoint: str = "",
    sampling: Sampling = Sampling(),  # noqa: B008
    batch: int = 8,
    progress: Callable[[int, int, int], None] = lambda done, failed, total: None,
) -> Outcome:
    """Answers what has no answer in `file` yet, and names in the `.failed` file beside it what got none.

    Args:
      asked: where the questions are written, once nothing is refused: until then those stand there that the answers in
        `file` were given to.
      model, checkpoint: what made the answers (generate.many.answer_file); those of another one are refused.
    Raises ValueError: answers in `file` that were made otherwise.
    """
    yes, no = first_tokens(generator.tokenizer)
    closed = {q.row_id for q in questions if q.task == "diagnosis"}

    def more(row_id: str, answer: Answer) -> dict:
        if row_id not in closed or not (yes and no):
            return {}
        masses = [sum(map(math.exp, part)) for part in (answer.watched[: len(yes)], answer.watched[len(yes) :])]
        whole = sum(masses)
        return {"p_yes": masses[0] / whole, "p_yes_or_no": whole} if whole > 0 else {}

    fresh = asked.with_suffix(".new.jsonl")
    write_questions(questions, fresh)
    try:
        # Every path was looked for below the root of its own data set when the question was made.
        outcome = answer_file(
            generator,
            fresh,
            file,
            sampling,
            root=Path("/"),
            batch=batch,
            model=model,
            checkpoint=checkpoint,
            progress=progress,
            watch=(*yes, *no),
            more=more,
            no_others=True,  # scoring would refuse them when everything is answered
            accepted=lambda: fresh.replace(asked),
        )
    finally:
        fresh.unlink(missing_ok=True)
    write_lines(failures_of(file), ({"id": row_id, "error": why} for row_id, why in outcome.failed.items()))
    return outcome


def failures_of(file: Path) -> Path:
    return file.with_suffix(".failed.jsonl")


def first_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens with which the answers yes and no begin; both empty if the tokenizer begins both alike.

    The data sets write them in lower case. Other spellings count too, unless their first token is one of the other
    answer's, or the bare mark of a word's start, with which anything may begin that is spelled letter by letter.
    """
    yes, no = ([tokenizer.encode(spelling)[0] for spelling in SPELLINGS[answer]] for answer in ("yes", "no"))
    if yes[0] == no[0]:
        return (), ()

    def kept(own: list[int], other: list[int]) -> tuple[int, ...]:
        more = (token for token in own[1:] if token not in other and tokenizer.decode([token]).strip())
        return tuple(dict.fromkeys([own[0], *more]))

    return kept(yes, no), kept(no, yes)


# --- files of answers -------------------------------------------------------------------------------------------------


def read_answers(file: Path, questions: Sequence[Question]) -> dict[str, Given]:
    """id -> what was said; questions without a line have no entry.

    Raises:
      ValueError: lines that are no answers, ids that stand twice or are no question's, answers to another wording,
        probabilities or texts that are none; the first ten of them.
    """
    known = {q.row_id: q for q in questions}
    try:
        files = [file, *(one for one in [failures_of(file)] if one.exists())]
        name = lambda one: "" if one == file else f"{one.name}, "  # noqa: E731
        lines = [(f"{name(one)}line {n}", line) for one in files for n, line in enumerate(text_lines(one), 1)]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give JSON Lines in UTF-8, {{id, answer}} a line") from None
    found: dict[str, Given] = {}
    problems = []
    for where, line in lines:
        if not line.strip():
            continue
        try:
            row_id, given = _given(json.loads(line), known)
            if row_id in found:
                raise ValueError(f"id {row_id!r} stands twice")
            found[row_id] = given
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems[:10])}" + (" ..." if len(problems) > 10 else ""))
    return found


def _given(line: object, known: dict[str, Question]) -> tuple[str, Given]:
    if not isinstance(line, dict) or not isinstance(line.get("id"), str):
        raise ValueError("an object with `id` and `answer` is expected")
    row_id, text, error = line["id"], line.get("answer"), line.get("error") or ""
    if row_id not in known:
        raise ValueError(f"id {row_id!r} is no question of this benchmark: was it another config's?")
    if not isinstance(text, str) and not error:
        raise ValueError(f"{row_id}: `answer` must be a text, or `error` say why there is none")
    for key in ("prompt", "context"):
        wording, asked = line.get(key), getattr(known[row_id], key)
        if wording and wording != asked:
            raise ValueError(f"{row_id}: it answers {str(wording)[:60]!r}, but the {key} is {asked[:60]!r}")
    try:
        f"{text}{error}".encode()
    except UnicodeEncodeError as wrong:
        raise ValueError(f"{row_id}: its text is no valid Unicode ({wrong.reason}, character {wrong.start})") from None
    p_yes = line.get("p_yes")
    if p_yes is not None and (isinstance(p_yes, bool) or not isinstance(p_yes, int | float) or not 0 <= p_yes <= 1):
        raise ValueError(f"{row_id}: p_yes is {p_yes!r}, a probability is expected")
    tokens = line.get("tokens")
    return row_id, Given(
        text if isinstance(text, str) else "", p_yes, tokens if type(tokens) is int else None,
        str(line.get("ended") or ""), str(error),
    )  # fmt: skip
