"""Encode a sample as ids, targets, weights and visual slots of one packed segment.

Letters: t tokens of a sample, V vocabulary, L latents of a scan.

    Scan(a), Text("Any edema?", instruction), Text("Mild edema (new).", response)       L = 2, "edema" is a term

    position  0     1        2     3     4         5     6    7    8   9   10   11   12   13  14  15
    token     <s>   <image>  a0    a1    </image>  ▁Any  ▁ed  ema  ?   ▁M  ild  ▁ed  ema  ▁(  new ).   </s>
    ids       1     V        0     0     V+1       .     .    .    .   .   .    .    .    .   .   .    2
    visual    -     -        a,0   a,1   -         -     -    -    -   -   -    -    -    -   -   -    -
    targets   0     0        0     0     ▁Any      ▁ed   ema  ?    ▁M  ild ▁ed  ema  ▁(   new ).  </s> 0
    weights   0     0        0     0     0         0     0    0    1   1   3    3    1    1   1   1    0
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from input_pipeline.samples import RowError, Sample, Scan, Text
from input_pipeline.text import released_text
from input_pipeline.text.blocks import TRAINED, separator, to_blocks
from input_pipeline.text.chat import chat_blocks
from input_pipeline.text.shorten import shorten_blocks, shorten_released
from input_pipeline.text.terms import TermFinder
from input_pipeline.text.tokenizer import Tokenizer

Mode = Literal["paper", "released"]
MODES: tuple[str, ...] = Mode.__args__
Template = Literal["radfm", "chat"]
TEMPLATES: tuple[str, ...] = Template.__args__


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample ready for packing; the module docstring shows an example."""

    ids: np.ndarray  # int32[t]; 0 for a latent
    targets: np.ndarray  # int32[t], the token to predict at each position; 0 where that is not text
    weights: np.ndarray  # float32[t] of the targets: 3 medical term, 1 other trained text and EOS, 0 everything else
    visual: np.ndarray  # int32[t, 2], (index in `scans`, latent) or (-1, -1)
    key_ok: np.ndarray  # bool[t], whether later tokens of the sample may attend to this one
    scans: tuple[Scan, ...]  # distinct, in the order of their first mark
    cut_context: int = 0  # text tokens removed because the sample was too long
    cut_instruction: int = 0
    cut_response: int = 0  # including interleaved text
    dropped_scans: int = 0  # distinct scans removed: more than `max_scans`, or all their marks were in removed text
    starts: tuple[int, ...] = (0,)  # where the segments of the sample start; several only for alternatives.py


def encode(
    sample: Sample,
    tokenizer: Tokenizer,
    terms: TermFinder,
    *,
    max_scans: int,
    num_latents: int = 32,
    max_tokens: int = 2048,
    mode: Mode = "paper",
    template: Template = "radfm",
    rng: np.random.Generator | None = None,
    prompt: bool = False,
) -> Encoded:
    """Encode a sample (section 4.1 of the paper, equations 3 and 4).

    BOS if the model has one, then the parts in reading order, each scan as `<image>`, its latents and `</image>`.
    `blocks.separator` defines the white space between parts. EOS ends every answer and the interleaved text, and is
    trained.

    A sample longer than `max_tokens` is cut, no more than needed, in this order:
      1. the beginning of its contexts, the first one first;
      2. the beginning of its instructions, down to the last 64 tokens;
      3. the end of its last answer or interleaved text, including scans in that end; EOS is kept.
    Cuts are at the start of a word if one is near.

    Args:
      max_scans: maximum of distinct scans. If there are more, `rng` chooses which to keep.
      mode: `paper`, or `released`: the layout that the released weights were trained with (released_text.py). If it is
        too long, the beginning of the question and then the end of the answer is cut. The original loses the answer.
      template: `radfm`, or `chat`: the chat template of the tokenizer (chat.py), in mode `paper`. Its own tokens are
        never cut. Interleaved text has no turns and keeps the form `radfm`.
      prompt: the sample ends with a question and will be continued: no EOS at its end, no weights.
    Raises:
      RowError: nothing to train on, nothing to answer, too long, not valid Unicode, or rejected by the chat template.
      ValueError: an unknown mode or template; more than `max_scans` scans and no rng.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} must be one of {', '.join(MODES)}")
    known = TEMPLATES if mode == "paper" else TEMPLATES[:1]
    if template not in known:
        raise ValueError(f"template {template!r} must be one of {', '.join(known)} in mode {mode!r}")
    parts, dropped = _choose_scans(sample, max_scans, rng)
    roles = [p.role for p in parts if isinstance(p, Text)]
    trained = any(role in TRAINED for role in roles)
    if prompt and trained and roles[-1] in TRAINED:
        raise _row_error(sample, "a prompt must not end with a response", "remove the response")
    if not prompt and not trained:
        raise _row_error(sample, "no response and no interleaved text: nothing to train on", "fill in the response")
    if not roles:
        raise _row_error(sample, "no text", "write an instruction")
    try:
        if mode == "released":
            return _released(sample, parts, dropped, tokenizer, terms, num_latents, max_tokens, prompt)
        to_own_blocks = chat_blocks if template == "chat" and "interleaved" not in roles else to_blocks
        blocks = to_own_blocks(parts, tokenizer, terms, num_latents, prompt)
        return _paper(sample, blocks, dropped, tokenizer, num_latents, max_tokens, prompt)
    except RowError:
        raise
    except ValueError as error:
        raise _row_error(sample, str(error)) from error


def _row_error(sample: Sample, reason: str, remedy: str = "") -> RowError:
    return RowError(sample.dataset, sample.row_id, reason, remedy)


def _choose_scans(sample: Sample, max_scans: int, rng: np.random.Generator | None) -> tuple[list[Text | Scan], int]:
    """Return parts with at most `max_scans` distinct scans and no blank texts, and the number of scans dropped."""
    distinct = list(dict.fromkeys(sample.scans))
    parts = [p for p in sample.parts if isinstance(p, Scan) or p.text.strip()]
    if len(distinct) <= max_scans:
        return parts, 0
    if rng is None:
        raise ValueError(f"{sample.dataset}, row {sample.row_id}: {len(distinct)} scans, {max_scans} allowed: pass rng")
    kept = {distinct[i] for i in rng.choice(len(distinct), max_scans, replace=False)}
    return [p for p in parts if isinstance(p, Text) or p in kept], len(distinct) - max_scans


def _paper(sample, blocks, dropped, tokenizer, num_latents, max_tokens, prompt) -> Encoded:
    excess = sum(len(block.ids) for block in blocks) - max_tokens
    cut: Counter[str] = Counter()
    if excess > 0:
        before = {b.scan for b in blocks} - {None}
        cut = shorten_blocks(sample, blocks, excess, tokenizer, max_tokens)
        dropped += len(before - {b.scan for b in blocks})
    ids, weights, visual, scans = [], [], [], {}
    for block in blocks:
        if block.scan is not None:
            visual.append((len(ids) + 1, scans.setdefault(block.scan, len(scans))))
        ids += block.ids
        weights += [0.0] * len(block.ids) if prompt or block.weights is None else block.weights
    return _to_arrays(tokenizer, ids, weights, visual, num_latents, tuple(scans), cut, dropped)


def _released(sample, parts, dropped, tokenizer, terms, num_latents, max_tokens, prompt) -> Encoded:
    texts, images, scans = ["", ""], ([], []), {}  # the first item belongs to the question, the second to the answer
    side = contexts = 0
    for i, part in enumerate(parts):
        if isinstance(part, Scan):
            texts[side] = texts[side].rstrip()
            position = len(texts[side])
            if _inside_text(parts, i):
                position = released_text.exact_position(position)
            images[side].append((position, scans.setdefault(part, len(scans))))
            continue
        if part.role in TRAINED:
            side = 1
        elif side == 1:
            raise _row_error(sample, "the released layout has one question and one answer", "use mode 'paper'")
        if texts[side]:
            texts[side] = texts[side].rstrip() + separator(texts[side], part.text) + part.text.lstrip()
        else:
            texts[side] = part.text
        contexts += len(tokenizer.encode(part.text.strip())) if part.role == "context" else 0
    question, answer = (released_text.insert_images(*both) for both in zip(texts, images, strict=True))
    if prompt:
        ids = released_text.encode_segments(tokenizer, question, num_latents=num_latents)
        weights, question_length = [0.0] * len(ids), len(ids)
    else:
        keys = [texts[1][begin:end] for begin, end in terms.find(texts[1])]
        full = released_text.released_text(tokenizer, question, answer, keys, num_latents=num_latents, max_tokens=2**31)
        ids, weights, question_length = full.ids, full.weights, full.question_length
    cut: Counter[str] = Counter()
    if len(ids) > max_tokens:
        ids, weights, cut = shorten_released(
            sample, tokenizer, ids, weights, question_length, contexts, max_tokens, prompt
        )
    latents = [t - tokenizer.image_id - 2 for t in ids]  # negative for text and marks
    present = list(dict.fromkeys(n // num_latents for n in latents if n >= 0))
    visual = [(i, present.index(n // num_latents)) for i, n in enumerate(latents) if n >= 0 and n % num_latents == 0]
    ids = [t if n < 0 else 0 for t, n in zip(ids, latents, strict=True)]
    scans = list(scans)
    kept = tuple(scans[n] for n in present)
    encoded = _to_arrays(tokenizer, ids, weights, visual, num_latents, kept, cut, dropped + len(scans) - len(kept))
    encoded.key_ok[-1] = prompt
    return encoded


def _inside_text(parts: Sequence[Text | Scan], i: int) -> bool:
    """Return whether a scan is in the middle of a context or an instruction, where the loader never inserts one."""
    before = next((p.role for p in reversed(parts[:i]) if isinstance(p, Text)), None)
    after = next((p.role for p in parts[i + 1 :] if isinstance(p, Text)), None)
    return before == after and before not in (None, *TRAINED)


def _to_arrays(tokenizer, ids, weights, visual, num_latents, scans, cut: Counter[str], dropped: int) -> Encoded:
    """Shift tokens and their weights by one position to targets, and fill the visual slots.

    `visual` has the position of the first latent and the scan index of every scan mark.
    """
    t = len(ids)
    ids = np.array(ids, np.int32)
    targets, shifted = np.zeros(t, np.int32), np.zeros(t, np.float32)
    targets[:-1] = ids[1:]
    targets[targets >= tokenizer.vocab_size] = 0
    shifted[:-1] = weights[1:]
    slots = np.full((t, 2), -1, np.int32)
    for position, number in visual:
        slots[position : position + num_latents, 0] = number
        slots[position : position + num_latents, 1] = np.arange(num_latents)
    removed = cut["context"], cut["instruction"], cut["response"], dropped
    return Encoded(ids, targets, shifted, slots, np.ones(t, bool), scans, *removed)
