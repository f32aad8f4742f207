"""Hand-written samples and readable forms of their arrays, for the tests of tokens."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.samples import Sample, Scan, Text
from input_pipeline.text.terms import Terms
from input_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from input_pipeline.text.tokens import Encoded, encode

V = 32000
A, B, C = Scan("a.png"), Scan("b.nii.gz"), Scan("c.png", window="lung")
NO_TERMS = Terms(["zzz"])


@functools.cache
def installed() -> Tokenizer:
    folder = Path(importlib.util.find_spec("mistral_common").origin).parent
    return load_tokenizer(folder / "data" / "tokenizer.model.v1")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return an installed 32,000-piece model in LLaMA's id layout (the first of mistral-common)."""
    return installed()


def sample(*parts, row_id="7") -> Sample:
    """Make a sample of scans and (role, text) pairs."""
    texts = tuple(Text(p[1], p[0]) if isinstance(p, tuple) else p for p in parts)
    return Sample(row_id, "a_set", "vqa", None, texts)


def context(text):
    return ("context", text)


def instruction(text):
    return ("instruction", text)


def response(text):
    return ("response", text)


def interleaved(text):
    return ("interleaved", text)


def run(tokenizer, *parts, terms=NO_TERMS, num_latents=2, max_scans=9, **options) -> Encoded:
    return encode(sample(*parts), tokenizer, terms, num_latents=num_latents, max_scans=max_scans, **options)


def read_back(tokenizer: Tokenizer, encoded: Encoded) -> str:
    """Decode ids to readable text, with [a], [b], [c] for scans and | for EOS."""
    text, current = "", []
    names = {A: "[a]", B: "[b]", C: "[c]"}

    def flush():
        nonlocal text, current
        words = tokenizer.decode(current)
        starts_word = bool(current) and tokenizer._words.id_to_piece(current[0]).startswith("▁")
        text += (" " if text and starts_word else "") + words
        current = []

    for i, token in enumerate(encoded.ids.tolist()):
        number, latent = encoded.visual[i]
        if token == tokenizer.image_id:
            flush()
        elif number >= 0:
            if latent == 0:
                text += (" " if text else "") + names[encoded.scans[number]]
        elif token == tokenizer.eos_id:
            flush()
            text += "|"
        elif token not in (tokenizer.image_end_id, tokenizer.bos_id):
            current.append(token)
    flush()
    return text


def long_text(n, word="word"):
    return " ".join(f"{word}{i % 10}" for i in range(n))


def check(encoded: Encoded, tokenizer: Tokenizer, drawing: str) -> None:
    """Compare with a drawing, which has the rows token, visual, targets and weights; `-` and `0` are empty."""
    rows = {line.split()[0]: line.split()[1:] for line in drawing.strip().splitlines()}
    special = {"<s>": 1, "</s>": 2, "<image>": V, "</image>": V + 1, "0": 0, "-": 0}

    def number(piece):
        if piece not in special and not re.fullmatch(r"[ab]\d", piece):
            special[piece] = tokenizer._words.piece_to_id(piece)
            assert special[piece] != 0, piece
        return special.get(piece, 0)

    assert encoded.ids.tolist() == [number(p) for p in rows["token"]]
    assert encoded.targets.tolist() == [number(p) for p in rows["targets"]]
    assert encoded.weights.tolist() == [float(w) for w in rows["weights"]]
    slots = [(-1, -1) if p == "-" else tuple(map(int, p.split(","))) for p in rows["visual"]]
    assert encoded.visual.tolist() == [list(slot) for slot in slots]
    assert encoded.ids.dtype == encoded.targets.dtype == encoded.visual.dtype == np.int32
    assert encoded.weights.dtype == np.float32 and encoded.key_ok.dtype == bool
