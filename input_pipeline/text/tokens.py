"""Sample -> ids, targets, weights and visual slots of one packed segment.

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
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from input_pipeline.samples import RowError, Sample, Scan, Text
from input_pipeline.text import released_text
from input_pipeline.text.terms import TermFinder
from input_pipeline.text.tokenizer import Tokenizer

Mode = Literal["paper", "released"]
MODES: tuple[str, ...] = Mode.__args__
TERM_WEIGHT = released_text.TERM_WEIGHT
TRAINED = ("response", "interleaved")
# Of an instruction that is too long, the last tokens are kept: the question stands at its end.
INSTRUCTION_FLOOR = 64


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as the packer takes it; drawn at the head of this file.

    Attributes:
      ids: int32[t]; 0 where a latent stands.
      targets: int32[t], the token that a position should predict; 0 where that is no text.
      weights: float32[t] of the targets: 3 medical term, 1 other trained text and EOS, 0 everything else.
      visual: int32[t, 2], (number in `scans`, latent) or (-1, -1).
      key_ok: bool[t], whether later tokens of the sample may attend to this one.
      scans: distinct scans in the order of their first mark.
      cut_context, cut_instruction, cut_response: text tokens left out since the sample was too long (interleaved text
        counts as response).
      dropped_scans: distinct scans left out: more than `max_scans`, or all their marks in text that was cut.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    visual: np.ndarray
    key_ok: np.ndarray
    scans: tuple[Scan, ...]
    cut_context: int = 0
    cut_instruction: int = 0
    cut_response: int = 0
    dropped_scans: int = 0


def encode(
    sample: Sample,
    tokenizer: Tokenizer,
    terms: TermFinder,
    *,
    max_scans: int,
    num_latents: int = 32,
    max_tokens: int = 2048,
    mode: Mode = "paper",
    rng: np.random.Generator | None = None,
    prompt: bool = False,
) -> Encoded:
    """Tokens of a sample (section 4.1 of the paper, equations 3 and 4).

    BOS, then the parts in reading order, a scan as `<image>`, its latents, `</image>`. White space between parts is
    `_join`. EOS ends every answer and the interleaved text, and is trained on.

    A sample longer than `max_tokens` loses, in this order and no more than needed: the beginning of its contexts (the
    first one first), the beginning of its instructions down to the last 64 tokens, the end of its last answer or
    interleaved text, scans in that end included, EOS kept. Cuts are on tokens, moved to a word's start if one is near.

    Args:
      max_scans: most distinct scans. Of more, `rng` chooses which stay; the marks of the others are removed.
      mode: `paper`, or `released`: the layout that the released weights were trained with (released_text.py; when it
        is too long the beginning of question, then the end of the answer is cut, instead of losing the answer).
      prompt: the sample has no answer and is to be continued: no EOS, no weights.
    Raises:
      RowError: nothing to train on, nothing to answer, or it does not fit; text that is not valid Unicode.
      ValueError: an unknown mode; more than `max_scans` scans and no rng.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    parts, dropped = _choose_scans(sample, max_scans, rng)
    trained = any(isinstance(p, Text) and p.role in TRAINED for p in parts)
    if prompt and trained:
        raise _row_error(sample, "a prompt has a response already", "leave the response out")
    if not prompt and not trained:
        raise _row_error(sample, "no response and no interleaved text: nothing to train on", "fill the response")
    if not any(isinstance(p, Text) for p in parts):
        raise _row_error(sample, "no text", "write an instruction")
    layout = _paper if mode == "paper" else _released
    try:
        return layout(sample, parts, dropped, tokenizer, terms, num_latents, max_tokens, prompt)
    except RowError:
        raise
    except ValueError as error:
        raise _row_error(sample, str(error)) from error


def _row_error(sample: Sample, reason: str, remedy: str = "") -> RowError:
    return RowError(sample.dataset, sample.row_id, reason, remedy)


def _does_not_fit(sample: Sample, tokens: int, marks: int, max_tokens: int) -> RowError:
    return _row_error(
        sample,
        f"{tokens} tokens, {marks} scans among them, do not fit into {max_tokens}",
        "allow fewer scans or more tokens (data.max_scans, data.text_length)",
    )


def _choose_scans(sample: Sample, max_scans: int, rng: np.random.Generator | None) -> tuple[list[Text | Scan], int]:
    """Parts with at most `max_scans` distinct scans and no blank texts, and how many scans that left out."""
    distinct = list(dict.fromkeys(sample.scans))
    parts = [p for p in sample.parts if isinstance(p, Scan) or p.text.strip()]
    if len(distinct) <= max_scans:
        return parts, 0
    if rng is None:
        raise ValueError(f"{sample.dataset}, row {sample.row_id}: {len(distinct)} scans, {max_scans} allowed: pass rng")
    kept = {distinct[i] for i in rng.choice(len(distinct), max_scans, replace=False)}
    return [p for p in parts if isinstance(p, Text) or p in kept], len(distinct) - max_scans


# --- White space between parts ---

_CLOSING = re.compile(r"[)\]},;?!%]|[.:](?!\d)")
_OPENING = ("(", "[", "{")


def _join(left: str | None, right: str) -> str:
    """What stands between a text (None: a scan or the beginning) and the text after it: the one place that says so.

    White space of both sides is replaced by one space, by their line ends if they have any, by nothing before closing
    punctuation ("<image-1>, which", "fracture" + "?") and after an opening bracket. Beside a scan white space says
    nothing and is dropped.
    """
    if left is not None:
        space = left[len(left.rstrip()) :] + right[: len(right) - len(right.lstrip())]
        if lines := space.replace("\r\n", "\n").count("\n"):
            return "\n" * lines
        if left.rstrip().endswith(_OPENING):
            return ""
    return "" if _CLOSING.match(right.lstrip()) else " "


# --- The layout of the paper ---


@dataclasses.dataclass
class _Block:
    """One part as tokens: a text of one role, a scan, or an EOS."""

    role: str  # context, instruction, response, interleaved, scan, eos
    ids: list[int]
    weights: list[float] | None = None  # None: zeros
    scan: Scan | None = None


def _paper(sample, parts, dropped, tokenizer, terms, num_latents, max_tokens, prompt) -> Encoded:
    blocks = _blocks(parts, tokenizer, terms, num_latents, prompt)
    over = 1 + sum(len(block.ids) for block in blocks) - max_tokens
    cut = {"context": 0, "instruction": 0, "response": 0}
    if over > 0:
        before = {b.scan for b in blocks} - {None}
        cut = _shorten(sample, blocks, over, tokenizer, max_tokens)
        dropped += len(before - {b.scan for b in blocks})
    ids, weights, visual, scans = [tokenizer.bos_id], [0.0], [], {}
    for block in blocks:
        if block.scan is not None:
            visual.append((len(ids) + 1, scans.setdefault(block.scan, len(scans))))
        ids += block.ids
        weights += block.weights or [0.0] * len(block.ids)
    return _arrays(tokenizer, ids, weights, visual, num_latents, tuple(scans), cut, dropped)


def _blocks(parts, tokenizer: Tokenizer, terms: TermFinder, num_latents: int, prompt: bool) -> list[_Block]:
    mark = [tokenizer.image_id, *[0] * num_latents, tokenizer.image_end_id]
    last_text = max(i for i, p in enumerate(parts) if isinstance(p, Text))
    blocks: list[_Block] = []
    end_of_answer = None  # where the EOS of the answer begun goes: behind its last text
    left: str | None = None  # the text before, if no scan stands between
    for i, part in enumerate(parts):
        if isinstance(part, Scan):
            blocks.append(_Block("scan", mark, scan=part))
            left = None
            continue
        if part.role not in TRAINED and end_of_answer is not None:
            blocks.insert(end_of_answer, _Block("eos", [tokenizer.eos_id], [1.0]))
            end_of_answer, left = None, None
        between = _join(left, part.text)
        following = parts[i + 1] if i + 1 < len(parts) else None
        text = part.text.strip()
        if isinstance(following, Text) and not (part.role in TRAINED and following.role not in TRAINED):
            lines = _join(part.text, following.text)
        else:
            # What continues a prompt stands where the response stood in training.
            lines = _join(part.text, "x") if prompt and i == last_text and following is None else ""
        text += lines.strip(" ")
        # A line end stands at the end of the text before it.
        starts_word = between == " "
        if part.role in TRAINED:
            ids, weights = _weighted(text, starts_word, tokenizer, terms)
            blocks.append(_Block(part.role, ids, weights))
            end_of_answer = len(blocks)
        else:
            blocks.append(_Block(part.role, tokenizer.encode(text, starts_word=starts_word)))
        left = part.text
    if end_of_answer is not None:
        blocks.append(_Block("eos", [tokenizer.eos_id], [1.0]))
    return blocks


def _weighted(text: str, starts_word: bool, tokenizer: Tokenizer, terms: TermFinder) -> tuple[list[int], list[float]]:
    """Ids and weights: 3 for every piece that shares a character with a term."""
    ids, offsets = tokenizer.encode_with_offsets(text, starts_word=starts_word)
    weights = [1.0] * len(ids)
    i = 0
    for begin, end in terms.find(text):
        while i < len(ids) and offsets[i][1] <= begin:
            i += 1
        j = i
        while j < len(ids) and offsets[j][0] < end:
            # An empty piece is the mark of a word's start alone.
            if offsets[j][1] > begin and offsets[j][0] < offsets[j][1]:
                weights[j] = TERM_WEIGHT
            j += 1
    return ids, weights


def _shorten(sample: Sample, blocks: list[_Block], over: int, tokenizer: Tokenizer, max_tokens: int) -> dict[str, int]:
    """Takes `over` tokens or somewhat more from the blocks, in place; says how many of which role."""
    cut = {"context": 0, "instruction": 0, "response": 0}
    for role in ("context", "instruction"):
        texts = [b for b in blocks if b.role == role]
        keep = 0 if role == "context" else INSTRUCTION_FLOOR
        spare = sum(len(b.ids) for b in texts) - keep
        for block in texts:
            if over <= 0 or spare <= 0:
                break
            gone = tokenizer.word_after(block.ids, min(over, spare, len(block.ids)))
            if gone > spare:
                gone = min(over, spare)
            del block.ids[:gone]
            cut[role] += gone
            over -= gone
            spare -= gone
    if over > 0:
        cut["response"] = _shorten_answer(sample, blocks, over, tokenizer, max_tokens)
    return cut


def _shorten_answer(sample: Sample, blocks: list[_Block], over: int, tokenizer: Tokenizer, max_tokens: int) -> int:
    """Cuts the last answer or interleaved text at its end, EOS kept."""
    total = 1 + sum(len(b.ids) for b in blocks)
    too_long = _does_not_fit(sample, total, sum(b.role == "scan" for b in blocks), max_tokens)
    eos = next((i for i in range(len(blocks) - 1, -1, -1) if blocks[i].role == "eos"), None)
    if eos is None:
        raise too_long
    first = eos
    while first > 0 and blocks[first - 1].role in (*TRAINED, "scan"):
        first -= 1
    while blocks[first].role == "scan":  # scans before an answer's first word belong to the question
        first += 1
    cut, i = 0, eos - 1
    while over > 0:
        block = blocks[i]
        if block.role == "scan" or (len(block.ids) <= over and i > first):
            del blocks[i]
            cut += 0 if block.role == "scan" else len(block.ids)
            over -= len(block.ids)
            i -= 1
            continue
        kept = len(block.ids) - over
        if kept > 0:
            kept = tokenizer.word_before(block.ids, kept) or kept
        if kept <= 0 or i < first:
            raise too_long
        cut += len(block.ids) - kept
        over = 0
        del block.ids[kept:], block.weights[kept:]
    return cut


def _arrays(tokenizer, ids, weights, visual, num_latents, scans, cut, dropped, key_ok=None) -> Encoded:
    """Lists of tokens and their own weights -> arrays whose targets and weights are those of the next token."""
    t = len(ids)
    ids = np.array(ids, np.int32)
    targets, shifted = np.zeros(t, np.int32), np.zeros(t, np.float32)
    targets[:-1] = ids[1:]
    targets[targets >= tokenizer.vocab_size] = 0
    shifted[:-1] = weights[1:]
    slots = np.full((t, 2), -1, np.int32)
    for at, number in visual:
        slots[at : at + num_latents, 0] = number
        slots[at : at + num_latents, 1] = np.arange(num_latents)
    return Encoded(
        ids,
        targets,
        shifted,
        slots,
        np.ones(t, bool) if key_ok is None else key_ok,
        scans,
        cut["context"],
        cut["instruction"],
        cut["response"],
        dropped,
    )


# --- The layout of the released code ---


def _released(sample, parts, dropped, tokenizer, terms, num_latents, max_tokens, prompt) -> Encoded:
    texts, images, scans = ["", ""], ([], []), {}  # of question and answer
    side = contexts = 0
    for part in parts:
        if isinstance(part, Scan):
            texts[side] = texts[side].rstrip()
            images[side].append((len(texts[side]), scans.setdefault(part, len(scans))))
            continue
        if part.role in TRAINED:
            side = 1
        elif side == 1:
            raise _row_error(sample, "the released layout has one question and one answer", "use mode 'paper'")
        if texts[side]:
            texts[side] = texts[side].rstrip() + _join(texts[side], part.text) + part.text.lstrip()
        else:
            texts[side] = part.text
        contexts += len(tokenizer.encode(part.text.strip())) if part.role == "context" else 0
    question, answer = (released_text.insert_images(*both) for both in zip(texts, images, strict=True))
    if prompt:
        ids = released_text.encode_segments(tokenizer, question, num_latents=num_latents)
        weights, question_length = [0.0] * len(ids), len(ids)
    else:
        keys = [texts[1][begin:end] for begin, end in terms.find(texts[1])]
        whole = released_text.released_text(
            tokenizer, question, answer, keys, num_latents=num_latents, max_tokens=2**31
        )
        ids, weights, question_length = whole.ids, whole.weights, whole.question_length
    cut = {"context": 0, "instruction": 0, "response": 0}
    if len(ids) > max_tokens:
        ids, weights, cut = _shorten_released(
            sample, tokenizer, ids, weights, question_length, contexts, max_tokens, prompt
        )
    numbers = [t - tokenizer.image_id - 2 for t in ids]
    present = dict.fromkeys(n // num_latents for n in numbers if n >= 0)
    order = {number: i for i, number in enumerate(present)}
    visual = [(i, order[n // num_latents]) for i, n in enumerate(numbers) if n >= 0 and n % num_latents == 0]
    by_number = list(scans)
    key_ok = np.ones(len(ids), bool)
    key_ok[-1] = prompt
    return _arrays(
        tokenizer,
        [t if n < 0 else 0 for t, n in zip(ids, numbers, strict=True)],
        list(weights),
        visual,
        num_latents,
        tuple(by_number[n] for n in present),
        cut,
        dropped + len(scans) - len(present),
        key_ok,
    )


def _shorten_released(sample, tokenizer, ids, weights, question_length, contexts, max_tokens, prompt):
    """Cuts the beginning of the question, contexts being there, then the end of the answer; EOS stays.

    Args:
      contexts: tokens of the question that are context.
    """
    is_text = [i for i in range(1, question_length) if ids[i] < tokenizer.vocab_size]
    spare = max(min(contexts, len(is_text)), len(is_text) - INSTRUCTION_FLOOR)
    gone = min(len(ids) - max_tokens, spare)
    gone = min(tokenizer.word_after([ids[i] for i in is_text], gone), max(spare, gone))
    over = len(ids) - max_tokens - gone
    end = len(ids) - (0 if prompt else 1)
    if over > 0:
        end -= over
        while end > question_length and ids[end] < tokenizer.vocab_size and tokenizer.continues_character(ids[end]):
            end -= 1
        while end > question_length and tokenizer.image_id <= ids[end - 1] != tokenizer.image_end_id:
            end -= 1  # a scan that was cut in two
    if over > 0 and (prompt or not any(weights[question_length : max(end, 0)])):
        marks = sum(t == tokenizer.image_id for t in ids)
        raise _does_not_fit(sample, len(ids), marks, max_tokens)
    left_out = set(is_text[:gone])
    kept = [i for i in range(end) if i not in left_out] + ([] if prompt else [len(ids) - 1])
    cut = {
        "context": min(gone, contexts),
        "instruction": gone - min(gone, contexts),
        "response": sum(t < tokenizer.vocab_size for t in ids[end : len(ids) - 1]) if over > 0 else 0,
    }
    return [ids[i] for i in kept], [weights[i] for i in kept], cut


# --- Templates ---

_MARK = re.compile(r"<image-([0-9]+)>")


def parse_marks(text: str | Sequence[str], n_scans: int) -> list:
    """`<image-i>` marks of a template -> texts and scan numbers (from 0) in reading order.

    For JSONL and `--prompt` only: the same letters in the text of a data set are text. Marks may stand in any order and
    more than once.

        "<image-2> Compare with <image-1>." -> [1, " Compare with ", 0, "."]

    Args:
      text: one template, or several that share their scans (context, instruction, response): a list for each then.
    Raises:
      ValueError: a mark without a scan, or a scan without a mark; all of them are named.
    """
    templates = [text] if isinstance(text, str) else list(text)
    parsed, unknown, used = [], [], set()
    for template in templates:
        parts: list[str | int] = []
        end = 0
        for match in _MARK.finditer(template):
            # Compared as text first: a number of a thousand digits is no scan, and slow to read.
            digits = match[1].lstrip("0")
            if not digits or len(digits) > 9 or int(digits) > n_scans:
                unknown.append(match[0] if len(match[0]) < 30 else match[0][:27] + "...")
                continue
            if template[end : match.start()]:
                parts.append(template[end : match.start()])
            parts.append(int(digits) - 1)
            used.add(int(digits))
            end = match.end()
        if template[end:]:
            parts.append(template[end:])
        parsed.append(parts)
    problems = []
    if unknown:
        known = {0: "no scans are given", 1: "the only mark is <image-1>"}
        run = known.get(n_scans, f"marks run from <image-1> to <image-{n_scans}>")
        problems.append(f"no scan for {', '.join(unknown)} ({run})")
    if missing := [f"<image-{i}>" for i in range(1, n_scans + 1) if i not in used]:
        problems.append(f"{n_scans} scan{'s' if n_scans > 1 else ''}, but no mark {', '.join(missing)}")
    if problems:
        raise ValueError("; ".join(problems))
    return parsed[0] if isinstance(text, str) else parsed
