"""The exact text layout of the released RadFM, which the released weights expect.

It differs from the layout of the paper (tokens.py) in the position of images and in what is trained:

- Question, a space and answer are tokenised as one string. It is split at each image, and white space around images is
  dropped.
- The data loader inserts an image at character p of a text before character p - 1, so "at the end" is before the last
  character. In the middle of a user's text, an image is inserted exactly at its mark, as in the demo.
- No token attends to the end-of-text token. A text that fills the row has none (`tokens.encode` shortens instead).
- Terms are tokenised separately and matched as ids, so they match inside other words, and not after a bracket.

Ids from V on: V `<image>`, V + 1 `</image>`, V + 2 + L s + j latent j of scan s (V vocabulary, L latents of a scan).
Source: the data loader of the released code; reference encodings in tests/data/tokenizer_golden.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from input_pipeline.text.terms import TERM_WEIGHT
from input_pipeline.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ReleasedText:
    """One sample without padding."""

    ids: list[int]  # numbered as in the module docstring
    weights: list[float]  # weight of each token as a label (not shifted); 0 where the original has the label -100
    question_length: int  # tokens of the question, including BOS and images
    complete: bool  # False if the answer or the end-of-text token did not fit


def exact_position(position: int) -> int:
    """Return the argument with which `insert_images` inserts an image exactly before character `position`."""
    return position + 1


def insert_images(text: str, images: Iterable[tuple[int, int]]) -> list[str | int]:
    """Insert (position, scan) images into a text as the data loader does: before character position - 1.

    Returns texts and scan numbers in reading order:

    "Is it?" with images (0, 0) and (6, 1) -> [0, "Is it", 1, "?"]
    """
    images = list(images)
    if images and not text:
        raise ValueError("the released layout cannot insert a scan into an empty text")
    if bad := [p for p, _ in images if not 0 <= p <= len(text)]:
        raise ValueError(f"image positions {bad} are outside the text of {len(text)} characters")
    segments: list[str | int] = []
    start = 0
    for position, scan in sorted(((max(p - 1, 0), s) for p, s in images), key=lambda image: image[0]):
        if position > start:
            segments.append(text[start:position])
            start = position
        segments.append(scan)
    return [*segments, text[start:]] if text[start:] else segments


def encode_segments(tokenizer: Tokenizer, segments: Sequence[str | int], *, num_latents: int) -> list[int]:
    """Encode BOS, texts and scans. White space next to a scan is dropped, and every text starts a word."""
    if tokenizer.bos_id is None:
        raise ValueError(f"tokenizer {tokenizer.path} has no begin-of-text token, which the released layout needs")
    ids = [tokenizer.bos_id]
    for i, segment in enumerate(segments):
        if isinstance(segment, int):
            first = tokenizer.image_id + 2 + num_latents * segment
            ids += [tokenizer.image_id, *range(first, first + num_latents), tokenizer.image_end_id]
        else:
            segment = segment.lstrip() if i > 0 else segment
            segment = segment.rstrip() if i + 1 < len(segments) else segment
            ids += tokenizer.encode(segment)
    return ids


def released_text(
    tokenizer: Tokenizer,
    question: Sequence[str | int],
    answer: Sequence[str | int],
    terms: Iterable[str],  # the medical terms of the answer
    *,
    num_latents: int,
    max_tokens: int,
) -> ReleasedText:
    """Encode question and answer (from `insert_images`), truncated to `max_tokens` as in the original."""
    answer = [s if isinstance(s, int) else s.replace("•", "") for s in answer]
    joined = [*question]
    for segment in (" ", *answer):
        if joined and isinstance(joined[-1], str) and isinstance(segment, str):
            joined[-1] += segment
        else:
            joined.append(segment)
    ids = encode_segments(tokenizer, joined, num_latents=num_latents)
    # The question is tokenised alone, as in the original. After an empty question the space belongs to the answer.
    question_length = min(len(encode_segments(tokenizer, question, num_latents=num_latents)), max_tokens)
    complete = len(ids) < max_tokens
    ids = [*ids, tokenizer.eos_id] if complete else ids[:max_tokens]
    pad_or_unknown = 0  # padding and unknown pieces share this id, so an unknown piece is never trained
    label = [i >= question_length and t < tokenizer.image_id and t != pad_or_unknown for i, t in enumerate(ids)]
    weights = [float(trained) for trained in label]
    for key in {tuple(tokenizer.encode(term)) for term in terms} - {()}:
        for start in range(question_length, len(ids) - len(key) + 1):
            if ids[start] == key[0] and tuple(ids[start : start + len(key)]) == key:
                weights[start : start + len(key)] = [TERM_WEIGHT] * len(key)
    weights = [w if trained else 0.0 for w, trained in zip(weights, label, strict=True)]
    return ReleasedText(ids, weights, question_length, complete)
