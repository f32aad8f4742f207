"""Text of an answer while its tokens arrive."""

import pytest
from generation_parts import train_tokenizer

from input_pipeline.text.tokenizer import load_tokenizer
from radfm_jax.inference.answer_text import AnswerText


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("stop", [(), ("lung",), ("the right", "left lung"), ("zzz", "é")])
def test_pieces_of_text(tokenizer, chunk, stop):
    """Pieces concatenate to the answer, never change, and end at the same position for all chunk sizes."""
    t = load_tokenizer(tokenizer)
    text = "none seen in the left lung é😀 the right"
    ids = t.encode(text)
    answer, pieces = AnswerText(t, stop), []
    for start in range(0, len(ids), chunk):
        pieces.append(answer.add(ids[start : start + chunk]))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    found = [text.index(s) for s in stop if s in text]
    expected = text[: min(found)].rstrip() if found else text
    assert "".join(pieces) == answer.text == expected
    assert answer.stopped == bool(found)
    assert not any("\ufffd" in piece for piece in pieces)
    whole = AnswerText(t, stop)
    whole.add(ids)
    assert answer.ids == whole.ids and (t.decode(answer.ids).startswith(expected))
