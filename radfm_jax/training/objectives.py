"""Objectives of preference and reward tuning: DPO on pairs of answers, GRPO on generated answers with rewards.

Letters: B rows, T text tokens. An objective is a loss of the policy (the parameters that learn) and a reference, which
is the model as it was before the first step. Both return (sum, weight), as in losses.py.

google-tunix is not used: its trainers and samplers require a `flax.nnx` module that reads tokens and images and returns
logits, while this model is Linen, reads packed rows of text and scans, and computes logits in chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.field_rules import Size, above, at_least, check_fields, one_of, share
from input_pipeline.text.alternatives import Form, Group, Pair
from radfm_jax.models.radfm import RadFM
from radfm_jax.training.losses import answer_losses, token_weights

OBJECTIVES = ("likelihood", "dpo", "grpo")
REWARDS = ("exact", "rouge", "bleu", "umls", "radgraph")  # rewards.py computes them


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """The `dpo` group: direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    The reward of an answer is beta times the log of its probability relative to the reference. The loss of a pair is
    minus the log of the sigmoid of the chosen answer's reward minus the rejected one's.
    """

    beta: Annotated[float, above(0)] = 0.1  # a larger value keeps the policy closer to the reference
    # Share of pairs that are assumed to be in the wrong order (conservative DPO).
    label_smoothing: Annotated[float, share(zero=True, one=False)] = 0.0
    # Weight of the loss per token of the chosen answer. DPO alone may make both answers less likely.
    likelihood: Annotated[float, at_least(0)] = 0.0

    measures: ClassVar[tuple[str, ...]] = ("preferred", "margin", "chosen_reward", "rejected_reward")
    arrays: ClassVar[tuple[str, ...]] = ()
    uses_reference: ClassVar[bool] = True
    updates: ClassVar[int] = 1

    def __post_init__(self):
        check_fields(self, "dpo", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if self.label_smoothing >= 0.5:
            yield f"dpo.label_smoothing must be below 0.5 (got {self.label_smoothing})"

    def form(self, training: bool) -> Form:
        """Return the segments of a sample."""
        return Pair()

    def loss(self, model: RadFM, params: dict, reference: dict | None, batch: dict, *, chunk: int, normalise: str):
        """Return (sum, number of pairs, out) of a batch whose odd segments are chosen, and even ones rejected.

        `out` has `measures`, sums over pairs: preferred (the chosen answer has the higher reward), margin (difference
        of the rewards), chosen_reward and rejected_reward. Its weights are those of the chosen answers.
        """
        active = batch["weights"] > 0
        out = answer_losses(model, params, batch, active, chunk=chunk)
        if reference is None:
            raise ValueError("DPO needs a reference")
        start = answer_losses(model, reference, batch, active, chunk=chunk)
        gain = jax.lax.stop_gradient(start["token_loss"]) - out["token_loss"]
        chosen = active & (batch["segments"] % 2 == 1)
        pairs = (batch["segments"] + 1) // 2
        of_pairs = functools.partial(segment_sum, pairs)
        rewards = [self.beta * of_pairs(jnp.where(side, gain, 0.0)) for side in (chosen, active & ~chosen)]
        margin, is_pair = rewards[0] - rewards[1], of_pairs(active) > 0
        losses = -(1 - self.label_smoothing) * jax.nn.log_sigmoid(margin)
        losses -= self.label_smoothing * jax.nn.log_sigmoid(-margin)
        if self.likelihood:
            nll = of_pairs(jnp.where(chosen, out["token_loss"], 0.0))
            losses += self.likelihood * nll / jnp.maximum(of_pairs(chosen), 1.0)
        total = lambda values: jnp.sum(jnp.where(is_pair, values, 0.0))  # noqa: E731
        values = dict(zip(self.measures, (margin > 0, margin, *rewards), strict=True))
        measures = {name: total(x) for name, x in values.items()}
        out |= {"weights": jnp.where(chosen, 1.0, 0.0), "measures": measures}
        return total(losses), total(1.0), out


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """The `grpo` group: group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, equation 3).

    Each step generates `group` answers to every question. The advantage of an answer is its reward minus the mean of
    its group, divided by the standard deviation of the group.
    """

    group: Annotated[int, at_least(2)] = 8  # answers per question
    reward: tuple[Annotated[str, one_of(REWARDS)], ...] = ("exact",)  # names of rewards.py; their mean is the reward
    max_new_tokens: Size = 64  # of an answer; a row reserves this room for each
    temperature: Annotated[float, above(0)] = 1.0
    top_p: Annotated[float, share(zero=False, one=True)] = 1.0
    clip: Annotated[float, above(0)] = 0.2  # maximum relative change of a token's probability that is rewarded
    kl: Annotated[float, at_least(0)] = 0.0  # weight of the divergence from the reference; 0: no reference
    updates: Size = 1  # optimizer updates per step, all on the answers of the step
    scale: bool = True  # divide advantages by the standard deviation of the group
    generation_batch: Size = 64  # answers generated at a time

    measures: ClassVar[tuple[str, ...]] = ("clipped", "kl")
    arrays: ClassVar[tuple[str, ...]] = ("advantages", "log_probs")  # of a batch, float32[B, T], in addition

    def __post_init__(self):
        check_fields(self, "grpo", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if not self.reward:
            yield f"grpo.reward must name at least one of {', '.join(REWARDS)}"

    @property
    def uses_reference(self) -> bool:
        return self.kl > 0

    def form(self, training: bool) -> Form:
        """Return the segments of a sample: a held-out question gets one answer."""
        return Group(self.group if training else 1, self.max_new_tokens)

    def loss(self, model: RadFM, params: dict, reference: dict | None, batch: dict, *, chunk: int, normalise: str):
        """Return (sum, weight, out) of a batch that rollouts.py filled with answers.

        It has `advantages` and `log_probs` float32[B, T]: of the answer, and of its token when it was generated.
        `normalise` is one of losses.NORMALISATIONS: with `sample` each answer has the same weight, as in the paper.
        `out` has `measures`, weighted sums over tokens: clipped, and kl (estimator k3 of Schulman 2020).
        """
        weights = token_weights(batch["weights"], batch["segments"], weighting="unweighted", normalise=normalise)
        active = weights > 0
        out = answer_losses(model, params, batch, active, chunk=chunk)
        log_probs = -out["token_loss"]
        ratio = jnp.exp(jnp.where(active, log_probs - batch["log_probs"], 0.0))
        advantages = batch["advantages"]
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip) * advantages
        losses = -jnp.minimum(ratio * advantages, clipped)
        divergence = jnp.zeros_like(losses)
        if reference is not None:
            start = answer_losses(model, reference, batch, active, chunk=chunk)
            difference = jax.lax.stop_gradient(-start["token_loss"]) - log_probs
            divergence = jnp.exp(difference) - difference - 1
            losses += self.kl * divergence
        total = lambda values: jnp.sum(jnp.where(active, weights * values, 0.0))  # noqa: E731
        measures = {"clipped": total(clipped < ratio * advantages), "kl": total(divergence)}
        return total(losses), jnp.sum(weights), {**out, "weights": weights, "measures": measures}


Objective = DPOConfig | GRPOConfig


def segment_sum(segments: jax.Array, values: jax.Array) -> jax.Array:
    """Return the sum of values[B, T] in each segment of a row, float32[B, 1 + T]."""
    zeros = jnp.zeros(1 + segments.shape[1])
    return jax.vmap(lambda segment, x: zeros.at[segment].add(x.astype(jnp.float32)))(segments, values)


def group_advantages(rewards: np.ndarray, scale: bool = True) -> np.ndarray:
    """Return float32[groups, G]: rewards minus the mean of their group, over its standard deviation with `scale`.

    A group with equal rewards has no advantages, and so no gradient.
    """
    rewards = np.asarray(rewards, np.float64)
    difference = rewards - rewards.mean(axis=1, keepdims=True)
    deviation = rewards.std(axis=1, keepdims=True)
    # Rounding of the mean must not become an advantage.
    difference = np.where(deviation > 1e-9, difference, 0.0)
    return (difference / (deviation + 1e-4) if scale else difference).astype(np.float32)
