"""Inputs and outputs of generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from input_pipeline.images.planes import Volume
from radfm_jax.inference import inputs


class GenerationError(ValueError):
    """A prompt has no answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedScans:
    """Visual tokens of the scans of a prompt. They replace the scans in any number of requests."""

    tokens: jax.Array  # float[S, L, E] on the device, zeros after the last scan
    names: tuple[str, ...] = ()  # names of the scans, for messages
    volumes: tuple[Volume, ...] = ()  # the prepared volumes
    adapter: str = ""  # the one of `Model.adapters` that encoded them; "": the model itself

    def __len__(self) -> int:
        return len(self.names)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt as text and scans; see `inputs.encode_prompt`."""

    prompt: str
    scans: Sequence[inputs.Scan] | EncodedScans = ()
    context: str = ""
    place: str = "first"
    system: str = ""
    history: Sequence[tuple[str, str]] = ()  # earlier questions and answers
    adapter: str = ""  # name of one of `Model.adapters`; "": the model itself

    def __post_init__(self):
        if not isinstance(self.scans, EncodedScans | list | tuple):
            raise ValueError(f"scans are a {type(self.scans).__name__}: pass a list of paths or arrays")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as tokens."""

    ids: np.ndarray  # int32[t]; V and V + 1 are `<image>` and `</image>`
    visual_index: np.ndarray  # int32[t], slot * L + latent at a visual token, -1 elsewhere
    visual: jax.Array | None = None  # float[S, L, E], the visual tokens of each slot; None without scans


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one prompt; log probabilities are natural, before temperature and the other sampling options."""

    text: str  # stripped of white space; "" after a failure or without a tokenizer
    ids: tuple[int, ...]  # tokens, including the stop token
    logprobs: tuple[float, ...]  # log probability of each token
    ended: str  # `stop id`, `stop text`, `length` or `failed`; "" while it is being generated
    error: str = ""  # why there is no answer; "" if there is one
    watched: tuple[float, ...] = ()  # log probability of each watched token at the first position


def suspicious(answer: Answer) -> str | None:
    """Return why an answer looks like that of an untrained or wrongly converted model, or None."""
    tokens = answer.ids[:-1] if answer.ended == "stop id" else answer.ids
    if not tokens:
        return "the answer is empty: its first token was the end of text"
    if len(tokens) > 2 and len(set(tokens)) == 1:
        return f"the answer repeats one token {len(tokens)} times: the model may be untrained for such prompts"
    return None


def require_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers. Raises GenerationError that lists every failure."""
    if errors := [answer.error for answer in answers if answer.error]:
        raise GenerationError("; ".join(errors))
    return list(answers)
