"""Tokens of a sample part by part: texts with the white space between them, scan marks, and EOS."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from input_pipeline.samples import Scan, Text
from input_pipeline.text.terms import TERM_WEIGHT, TermFinder
from input_pipeline.text.tokenizer import Tokenizer

TRAINED = ("response", "interleaved")  # roles with a loss

_CLOSING = re.compile(r"[)\]},;?!%]|[.:](?!\d)")
_OPENING = ("(", "[", "{")


@dataclasses.dataclass
class Block:
    """The tokens of a text of one role, of a scan, of a piece of a chat template, BOS, or the end of an answer."""

    role: str  # that of a text, or scan, template, bos, eos
    ids: list[int]
    weights: list[float] | None = None  # None: zeros
    scan: Scan | None = None


def separator(left: str | None, right: str) -> str:
    """Return the white space between a text (None: a scan or the beginning) and the next text.

    The white space of both sides becomes one space, or its line breaks if it has any. Before closing punctuation
    ("<image-1>, which", "fracture" + "?") and after an opening bracket it is dropped. Next to a scan it has no meaning
    and is dropped.
    """
    if left is not None:
        space = left[len(left.rstrip()) :] + right[: len(right) - len(right.lstrip())]
        if lines := space.replace("\r\n", "\n").count("\n"):
            return "\n" * lines
        if left.rstrip().endswith(_OPENING):
            return ""
    return "" if _CLOSING.match(right.lstrip()) else " "


def to_blocks(
    parts: Sequence[Text | Scan], tokenizer: Tokenizer, terms: TermFinder, num_latents: int, prompt: bool
) -> list[Block]:
    """Encode BOS, if there is one, and the parts of a sample in reading order, with an EOS after every answer."""
    mark = scan_mark(tokenizer, num_latents)
    last_text = max(i for i, p in enumerate(parts) if isinstance(p, Text))
    blocks = [] if tokenizer.bos_id is None else [Block("bos", [tokenizer.bos_id])]
    eos_position = None  # position of the current answer's EOS: after its last text
    left: str | None = None  # the previous text, unless a scan is in between
    for i, part in enumerate(parts):
        if isinstance(part, Scan):
            blocks.append(Block("scan", mark, scan=part))
            left = None
            continue
        if part.role not in TRAINED and eos_position is not None:
            blocks.insert(eos_position, Block("eos", [tokenizer.eos_id], [1.0]))
            eos_position, left = None, None
        space = separator(left, part.text)
        before = None if left is None and space else space if space == " " else ""
        following = parts[i + 1] if i + 1 < len(parts) else None
        lines = ""  # line breaks belong to the text before them
        if isinstance(following, Text) and not (part.role in TRAINED and following.role not in TRAINED):
            lines = separator(part.text, following.text)
        elif prompt and i == last_text and following is None:
            lines = separator(part.text, "x")  # as in training, where a response follows
        text = part.text.strip() + lines.strip(" ")
        blocks.append(text_block(part.role, text, before, tokenizer, terms))
        if part.role in TRAINED:
            eos_position = len(blocks)
        left = part.text
    if eos_position is not None:
        blocks.append(Block("eos", [tokenizer.eos_id], [1.0]))
    return blocks


def scan_mark(tokenizer: Tokenizer, num_latents: int) -> list[int]:
    """Return the ids of a scan: `<image>`, a 0 for each latent, `</image>`."""
    return [tokenizer.image_id, *[0] * num_latents, tokenizer.image_end_id]


def text_block(role: str, text: str, before: str | None, tokenizer: Tokenizer, terms: TermFinder) -> Block:
    """Encode a text. `before` is the separator for Tokenizer.encode. Text of a trained role gets weights."""
    if role not in TRAINED:
        return Block(role, tokenizer.encode(text, separator=before))
    return Block(role, *_encode_weighted(text, before, tokenizer, terms))


def _encode_weighted(
    text: str, before: str | None, tokenizer: Tokenizer, terms: TermFinder
) -> tuple[list[int], list[float]]:
    """Return ids and weights; every piece that shares a character with a term has TERM_WEIGHT."""
    ids, offsets = tokenizer.encode_with_offsets(text, separator=before)
    weights = [1.0] * len(ids)
    i = 0
    for begin, end in terms.find(text):
        while i < len(ids) and offsets[i][1] <= begin:
            i += 1
        j = i
        while j < len(ids) and offsets[j][0] < end:
            # An empty piece is only the mark of a word's start.
            if offsets[j][1] > begin and offsets[j][0] < offsets[j][1]:
                weights[j] = TERM_WEIGHT
            j += 1
    return ids, weights
