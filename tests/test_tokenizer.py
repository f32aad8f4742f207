"""Tokenizer files and their encodings."""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sentencepiece
from token_parts import A, V, instruction, read_back, response, run, tokenizer  # noqa: F401

from input_pipeline.text.released_text import released_text
from input_pipeline.text.terms import Terms
from input_pipeline.text.tokenizer import load_tokenizer


def test_tokenizer_files(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"none.model cannot be read \(No such file"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="bad.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint and again.encode("A mass\n") == tokenizer.encode("A mass\n")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (V, 1, 2, 0)
    assert (tokenizer.image_id, tokenizer.image_end_id) == (V, V + 1)


def test_a_small_custom_model(tmp_path):
    """Any SentencePiece model with a dummy prefix works; one without is refused."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the mass is in the left lung\nno edema is seen in the right lung\n" * 20)
    options = dict(input=str(corpus), vocab_size=60, model_type="bpe", minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "own"), **options)
    own = load_tokenizer(tmp_path / "own.model")
    encoded = run(own, A, instruction("is the mass"), response("in the left lung"), terms=Terms(["lung"]))
    assert read_back(own, encoded) == "[a] is the mass in the left lung|"
    assert (encoded.ids == 60).sum() == (encoded.ids == 61).sum() == 1
    assert own.decode(encoded.targets[encoded.weights == 3]) == "lung"
    # This model has no byte pieces: an unknown piece has the id of the padding, and the original never trains it.
    got = released_text(own, ["is the mass"], ["left 放 lung"], [], num_latents=2, max_tokens=99)
    assert got.ids.count(0) == 1 and got.weights[got.ids.index(0)] == 0
    assert sum(got.weights) == len(got.ids) - got.question_length - 1
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "bare"), add_dummy_prefix=False, **options)
    with pytest.raises(ValueError, match="no dummy prefix"):
        load_tokenizer(tmp_path / "bare.model")
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "endless"), eos_id=-1, **options)
    with pytest.raises(ValueError, match="no end-of-text"):
        load_tokenizer(tmp_path / "endless.model")


def test_encoding_word_by_word_equals_encoding_the_text(tokenizer):
    """Words are encoded separately and cached; ids and offsets equal those of the whole text."""
    assert tokenizer._by_word
    rng = np.random.default_rng(0)
    bits = [
        "a",
        "lung",
        "Œ",
        "放",
        "\n",
        "\t",
        " ",
        "  ",
        "3.5",
        ",",
        "(",
        "</s>",
        "<image-1>",
        "\0",
        "😀",
        "▁",
        "-",
        "\u3000",
    ]
    texts = ["".join(rng.choice(bits) + " " * rng.integers(2) for _ in range(rng.integers(9))) for _ in range(3000)]
    assert sum("  " not in text and "▁" not in text for text in texts) > 500
    for text in texts:
        for separator, model in ((None, tokenizer._words), (" ", tokenizer._words), ("", tokenizer._continued)):
            assert tokenizer.encode_with_offsets(text, separator=separator) == tokenizer._encode(model, text)
