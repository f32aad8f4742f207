"""Answers that a step generates to the questions of its batch, and their rewards (train.objective="grpo").

    from the pipeline    | prompt . . . . | prompt . . . . |      alternatives.Group: . is room for an answer
    after `fill`         | prompt y e s / | prompt n o /   |      / ends the answer; unused room becomes padding
    advantages             0   0 1 1 1 1    0 -1 -1 -1            at the positions that predict the answer

The scans of a batch are encoded once. The visual tokens serve all answers, and the same planes train the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from input_pipeline.batching.report import RowInfo
from input_pipeline.sources import terms_of, tokenizer_of
from radfm_jax.inference import Answer, Generator, Prompt, Sampling, decoding, inputs
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.objectives import group_advantages
from radfm_jax.training.rewards import Rewards

TEXT = ("ids", "targets", "segments", "key_ok", "weights", "visual_index", "tasks")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The room for one answer: a segment [start, end) of row (micro-batch, row), whose answer begins at `room`."""

    row: tuple[int, int]
    start: int
    room: int
    end: int
    reference: str


class Rollouts:
    """Generates answers with the parameters of a step, and fills them into its batch.

    Raises:
      ValueError: the run has several processes, or a reward is not available. Generation needs all parameters in one
        process.
    """

    def __init__(self, config: Experiment, mesh: jax.sharding.Mesh):
        if jax.process_count() > 1:
            raise ValueError(
                f"train.objective='grpo' generates answers in one process, but there are {jax.process_count()}: start "
                "one process with all its devices"
            )
        self.config, self.mesh, self.options = config, mesh, config.grpo
        self.tokenizer = tokenizer_of(config.data)
        self.rewards = Rewards(config.grpo.reward, terms_of(config.data.terms, config.data.umls_types))
        self.preparation = inputs.Preparation.from_config(config.data)

    def fill(
        self, params: dict, arrays: dict, rows: Sequence[RowInfo | None], step: int
    ) -> tuple[dict[str, jax.Array], dict[str, float]]:
        """Return the batch [A, B, ...] with answers, and their mean metrics.

        The answers depend on (train.seed, step), the batch and the parameters alone, so a resumed run repeats them. The
        metrics are reward, equal_groups (share of groups without an advantage), answer_tokens and unfinished (share of
        answers that reached grpo.max_new_tokens).
        """
        options = self.options
        text = {name: np.array(jax.device_get(arrays[name])) for name in TEXT}
        slots = list(_slots(text, rows))
        sampling = Sampling(options.max_new_tokens, options.temperature, top_p=options.top_p)
        answers = self._answers(params, arrays, text, slots, sampling, _seeds(self.config.train.seed, step, len(slots)))
        rewards = self._reward(answers, slots).reshape(-1, options.group)
        advantages = group_advantages(rewards, options.scale)
        text |= {name: np.zeros_like(text["weights"]) for name in options.arrays}
        for slot, answer, advantage in zip(slots, answers, advantages.flat, strict=True):
            _insert(text, slot, answer, advantage)
        text["tasks"][text["segments"] == 0] = 0
        sharding = train_step.batch_sharding(self.mesh)
        filled = {name: jax.device_put(x, sharding) for name, x in text.items()}
        mean = lambda values: float(np.mean(values)) if slots else 0.0  # noqa: E731
        return arrays | filled, {
            "reward": mean(rewards),
            "equal_groups": mean(~advantages.any(axis=1)),
            "answer_tokens": mean([len(answer.ids) for answer in answers]),
            "unfinished": mean([answer.ended == "length" for answer in answers]),
        }

    def held_out(self, params: dict, arrays: dict, rows: Sequence[RowInfo | None]) -> dict[str, np.floating]:
        """Return sums over greedy answers to a validation batch: loss (1 - reward), reward and weight."""
        text = {name: np.array(jax.device_get(arrays[name])) for name in TEXT}
        slots = list(_slots(text, rows))
        answers = self._answers(params, arrays, text, slots, Sampling(self.options.max_new_tokens), [0] * len(slots))
        rewards = self._reward(answers, slots)
        return {
            "loss": np.float64(np.sum(1 - rewards)),
            "weight": np.float64(len(rewards)),
            "reward": np.float64(np.sum(rewards)),
        }

    def _reward(self, answers: Sequence[Answer], slots: Sequence[_Slot]) -> np.ndarray:
        return self.rewards([answer.text for answer in answers], [slot.reference for slot in slots])

    def _answers(
        self, params: dict, arrays: dict, text: dict, slots: Sequence[_Slot], sampling: Sampling, seeds: list[int]
    ) -> list[Answer]:
        """Generate the answers of all slots. A call has `generation_batch` prompts, so one program serves all calls."""
        one_device = self.mesh.devices.size == 1
        generator = Generator(
            self.config.compute, params, mesh=None if one_device else self.mesh, tokenizer=self.tokenizer,
            preparation=self.preparation, length=self.config.data.text_length,
        )  # fmt: skip
        prompts = self._prompts(generator, params, arrays, text, slots)
        size, answers = self.options.generation_batch, list[Answer]()
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            missing = size - len(prompts[part])
            answers += generator.answers(
                prompts[part] + prompts[-1:] * missing, sampling, seeds=seeds[part] + [0] * missing
            )[: size - missing]
        return answers

    def _prompts(
        self, generator: Generator, params: dict, arrays: dict, text: dict, slots: Sequence[_Slot]
    ) -> list[Prompt]:
        """Return the prompt of each slot, with the visual tokens of its own scans."""
        latents = self.config.model.num_latents
        visual = []  # [S, L, E] of each row of each micro-batch
        for micro in range(len(text["ids"])):
            with generator.on_mesh():
                batch = {name: x[micro] for name, x in arrays.items()}
                visual.append(decoding.visual_tokens(generator.config, params, batch)[0])
        shown: dict[tuple, jax.Array] = {}
        prompts = []
        for slot in slots:
            ids, index = (text[name][slot.row][slot.start : slot.room] for name in ("ids", "visual_index"))
            scans, position = np.unique(index[index >= 0] // latents, return_inverse=True)
            own = index.copy()
            own[index >= 0] = position * latents + index[index >= 0] % latents
            key = (slot.row, *scans.tolist())
            if len(scans) and key not in shown:  # the prompts of a group share their visual tokens
                shown[key] = visual[slot.row[0]][slot.row[1]][scans]
            prompts.append(Prompt(ids, own, shown.get(key)))
        return prompts


def _slots(text: dict[str, np.ndarray], rows: Sequence[RowInfo | None]) -> Iterator[_Slot]:
    """Yield the room for each answer, in the order of the rows and their segments.

    A sample whose scan could not be loaded has no weights (collate.py), and no answers.
    """
    per_micro = text["ids"].shape[1]
    for number, info in enumerate(rows):
        if info is None:
            continue
        row = divmod(number, per_micro)
        segments, weights = text["segments"][row], text["weights"][row]
        copies = int(segments.max()) // len(info.samples)
        for segment in range(1, int(segments.max()) + 1):
            start, end = np.searchsorted(np.where(segments > 0, segments, segments.max() + 1), (segment, segment + 1))
            if (predicting := np.flatnonzero(weights[start:end])).size:
                sample = info.samples[(segment - 1) // copies]
                yield _Slot(row, int(start), int(start + predicting[0] + 1), int(end), sample.reference)


def _insert(text: dict[str, np.ndarray], slot: _Slot, answer: Answer, advantage: float) -> None:
    """Write an answer into its room. A failed answer has no tokens, and so no weight."""
    ids = () if answer.error else answer.ids
    n, row = len(ids), {name: x[slot.row] for name, x in text.items()}
    predicting = slice(slot.room - 1, slot.room - 1 + n)
    row["weights"][slot.start : slot.end] = 0
    row["weights"][predicting], row["targets"][predicting] = 1, ids
    row["ids"][slot.room : slot.room + n] = ids
    row["advantages"][predicting] = advantage
    row["log_probs"][predicting] = answer.logprobs[:n]
    unused = slice(slot.room + n, slot.end)
    row["segments"][unused], row["key_ok"][unused] = 0, False


def _seeds(seed: int, step: int, count: int) -> list[int]:
    """Return the seed of each answer of a step."""
    return (np.random.SeedSequence((seed, step)).generate_state(count) >> 1).tolist() if count else []
