"""Shorten samples that are longer than a row."""

from __future__ import annotations

from collections import Counter

from input_pipeline.samples import RowError, Sample
from input_pipeline.text.blocks import TRAINED, Block
from input_pipeline.text.tokenizer import Tokenizer

# Number of last tokens to keep of an instruction that is too long. The question is at its end.
INSTRUCTION_FLOOR = 64


class TooLong(RowError):
    """A sample that is longer than a row, even without the texts that may be shortened."""


def does_not_fit(sample: Sample, tokens: int, marks: int, max_tokens: int) -> TooLong:
    reason = f"{tokens} tokens, including {marks} scans, do not fit into {max_tokens}"
    remedy = "allow fewer scans or more tokens (data.max_scans, data.text_length)"
    return TooLong(sample.dataset, sample.row_id, reason, remedy)


def shorten_blocks(
    sample: Sample, blocks: list[Block], excess: int, tokenizer: Tokenizer, max_tokens: int
) -> Counter[str]:
    """Remove at least `excess` tokens, and few more, from the blocks in place. Returns the number removed per role."""
    cut: Counter[str] = Counter()
    for role in ("context", "instruction"):
        texts = [b for b in blocks if b.role == role]
        floor = 0 if role == "context" else INSTRUCTION_FLOOR
        spare = sum(len(b.ids) for b in texts) - floor
        for block in texts:
            if excess <= 0 or spare <= 0:
                break
            count = tokenizer.word_after(block.ids, min(excess, spare, len(block.ids)))
            count = count if count <= spare else min(excess, spare)
            del block.ids[:count]
            cut[role] += count
            excess -= count
            spare -= count
    if excess > 0:
        cut["response"] = _shorten_answer(sample, blocks, excess, tokenizer, max_tokens)
    return cut


def _shorten_answer(sample: Sample, blocks: list[Block], excess: int, tokenizer: Tokenizer, max_tokens: int) -> int:
    """Remove the end of the last answer or interleaved text, but keep its EOS. Returns the number of tokens removed."""
    total = sum(len(b.ids) for b in blocks)
    too_long = does_not_fit(sample, total, sum(b.role == "scan" for b in blocks), max_tokens)
    eos = next((i for i in range(len(blocks) - 1, -1, -1) if blocks[i].role == "eos"), None)
    if eos is None:
        raise too_long
    first = eos
    while first > 0 and blocks[first - 1].role in (*TRAINED, "scan"):
        first -= 1
    while blocks[first].role == "scan":  # scans before the first word of an answer belong to the question
        first += 1
    cut, i = 0, eos - 1
    while excess > 0:
        block = blocks[i]
        if block.role == "scan" or (len(block.ids) <= excess and i > first):
            del blocks[i]
            cut += 0 if block.role == "scan" else len(block.ids)
            excess -= len(block.ids)
            i -= 1
            continue
        kept = len(block.ids) - excess
        if kept <= 0 or i < first:
            raise too_long
        kept = tokenizer.word_before(block.ids, kept) or kept
        cut += len(block.ids) - kept
        excess = 0
        del block.ids[kept:], block.weights[kept:]
    return cut


def shorten_released(
    sample: Sample,
    tokenizer: Tokenizer,
    ids: list[int],
    weights: list[float],
    question_length: int,
    contexts: int,  # tokens of the question that are context
    max_tokens: int,
    prompt: bool,
) -> tuple[list[int], list[float], Counter[str]]:
    """Remove the beginning of the question, which contains the contexts, then the end of the answer. EOS is kept.

    Returns ids, weights, and the number of tokens removed per role.
    """
    is_text = [i for i in range(1, question_length) if ids[i] < tokenizer.vocab_size]
    spare = max(min(contexts, len(is_text)), len(is_text) - INSTRUCTION_FLOOR)
    count = min(len(ids) - max_tokens, spare)
    count = min(tokenizer.word_after([ids[i] for i in is_text], count), max(spare, count))
    excess = len(ids) - max_tokens - count
    end = len(ids) - (0 if prompt else 1)
    if excess > 0:
        end -= excess
        while end > question_length and ids[end] < tokenizer.vocab_size and tokenizer.continues_character(ids[end]):
            end -= 1
        while end > question_length and tokenizer.image_id <= ids[end - 1] != tokenizer.image_end_id:
            end -= 1  # remove all of a scan that would be cut in two
        if prompt or not any(weights[question_length : max(end, 0)]):
            marks = sum(t == tokenizer.image_id for t in ids)
            raise does_not_fit(sample, len(ids), marks, max_tokens)
    removed = set(is_text[:count])
    kept = [i for i in range(end) if i not in removed] + ([] if prompt else [len(ids) - 1])
    cut = Counter(context=min(count, contexts), instruction=count - min(count, contexts))
    if excess > 0:
        cut["response"] = sum(t < tokenizer.vocab_size for t in ids[end : len(ids) - 1])
    return [ids[i] for i in kept], [weights[i] for i in kept], cut
