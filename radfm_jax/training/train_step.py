"""The state of a training run, and one step of it.

    state     {"step", "params": trainable, "frozen", "opt", "key", "skipped"}

and "reference" for an objective that has one: the trainable parameters before the first step. The frozen parameters
belong to both models, so the reference of a model with adapters is small.

Shapes come first, then shardings, then arrays: no parameter ever exists unsharded. A step adds up the gradients of the
summed loss and the weights over A micro-batches of B rows, and divides once. So its result does not depend on A, the
mesh or the packing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from input_pipeline.field_rules import Size, check_fields, one_of
from input_pipeline.samples import TASKS
from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.models import radfm
from radfm_jax.models.radfm import segment_max
from radfm_jax.runtime import sharding
from radfm_jax.training import optimizer as opt
from radfm_jax.training.losses import NORMALISATIONS, WEIGHTINGS, radfm_loss
from radfm_jax.training.objectives import DPOConfig, GRPOConfig, Objective

NONFINITE = ("skip", "stop")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Options of the loss of a step."""

    weighting: Annotated[str, one_of(WEIGHTINGS)] = "weighted"  # losses.WEIGHTINGS
    # losses.NORMALISATIONS; "micro_batch" divides by each one's weight, as the original does.
    normalise: Annotated[str, one_of((*NORMALISATIONS, "micro_batch"))] = "token"
    chunk: Size = 256  # positions per device whose logits are materialized at once
    dropout: bool = True  # an objective uses none, since it compares probabilities of two models
    objective: DPOConfig | GRPOConfig | None = None  # None: the likelihood of the answers

    def __post_init__(self):
        check_fields(self, "train")


# --- the state --------------------------------------------------------------------------------------------------------


def abstract_state(
    model: radfm.RadFMConfig, config: opt.OptimizerConfig, mesh: Mesh, *, reference: bool = False
) -> tuple[dict, optax.GradientTransformation, dict[str, str]]:
    """Return (state of jax.ShapeDtypeStruct with shardings, optimizer, notes of sharding.param_shardings).

    reference: the state also has the trainable parameters before the first step.
    """
    boxed = radfm.abstract_params(model)
    shardings, notes = sharding.param_shardings(boxed, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)
    trainable, frozen = opt.split(params, config.frozen)
    trainable = _in_float32(trainable, model.base)
    transform = opt.optimizer(config, trainable)
    replicated = NamedSharding(mesh, PartitionSpec())
    small = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)  # noqa: E731
    leaves = flatten(trainable)

    def moment(path, x):
        """Shard a moment like the parameter whose name is its path suffix; replicate everything else (counts)."""
        names = reversed([*itertools.takewhile(lambda key: hasattr(key, "key"), reversed(path))])
        parameter = leaves.get("/".join(str(key.key) for key in names))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parameter.sharding if parameter else replicated)

    moments = jax.tree_util.tree_map_with_path(moment, jax.eval_shape(transform.init, trainable))
    state = {"step": small((), jnp.int32), "params": trainable, "frozen": frozen, "opt": moments}
    if reference:
        state["reference"] = trainable
    return {**state, "key": small((2,), jnp.uint32), "skipped": small((), jnp.int32)}, transform, notes


def _in_float32(trainable: dict, base: str) -> dict:
    """Return the trained parameters of the language model in float32, as the others are, whatever `model.base` is."""

    def widened(path: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"model.base {base} holds {path}, which is trained: add it to optimizer.frozen")
        is_narrow = base != "float32" and x.dtype == jnp.bfloat16
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) if is_narrow else x

    return unflatten({path: widened(path, x) for path, x in flatten(trainable).items()})


def init_state(
    abstract: dict,
    model: radfm.RadFMConfig,
    config: opt.OptimizerConfig,
    transform: optax.GradientTransformation,
    seed: int,
    loaded: dict | None = None,
) -> dict:
    """Return a state with fresh moments and parameters, each created with its sharding.

    `loaded` has the parameters that are not initialised, path -> array (train_state.init_from).
    """
    loaded = loaded or {}
    paths = flatten(params_of(abstract))

    def init(key):
        params = radfm.init_params(model, key)
        return {
            "step": jnp.zeros((), jnp.int32),
            "fresh": {path: x for path, x in flatten(params).items() if path not in loaded},
            "opt": transform.init(opt.split(params, config.frozen)[0]),
            "key": jax.random.key_data(jax.random.fold_in(key, 1)),
            "skipped": jnp.zeros((), jnp.int32),
        }

    shardings = {name: shardings_of(abstract[name]) for name in ("step", "opt", "key", "skipped")}
    shardings["fresh"] = {path: x.sharding for path, x in paths.items() if path not in loaded}
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    params = state.pop("fresh") | loaded
    trainable, frozen = opt.split(unflatten({path: params[path] for path in paths}), config.frozen)
    if "reference" in abstract:  # a copy, because a step donates the parameters
        state["reference"] = jax.tree.map(jnp.copy, trainable)
    return state | {"params": trainable, "frozen": frozen}


def params_of(state: dict) -> dict:
    """Return all parameters of a state, trainable and frozen."""
    return opt.merge(state["params"], state["frozen"])


def reference_of(state: dict) -> dict | None:
    """Return all parameters of the reference of a state, or None if it has none."""
    return opt.merge(state["reference"], state["frozen"]) if "reference" in state else None


def shardings_of(abstract: dict) -> dict:
    """Return the shardings of a tree of arrays or shapes."""
    return jax.tree.map(lambda x: x.sharding, abstract)


# --- batches ----------------------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of [A, B, ...]: the rows of each micro-batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))


def put_batch(arrays: dict[str, np.ndarray], mesh: Mesh, accumulation: int) -> dict[str, jax.Array]:
    """Put this process's rows of a global batch [A * B, ...] on the devices as global arrays [A, B, ...]."""
    rows = len(next(iter(arrays.values())))
    ways = int(np.prod([mesh.shape[a] for a in sharding.BATCH])) // jax.process_count()
    if rows % accumulation or (rows // accumulation) % max(ways, 1):
        raise ValueError(
            f"{rows} rows per process do not divide into {accumulation} micro-batches over {ways} devices: make "
            "train.batch a multiple of train.accumulation times the devices of `data` and `fsdp`"
        )
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return {name: put(x.reshape(accumulation, -1, *x.shape[1:])) for name, x in arrays.items()}


def put_rate(rate: np.float32, mesh: Mesh) -> jax.Array:
    """Put a learning rate on every device."""
    return jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda _: rate)


# --- the step ---------------------------------------------------------------------------------------------------------


def make_train_step(
    model: radfm.RadFMConfig, transform: optax.GradientTransformation, config: StepConfig
) -> Callable[[dict, dict, jax.Array], tuple[dict, dict]]:
    """Return (state, batch [A, B, ...], learning rate) -> (state, metrics), to be jitted with the state donated.

    A step whose loss or gradient is not finite leaves parameters and moments unchanged; `skipped` counts such steps in
    a row. The metrics are loss (the minimised value), weight, correct (share of the trained tokens that were the most
    likely ones), real_tokens (share of the positions that hold a token), grad_norm before clipping, finite bool,
    skipped, and task_loss and task_weight float32[tasks]; with an objective also measures, name -> mean.
    """
    loss = _loss(model, config)

    def step(state: dict, batch: dict, rate: jax.Array) -> tuple[dict, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        micro_batches = batch["ids"].shape[0]

        def add_micro_batch(carry, numbered):
            number, micro = numbered
            arguments = (state["params"], state, micro, jax.random.fold_in(key, number))
            (total, (weight, counts)), grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
            if config.normalise == "micro_batch":
                share = 1.0 / jnp.maximum(weight, 1e-8)
                grads, total, weight = jax.tree.map(lambda g: g * share, grads), total * share, jnp.float32(1)
            return jax.tree.map(jnp.add, carry, (grads, total, weight, counts)), None

        numbered = (jnp.arange(micro_batches), batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state["params"])
        start = (zeros, jnp.float32(0), jnp.float32(0), _zero_counts() | _zero_measures(config.objective))
        if micro_batches == 1:  # without a loop, XLA needs no memory for the sum in addition to the gradient
            (grads, total, weight, counts), _ = add_micro_batch(start, jax.tree.map(lambda x: x[0], numbered))
        else:
            (grads, total, weight, counts), _ = jax.lax.scan(add_micro_batch, start, numbered)
        with jax.named_scope("update"):
            share = 1.0 / jnp.maximum(weight, 1e-8)
            grads = jax.tree.map(lambda g, p: (g * share).astype(p.dtype), grads, state["params"])
            norm = optax.tree_utils.tree_norm(grads)
            finite = jnp.isfinite(total) & jnp.isfinite(norm)
            updates, moments = transform.update(grads, state["opt"], state["params"])
            updated = optax.apply_updates(state["params"], jax.tree.map(lambda u: -rate * u, updates))
            if_finite = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        after = {
            **state,
            "step": state["step"] + 1,
            "params": if_finite(updated, state["params"]),
            "opt": if_finite(moments, state["opt"]),
            "skipped": jnp.where(finite, 0, state["skipped"] + 1),
        }
        metrics = {"loss": total * share, "weight": weight, "grad_norm": norm, "finite": finite, **_shares(counts)}
        if config.objective is not None:
            metrics["measures"] = jax.tree.map(lambda x: x * share, counts["measures"])
        real_tokens = jnp.mean(batch["segments"] > 0, dtype=jnp.float32)
        return after, {**metrics, "real_tokens": real_tokens, "skipped": after["skipped"]}

    return step if config.objective is None else _with_updates(step, config.objective.updates)


def _loss(model: radfm.RadFMConfig, config: StepConfig) -> Callable:
    """Return (trainable, state, batch, key) -> (sum, (weight, counts))."""
    network, objective = radfm.RadFM(model), config.objective
    options = {"chunk": config.chunk, "normalise": "token" if config.normalise == "micro_batch" else config.normalise}

    def likelihood(trainable, state, batch, key):
        rngs = {"dropout": key} if config.dropout else None
        params = opt.merge(trainable, state["frozen"])
        total, weight, out = radfm_loss(network, params, batch, weighting=config.weighting, **options, rngs=rngs)
        return total, (weight, _counts(batch, out))

    def relative(trainable, state, batch, _):
        params = opt.merge(trainable, state["frozen"])
        total, weight, out = objective.loss(network, params, reference_of(state), batch, **options)
        return total, (weight, _counts(batch, out) | {"measures": out["measures"]})

    return likelihood if objective is None else relative


def _with_updates(step: Callable, updates: int) -> Callable:
    """Return a step that repeats a step on one batch. Its metrics are those of the last update."""

    def repeated(state: dict, batch: dict, rate: jax.Array) -> tuple[dict, dict]:
        after, metrics = jax.lax.scan(lambda state, _: step(state, batch, rate), state, length=updates)
        finite = metrics["finite"].all()
        return after | {"step": state["step"] + 1}, jax.tree.map(lambda x: x[-1], metrics) | {"finite": finite}

    return step if updates == 1 else repeated


def make_eval_step(model: radfm.RadFMConfig, config: StepConfig) -> Callable[[dict, dict], dict]:
    """Return (parameters, batch [A, B, ...]) -> sums. Add them over batches, then call `summarise`.

    `exact` counts samples in which every trained token was the most likely one given the tokens before it, which the
    released code logs as accuracy.
    """
    network = radfm.RadFM(model)

    def step(params: dict, batch: dict) -> dict:
        def add_micro_batch(carry, micro):
            _, _, out = radfm_loss(network, params, micro, weighting=config.weighting, chunk=config.chunk)
            return jax.tree.map(jnp.add, carry, _counts(micro, out)), None

        return jax.lax.scan(add_micro_batch, _zero_counts(), batch)[0]

    return step


def _zero_counts() -> dict:
    return {name: jnp.zeros(len(TASKS) + 1) for name in ("loss", "weight", "tokens", "correct", "samples", "exact")}


def _zero_measures(objective: Objective | None) -> dict:
    return {} if objective is None else {"measures": dict.fromkeys(objective.measures, jnp.float32(0))}


def _counts(batch: dict, out: dict) -> dict[str, jax.Array]:
    """Return sums over tokens and samples of each task, float32[1 + tasks]; entry 0 belongs to the padding."""
    active, segments = out["weights"] > 0, batch["segments"]
    has_errors = segment_max(segments, active & ~out["correct"])
    is_sample = segment_max(segments, active)

    def sum_by_task(tasks, values):
        return jnp.zeros(len(TASKS) + 1).at[tasks].add(values.astype(jnp.float32))

    of_tokens = functools.partial(sum_by_task, batch["tasks"])
    of_samples = functools.partial(sum_by_task, segment_max(segments, batch["tasks"]))
    return {
        "loss": of_tokens(jnp.where(active, out["weights"] * out["token_loss"], 0.0)),
        "weight": of_tokens(out["weights"]),
        "tokens": of_tokens(active),
        "correct": of_tokens(active & out["correct"]),
        "samples": of_samples(is_sample),
        "exact": of_samples(is_sample & ~has_errors),
    }


def _shares(counts: dict) -> dict[str, jax.Array]:
    share = lambda part, total: part / jnp.maximum(total, 1e-8)  # noqa: E731
    return {
        "correct": share(counts["correct"].sum(), counts["tokens"].sum()),
        "task_loss": share(counts["loss"], counts["weight"])[1:],
        "task_weight": counts["weight"][1:],
    }


def make_objective_eval_step(model: radfm.RadFMConfig, config: StepConfig) -> Callable[[dict, dict, dict], dict]:
    """Return (parameters, batch [A, B, ...], parameters of the reference) -> sums of loss, weight and measures."""
    network, objective = radfm.RadFM(model), config.objective
    assert objective is not None
    options = {"chunk": config.chunk, "normalise": config.normalise}

    def step(params: dict, batch: dict, reference: dict) -> dict:
        def add_micro_batch(carry, micro):
            loss, weight, out = objective.loss(network, params, reference, micro, **options)
            return jax.tree.map(jnp.add, carry, {"loss": loss, "weight": weight, **out["measures"]}), None

        zeros = dict.fromkeys(("loss", "weight", *objective.measures), jnp.float32(0))
        return jax.lax.scan(add_micro_batch, zeros, batch)[0]

    return step


def summarise_objective(sums: dict) -> dict[str, dict[str, float]]:
    """Convert sums of `make_objective_eval_step` to {"all": {loss, each measure, samples}}."""
    weight = float(sums["weight"])
    means = {name: float(x) / max(weight, 1e-8) for name, x in sums.items() if name != "weight"}
    return {"all": means | {"samples": weight}}


def summarise(counts: dict) -> dict[str, dict[str, float]]:
    """Convert sums of `make_eval_step` to {task: {loss, token_accuracy, exact_match, samples}}.

    `all` comes first; tasks without samples are omitted.
    """
    counts = {name: np.asarray(x, np.float64) for name, x in counts.items()}
    summary = {}
    for name, pick in (("all", slice(1, None)), *((task, slice(i, i + 1)) for i, task in enumerate(TASKS, 1))):
        c = {k: float(x[pick].sum()) for k, x in counts.items()}
        if c["samples"]:
            summary[name] = {
                "loss": c["loss"] / max(c["weight"], 1e-8),
                "token_accuracy": c["correct"] / max(c["tokens"], 1.0),
                "exact_match": c["exact"] / c["samples"],
                "samples": c["samples"],
            }
    return summary
