"""Files of answers."""

import json
from pathlib import Path

import pytest

from radfm_jax.evaluate import (
    model_answers,
)
from radfm_jax.evaluate.radbench import Question


def write(file: Path, lines) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_an_answer_may_hold_line_separators(tmp_path):
    file, questions = tmp_path / "a.jsonl", [Question("x/1", "vqa", "x", "Q?", ("a",))]
    # With a byte order mark, as Windows programs write it.
    file.write_text("\ufeff" + json.dumps({"id": "x/1", "answer": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert model_answers.read_answers(file, questions)["x/1"].text == "a\u2028b\x85c"


@pytest.mark.parametrize(
    "given, message",
    [
        ([{"id": "x/1", "answer": "a"}, {"id": "x/1", "answer": "b"}], "line 2: duplicate id 'x/1'"),
        ([{"id": "x/9", "answer": "a"}], "'x/9' is not in this benchmark"),
        ([{"id": "x/1"}], "`answer` must be a text"),
        ([{"answer": "a"}], "expected an object with `id`"),
        ([{"id": "x/1", "answer": "a", "p_yes": 1.2}], "p_yes must be a probability .got 1.2"),
        ([{"id": "x/1", "answer": "a", "prompt": "Other?"}], "answers the prompt 'Other\\?', but it is 'Q\\?'"),
        ([{"id": "x/1", "answer": "a", "context": "Pain."}], "answers the context 'Pain.', but it is ''"),
        (
            [{"id": "x/1", "answer": "a"}, {"id": "x/2", "answer": "a \ud83d"}],
            "line 2: a string has a lone surrogate",
        ),
    ],
)
def test_invalid_files_of_answers(given, message, tmp_path):
    questions = [Question(f"x/{i}", "vqa", "x", "Q?", ("a",)) for i in (1, 2)]
    with pytest.raises(ValueError, match=message):
        model_answers.read_answers(write(tmp_path / "a.jsonl", given), questions)


def test_lines_of_failures_are_reported_with_their_file(tmp_path):
    questions = [Question(f"x/{i}", "vqa", "x", "Q?", ("a",)) for i in (1, 2)]
    file = write(tmp_path / "a.jsonl", [{"id": "x/1", "answer": "a"}])
    write(tmp_path / "a.failed.jsonl", [{"id": "x/2", "error": "no scan"}, {"id": "x/1", "error": "no scan"}])
    with pytest.raises(ValueError, match="a.jsonl: a.failed.jsonl, line 2: duplicate id 'x/1'"):
        model_answers.read_answers(file, questions)
