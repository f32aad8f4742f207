"""The text of a sample, token by token, from the arrays of its row.

Letters: t tokens of a sample, L latents of a scan, V vocabulary.

The weight of a target is at the position before the token that it is about. Here a token carries its own weight, with
which it is predicted:

    token      <s>  ▁Any  ▁ed  ema  ?   ▁M  ild  ▁ed  ema  </s>
    weights    0    0     0    0    1   1   3    3    1    0
    weight     0    0     0    0    0   1   1    3    3    1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.text.tokenizer import Tokenizer
from input_pipeline.text.tokens import TERM_WEIGHT

WEIGHTS = (0, 1, TERM_WEIGHT)
TEXT = ("ids", "targets", "weights", "visual_index", "key_ok")


@dataclasses.dataclass(frozen=True)
class Token:
    """One token, or all tokens of a scan.

    Attributes:
      kind: text; byte (another byte of the previous character); bos; eos; image; lost (an image that could not be
        loaded); mark (an image mark without its latents); unknown (no text).
      text: as decoded, with its space.
      place, places: its first position in the row, and its number of positions.
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


class TokenDecoder:
    """Decodes single tokens, with their spaces."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # A tokenizer drops a space at the start of a text, so tokens are decoded after this prefix.
        self._prefix = tokenizer.encode("a")
        self._prefix_length = len(tokenizer.decode(self._prefix))
        self._cache: dict[tuple[int, ...], str] = {}

    def __call__(self, *ids: int) -> str:
        """Return the text of a few tokens."""
        if ids not in self._cache:
            self._cache[ids] = self.tokenizer.decode([*self._prefix, *ids])[self._prefix_length :]
        return self._cache[ids]


def sample_tokens(
    arrays: Mapping[str, np.ndarray], decoder: TokenDecoder, num_latents: int, place: int = 0
) -> tuple[list[Token], tuple[int, ...], list[str]]:
    """Return the tokens of a sample, the slots of its images in reading order, and warnings.

    Args:
      arrays: TEXT of one segment, each [t].
      place: position of its first token in the row.
    """
    reader = _TokenReader(arrays, decoder, num_latents, place)
    while reader.i < len(reader.ids):
        reader.read_next()
    reader.check_targets(arrays["targets"].tolist())
    warnings = [f"{warning}: {_positions(positions)}" for warning, positions in reader.warnings.items()]
    return reader.tokens, tuple(reader.slots), warnings


class _TokenReader:
    """Reads the tokens of a sample from left to right.

    Attributes:
      i: index of the next token.
      slots: slot -> number of the image.
      warnings: warning -> its positions in the row.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], decoder: TokenDecoder, num_latents: int, place: int):
        self.decoder, self.tokenizer, self.num_latents, self.place = decoder, decoder.tokenizer, num_latents, place
        names = ("ids", "weights", "visual_index", "key_ok")
        self.ids, self.weights, self.visual, self.key_ok = (arrays[name].tolist() for name in names)
        self.i = 0
        self.tokens: list[Token] = []
        self.slots: dict[int, int] = {}
        self.warnings: dict[str, list[int]] = {}

    def add(self, kind: str, text: str = "", places: int = 1, image: int = 0) -> None:
        """Append a token of `places` positions, and move past it."""
        i, weight = self.i, self.weights[self.i - 1] if self.i else 0.0
        seen = all(self.key_ok[i : i + places])
        self.tokens.append(Token(kind, text, self.ids[i], self.place + i, places, weight, image, seen))
        self.i += places

    def warn(self, warning: str, index: int) -> None:
        """Record a warning about the token at an index."""
        self.warnings.setdefault(warning, []).append(self.place + index)

    def read_next(self) -> None:
        """Read the next token, or all tokens of a scan."""
        token, tokenizer = self.ids[self.i], self.tokenizer
        if self.visual[self.i] >= 0:
            self._read_unmarked_image()
        elif token == tokenizer.image_id:
            self._read_image()
        elif token == tokenizer.image_end_id:
            self.warn("an image's end mark without its visual tokens", self.i)
            self.add("mark", "</image>")
        elif token == tokenizer.bos_id:
            self.add("bos")
        elif token == tokenizer.eos_id:
            self.add("eos")
        elif not 0 <= token < tokenizer.vocab_size:
            self.warn("an id outside the vocabulary", self.i)
            self.add("unknown")
        else:
            self._read_text()

    def _image_number(self, visual: int) -> int:
        return self.slots.setdefault(visual // self.num_latents, len(self.slots) + 1)

    def _read_unmarked_image(self) -> None:
        i, visual, n = self.i, self.visual, 1
        self.warn("visual tokens without image marks around them", i)
        end_of_slot = (visual[i] // self.num_latents + 1) * self.num_latents
        while i + n < len(visual) and visual[i + n] == visual[i] + n < end_of_slot:
            n += 1
        self.add("image", places=n, image=self._image_number(visual[i]))

    def _read_image(self) -> None:
        start, end = self.i + 1, self.i + 1 + self.num_latents
        latents = self.visual[start:end]
        closed = end < len(self.ids) and self.ids[end] == self.tokenizer.image_end_id
        if closed and latents[0] >= 0 and latents[0] % self.num_latents == 0 and _consecutive(latents):
            self.add("image", places=self.num_latents + 2, image=self._image_number(latents[0]))
        elif closed and set(latents) == {-1} and not any(self.ids[start:end]):
            self.add("lost", places=self.num_latents + 2)
        else:
            self.warn("an image mark without its visual tokens", self.i)
            self.add("mark", "<image>")

    def _read_text(self) -> None:
        i, n = self.i, 1
        while i + n < len(self.ids) and 0 <= self.ids[i + n] < self.tokenizer.vocab_size and self.visual[i + n] < 0:
            if not self.tokenizer.continues_character(self.ids[i + n]):
                break
            n += 1
        text = self.decoder(*self.ids[i : i + n])
        self.add("text" if text else "unknown", text)
        for _ in range(1, n):
            self.add("byte")

    def check_targets(self, targets: list[int]) -> None:
        """Warn about unknown weights, and about weights on a target that is not the next token."""
        for i, (target, weight) in enumerate(zip(targets, self.weights, strict=True)):
            if weight not in WEIGHTS:
                self.warn(f"a weight that is none of {', '.join(f'{w:g}' for w in WEIGHTS)}", i)
            last = i + 1 == len(targets)
            if weight and (
                last or self.visual[i + 1] >= 0 or target != self.ids[i + 1] or target >= self.tokenizer.vocab_size
            ):
                self.warn("a weight on a target that is not the next token of the text", i)


def _consecutive(numbers: Sequence[int]) -> bool:
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def _positions(positions: Sequence[int]) -> str:
    listed = ", ".join(map(str, positions[:8])) + (" ..." if len(positions) > 8 else "")
    return f"position{'s' if len(positions) > 1 else ''} {listed}"
