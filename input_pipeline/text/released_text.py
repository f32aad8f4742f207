"""The text layout of the released RadFM, number for number: weights trained with it expect it.

It differs from ours (tokens.py) in where an image stands and what is trained on:

- question, a space and answer are tokenised as one string, cut at each image, without the white space beside it;
- an image at character p of a text stands before character p - 1, so "at the end" is before the last character;
- the end-of-text token cannot be attended to; a text that fills the row has none (`tokens.encode` shortens instead);
- terms are tokenised alone and searched as runs of ids, so they match inside other words and not after a bracket.

Ids from V on: V `<image>`, V + 1 `</image>`, V + 2 + L s + j latent j of scan s (V vocabulary, L latents of a scan).
Source: the data loader of the released code; reference encodings in tests/data/tokenizer_golden.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from input_pipeline.text.tokenizer import Tokenizer

TERM_WEIGHT = 3.0


@dataclasses.dataclass(frozen=True)
class ReleasedText:
    """One sample, not padded.

    Attributes:
      ids: with the numbering above.
      weights: of each token as a label (not shifted); 0 where the original has label -100.
      question_length: tokens of the question, BOS and images included.
      complete: false if the answer or the end-of-text token did not fit.
    """

    ids: list[int]
    weights: list[float]
    question_length: int
    complete: bool


def insert_images(text: str, images: Iterable[tuple[int, int]]) -> list[str | int]:
    """Text with (position, scan) images put in -> text and scan numbers in reading order.

    "Is it?" with images (0, 0) and (6, 1) -> [0, "Is it", 1, "?"]

    Raises:
      ValueError: an image in an empty text; a position outside the text.
    """
    images = list(images)
    if images and not text:
        raise ValueError("the released layout has no place for a scan in an empty text")
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
    """BOS, then texts and scans; white space on either side of a scan is gone, and a text starts as a word."""
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
    terms: Iterable[str],
    *,
    num_latents: int,
    max_tokens: int,
) -> ReleasedText:
    """Question and answer (`insert_images`) -> ids and weights, cut at `max_tokens` as the original cuts them.

    Args:
      terms: the medical terms of the answer, as strings.
    """
    bullets_gone = [s if isinstance(s, int) else s.replace("•", "") for s in answer]
    joined = [*question]
    for segment in (" ", *bullets_gone):
        if joined and isinstance(joined[-1], str) and isinstance(segment, str):
            joined[-1] += segment
        else:
            joined.append(segment)
    ids = encode_segments(tokenizer, joined, num_latents=num_latents)
    # Counted on the question alone, as there: after an empty question the lone space is part of the answer.
    question_length = min(len(encode_segments(tokenizer, question, num_latents=num_latents)), max_tokens)
    complete = len(ids) < max_tokens
    ids = [*ids, tokenizer.eos_id] if complete else ids[:max_tokens]
    pad_or_unknown = 0  # one id in this model, so an unknown piece is never trained on
    label = [i >= question_length and t < tokenizer.image_id and t != pad_or_unknown for i, t in enumerate(ids)]
    weights = [float(trained) for trained in label]
    for key in {tuple(tokenizer.encode(term)) for term in terms} - {()}:
        for start in range(question_length, len(ids) - len(key) + 1):
            if ids[start] == key[0] and tuple(ids[start : start + len(key)]) == key:
                weights[start : start + len(key)] = [TERM_WEIGHT] * len(key)
    weights = [w if trained else 0.0 for w, trained in zip(weights, label, strict=True)]
    return ReleasedText(ids, weights, question_length, complete)


def released_decode(tokenizer: Tokenizer, ids: Iterable[int], *, num_scans: int = 100, num_latents: int = 32) -> str:
    """Ids -> text with special tokens and image tokens written out ("<s>", "<image>", "<image17>").

    A special token that follows text puts a space before that text; image tokens have a space on both sides.
    """
    marks = {tokenizer.image_id: "<image>", tokenizer.image_end_id: "</image>"}
    special = {0: "<unk>", tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    groups: list[str | list[int]] = []
    for token in ids:
        if token >= tokenizer.image_id:
            number = token - tokenizer.image_id - 2
            if number >= num_scans * num_latents:
                raise ValueError(f"id {token} is no token of {num_scans} scans of {num_latents} latents")
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
