"""The released layout against its reference encodings, and shortening of samples in that layout."""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from token_parts import (  # noqa: F401
    A,
    B,
    V,
    check,
    context,
    instruction,
    interleaved,
    long_text,
    read_back,
    response,
    run,
    tokenizer,
)

from input_pipeline.text.released_text import encode_segments, insert_images, released_text
from input_pipeline.text.terms import Terms
from input_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from radfm_jax.inference.inputs import Preparation, encode_prompt

GOLDEN = json.loads((Path(__file__).parent / "data" / "tokenizer_golden.json").read_text())
LITERAL = re.compile(r"\{IMG(\d+)\}")


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    """Return the LLaMA tokenizer of the reference encodings: RADFM_TOKENIZER=/path/to/tokenizer.model."""
    if not (path := os.environ.get("RADFM_TOKENIZER")):
        pytest.skip("RADFM_TOKENIZER must name a LLaMA tokenizer.model")
    return load_tokenizer(path)


# --- reference encodings ---


def literal_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a reference text with images written out, which the product code never reads from text."""
    pieces = re.split(r"(<image>\{IMG\d+\}</image>|<image>|</image>|<image\d+>)", text)
    segments = [int(LITERAL.search(p)[1]) if LITERAL.search(p) else p for p in pieces if p]
    single = [s for s in segments if isinstance(s, str) and re.fullmatch(r"</?image\d*>", s)]
    if not single:
        return encode_segments(tokenizer, segments, num_latents=32)
    ids = [tokenizer.bos_id]  # single image tokens, which only the original can have
    for i, segment in enumerate(segments):
        if segment in single:
            ids.append({"<image>": V, "</image>": V + 1}.get(segment) or V + 2 + int(segment[6:-1]))
        else:
            segment = segment.lstrip() if i else segment
            ids += tokenizer.encode(segment.rstrip() if i + 1 < len(segments) else segment)
    return ids


def released_decode(tokenizer: Tokenizer, ids: Iterable[int], *, num_scans: int = 100, num_latents: int = 32) -> str:
    """Decode ids with special tokens and image tokens as text ("<s>", "<image>", "<image17>"), as the original does.

    A special token after text adds a space before that text. Image tokens have a space on both sides.
    """
    marks = {tokenizer.image_id: "<image>", tokenizer.image_end_id: "</image>"}
    special = {0: "<unk>", tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    groups: list[str | list[int]] = []
    for token in ids:
        if token >= tokenizer.image_id:
            number = token - tokenizer.image_id - 2
            if number >= num_scans * num_latents:
                raise ValueError(f"id {token} is not a token of {num_scans} scans of {num_latents} latents")
            groups.append(marks.get(token) or f"<image{number}>")
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(token)
        else:
            groups.append([token])
    texts = []
    for group in groups:
        if isinstance(group, str):
            texts.append(group)
            continue
        text, current, after_special = "", [], False
        for i, token in enumerate(group):
            if token in special:
                text += (" " if i and not after_special else "") + tokenizer.decode(current) + special[token]
                current, after_special = [], True
            else:
                current.append(token)
                after_special = False
        texts.append(text + tokenizer.decode(current))
    return " ".join(texts)


def test_reference_encodings(llama):
    assert [literal_ids(llama, case["text"]) for case in GOLDEN["encode"]] == [case["ids"] for case in GOLDEN["encode"]]
    for case in GOLDEN["concat"]:
        assert literal_ids(llama, case["question"]) == case["question_ids"]
        assert literal_ids(llama, case["question"] + " " + case["answer"]) == case["ids"]


def test_reference_decodings(llama):
    assert len(GOLDEN["decode"]) == 7
    for case in GOLDEN["decode"]:
        assert llama.decode(case["ids"]) == case["skip_special_tokens"]
        assert released_decode(llama, case["ids"]) == case["keep"]


def images_of(case, side):
    """Return (position, scan) of question or answer, with scans numbered in their order."""
    return [(position, i) for i, (where, position) in enumerate(case["images"]) if where == side]


LABEL_CASES = [case for case in GOLDEN["labels_cases"] if "error" not in case]


@pytest.mark.parametrize("case", LABEL_CASES, ids=lambda case: case["question"] or "empty")
def test_reference_labels_and_weights(llama, case):
    question = insert_images(case["question"], images_of(case, "question"))
    answer = insert_images(case["answer"], images_of(case, "answer"))
    got = released_text(llama, question, answer, case["keys"], num_latents=32, max_tokens=case["max_seq"])
    n = len(got.ids)
    assert n + (case["max_seq"] > n) == case["first_n"]
    assert got.ids == case["lang_x"][:n] and not any(case["lang_x"][n:])
    assert got.weights == case["loss_reweight"][:n]
    labels = [t if w else -100 for t, w in zip(got.ids, got.weights, strict=True)]
    assert labels == case["labels"][:n]
    assert got.question_length == case["question_length"]
    assert got.complete == (case["n_attended"] < case["max_seq"]) and case["n_attended"] == n - got.complete
    assert case["attention_mask"][:n] == [1] * (n - got.complete) + [0] * got.complete


@pytest.mark.parametrize("case", LABEL_CASES, ids=lambda case: case["question"] or "empty")
def test_reference_positions_of_images(case):
    """Compare the texts of the original with images written out, which needs no tokenizer."""
    for side in ("question", "answer"):
        segments = insert_images(case[side], images_of(case, side))
        text = "".join(s if isinstance(s, str) else f"<image>{{IMG{s}}}</image>" for s in segments)
        assert text.replace("•", "") == case[f"text_{side}"]


def test_an_image_in_an_empty_question_is_an_error():
    (case,) = [case for case in GOLDEN["labels_cases"] if "error" in case]
    with pytest.raises(ValueError, match="cannot insert a scan"):
        insert_images(case["question"], images_of(case, "question"))
    with pytest.raises(ValueError, match=r"positions \[9\]"):
        insert_images("text", [(9, 0)])


# --- samples ---


def test_released_samples_as_drawn(tokenizer):
    """A scan at the end of the question is before its last character; EOS is trained and never attended to."""
    parts = instruction("Any edema?"), A, response("Mild edema.")
    encoded = run(tokenizer, *parts, terms=Terms(["edema"]), mode="released")
    check(
        encoded,
        tokenizer,
        """
    token    <s> ▁Any ▁ed ema <image> a0  a1  </image> ▁? ▁M  ild ▁ed ema .    </s>
    visual   -   -    -   -   -       0,0 0,1 -        -  -   -   -   -   -    -
    targets  ▁Any ▁ed ema 0   0       0   0   ▁?       ▁M ild ▁ed ema .   </s> 0
    weights  0   0    0   0   0       0   0   0        1  1   3   3   1   1    0
        """,
    )
    assert encoded.key_ok.tolist() == [True] * 14 + [False]


def test_released_weights_match_id_sequences(tokenizer):
    """The original finds no term after a bracket or a line break; the paper layout weights all its characters."""
    parts = instruction("Q:"), response("mass (mass) masses\nmass")
    weighed = {}
    for mode in ("released", "paper"):
        encoded = run(tokenizer, *parts, terms=Terms(["mass"]), mode=mode)
        weighed[mode] = [tokenizer._words.id_to_piece(int(t)) for t in encoded.targets[encoded.weights == 3]]
    assert weighed == {"released": ["▁mass", "▁masses"], "paper": ["▁mass", "mass", "▁masses", "mass"]}


@pytest.mark.parametrize("question_words", [5, 30, 200])
@pytest.mark.parametrize("length", [1, 7, 40, 400])
def test_released_keeps_the_answer_and_its_end(tokenizer, length, question_words):
    """The original loses the answer of a long question and the EOS of a full row; both modes here keep them."""
    parts = context(long_text(length)), A, instruction(long_text(question_words, "ask") + "?"), response("yes it is")
    whole = run(tokenizer, *parts, mode="released", max_tokens=10**6)
    most = 75 if question_words == 5 else 110
    short = run(tokenizer, *parts, mode="released", max_tokens=most)
    assert len(short.ids) <= most and short.ids[-1] == 2 and (short.weights > 0).sum() == 4
    assert short.scans == (A,) and short.cut_response == 0
    removed = len(whole.ids) - len(short.ids)
    assert removed == short.cut_context + short.cut_instruction and (removed == 0) == (len(whole.ids) <= most)
    of_context = len(tokenizer.encode(long_text(length)))
    assert short.cut_instruction == max(0, removed - of_context)
    assert tokenizer.decode(short.ids[short.weights.argmax() + 1 :]) == "yes it is"


def test_released_cuts_never_split_a_character(tokenizer):
    heart = "🫀🧠" * 30
    for room in range(90, 400, 3):
        short = run(tokenizer, instruction(heart), response(heart), max_tokens=room, mode="released")
        assert "\ufffd" not in tokenizer.decode(short.ids)
    assert short.cut_instruction > 0


def test_released_cuts_the_end_of_a_long_answer(tokenizer):
    parts = instruction("Report?"), A, response(long_text(50)), B, response(long_text(50))
    whole = run(tokenizer, *parts, mode="released")
    for room in range(12, len(whole.ids)):
        short = run(tokenizer, *parts, mode="released", max_tokens=room)
        n = len(short.ids)
        assert n <= room and short.ids[-1] == 2 and short.ids[: n - 1].tolist() == whole.ids[: n - 1].tolist()
        assert (short.ids == V).sum() == (short.ids == V + 1).sum() == len(short.scans) == 2 - short.dropped_scans
        text = lambda e: int((e.ids < V).sum() - (e.visual[:, 0] >= 0).sum())  # noqa: E731
        assert short.cut_response == text(whole) - text(short)


def test_a_scan_in_the_middle_of_a_text_is_exactly_at_its_mark(tokenizer):
    """The released demo inserts exactly; the loader's rule for ends would tear the word: `Descri <image> e in`."""
    encoded = run(tokenizer, instruction("Describe"), A, instruction("in detail."), response("Clear."), mode="released")
    assert read_back(tokenizer, encoded) == "Describe [a] in detail. Clear.|"
    # Several scans, at the start, in the middle and before punctuation.
    parts = A, instruction("Compare"), B, A, instruction(", then"), B, instruction("?"), response("Same.")
    assert read_back(tokenizer, run(tokenizer, *parts, mode="released")) == "[a] Compare [b] [a] , then [b] ? Same.|"


def test_the_loader_inserts_before_the_last_character_of_a_context_or_an_answer(tokenizer):
    """Case reports have their images after the context, PMC-Inline has them between the sentences of the answer."""
    case = context("Pain in the hip."), A, instruction("Why?"), response("A cyst.")
    assert read_back(tokenizer, run(tokenizer, *case, mode="released")) == "Pain in the hip [a] . Why? A cyst.|"
    inline = interleaved("No edema."), A, interleaved("A mass.")
    assert read_back(tokenizer, run(tokenizer, *inline, mode="released")).strip() == "No edema [a] . A mass.|"


def test_marks_of_a_released_prompt(tokenizer):
    preparation = Preparation(preprocess="released", storage="float32", num_latents=2)
    image = [V, 0, 0, V + 1]
    encoded = encode_prompt(" Describe <image-1> in detail.\r\n", 1, tokenizer, preparation)
    assert encoded.ids.tolist() == [1, *tokenizer.encode("Describe"), *image, *tokenizer.encode("in detail.")]
    encoded = encode_prompt("Any edema? <image-1>", 1, tokenizer, preparation)
    assert encoded.ids.tolist() == [1, *tokenizer.encode("Any edema"), *image, *tokenizer.encode("?")]
