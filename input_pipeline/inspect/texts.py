"""The text of a sample as a row's arrays hold it, token by token.

Letters: t tokens of a sample, L latents of a scan, V vocabulary.

The weight of a target stands one place before the token that it speaks of. Here a token carries the weight with which
it is predicted:

    token      <s>  ▁Any  ▁ed  ema  ?   ▁M  ild  ▁ed  ema  </s>
    weights    0    0     0    0    1   1   3    3    1    0
    weight     0    0     0    0    0   1   1    3    3    1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.text.terms import TERM_WEIGHT
from input_pipeline.text.tokenizer import Tokenizer

WEIGHTS = (0, 1, TERM_WEIGHT)
TEXT = ("ids", "targets", "weights", "visual_index", "key_ok")


@dataclasses.dataclass(frozen=True)
class Token:
    """A token, or the tokens of a scan as one.

    Attributes:
      kind: text; byte (a further byte of the character before); bos; eos; image; lost (an image that was left out);
        mark (an image mark without its latents); unknown (no text).
      text: as decoded, with its space.
      place, places: the first place in the row, and how many it takes.
      weight: with which it is predicted.
      image: number of the image in the sample, from 1; 0 for other kinds.
      seen: whether later tokens may attend to it.
    """

    kind: str
    text: str
    id: int
    place: int
    places: int = 1
    weight: float = 0.0
    image: int = 0
    seen: bool = True


class Speller:
    """Text of single tokens, spaces kept."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # A decoder drops the space at a text's beginning: so nothing is decoded at the beginning.
        self._before = tokenizer.encode("a")
        self._skip = len(tokenizer.decode(self._before))
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, *ids: int) -> str:
        if ids not in self._known:
            self._known[ids] = self.tokenizer.decode([*self._before, *ids])[self._skip :]
        return self._known[ids]


def sample_tokens(
    arrays: Mapping[str, np.ndarray], speller: Speller, num_latents: int, place: int = 0
) -> tuple[list[Token], tuple[int, ...], list[str]]:
    """The tokens of one sample, the slots of its images in the order of their first mark, and what is odd.

    Args:
      arrays: TEXT of one segment, each [t].
      place: of its first token in the row.
    """
    tokenizer = speller.tokenizer
    ids, targets, weights, visual = (arrays[name].tolist() for name in ("ids", "targets", "weights", "visual_index"))
    key_ok = arrays["key_ok"].tolist()
    vocabulary, t = tokenizer.vocab_size, len(ids)
    latents = list(range(num_latents))
    tokens: list[Token] = []
    slots: dict[int, int] = {}  # slot -> number of the image
    odd: dict[str, list[int]] = {}
    i = 0

    def add(kind: str, text: str = "", places: int = 1, image: int = 0) -> None:
        nonlocal i
        weight = weights[i - 1] if i else 0.0
        tokens.append(Token(kind, text, ids[i], place + i, places, weight, image, all(key_ok[i : i + places])))
        i += places

    while i < t:
        token = ids[i]
        if visual[i] >= 0:
            odd.setdefault("visual tokens without image marks around them", []).append(place + i)
            slot, n = visual[i] // num_latents, 1
            while i + n < t and visual[i + n] == visual[i] + n and visual[i + n] // num_latents == slot:
                n += 1
            add("image", places=n, image=slots.setdefault(slot, len(slots) + 1))
        elif token == tokenizer.image_id:
            body, end = visual[i + 1 : i + 1 + num_latents], i + 1 + num_latents
            closed = end < t and ids[end] == tokenizer.image_end_id
            if closed and body[0] >= 0 and body == [body[0] // num_latents * num_latents + j for j in latents]:
                number = slots.setdefault(body[0] // num_latents, len(slots) + 1)
                add("image", places=num_latents + 2, image=number)
            elif closed and body == [-1] * num_latents and not any(ids[i + 1 : end]):
                add("lost", places=num_latents + 2)
            else:
                odd.setdefault("an image mark without its visual tokens", []).append(place + i)
                add("mark", "<image>")
        elif token == tokenizer.image_end_id:
            odd.setdefault("an image's end mark without its visual tokens", []).append(place + i)
            add("mark", "</image>")
        elif token == tokenizer.bos_id:
            add("bos")
        elif token == tokenizer.eos_id:
            add("eos")
        elif not 0 <= token < vocabulary:
            odd.setdefault("an id outside the vocabulary", []).append(place + i)
            add("unknown")
        else:
            n = 1
            while i + n < t and 0 <= ids[i + n] < vocabulary and visual[i + n] < 0:
                if not tokenizer.continues_character(ids[i + n]):
                    break
                n += 1
            text = speller(*ids[i : i + n])
            add("text" if text else "unknown", text)
            for _ in range(1, n):
                add("byte")
    for p, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        if weight not in WEIGHTS:
            odd.setdefault(f"a weight that is none of {', '.join(f'{w:g}' for w in WEIGHTS)}", []).append(place + p)
        if weight and (p + 1 == t or visual[p + 1] >= 0 or target != ids[p + 1] or target >= vocabulary):
            odd.setdefault("a weight on a target that is not the next token of the text", []).append(place + p)
    return tokens, tuple(slots), [f"{what}: {_places(where)}" for what, where in odd.items()]


def _places(where: Sequence[int]) -> str:
    listed = ", ".join(map(str, where[:8])) + (" ..." if len(where) > 8 else "")
    return f"place{'s' if len(where) > 1 else ''} {listed}"
