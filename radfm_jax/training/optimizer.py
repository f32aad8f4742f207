"""AdamW or Muon with warm-up and cosine, clipping, learning rates by part, and parts that do not learn at all.

The paper gives no settings; these are ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from radfm_jax.checkpoints.checkpoint import flatten, unflatten

METHODS = ("adamw", "muon")
# Kernels of the blocks by name -> axes that are summed over, axes of the output. Axis 0 are the layers; q, k and v that
# stand in one kernel are matrices of their own.
MATRICES = {
    "query": ((1,), (2, 3)),
    "key": ((1,), (2, 3)),
    "value": ((1,), (2, 3)),
    "qkv": ((1,), (3, 4)),
    "key_value": ((1,), (3, 4)),
    "out": ((1, 2), (3,)),
    "gate": ((1,), (2,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The `optimizer` group of a config.

    Attributes:
      method: adamw; or muon: the matrices of the blocks move by their orthogonalised momentum (one moment instead of
        two), scaled so that a learning rate for AdamW fits; all else by Adam, both with Nesterov's momentum.
      learning_rate: at the end of the warm-up. final: its share that is left at the last step.
      warmup_steps: from 0 to the full rate, linearly; then a cosine to `final`.
      rates: path of a parameter or of a whole part -> factor of its learning rate; the longest path that fits counts.
        {"vit": 1.0, "vit/embedding": 0.2, "llama": 0.1}
      frozen: parts that do not learn: no gradients, no optimizer memory. ("llama",) in the first epoch of the paper.
      weight_decay: of kernels and embeddings; never of norms, biases, positions, latents and marks.
      clip: global norm of the gradient of what learns; 0 for none.
      mu_dtype: of the first moment, float32 or bfloat16.
    """

    method: str = "adamw"
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
        if self.method not in METHODS:
            problems.append(f"optimizer.method is {self.method!r}; known: {', '.join(METHODS)}")
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


def learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """Learning rate of each of `steps` steps, float32[steps]."""
    if config.warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps {config.warmup_steps} is not below train.steps {steps}")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps, config.learning_rate * config.final
    )
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float32)


def optimizer(config: OptimizerConfig, learning: dict) -> optax.GradientTransformation:
    """Gradients -> the step of the parameters that learn (`split`), upwards, at learning rate 1.

    The rate is an argument of a step of training, so that one program holds for every schedule.

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
        _direction(config, leaves),
        optax.add_decayed_weights(config.weight_decay, decayed),
        scale,
    )


def _direction(config: OptimizerConfig, leaves: dict) -> optax.GradientTransformation:
    """Gradients -> the direction of the step."""
    moments = {"eps": config.eps, "mu_dtype": jnp.dtype(config.mu_dtype)}
    if config.method == "adamw":
        return optax.scale_by_adam(config.b1, config.b2, **moments)
    matrices = {path: MATRICES.get(path.split("/")[-2]) for path in leaves if re.search("/blocks/.*/kernel$", path)}
    if unknown := [path for path, axes in matrices.items() if axes is None]:
        raise ValueError(f"optimizer.method muon: what are the axes of {', '.join(unknown)}?")
    axes = {path: MuonDimensionNumbers(*matrices[path]) if path in matrices else None for path in leaves}
    # 0.2: the root mean square of AdamW's steps (Liu et al., 2025, arXiv:2502.16982).
    down = muon(1.0, muon_weight_dimension_numbers=unflatten(axes), consistent_rms=0.2, adam_b1=config.b1,
                adam_b2=config.b2, **moments)  # fmt: skip
    return optax.chain(down, optax.scale(-1.0))


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
