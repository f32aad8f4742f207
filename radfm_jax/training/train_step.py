"""The state of a training run, and one step of it.

    state     {"step", "params": learning, "frozen": what does not learn, "opt", "key", "skipped"}

Shapes, then shardings, then arrays: no parameter ever exists unsharded. A step takes A micro-batches of B rows
each; it adds up the gradient of the summed loss and the weights over all of them and divides once, so neither A, nor
the mesh, nor the packing changes it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from input_pipeline.samples import TASKS
from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.models import radfm
from radfm_jax.runtime import sharding
from radfm_jax.training import optimizer as opt
from radfm_jax.training.losses import NORMALISATIONS, WEIGHTINGS, radfm_loss

NONFINITE = ("skip", "stop")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes its loss.

    Attributes:
      weighting, normalise: as in losses.radfm_loss; `normalise="micro_batch"` divides each micro-batch by its own
        weight, as the original does.
      chunk: positions whose logits exist at a time on a device.
      dropout: whether the network's dropout is on in training.
    """

    weighting: str = "weighted"
    normalise: str = "token"
    chunk: int = 256
    dropout: bool = True

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"train.weighting {self.weighting!r} is unknown: {', '.join(WEIGHTINGS)}")
        if self.normalise not in (*NORMALISATIONS, "micro_batch"):
            raise ValueError(f"train.normalise {self.normalise!r} is unknown: {', '.join(NORMALISATIONS)}, micro_batch")


# --- the state --------------------------------------------------------------------------------------------------------


def abstract_state(
    model: radfm.RadFMConfig, config: opt.OptimizerConfig, mesh: Mesh
) -> tuple[dict, optax.GradientTransformation, dict[str, str]]:
    """(state as jax.ShapeDtypeStruct with shardings, the optimizer, notes of sharding.param_shardings)."""
    boxed = radfm.abstract_params(model)
    shardings, notes = sharding.param_shardings(boxed, mesh)
    whole = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)
    learning, frozen = opt.split(whole, config.frozen)
    transform = opt.optimizer(config, learning)
    everywhere = NamedSharding(mesh, PartitionSpec())
    scalar = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)  # noqa: E731
    leaves = flatten(learning)

    def moment(path, x):
        """Lies as the parameter whose name ends its path; anything else (counts) is everywhere."""
        names = reversed([*itertools.takewhile(lambda key: hasattr(key, "key"), reversed(path))])
        parameter = leaves.get("/".join(str(key.key) for key in names))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parameter.sharding if parameter else everywhere)

    moments = jax.tree_util.tree_map_with_path(moment, jax.eval_shape(transform.init, learning))
    state = {
        "step": scalar((), jnp.int32),
        "params": learning,
        "frozen": frozen,
        "opt": moments,
        "key": scalar((2,), jnp.uint32),
        "skipped": scalar((), jnp.int32),
    }
    return state, transform, notes


def init_state(
    abstract: dict,
    model: radfm.RadFMConfig,
    config: opt.OptimizerConfig,
    transform,
    seed: int,
    given: dict | None = None,
) -> dict:
    """Fresh moments and parameters, each made where it will lie.

    given: path -> array of parameters that are there already (train_state.init_from); only the others are made.
    """
    given = given or {}
    paths = flatten(params_of(abstract))

    def init(key):
        params = radfm.init_params(model, key)
        return {
            "step": jnp.zeros((), jnp.int32),
            "fresh": {path: x for path, x in flatten(params).items() if path not in given},
            "opt": transform.init(opt.split(params, config.frozen)[0]),
            "key": jax.random.key_data(jax.random.fold_in(key, 1)),
            "skipped": jnp.zeros((), jnp.int32),
        }

    where = {name: shardings_of(abstract[name]) for name in ("step", "opt", "key", "skipped")}
    where["fresh"] = {path: x.sharding for path, x in paths.items() if path not in given}
    state = jax.jit(init, out_shardings=where)(jax.random.key(seed))
    params = state.pop("fresh") | given
    learning, frozen = opt.split(unflatten({path: params[path] for path in paths}), config.frozen)
    return state | {"params": learning, "frozen": frozen}


def params_of(state: dict) -> dict:
    """All parameters of a state, learning or not."""
    return opt.merge(state["params"], state["frozen"])


def shardings_of(abstract: dict) -> dict:
    return jax.tree.map(lambda x: x.sharding, abstract)


# --- batches ----------------------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[A, B, ...]: the rows of each micro-batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))


def place(arrays: dict[str, np.ndarray], mesh: Mesh, accumulation: int) -> dict[str, jax.Array]:
    """This process's rows of a global batch [A * B, ...] -> global arrays [A, B, ...] on the devices.

    Raises ValueError if A does not divide the rows, or the devices do not divide B.
    """
    rows = len(next(iter(arrays.values())))
    ways = int(np.prod([mesh.shape[a] for a in sharding.BATCH])) // jax.process_count()
    if rows % accumulation or (rows // accumulation) % max(ways, 1):
        raise ValueError(
            f"{rows} rows a process do not divide into {accumulation} micro-batches over {ways} devices: make "
            "train.batch a multiple of train.accumulation times the devices of `data` and `fsdp`"
        )
    where = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(where, x.reshape(accumulation, -1, *x.shape[1:]))
        for name, x in arrays.items()
    }


def place_rate(rate: np.float32, mesh: Mesh) -> jax.Array:
    """A learning rate, on every device."""
    return jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda _: rate)


# --- the step ---------------------------------------------------------------------------------------------------------


def make_train_step(
    model: radfm.RadFMConfig, transform: optax.GradientTransformation, config: StepConfig
) -> Callable[[dict, dict, jax.Array], tuple[dict, dict]]:
    """(state, batch [A, B, ...], learning rate) -> (state, metrics), to be jitted with the state donated.

    A step whose loss or gradient is not finite leaves parameters and moments as they are; `skipped` counts such steps
    in a row.

    metrics: loss (what is minimised), weight, correct (share of the trained tokens that were the most likely ones),
    grad_norm before clipping, finite bool, skipped steps in a row; and for each task of samples.TASKS its loss and
    weight, float32[tasks].
    """
    network = radfm.RadFM(model)
    normalise = "token" if config.normalise == "micro_batch" else config.normalise

    def loss(learning, frozen, batch, key):
        rngs = {"dropout": key} if config.dropout else None
        total, weight, out = radfm_loss(
            network, opt.merge(learning, frozen), batch, weighting=config.weighting, normalise=normalise,
            chunk=config.chunk, rngs=rngs,
        )  # fmt: skip
        return total, (weight, _counts(batch, out))

    def step(state: dict, batch: dict, rate: jax.Array) -> tuple[dict, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        micro_batches = batch["ids"].shape[0]

        def one(carry, numbered):
            number, micro = numbered
            gradient = jax.value_and_grad(loss, has_aux=True)
            (total, (weight, counts)), grads = gradient(
                state["params"], state["frozen"], micro, jax.random.fold_in(key, number)
            )
            if config.normalise == "micro_batch":
                share = 1.0 / jnp.maximum(weight, 1e-8)
                grads, total, weight = jax.tree.map(lambda g: g * share, grads), total * share, jnp.float32(1)
            return jax.tree.map(jnp.add, carry, (grads, total, weight, counts)), None

        numbered = (jnp.arange(micro_batches), batch)
        zero = (_zeros(state["params"]), jnp.float32(0), jnp.float32(0), _no_counts())
        if micro_batches == 1:  # without the loop no sum has to be kept beside the gradient
            (grads, total, weight, counts), _ = one(zero, jax.tree.map(lambda x: x[0], numbered))
        else:
            (grads, total, weight, counts), _ = jax.lax.scan(one, zero, numbered)
        with jax.named_scope("update"):
            share = 1.0 / jnp.maximum(weight, 1e-8)
            grads = jax.tree.map(lambda g, p: (g * share).astype(p.dtype), grads, state["params"])
            norm = optax.tree_utils.tree_norm(grads)
            finite = jnp.isfinite(total) & jnp.isfinite(norm)
            updates, moments = transform.update(grads, state["opt"], state["params"])
            learned = optax.apply_updates(state["params"], jax.tree.map(lambda u: -rate * u, updates))
            kept = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        after = {
            **state,
            "step": state["step"] + 1,
            "params": kept(learned, state["params"]),
            "opt": kept(moments, state["opt"]),
            "skipped": jnp.where(finite, 0, state["skipped"] + 1),
        }
        metrics = {"loss": total * share, "weight": weight, "grad_norm": norm, "finite": finite, **_shares(counts)}
        metrics["skipped"] = after["skipped"]
        return after, metrics

    return step


def make_eval_step(model: radfm.RadFMConfig, config: StepConfig) -> Callable[[dict, dict], dict]:
    """(parameters, batch [A, B, ...]) -> sums to be added up over batches and given to `summarise`.

    `exact` counts the samples of which every trained token was the most likely one, given the tokens before it: what
    the released code logs as accuracy.
    """
    network = radfm.RadFM(model)

    def step(params: dict, batch: dict) -> dict:
        def one(carry, micro):
            _, _, out = radfm_loss(network, params, micro, weighting=config.weighting, chunk=config.chunk)
            return jax.tree.map(jnp.add, carry, _counts(micro, out)), None

        return jax.lax.scan(one, _no_counts(), batch)[0]

    return step


def _zeros(tree: dict) -> dict:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _no_counts() -> dict:
    return {name: jnp.zeros(len(TASKS) + 1) for name in ("loss", "weight", "tokens", "correct", "samples", "exact")}


def by_segment(segments: jax.Array, values: jax.Array) -> jax.Array:
    """[B, T], [B, T] -> [B, T + 1]: the largest value in each segment of a row; 0 or False where there is none."""
    return jax.vmap(lambda segment, x: jnp.zeros(x.size + 1, x.dtype).at[segment].max(x))(segments, values)


def _counts(batch: dict, out: dict) -> dict[str, jax.Array]:
    """Sums by task, float32[1 + tasks]; entry 0 belongs to the padding."""
    active = out["weights"] > 0
    by_task = lambda values: jnp.zeros(len(TASKS) + 1).at[batch["tasks"]].add(values)  # noqa: E731
    segments = batch["segments"]
    wrong = by_segment(segments, active & ~out["correct"])
    seen = by_segment(segments, active)
    task = by_segment(segments, batch["tasks"])
    per_segment = lambda x: jnp.zeros(len(TASKS) + 1).at[task].add(x.astype(jnp.float32))  # noqa: E731
    return {
        "loss": by_task(jnp.where(active, out["weights"] * out["token_loss"], 0.0)),
        "weight": by_task(out["weights"]),
        "tokens": by_task(active.astype(jnp.float32)),
        "correct": by_task((active & out["correct"]).astype(jnp.float32)),
        "samples": per_segment(seen),
        "exact": per_segment(seen & ~wrong),
    }


def _shares(counts: dict) -> dict[str, jax.Array]:
    share = lambda part, whole: part / jnp.maximum(whole, 1e-8)  # noqa: E731
    return {
        "correct": share(counts["correct"].sum(), counts["tokens"].sum()),
        "task_loss": share(counts["loss"], counts["weight"])[1:],
        "task_weight": counts["weight"][1:],
    }


def summarise(counts: dict) -> dict[str, dict[str, float]]:
    """Sums of `make_eval_step` -> {task: {loss, token_accuracy, exact_match, samples}}, `all` first; tasks that did
    not occur are left out."""
    counts = {name: np.asarray(x, np.float64) for name, x in counts.items()}
    found = {}
    for name, pick in (("all", slice(1, None)), *((task, slice(i, i + 1)) for i, task in enumerate(TASKS, 1))):
        c = {k: float(x[pick].sum()) for k, x in counts.items()}
        if c["samples"]:
            found[name] = {
                "loss": c["loss"] / max(c["weight"], 1e-8),
                "token_accuracy": c["correct"] / max(c["tokens"], 1.0),
                "exact_match": c["exact"] / c["samples"],
                "samples": c["samples"],
            }
    return found
