"""The text of a sample, token by token, from the arrays of its row.

Letters: t tokens of a sample, L latents of a scan, V vocabulary.

In the arrays, the loss weight of a token is stored one position before it. Here each token has its own weight:

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
    """One token, or all tokens of a scan.

    Its kind is text; byte (another byte of the previous character); bos; eos; special (a special token of a chat
    template, with its name as text); image; lost (an image that could not be
    loaded); mark (an image mark without its latents); or unknown (no text).
    """

    kind: str
    text: str  # decoded text, with its space
    id: int
    place: int  # first position in the row
    places: int = 1  # number of positions
    weight: float = 0.0  # loss weight of its prediction
    image: int = 0  # number of the image in the sample, from 1; 0 for other kinds
    seen: bool = True  # whether later tokens may attend to it


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
    tokenizer, columns = decoder.tokenizer, {name: arrays[name].tolist() for name in TEXT}
    ids, weights, visual, key_ok = (columns[name] for name in ("ids", "weights", "visual_index", "key_ok"))
    tokens: list[Token] = []
    slots: dict[int, int] = {}  # slot -> number of the image
    warnings: dict[str, list[int]] = {}
    i = 0

    def add(kind: str, text: str = "", places: int = 1, image: int = 0, warning: str = "") -> None:
        nonlocal i
        if warning:
            warnings.setdefault(warning, []).append(place + i)
        weight = weights[i - 1] if i else 0.0
        tokens.append(Token(kind, text, ids[i], place + i, places, weight, image, all(key_ok[i : i + places])))
        i += places

    def continues(k: int) -> bool:
        return 0 <= ids[k] < tokenizer.vocab_size and visual[k] < 0 and tokenizer.continues_character(ids[k])

    while i < len(ids):
        token, latents = ids[i], visual[i + 1 : i + 1 + num_latents]
        if visual[i] >= 0:
            slot = visual[i] // num_latents
            n = _length(visual, i, lambda k: visual[k] == visual[k - 1] + 1 and visual[k] % num_latents)
            number = slots.setdefault(slot, len(slots) + 1)
            add("image", "", n, number, warning="visual tokens without image marks around them")
        elif token == tokenizer.image_id:
            closed = ids[i + 1 + num_latents : i + 2 + num_latents] == [tokenizer.image_end_id]
            slot = latents[0] // num_latents if closed else -1
            if slot >= 0 and latents == list(range(slot * num_latents, (slot + 1) * num_latents)):
                add("image", "", num_latents + 2, slots.setdefault(slot, len(slots) + 1))
            elif closed and set(latents) == {-1} and not any(ids[i + 1 : i + 1 + num_latents]):
                add("lost", "", num_latents + 2)
            else:
                add("mark", "<image>", warning="an image mark without its visual tokens")
        elif token == tokenizer.image_end_id:
            add("mark", "</image>", warning="an image's end mark without its visual tokens")
        elif token in (tokenizer.bos_id, tokenizer.eos_id):
            add("bos" if token == tokenizer.bos_id else "eos")
        elif tokenizer.is_special(token) and token != tokenizer.unk_id:
            add("special", tokenizer.piece(token))
        elif not 0 <= token < tokenizer.vocab_size:
            add("unknown", warning="an id outside the vocabulary")
        else:
            n = _length(ids, i, continues)
            text = decoder(*ids[i : i + n])
            add("text" if text else "unknown", text)
            for _ in range(1, n):
                add("byte")
    for warning, indices in _target_warnings(columns, tokenizer.vocab_size).items():
        warnings[warning] = [place + k for k in indices]
    return tokens, tuple(slots), [f"{warning}: {_positions(where)}" for warning, where in warnings.items()]


def _length(values: Sequence[int], start: int, continues) -> int:
    """Return the length of the run at `start`: this index, and the next ones while `continues(index)` is true."""
    return next((k for k in range(start + 1, len(values)) if not continues(k)), len(values)) - start


def _target_warnings(columns: Mapping[str, list], vocab_size: int) -> dict[str, list[int]]:
    """Find unknown weights, and weights on a target that is not the next token: warning -> indices."""
    ids, visual = columns["ids"], columns["visual_index"]
    warnings: dict[str, list[int]] = {}
    for k, (target, weight) in enumerate(zip(columns["targets"], columns["weights"], strict=True)):
        if weight not in WEIGHTS:
            warnings.setdefault(f"a weight other than {', '.join(f'{w:g}' for w in WEIGHTS)}", []).append(k)
        last = k + 1 == len(ids)
        if weight and (last or visual[k + 1] >= 0 or target != ids[k + 1] or target >= vocab_size):
            warnings.setdefault("a weight on a target that is not the next token of the text", []).append(k)
    return warnings


def _positions(positions: Sequence[int]) -> str:
    listed = ", ".join(map(str, positions[:8])) + (" ..." if len(positions) > 8 else "")
    return f"position{'s' if len(positions) > 1 else ''} {listed}"
