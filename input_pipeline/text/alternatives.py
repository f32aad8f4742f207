"""Samples with several answers, each in a segment of its own with the prompt; all segments share the scans.

    Pair()              | prompt chosen </s> | prompt rejected </s> |
    Group(3, room=4)    | prompt . . . .     | prompt . . . .       | prompt . . . . |     . is filled by generation

The segments of a sample follow each other in one row, so its scans are loaded and encoded once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np

from input_pipeline.samples import RowError, Sample, Text
from input_pipeline.text.shorten import TooLong
from input_pipeline.text.tokens import Encoded

Encode = Callable[..., Encoded]  # tokens.encode without the arguments sample, max_tokens, rng and prompt


@dataclasses.dataclass(frozen=True)
class Pair:
    """The response of a sample, then its rejected answer. Pair k of a row (from 1) has the segments 2k - 1 and 2k."""

    def encode(self, sample: Sample, encode: Encode, max_tokens: int, rng: np.random.Generator) -> Encoded:
        """Return both segments. Raises RowError if there is no pair, it has one answer twice, or it is too long."""
        if sample.rejected is None:
            raise _error(sample, "it has no `rejected` answer", "write `chosen` and `rejected`, or remove the row")
        rejected = dataclasses.replace(sample, parts=(*sample.parts[:-1], Text(sample.rejected, "response")))
        # Both choose the same scans, if there are too many.
        pair = [encode(one, max_tokens=max_tokens, rng=copy.deepcopy(rng)) for one in (sample, rejected)]
        tokens = sum(len(one.ids) for one in pair)
        # A longer answer would leave less of the prompt, and the two answers would have different prompts.
        if tokens > max_tokens or any(one.cut_context + one.cut_instruction + one.cut_response for one in pair):
            raise _error(
                sample,
                f"its prompt with each of the two answers has at least {tokens} tokens, and a row {max_tokens}",
                "increase data.text_length, or shorten the context or the answers",
            )
        if np.array_equal(pair[0].ids, pair[1].ids):
            raise _error(sample, "chosen and rejected are the same tokens", "write two different answers")
        return joined(pair)


@dataclasses.dataclass(frozen=True)
class Group:
    """`size` copies of the prompt of a sample, each with `room` free positions for an answer.

    The free positions have id 0, and the positions that predict them have weight 1.
    """

    size: int
    room: int

    def encode(self, sample: Sample, encode: Encode, max_tokens: int, rng: np.random.Generator) -> Encoded:
        """Return all segments. A long prompt is cut as in tokens.encode.

        Raises RowError if there is no question, or if the answers leave no room for it.
        """
        if any(isinstance(part, Text) and part.role == "interleaved" for part in sample.parts):
            raise _error(sample, "interleaved text has no question to answer", "remove its source from this run")
        prompt = dataclasses.replace(sample, parts=sample.parts[: len(sample.parts) - _answer_parts(sample)])
        try:
            one = encode(prompt, max_tokens=max_tokens // self.size - self.room, rng=rng, prompt=True)
        except TooLong as error:
            raise _error(
                sample,
                f"{error.reason} tokens: a row of {max_tokens} has {self.size} copies with {self.room} for an answer",
                "increase data.text_length, or lower grpo.group or grpo.max_new_tokens",
            ) from None
        return joined([self._with_room(one)] * self.size)

    def _with_room(self, prompt: Encoded) -> Encoded:
        t, room = len(prompt.ids), self.room
        weights = np.zeros(t + room, np.float32)
        weights[t - 1 : -1] = 1
        return dataclasses.replace(
            prompt,
            ids=np.pad(prompt.ids, (0, room)),
            targets=np.zeros(t + room, np.int32),
            weights=weights,
            visual=np.pad(prompt.visual, ((0, room), (0, 0)), constant_values=-1),
            key_ok=np.pad(prompt.key_ok, (0, room), constant_values=True),
        )

    def reference(self, sample: Sample) -> str:
        """Return the answer of the row, with which generated answers are compared."""
        answer = sample.parts[len(sample.parts) - _answer_parts(sample) :]
        return " ".join(part.text.strip() for part in answer if isinstance(part, Text))


Form = Pair | Group


def joined(segments: list[Encoded]) -> Encoded:
    """Return segments that show the same scans as one Encoded."""
    assert all(one.scans == segments[0].scans for one in segments), "the segments show different scans"
    arrays = {
        name: np.concatenate([getattr(one, name) for one in segments])
        for name in ("ids", "targets", "weights", "visual", "key_ok")
    }
    starts = np.cumsum([0, *(len(one.ids) for one in segments[:-1])])
    return dataclasses.replace(segments[0], **arrays, starts=tuple(starts.tolist()))


def _answer_parts(sample: Sample) -> int:
    """Return the number of parts at the end of a sample that are its last answer."""
    count = 0
    for part in reversed(sample.parts):
        if not isinstance(part, Text) or part.role != "response":
            break
        count += 1
    return count


def _error(sample: Sample, reason: str, remedy: str) -> RowError:
    return RowError(sample.dataset, sample.row_id, reason, remedy)
