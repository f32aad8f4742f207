"""AdamW with warm-up and cosine, clipping, learning rates by part, and parts that do not learn at all.

The paper gives no settings; these are ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from radfm_jax.checkpoint import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The `optimizer` group of a config.

    Attributes:
      learning_rate: at the end of the warm-up. final: its share that is left at the last step.
      warmup_steps: from 0 to the full rate, linearly; then a cosine to `final`.
      rates: path of a parameter or of a whole part -> factor of its learning rate; the longest path that fits counts.
        {"vit": 1.0, "vit/embedding": 0.2, "llama": 0.1}
      frozen: parts that do not learn: no gradients, no optimizer memory. ("llama",) in the first epoch of the paper.
      weight_decay: of kernels and embeddings; never of norms, biases, positions, latents and marks.
      clip: global norm of the gradient of what learns; 0 for none.
      mu_dtype: of the first moment, float32 or bfloat16.
    """

    learning_rate: float = 2e-5
    final: float = 0.1
    warmup_steps: int = 1000
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    mu_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "rates", types.MappingProxyType(dict(self.rates)))
        problems = [
            f"optimizer.{name} is {getattr(self, name)}"
            for name in ("learning_rate", "eps")
            if not getattr(self, name) > 0
        ]
        problems += [
            f"optimizer.{name} is {getattr(self, name)}"
            for name in ("warmup_steps", "weight_decay", "clip", "final")
            if getattr(self, name) < 0
        ]
        if self.mu_dtype not in ("float32", "bfloat16"):
            problems.append(f"optimizer.mu_dtype is {self.mu_dtype!r}; known: float32, bfloat16")
        if problems:
            raise ValueError("; ".join(problems))


def split(params: dict, frozen: tuple[str, ...]) -> tuple[dict, dict]:
    """(what learns, what does not); together, by `merge`, the tree again. ValueError: a name that is no part."""
    leaves = flatten(params)
    for name in frozen:
        _check(name, leaves, "optimizer.frozen")
    is_frozen = {path: any(_within(path, name) for name in frozen) for path in leaves}
    if all(is_frozen.values()):
        raise ValueError(f"optimizer.frozen {', '.join(frozen)} leaves nothing to learn")
    return (
        unflatten({p: x for p, x in leaves.items() if not is_frozen[p]}),
        unflatten({p: x for p, x in leaves.items() if is_frozen[p]}),
    )


def merge(learning: dict, frozen: dict) -> dict:
    """The inverse of `split`."""
    return unflatten(flatten(learning) | flatten(frozen))


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each of `steps` steps."""
    if config.warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps {config.warmup_steps} is not below train.steps {steps}")
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps, config.learning_rate * config.final
    )


def optimizer(config: OptimizerConfig, learning: dict, steps: int) -> optax.GradientTransformation:
    """The chain for the parameters that learn (`split`).

    Args:
      learning: their tree, of arrays or shapes.
    Raises:
      ValueError: a path in `rates` that no parameter has.
    """
    leaves = flatten(learning)
    for name in config.rates:
        if not any(_within(name, frozen) for frozen in config.frozen):
            _check(name, leaves, "optimizer.rates")
    factors = unflatten({path: _factor(path, config.rates) for path in leaves})
    decayed = unflatten({path: path.rpartition("/")[2] in ("kernel", "head", "embedding") for path in leaves})
    scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.mu_dtype)),
        optax.add_decayed_weights(config.weight_decay, decayed),
        scale,
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _within(path: str, part: str) -> bool:
    return path == part or path.startswith(part + "/")


def _factor(path: str, rates: Mapping[str, float]) -> float:
    fitting = [name for name in rates if _within(path, name)]
    return rates[max(fitting, key=len)] if fitting else 1.0


def _check(name: str, leaves: dict, where: str) -> None:
    if any(_within(path, name) for path in leaves):
        return
    known = {"/".join(path.split("/")[:n]) for path in leaves for n in range(1, path.count("/") + 2)}
    near = difflib.get_close_matches(name, sorted(known), 1, 0.4)
    parts = ", ".join(sorted({path.partition("/")[0] for path in leaves}))
    raise ValueError(f"{where}: no parameter is below {name!r}" + (f" (did you mean {near[0]}?)" if near else "") +
                     f"; parts: {parts}")  # fmt: skip
