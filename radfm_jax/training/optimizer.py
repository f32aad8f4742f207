"""AdamW or Muon with warm-up and cosine decay, clipping, learning rate factors per part, and frozen parts.

The paper reports no settings; the defaults were chosen for this project.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from input_pipeline.field_rules import Count, above, at_least, check_fields, one_of, share
from input_pipeline.files import nearest
from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.models.lora import A, B, is_adapter

METHODS = ("adamw", "muon")
MU_DTYPES = ("float32", "bfloat16")
# Name of a block's kernel -> its input axes and output axes, for Muon. Other axes are batches of matrices: the layers
# (axis 0), and q, k and v in one kernel.
MATRICES = {
    **dict.fromkeys(("query", "key", "value"), ((1,), (2, 3))),
    **dict.fromkeys(("qkv", "key_value"), ((1,), (3, 4))),
    "out": ((1, 2), (3,)),
    **dict.fromkeys(("gate", "up", "down"), ((1,), (2,))),
    "gate_up": ((1,), (3,)),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The `optimizer` group of a config.

    `method` is adamw or muon. muon updates the matrices of the blocks and of their adapters by orthogonalised momentum
    (one moment instead of two), scaled to suit AdamW learning rates, and the rest by Adam; both with Nesterov momentum.
    """

    method: Annotated[str, one_of(METHODS)] = "adamw"
    learning_rate: Annotated[float, above(0)] = 2e-5  # after the warm-up
    final: Annotated[float, at_least(0)] = 0.1  # fraction of the learning rate at the last step
    warmup_steps: Count = 1000  # linear from 0; a cosine to `final` follows
    # Path of a parameter or part -> factor of its learning rate, {"vit": 1.0, "vit/embedding": 0.2, "llama": 0.1}; the
    # longest matching path applies.
    rates: Mapping[str, Annotated[float, at_least(0)]] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()  # parts without gradients and optimizer memory; ("llama",) in the paper's first epoch
    b1: Annotated[float, share(zero=True, one=False)] = 0.9
    b2: Annotated[float, share(zero=True, one=False)] = 0.95
    eps: Annotated[float, above(0)] = 1e-8
    weight_decay: Annotated[float, at_least(0)] = (
        0.01  # of kernels and embeddings, not of norms, biases, positions, latents and marks
    )
    clip: Annotated[float, at_least(0)] = 1.0  # maximum global norm of the gradient; 0 disables clipping
    mu_dtype: Annotated[str, one_of(MU_DTYPES)] = "float32"  # dtype of the first moment: float32 or bfloat16

    def __post_init__(self):
        if isinstance(self.rates, Mapping):
            object.__setattr__(self, "rates", types.MappingProxyType(dict(self.rates)))
        check_fields(self, "optimizer")


def split(params: dict, frozen: tuple[str, ...]) -> tuple[dict, dict]:
    """Split parameters into (trainable, frozen); `merge` is the inverse. Adapters are always trainable.

    Raises ValueError if a name is not a part, everything is frozen, or a linear map with an adapter is not frozen.
    """
    leaves = flatten(params)
    for name in frozen:
        _check(name, leaves, "optimizer.frozen")
    is_frozen = {path: any(_within(path, name) for name in frozen) and not is_adapter(path) for path in leaves}
    for path in leaves:
        kernel = path.removesuffix(A) + "kernel"
        if path.endswith(f"/{A}") and not is_frozen[kernel]:
            raise ValueError(f"model.lora.targets match {kernel}, which is trained itself: add it to optimizer.frozen")
    if all(is_frozen.values()):
        raise ValueError(f"optimizer.frozen ({', '.join(frozen)}) freezes all parameters: leave a part trainable")
    trainable, fixed = ({p: x for p, x in leaves.items() if is_frozen[p] is kept} for kept in (False, True))
    return unflatten(trainable), unflatten(fixed)


def merge(trainable: dict, frozen: dict) -> dict:
    """Merge the trees that `split` returns."""
    return unflatten(flatten(trainable) | flatten(frozen))


def learning_rates(config: OptimizerConfig, steps: int, constant_until: int = 0) -> np.ndarray:
    """Return the learning rate of each step, float32[steps].

    Args:
      constant_until: the first steps, whose rates are those of `warmup_rate`: they were computed before the number of
        steps was known. The cosine starts after them and after the warm-up.
    """
    warmup = config.warmup_steps
    if warmup >= steps:
        raise ValueError(f"optimizer.warmup_steps must be below the {steps} steps of the run (got {warmup})")
    early = np.array([warmup_rate(config, step) for step in range(max(warmup, constant_until))], np.float32)
    if constant_until >= steps:
        return early[:steps]
    inserted = len(early) - warmup
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, steps - inserted, config.learning_rate * config.final
    )
    rates = np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps - inserted)), np.float32)
    return np.concatenate([early, rates[warmup:]]) if constant_until else rates


def warmup_rate(config: OptimizerConfig, step: int) -> np.float32:
    """Return the learning rate of a step while the number of steps is unknown: linear from 0, then constant."""
    return np.float32(config.learning_rate * min(1.0, step / config.warmup_steps if config.warmup_steps else 1.0))


def optimizer(config: OptimizerConfig, trainable: dict) -> optax.GradientTransformation:
    """Return the transformation of gradients to updates at learning rate 1. Subtract the updates from the parameters.

    The learning rate is an argument of the train step, so one compiled program serves every schedule. `trainable` is a
    tree of arrays or shapes (`split`).

    Raises:
      ValueError: a path in `rates` that matches no parameter, or a kernel without an entry in MATRICES.
    """
    leaves = flatten(trainable)
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
    """Return AdamW's or Muon's transformation, without clipping, weight decay and rates."""
    moments: dict[str, Any] = {"eps": config.eps, "mu_dtype": jnp.dtype(config.mu_dtype)}
    if config.method == "adamw":
        return optax.scale_by_adam(config.b1, config.b2, **moments)
    axes = {path: _muon_axes(path) for path in leaves}
    # 0.2 is the root mean square of AdamW's updates (Liu et al., 2025, arXiv:2502.16982).
    negative = muon(1.0, muon_weight_dimension_numbers=unflatten(axes), consistent_rms=0.2, adam_b1=config.b1,
                    adam_b2=config.b2, **moments)  # fmt: skip
    return optax.chain(negative, optax.scale(-1.0))


def _muon_axes(path: str) -> MuonDimensionNumbers | None:
    """Return the input and output axes of a matrix of a block, or of the A or B of its adapter; None for the rest."""
    if not (found := re.search(f"/(?:blocks|spatial|temporal)/.*?([^/]+)/(kernel|{A}|{B})$", path)):
        return None
    name, kind = found.groups()
    if name not in MATRICES:
        raise ValueError(f"no Muon axes for {path}: add {name} to MATRICES")
    inputs, outputs = MATRICES[name]
    if kind == A:
        return MuonDimensionNumbers(inputs, (inputs[-1] + 1,))
    if kind == B:
        return MuonDimensionNumbers((1,), tuple(axis - len(inputs) + 1 for axis in outputs))
    return MuonDimensionNumbers(inputs, outputs)


def _within(path: str, part: str) -> bool:
    return path == part or path.startswith(part + "/")


def _factor(path: str, rates: Mapping[str, float]) -> float:
    matches = [name for name in rates if _within(path, name)]
    return rates[max(matches, key=len)] if matches else 1.0


def _check(name: str, leaves: dict, field: str) -> None:
    """Raise ValueError unless `name` is the path of a parameter or of a part that contains parameters."""
    if any(_within(path, name) for path in leaves):
        return
    known = {"/".join(path.split("/")[:n]) for path in leaves for n in range(1, path.count("/") + 2)}
    parts = ", ".join(sorted({path.partition("/")[0] for path in leaves}))
    raise ValueError(f"{field}: no parameter matches {name!r}{nearest(name, sorted(known))}; parts: {parts}")
