"""One batch of prompts while its answers are generated."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from radfm_jax.inference import decoding
from radfm_jax.inference.answer_text import AnswerText
from radfm_jax.inference.requests import Answer, Prompt
from radfm_jax.inference.sampling import Sampling
from radfm_jax.runtime import sharding

if TYPE_CHECKING:
    from radfm_jax.inference.engine import Generator

# The smallest buckets.
PROMPT_TOKENS, CACHE_LENGTH, SCANS = 64, 256, 4


def bucket(size: int, minimum: int = 1) -> int:
    """Return the smallest of minimum, 2 minimum, 4 minimum ... that is at least `size`."""
    while minimum < size:
        minimum *= 2
    return minimum


class Batch:
    """A batch of prompts. The constructor prefills; then call `decode` and `answers` in turn until `finished`.

    Raises ValueError if a prompt or a stop id is invalid.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        watch: tuple[int, ...],
    ):
        config = generator.config
        lengths = [len(p.ids) for p in prompts]
        limits = [generator.token_limit(p, sampling, f"prompt {i}") for i, p in enumerate(prompts, 1)]
        longest = max(map(operator.add, lengths, limits))
        self.cache_length = min(bucket(longest, CACHE_LENGTH), generator.length)
        self.stop_ids = _stop_ids(generator, sampling)
        self.generator = generator
        sample, penalise = sampling.temperature > 0, sampling.repetition_penalty != 1
        choice = decoding.sampling_arrays(sampling, self.stop_ids, watch)
        arrays = self._arrays(prompts, lengths, limits)
        # The key data of jax.random.key(seed).
        arrays["keys"][: len(prompts), 1] = sampling.seed + np.arange(len(prompts)) if seeds is None else seeds
        with generator.on_mesh():
            prompt = generator.device_put(arrays) | {"visual": self._visual(prompts, len(arrays["ids"]))}
            params = generator.decode_params
            self.state = decoding.first_token(config, self.cache_length, sample, penalise, params, prompt, choice)
        self._decode = functools.partial(decoding.more_tokens, config, sample, penalise, params)
        tokenizer = generator.tokenizer
        self.texts = [AnswerText(tokenizer, sampling.stop) if tokenizer else None for _ in prompts]
        self.tokens_read = [0] * len(prompts)
        self.row_finished = [False] * len(prompts)

    def _arrays(self, prompts: Sequence[Prompt], lengths: list[int], limits: list[int]) -> dict[str, np.ndarray]:
        rows = self.generator.row_bucket(len(prompts))
        t = min(bucket(max(lengths), PROMPT_TOKENS), self.cache_length)
        arrays = {
            "ids": np.zeros((rows, t), np.int32),
            "visual_index": np.full((rows, t), -1, np.int32),
            "lengths": np.ones(rows, np.int32),
            "limit": np.zeros(rows, np.int32),
            "keys": np.zeros((rows, 2), np.uint32),
        }
        for i, p in enumerate(prompts):
            arrays["ids"][i, : lengths[i]], arrays["visual_index"][i, : lengths[i]] = p.ids, p.visual_index
        arrays["lengths"][: len(prompts)], arrays["limit"][: len(prompts)] = lengths, limits
        return arrays

    def _visual(self, prompts: Sequence[Prompt], rows: int) -> jax.Array:
        """Return the visual tokens [rows, S, L, E], zeros in empty slots."""
        config, mesh = self.generator.config, self.generator.mesh
        slots = bucket(max(0 if p.visual is None else len(p.visual) for p in prompts), SCANS)
        empty = np.zeros((slots, config.num_latents, config.llama.width), config.llama.dtype)
        visual = [empty if p.visual is None else _padded(p.visual, slots) for p in prompts]
        visual = jnp.stack(visual + [empty] * (rows - len(prompts)))
        return visual if mesh is None else jax.device_put(visual, sharding.batch_sharding(mesh))

    def decode(self, chunk: int | None) -> None:
        """Add up to `chunk` tokens to each answer; None: until all answers end."""
        stop = np.zeros(len(self.state["done"]), bool)
        stop[: len(self.row_finished)] = self.row_finished
        steps = np.int32(self.cache_length if chunk is None else chunk)
        with self.generator.on_mesh():
            self.state = self._decode(self.state, steps, self.generator.device_put({"stop": stop})["stop"])

    def answers(self) -> tuple[list[str], list[Answer]]:
        """Return the new piece of text of each row, and the answers so far. Updates `finished`."""
        names = ("out", "logprob", "count", "done", "failed", "watched")
        state = jax.device_get({name: self.state[name] for name in names})
        pieces, answers = [], []
        for i, text in enumerate(self.texts):
            count, done, failed = int(state["count"][i]), bool(state["done"][i]), bool(state["failed"][i])
            ids = state["out"][i, :count].tolist()
            at_stop_id = done and bool(ids) and ids[-1] in self.stop_ids
            piece = ""
            if text is not None and not self.row_finished[i]:
                piece = text.add(ids[self.tokens_read[i] : count - 1 if at_stop_id else count])
                if done and not failed:
                    piece += text.finish()
            self.tokens_read[i] = count
            stopped = text is not None and text.stopped
            self.row_finished[i] |= done or stopped
            pieces.append("" if failed else piece)
            written, error = "" if text is None else text.text, ""
            if failed:
                ended, written = "failed", ""
                error = f"the logits of token {count + 1} of answer {i + 1} are not finite: there is no answer"
            elif stopped:
                ended, ids = "stop text", text.ids
            else:
                ended = "stop id" if at_stop_id else "length" if done else ""
            logprobs, watched = state["logprob"][i, : len(ids)].tolist(), state["watched"][i].tolist()
            answers.append(Answer(written, tuple(ids), tuple(logprobs), ended, error, tuple(watched)))
        self.finished = all(self.row_finished)
        return pieces, answers


def _stop_ids(generator: Generator, sampling: Sampling) -> tuple[int, ...]:
    ids, vocabulary = sampling.stop_ids, generator.config.llama.vocab_size
    if ids is None:
        return generator.stop_ids
    if invalid := [i for i in ids if not 0 <= i < vocabulary]:
        raise ValueError(f"stop_ids contains {invalid[0]}: token ids run from 0 to {vocabulary - 1}")
    return ids


def _padded(tokens: jax.Array | np.ndarray, slots: int) -> jax.Array | np.ndarray:
    """Pad visual tokens [S, L, E] with zeros to `slots` scans; host arrays stay on the host."""
    if len(tokens) == slots:
        return tokens
    return (np if isinstance(tokens, np.ndarray) else jnp).pad(tokens, ((0, slots - len(tokens)), (0, 0), (0, 0)))
