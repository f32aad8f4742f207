"""Tokens, targets, weights and visual slots by hand; shortening of long samples; errors."""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import dataclasses
import random
import re

import numpy as np
import pytest
from token_parts import (
    A,
    B,
    C,
    V,
    check,
    context,
    instruction,
    interleaved,
    long_text,
    read_back,
    response,
    run,
    tokenizer,  # noqa: F401
)

from input_pipeline.samples import RowError, Scan
from input_pipeline.text.marks import parse_marks
from input_pipeline.text.shorten import INSTRUCTION_FLOOR
from input_pipeline.text.terms import Terms

# --- by hand ---


def test_an_instruction_sample_as_drawn(tokenizer):
    """The example in tokens.py."""
    parts = A, instruction("Any edema?"), response("Mild edema (new).")
    encoded = run(tokenizer, *parts, terms=Terms(["edema"]))
    check(
        encoded,
        tokenizer,
        """
    token    <s> <image> a0  a1  </image> ▁Any ▁ed ema ? ▁M  ild ▁ed ema ▁(  new ).   </s>
    visual   -   -       0,0 0,1 -        -    -   -   - -   -   -   -   -   -   -    -
    targets  0   0       0   0   ▁Any     ▁ed  ema ?   ▁M ild ▁ed ema ▁( new ).  </s> 0
    weights  0   0       0   0   0        0    0   0   1 1   3   3   1   1   1   1    0
        """,
    )
    assert encoded.scans == (A,) and encoded.key_ok.all()


def test_an_interleaved_sample_as_drawn(tokenizer):
    """All text is trained, image tokens are not; a repeated scan has one number; every mark costs L + 2 tokens."""
    parts = interleaved("A mass"), B, interleaved("in"), A, B, interleaved("is edema.")
    encoded = run(tokenizer, *parts, terms=Terms(["edema", "mass"]), num_latents=1)
    check(
        encoded,
        tokenizer,
        """
    token    <s> ▁A    ▁mass <image> b0  </image> ▁in <image> a0  </image> <image> b0  </image> ▁is ▁ed ema .    </s>
    visual   -   -     -     -       0,0 -        -   -       1,0 -        -       0,0 -        -   -   -   -    -
    targets  ▁A  ▁mass 0     0       0   ▁in      0   0       0   0        0       0   ▁is      ▁ed ema .   </s> 0
    weights  1   3     0     0       0   1        0   0       0   0        0       0   1        3   3   1   1    0
        """,
    )
    assert encoded.scans == (B, A)


def test_every_turn_ends_with_eos(tokenizer):
    encoded = run(tokenizer, A, instruction("What?"), response("A mass."), B, instruction("And here?"), response("No."))
    assert read_back(tokenizer, encoded) == "[a] What? A mass.| [b] And here? No.|"
    assert encoded.weights.sum() == len(tokenizer.encode("A mass.")) + len(tokenizer.encode("No.")) + 2
    ends = np.flatnonzero(encoded.targets == 2)
    assert encoded.weights[ends].tolist() == [1, 1]


def test_terms_are_weighted_at_any_position(tokenizer):
    """After a bracket or a line break, with a capital, or encoded in bytes; but not inside another word."""
    terms = Terms(["mass", "edema", "🫀 mass", "x"])
    text = "(mass)\nMass massive Oedema 放x"
    encoded = run(tokenizer, instruction("?"), response(text), terms=terms)
    ids, offsets = tokenizer.encode_with_offsets(text)
    own = encoded.weights[-len(ids) - 2 : -2]
    heavy = [text[b:e].strip() for w, (b, e) in zip(own, offsets, strict=True) if w == 3]
    assert "".join(heavy) == "massMassOedema"
    byte_terms = type("Finder", (), {"find": lambda self, text: [(text.index("🫀"), text.index("🫀") + 1)]})()
    encoded = run(tokenizer, instruction("?"), response("a 🫀 b"), terms=byte_terms)
    heavy_ids = encoded.targets[encoded.weights == 3]
    assert tokenizer.decode(heavy_ids) == "🫀" and len(heavy_ids) == 4


def test_weights_follow_the_characters(tokenizer):
    """Random spans over random text: a piece has weight 3 if and only if it shares a character with a span."""
    rng = random.Random(3)
    for _ in range(200):
        text = "".join(rng.choice("abc mass é放🫀.(\n") for _ in range(rng.randint(1, 40)))
        if not text.strip():
            continue
        text = text.strip()
        edges = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, 2 * rng.randint(0, 3))))
        spans = list(zip(edges[0::2], edges[1::2], strict=False))
        finder = type("Finder", (), {"find": lambda self, _, spans=spans: spans})()
        encoded = run(tokenizer, instruction("Q"), response(text), terms=finder)
        before = None if encoded.ids[2] == tokenizer.encode(text)[0] else ""
        ids, offsets = tokenizer.encode_with_offsets(text, separator=before)
        flagged = [any(b < end and begin < e for begin, end in spans) and b < e for b, e in offsets]
        got = encoded.weights[encoded.weights > 0][:-1]
        assert got.tolist() == [3 if f else 1 for f in flagged]


# --- text ---


@pytest.mark.parametrize("literal", ["<image-1>", "<image>", "<image12>", "</image>", "<s>", "</s>", "<unk>", "<0x0A>"])
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_marks_in_a_text_are_text(tokenizer, literal, mode):
    text = f"Look {literal} there"
    encoded = run(tokenizer, A, instruction(text), response(text), mode=mode)
    assert (encoded.ids >= V).sum() == 2 and (encoded.visual[:, 0] >= 0).sum() == 2
    assert (encoded.ids == tokenizer.bos_id).sum() == (encoded.ids == tokenizer.eos_id).sum() == 1
    assert tokenizer.decode(encoded.ids).count(literal) == 2


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([instruction("What is it?"), response("A mass.")], "What is it? A mass.|"),
        ([instruction(" What is it?  "), response("  A mass. ")], "What is it? A mass.|"),
        ([context("Cough."), instruction("What?"), response("No.")], "Cough. What? No.|"),
        ([context("History:\n"), instruction("What?"), response("No.")], "History:\nWhat? No.|"),
        ([context("History: \r\n"), instruction("\n What?\n"), response("\nNo.\n")], "History:\n\nWhat?\n\nNo.|"),
        ([A, instruction("What?"), response("No.")], "[a] What? No.|"),
        ([instruction("Compare \n"), A, instruction("\nwith "), B, instruction("."), response("x")],
         "Compare [a] with [b]. x|"),
        ([instruction("See ("), A, instruction("), then"), response("x")], "See ( [a]), then x|"),
        ([instruction("Is this"), A, instruction("?"), response("Yes")], "Is this [a]? Yes|"),
        ([instruction("Size ("), instruction("cm)"), instruction("?"), response(".5")], "Size (cm)? .5|"),
        ([instruction("two  spaces   inside"), response("a\tb")], "two  spaces   inside a\tb|"),
        ([context(" "), instruction("What?"), context("\n"), response("No.")], "What? No.|"),
        ([A, B, instruction("What?"), response("It"), C, response("is.")], "[a] [b] What? It [c] is.|"),
        ([interleaved("One."), A, interleaved("Two.")], "One. [a] Two.|"),
        ([interleaved("One."), A], "One. [a]|"),
    ],
)  # fmt: skip
def test_white_space_between_parts(tokenizer, parts, expected):
    """Words stay separate by one space, without space before closing punctuation; line breaks stay, except at scans."""
    assert read_back(tokenizer, run(tokenizer, *parts)) == expected


def test_a_prompt_is_the_prefix_of_its_training_sample(tokenizer):
    """The ids up to the answer are equal in both modes; a prompt has no EOS and no weights."""
    for mode in ("paper", "released"):
        for question in ([A, instruction("What is it?")], [context("Old.\n"), instruction("And ("), B],
                         [instruction("Findings:\n")]):  # fmt: skip
            prompt = run(tokenizer, *question, prompt=True, mode=mode)
            whole = run(tokenizer, *question, response("yes"), mode=mode)
            n = len(prompt.ids)
            assert prompt.ids.tolist() == whole.ids[:n].tolist()
            assert len(whole.ids) == n + 2 and whole.weights[n - 1 :].tolist() == [1, 1, 0]
            assert not prompt.weights.any() and 2 not in prompt.ids and prompt.key_ok.all()


# --- shortening ---


def test_context_is_shortened_first_and_from_its_beginning(tokenizer):
    parts = context("First old. " + long_text(50)), A, context("Second " + long_text(9) + " last."), instruction("Q?")
    whole = run(tokenizer, *parts, response("Yes it is."))
    for less in (1, 30, 60, 100):
        short = run(tokenizer, *parts, response("Yes it is."), max_tokens=len(whole.ids) - less)
        text = read_back(tokenizer, short)
        assert text.endswith("last. Q? Yes it is.|") and "[a]" in text and "First" not in text
        assert less <= short.cut_context <= less + 16 and len(short.ids) <= len(whole.ids) - less
        assert len(short.ids) == len(whole.ids) - short.cut_context
        assert (short.cut_instruction, short.cut_response, short.dropped_scans) == (0, 0, 0)
        assert read_back(tokenizer, whole).endswith(text.removeprefix("[a] ").lstrip()) or text.startswith("word")
        assert re.match(r"(\[a\] )?(old\.|word|Second|\[a\])", text)  # begins at the start of a word


def test_then_the_instruction_then_the_end_of_the_response(tokenizer):
    parts = context(long_text(20)), A, instruction(long_text(50, "ask") + " Why?"), response(long_text(40, "say"))
    whole = run(tokenizer, *parts)
    tokens = {role: len(tokenizer.encode(text)) for (role, text) in (p for p in parts if isinstance(p, tuple))}
    # The whole context and a part of the instruction are removed; the answer is kept.
    room = len(whole.ids) - tokens["context"] - 20
    short = run(tokenizer, *parts, max_tokens=room)
    assert short.cut_context == tokens["context"] and 20 <= short.cut_instruction <= 36 and short.cut_response == 0
    assert read_back(tokenizer, short).endswith(f"Why? {long_text(40, 'say')}|")
    # The instruction keeps its last tokens; then the answer loses its end, but not its EOS.
    room = 1 + 4 + INSTRUCTION_FLOOR + 30
    short = run(tokenizer, *parts, max_tokens=room)
    assert short.cut_context == tokens["context"]
    assert short.cut_instruction == tokens["instruction"] - INSTRUCTION_FLOOR
    text = read_back(tokenizer, short)
    assert re.search(r"Why\? say0 say1 [a-z0-9 ]+ say\d\|$", text) and len(short.ids) <= room
    assert short.cut_response == tokens["response"] - int((short.weights > 0).sum()) + 1 > 0
    assert short.ids[-1] == 2 and short.targets[-2] == 2 and short.weights[-2] == 1


def test_a_sample_that_cannot_fit_is_an_error_with_the_row(tokenizer):
    parts = A, B, instruction("Why?"), response("Because.")
    assert len(run(tokenizer, *parts).ids) == 14
    with pytest.raises(RowError, match=r"a_set, row 7: 14 tokens, including 2 scans, do not fit into 12.*max_scans"):
        run(tokenizer, *parts, max_tokens=12)
    assert run(tokenizer, *parts, max_tokens=14).cut_response == 0


def test_interleaved_text_is_cut_at_its_end_with_its_scans(tokenizer):
    parts = interleaved(long_text(5)), A, interleaved(long_text(5, "second")), B, interleaved(long_text(5, "third")), A
    whole = run(tokenizer, *parts)
    seen = set()
    for room in range(len(whole.ids), 3, -1):
        short = run(tokenizer, *parts, max_tokens=room)
        text = read_back(tokenizer, short)
        assert len(short.ids) <= room and text.endswith("|") and short.weights[-2] == 1
        assert short.dropped_scans == 2 - len(short.scans)
        assert (short.ids == V).sum() == (short.ids == V + 1).sum() == (short.visual[:, 1] == 0).sum()
        assert read_back(tokenizer, whole).startswith(text[:-1])
        seen.add(short.dropped_scans)
    assert seen == {0, 1, 2}


def test_a_cut_never_splits_a_character(tokenizer):
    """Neither at the beginning of a context nor at the end of a response without spaces."""
    heart = "🫀🧠" * 30
    for room in range(20, 200):
        try:
            short = run(tokenizer, context(heart), instruction("Q?"), response(heart), max_tokens=room)
        except RowError:
            continue
        assert "\ufffd" not in tokenizer.decode(short.ids)
    assert short.cut_context > 0


def test_samples_within_the_limit_are_not_shortened(tokenizer):
    parts = A, instruction("Why?"), response("Because.")
    n = len(run(tokenizer, *parts).ids)
    for mode in ("paper", "released"):
        exact = run(tokenizer, *parts, max_tokens=n, mode=mode)
        assert len(exact.ids) == n and exact.ids[-1] == 2
        assert (exact.cut_context, exact.cut_instruction, exact.cut_response) == (0, 0, 0)


# --- scans ---


def test_too_many_scans_are_chosen_reproducibly(tokenizer):
    parts = [
        instruction("Look at"),
        A,
        instruction("and"),
        B,
        A,
        instruction("and"),
        C,
        instruction("."),
        response("x"),
    ]
    seen = set()
    for seed in range(30):
        one, two = (run(tokenizer, *parts, max_scans=2, rng=np.random.default_rng(seed)) for _ in range(2))
        assert one.scans == two.scans and (one.ids == two.ids).all() and one.dropped_scans == 1
        seen.add((one.scans, read_back(tokenizer, one)))
    assert seen == {
        ((A, B), "Look at [a] and [b] [a] and. x|"),
        ((A, C), "Look at [a] and [a] and [c]. x|"),
        ((B, C), "Look at and [b] and [c]. x|"),
    }
    assert run(tokenizer, *parts, max_scans=3).dropped_scans == 0  # three distinct scans need no rng
    with pytest.raises(ValueError, match="3 scans, 2 allowed: pass rng"):
        run(tokenizer, *parts, max_scans=2)


def test_scans_with_different_windows_are_distinct(tokenizer):
    lung, bone = dataclasses.replace(A, window="lung"), dataclasses.replace(A, window="bone")
    assert run(tokenizer, lung, bone, lung, instruction("?"), response("x")).scans == (lung, bone)


# --- errors ---


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([A, instruction("Why?")], "no response"),
        ([A, instruction("Why?"), response(" \n")], "no response"),
        ([A], "no response"),
        ([instruction("Why?"), response("a\ud800b")], "lone surrogate"),
        ([instruction("\udfffWhy?"), response("ab")], "lone surrogate.*character 0"),
    ],
)
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_invalid_rows_are_named(tokenizer, parts, reason, mode):
    with pytest.raises(RowError, match=f"a_set, row 7: .*{reason}"):
        run(tokenizer, *parts, mode=mode)


def test_invalid_arguments_are_errors(tokenizer):
    with pytest.raises(ValueError, match="mode 'other' must be one of paper, released"):
        run(tokenizer, instruction("?"), response("x"), mode="other")
    with pytest.raises(RowError, match="must not end with a response"):
        run(tokenizer, instruction("?"), response("x"), prompt=True)
    with pytest.raises(RowError, match="no text"):
        run(tokenizer, A, prompt=True)
    with pytest.raises(RowError, match="released layout.*one question.*mode 'paper'"):
        run(tokenizer, instruction("?"), response("x"), instruction("?"), response("x"), mode="released")
    with pytest.raises(RowError, match="cannot insert a scan into an empty text"):
        run(tokenizer, A, response("x"), mode="released")


# --- marks ---


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("<image-1> What?", 1, [0, " What?"]),
        ("<image-2> Compare with <image-1>, <image-2>.", 2, [1, " Compare with ", 0, ", ", 1, "."]),
        ("<image-1><image-2>", 2, [0, 1]),
        ("No scan", 0, ["No scan"]),
        ("<image> <image1> <Image-1> <image-> <image-1 >", 0, ["<image> <image1> <Image-1> <image-> <image-1 >"]),
        ("", 0, []),
        (["<image-2> a", "b", "<image-1>"], 2, [[1, " a"], ["b"], [0]]),
    ],
)
def test_marks_of_templates(text, n, expected):
    assert parse_marks(text, n) == expected


@pytest.mark.parametrize(
    ("text", "n", "message"),
    [
        ("<image-3> <image-0>", 2, "no scan for <image-3>, <image-0>.*2 scans, but no mark <image-1>, <image-2>"),
        ("<image-1>", 3, "3 scans, but no mark <image-2>, <image-3>$"),
        (["<image-1>", "<image-5>"], 1, "no scan for <image-5>"),
        (f"<image-{'9' * 5000}>", 0, r"no scan for <image-9+\.\.\."),
    ],
)
def test_all_unmatched_marks_and_scans_are_named(text, n, message):
    with pytest.raises(ValueError, match=message):
        parse_marks(text, n)


# --- random samples ---


def random_parts(rng: random.Random):
    words = ["mass", "Oedema", "(lung)", "3.5 cm", "🫀", "放射", "no", "a\nb", "effusion,", "<image-1>", "\t", " "]
    text = lambda n: " ".join(rng.choice(words) for _ in range(rng.randint(1, n))) + "."  # noqa: E731
    scan = lambda: rng.choice([A, B, C])  # noqa: E731
    scans = lambda n: [scan() for _ in range(rng.randint(0, n))]  # noqa: E731
    if rng.random() < 0.3:
        return [p for _ in range(rng.randint(1, 4)) for p in (*scans(2), interleaved(text(20)))]
    parts = [
        *scans(1),
        *([context(text(60))] if rng.random() < 0.5 else []),
        *scans(2),
        instruction(text(15)),
        *scans(1),
    ]
    parts += [response(text(30))]
    return [*parts, *scans(1), response(text(5))] if rng.random() < 0.3 else parts


def test_invariants_of_random_samples(tokenizer):
    """400 random samples under random limits give an error or consistent arrays; without limits nothing is lost."""
    rng = random.Random(5)
    terms = Terms(["mass", "edema", "lung", "effusion"])
    errors = cuts = 0
    for i in range(400):
        parts = random_parts(rng)
        mode = rng.choice(["paper", "paper", "released"])
        has_question = any(isinstance(p, tuple) and p[0] == "instruction" for p in parts)
        if mode == "released" and not has_question and isinstance(parts[0], Scan):
            mode = "paper"
        options = dict(max_tokens=rng.choice([30, 60, 100, 10_000]), max_scans=rng.choice([1, 2, 9]), mode=mode)
        try:
            e = run(tokenizer, *parts, terms=terms, rng=np.random.default_rng(i), **options)
        except RowError as error:
            assert "do not fit" in str(error), error
            errors += 1
            continue
        t = len(e.ids)
        cuts += bool(e.cut_context or e.cut_instruction or e.cut_response)
        assert t <= options["max_tokens"] and e.ids[0] == 1 and e.ids[-1] == 2
        assert {len(x) for x in (e.targets, e.weights, e.visual, e.key_ok)} == {t}
        assert set(e.weights.tolist()) <= {0, 1, 3} and e.weights[-2] == 1 and e.weights[-1] == 0
        assert (e.targets[e.weights > 0] == e.ids[1:][e.weights[:-1] > 0]).all() and (e.targets < V).all()
        starts = np.flatnonzero(e.ids == V)
        assert (np.flatnonzero(e.ids == V + 1) == starts + 3).all()
        assert (np.flatnonzero(e.visual[:, 0] >= 0) == np.sort(np.concatenate([starts + 1, starts + 2]))).all()
        assert (e.visual[starts + 1, 1] == 0).all() and (e.visual[starts + 2, 1] == 1).all()
        order = list(dict.fromkeys(e.visual[starts + 1, 0].tolist()))
        assert order == list(range(len(e.scans))) and len(set(e.scans)) == len(e.scans) <= options["max_scans"]
        distinct = {p for p in parts if isinstance(p, Scan)}
        assert len(e.scans) + e.dropped_scans == len(distinct)
        assert e.key_ok.tolist() == [True] * (t - 1) + [mode == "paper"]
        if mode == "paper" and options["max_tokens"] == 10_000:
            text = " ".join(p[1] for p in parts if isinstance(p, tuple))
            spaced = lambda text: re.sub(r"\s+(?=[.,])", "", text).split()  # noqa: E731
            assert spaced(tokenizer.decode(e.ids)) == spaced(text)
    assert errors > 5 and cuts > 50
