"""Estimates by arithmetic: memory per device by part, time of a step, network traffic, steps of an epoch.

Nothing is compiled. Parameters and moments are exact (shapes and shardings of train_step.abstract_state). The rest of a
step's memory follows from formulas, in these letters: T tokens of a device's micro-batch, E width, F hidden width of an
MLP, H and G query and key widths, V vocabulary, n bytes per number. Times exclude communication (see `traffic`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from input_pipeline.datasets import FAMILIES
from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.cost import adapters, flops
from radfm_jax.models import attention, lora, quantised, radfm
from radfm_jax.models.layers import matmul_precision
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.runtime import sharding
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment, MeshConfig

# Share of the positions in packed rows that hold tokens.
FULL_ROWS = 0.95
# FLOP/s of a training step relative to a single matrix product, for devices without a published figure. CPU: the
# practice model took 0.8 s for 17.7 GFLOP (22 GFLOP/s) on two cores that multiplied at 188 GFLOP/s. Other devices: as
# in published runs on known ones.
SHARE_OF_PRODUCT = {"cpu": 0.12, "other": 0.4}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices of one kind."""

    count: int
    rate: float  # expected FLOP/s of a training step on each
    basis: str  # description of the rate


def published(kind: str, count: int) -> Hardware:
    """Return devices at their published rate: `published("A100", 32)`. Raises ValueError for an unknown kind."""
    name = flops.known_device(kind)
    if name is None:
        raise ValueError(f"unknown peak FLOP/s of {kind!r}; known devices: {', '.join(flops.PEAK)}")
    peak, share = flops.PEAK[name], flops.REACHED[name]
    return Hardware(count, share * peak, f"{share * 100:g} % of {amount(peak, 'FLOP/s')} on {count} x {name}")


def hardware(devices: Sequence[jax.Device], dtype: str = "bfloat16") -> Hardware:
    """Return the devices of a mesh, with their rate for products in `dtype`.

    The rate is the published one if it is known and `dtype` is bfloat16. Otherwise a product is timed for 0.2 s.
    """
    first = next(device for device in devices if device.process_index == jax.process_index())
    if dtype == "bfloat16" and flops.known_device(first.device_kind):
        return published(first.device_kind, len(devices))
    rate = product_rate(first, dtype)
    # Simulated devices share the cores of one CPU.
    parallel = len(devices) if first.platform != "cpu" else jax.process_count()
    share = SHARE_OF_PRODUCT.get(first.platform, SHARE_OF_PRODUCT["other"])
    reached = f"the {amount(rate, 'FLOP/s')} that a {dtype} product reaches on this {first.device_kind}"
    return Hardware(len(devices), share * rate * parallel / len(devices), f"{share * 100:g} % of {reached}")


def product_rate(device: jax.Device, dtype: str, seconds: float = 0.2) -> float:
    """Return the maximum FLOP/s of matrix products timed for `seconds`, after a first one that compiles."""
    m, k, n = (512, 512, 1024) if device.platform == "cpu" else (4096, 4096, 4096)
    left, right = (jax.device_put(np.ones(shape, dtype), device) for shape in ((m, k), (k, n)))
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=matmul_precision(dtype)))
    product(left, right).block_until_ready()
    quickest, end = math.inf, time.perf_counter() + seconds
    while quickest == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        product(left, right).block_until_ready()
        quickest = min(quickest, time.perf_counter() - start)
    return 2 * m * k * n / quickest


def row_flops(config: Experiment) -> float:
    """Return the FLOPs of one row of a training step (flops.training), and of the forward pass of a reference.

    The generation of answers (train.objective="grpo") is not included.
    """
    limits, channels, updates = (
        config.data.limits,
        config.data.channels,
        config.objective.updates if config.objective else 1,
    )
    reference = sum(flops.forward(config.model, limits, channels).values()) if config.has_reference else 0.0
    return updates * (flops.training(config.model, limits, config.optimizer.frozen, channels) + reference)


def step_seconds(config: Experiment, devices: Hardware) -> float:
    """Return the seconds of an optimizer step, with all of its micro-batches."""
    return row_flops(config) * config.train.batch / (devices.count * devices.rate)


def time_line(config: Experiment, steps: int, devices: Hardware) -> str:
    """Return a log line with the estimated time of the remaining `steps`."""
    each = step_seconds(config, devices)
    return (
        f"estimated time: {duration(steps * each)} for {steps:,} steps ({each:.3g} s per step: "
        f"{amount(row_flops(config), 'FLOP')} per row x {config.train.batch:,} rows at {devices.basis}), "
        "without evaluation, saving and communication"
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """Sizes of a data source that are known before `prepare` has read it; tokens and patches are averages per sample.

    At the paper's sizes each scan has 34 tokens, and 256 patches if it is 2D or 16 per slice of a volume.
    """

    rows: int
    tokens: float
    patches: float


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Samples and packed rows of one epoch, and the optimizer steps of `train.epochs` epochs."""

    samples: float
    rows: float
    steps: int


def epoch(config: Experiment, sources: Mapping[str, Source]) -> Epoch:
    """Return the size of an epoch of `data.train`. Raises ValueError for a source without a size.

    The number of rows follows from tokens at FULL_ROWS or from patches, whichever needs more.
    """
    data = config.data
    named = data.sources("train")
    if missing := [name for name in named if name not in sources]:
        raise ValueError(f"unknown size of data.train sources {', '.join(missing)}: add them to SIZES")
    rows_of = {name: sources[name].rows * (1 - data.validation_share) for name in named}
    if data.mixture == "weights":
        shares = {name: fields.get("weight", 1.0) for name, fields in named.items()}
        total = data.epoch_samples or sum(rows_of.values())
        samples = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    else:
        released = data.epoch == "released"
        fractions = {name: FAMILIES[fields["family"]].released_fraction for name, fields in named.items()}
        samples = {
            name: rows_of[name] * fields.get("fraction", 1.0) * (fractions[name] if released else 1.0)
            for name, fields in named.items()
        }
    tokens = sum(count * sources[name].tokens for name, count in samples.items())
    patches = sum(count * sources[name].patches for name, count in samples.items())
    limits = data.limits
    rows = max(tokens / limits.text_length / FULL_ROWS, patches / (limits.vision_rows * limits.patch_length))
    steps = config.train.steps or math.ceil(config.train.epochs * rows / config.train.batch)
    return Epoch(sum(samples.values()), rows, steps)


# --- memory -----------------------------------------------------------------------------------------------------------


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """Return a config's mesh of `devices` devices. Raises ValueError if the axes do not multiply to that number."""
    sizes = [config.data, config.fsdp, config.tensor]
    rest = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and rest > 0 and devices % rest == 0:
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices or min(sizes) < 1:
        axes = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in sharding.AXES)
        raise ValueError(f"{axes} does not make a mesh of {devices} devices")
    return AbstractMesh(tuple(sizes), sharding.AXES)


def abstract_state(config: Experiment, mesh: Mesh | AbstractMesh) -> dict:
    """Return the state that trains: train_step.abstract_state. Of `data` and `train`, only the objective matters."""
    # config.model instead of config.compute: the dtype of products does not change shapes.
    return train_step.abstract_state(config.model, config.optimizer, mesh, reference=config.has_reference)[0]


def memory(
    config: Experiment, mesh: Mesh | AbstractMesh, platform: str | None = None, state: dict | None = None
) -> dict[str, int]:
    """Return the bytes on each device by part; their sum is the peak of a step.

      parameters      of all parts in the types that hold them, with scales and adapters (train_step.abstract_state)
      reference       copy of the trained parameters, with an objective that has one
      optimizer       moments of trained parameters
      gradients       float32, of trained parameters; twice with accumulation, which adds a running sum
      batch           the arrays of this step and of the next one, which is transferred while this one computes
      activations     what remat saves of every block for the backward pass (`saved`)
      working set     the maximum of: a block in the backward pass with its gathered and dequantised weights, the patch
                      embedding, the loss head, the update

    Args:
      platform: that of an AbstractMesh's devices, which decides whether the decoder's attention is fused
        (attention.choose); None: it is.
      state: abstract_state of this config, if the caller has it.
    Raises:
      ValueError: rows do not divide over micro-batches and devices.
    """
    ways, tensor = math.prod(mesh.shape[axis] for axis in sharding.BATCH), mesh.shape["tensor"]
    train, limits, vision = config.train, config.data.limits, config.model.vision
    if train.batch % (train.accumulation * ways):
        raise ValueError(
            f"train.batch {train.batch} is not a multiple of train.accumulation {train.accumulation} times the {ways} "
            f"devices of {' and '.join(f'mesh.{axis}' for axis in sharding.BATCH)}"
        )
    rows = train.batch // train.accumulation // ways
    state = state or abstract_state(config, mesh)
    trained = _bytes(state["params"])
    in_float32 = sum(_shard(x) * 4 for x in jax.tree.leaves(state["params"]))
    # A CPU has no fused attention: it stores the scores of all pairs of tokens, except where attention is tiled.
    fused = not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "cpu"
    blocks = _stacks(config, rows, tensor, fused, platform is None or _has_kernel(config, platform))
    row_bytes = sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in abstract_batch(config).values())
    return {
        "parameters": trained + _bytes(state["frozen"]),
        **({"reference": _bytes(state["reference"])} if "reference" in state else {}),
        "optimizer": _bytes(state["opt"]),
        "gradients": in_float32 * (2 if train.accumulation > 1 else 1),
        "batch": 2 * train.accumulation * rows * row_bytes,
        "activations": sum(stack.layers * stack.saved(train.remat) for stack in blocks.values()),
        "working set": max(
            *(
                2 * stack.live + weights
                for stack, weights in zip(blocks.values(), _gathered(config, blocks), strict=True)
            ),
            # A scaled plane, its norm and the gradient of the norm, each in float32.
            3 * 4 * rows * limits.vision_rows * limits.patch_length * math.prod(vision.patch) * config.data.channels,
            _head(config, rows),
            in_float32,
        ),
    }


def traffic(config: Experiment, mesh: Mesh | AbstractMesh, state: dict | None = None) -> float:
    """Return the minimum bytes received by each device per step, in the dtype of products; 0 on one device.

    Each micro-batch gathers the weights sharded over `fsdp` twice (forward and backward) and reduces gradients of
    trained parameters once. Gradients of parameters too small for `fsdp` (sharding.param_shardings) are only
    all-reduced. All gradients are all-reduced over the replicas of `data`. Quantised weights are sent as they are.
    """
    state, ways, replicas = state or abstract_state(config, mesh), mesh.shape["fsdp"], mesh.shape["data"]
    all_reduce = lambda n: 2 * (n - 1) / n  # noqa: E731
    size, received = jnp.dtype(config.train.dtype).itemsize, 0.0
    for name, passes, trained in (("params", 3, True), ("frozen", 2, False)):
        for x in jax.tree.leaves(state[name]):
            sharded = any("fsdp" in ((axis,) if isinstance(axis, str) else axis or ()) for axis in x.sharding.spec)
            bytes_ = _shard(x) * (x.dtype.itemsize if jnp.issubdtype(x.dtype, jnp.integer) else size)
            received += bytes_ * (passes * (ways - 1) if sharded else trained * all_reduce(ways))
            received += bytes_ * trained * all_reduce(replicas)
    return received * config.train.accumulation


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A stack of equal blocks: bytes of one block's activations for a device's micro-batch."""

    layers: int
    inputs: int  # the residual stream, T E n
    attention: int  # outputs of attention, T H n
    projections: int  # also queries, keys and values, T (2 H + 2 G) n
    dots: int  # outputs of attention and of every product with weights
    live: int  # all intermediate values

    def saved(self, remat: str) -> int:
        """Return the bytes that a policy of layers.REMAT_POLICIES saves for the backward pass of one block."""
        extra = {"full": 0, "attention": self.attention, "projections": self.projections, "dots": self.dots}
        return self.inputs + extra[remat] if remat in extra else self.live

    def adapted(self, config: Experiment, path: str, rows: int) -> _Stack:
        """Return the stack at this parameter path with the activations of its adapters (adapters.py)."""
        n, dots, live = jnp.dtype(config.train.dtype).itemsize, 0.0, 0.0
        for adapter in adapters.adapters(config.model):
            if adapter.path.startswith(f"{path}/"):
                tokens = rows * adapter.tokens(config.model, config.data.limits)
                dots += n * tokens * (adapter.rank + adapter.outputs)
                if config.model.lora.dropout:  # the inputs after dropout, and which of them remain
                    live += (n + 1) * tokens * adapter.inputs
        return dataclasses.replace(self, dots=self.dots + math.ceil(dots), live=self.live + math.ceil(dots + live))


def _has_kernel(config: Experiment, platform: str) -> bool:
    """Return whether the decoder's attention on `platform` is not plain XLA."""
    c, text = config.compute.llama, config.data.text_length
    q, k = (jax.ShapeDtypeStruct((1, text, heads, c.head_dim), c.dtype) for heads in (c.num_heads, c.num_kv_heads))
    return attention.choose(c.attention, q, k, platform, c.attention_softcap) != "xla"


def _stacks(config: Experiment, rows: int, tensor: int, fused: bool, decoder_kernel: bool) -> dict[str, _Stack]:
    """Return the stacks of blocks, with fused attention kernels or not; the decoder may have no kernel at all."""
    limits, c, q = config.data.limits, config.model.llama, config.model.perceiver
    n = jnp.dtype(config.train.dtype).itemsize
    patches = rows * limits.vision_rows * limits.patch_length
    latents = rows * limits.scans * q.num_latents

    def stack(layers, tokens, keys, width, heads, query, key, hidden, more_keys=0, kernels=True, norms=2):
        """Return a stack of `tokens` queries with `keys` each, and `more_keys` from another sequence."""
        query, key, hidden = query // tensor, key // tensor, hidden // tensor
        # float32 scores and their softmax, unless a fused or tiled kernel computes them.
        tiled = kernels and keys >= attention.MIN_TILED_LENGTH and keys % 128 == 0
        scores = 0 if (fused and kernels) or tiled else 2 * 4 * tokens * keys * heads // tensor
        products = query + 2 * key + width + hidden + width
        # Norms (also in float32), two sums, and the activated hidden layer.
        live = n * tokens * (products + query + (norms + 2) * width + hidden) + norms * 4 * tokens * width + scores
        saved = [n * tokens * size for size in (width, query, 2 * query + 2 * key, products + query)]
        return _Stack(layers, *saved, live + n * more_keys * 2 * key)

    result = {
        "llama/blocks": stack(
            c.num_layers, rows * limits.text_length, limits.text_length, c.width, c.num_heads,
            c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, 2 * c.mlp_width,
            kernels=decoder_kernel, norms=4 if c.post_norms else 2,
        ),
    }  # fmt: skip
    for s in config.model.vision.stacks(limits.patch_length):
        result[f"vit/{s.name}"] = stack(
            s.layers, math.ceil(patches * s.tokens), s.keys, s.width, s.heads, s.inner, s.inner, s.hidden,
            kernels=s.kernels,
        )  # fmt: skip
    if isinstance(q, PerceiverConfig):
        inner = q.num_heads * q.head_dim
        result["perceiver/blocks"] = stack(
            q.num_layers, latents, limits.patch_length + q.num_latents, q.width, q.num_heads, inner, inner,
            q.mlp_factor * q.width, rows * limits.scans * limits.patch_length,
        )  # fmt: skip
    return {path: blocks.adapted(config, path, rows) for path, blocks in result.items()}


def _gathered(config: Experiment, stacks: Iterable[str]) -> list[int]:
    """Return the bytes of each stack's gathered block weights in the dtype of products, and of their gradient.

    On one device these are the cast or dequantised weights. Stacks are named by the path of their parameters.
    """
    n, frozen = jnp.dtype(config.train.dtype).itemsize, config.optimizer.frozen
    shapes = quantised.source_shapes(flatten(nn.unbox(radfm.abstract_params(config.model))))
    result = []
    for stack in stacks:
        numbers = {path: math.prod(shape[1:]) for path, shape in shapes.items() if path.startswith(f"{stack}/")}
        learns = stack.partition("/")[0] not in frozen
        gradients = sum(count for path, count in numbers.items() if learns or lora.is_adapter(path))
        # The weights of the next block are gathered while one computes.
        result.append(n * (2 * sum(numbers.values()) + gradients))
    return result


def _head(config: Experiment, rows: int) -> int:
    """Return the bytes of the loss: the unsharded head, its gradient, chunks of logits, hidden states.

    The head is float32 and cast, unless `model.base` holds it in a smaller type. A frozen one has no gradient.
    """
    c, chunk = config.model.llama, min(config.train.chunk, rows * config.data.text_length)
    n, learns = jnp.dtype(config.train.dtype).itemsize, "llama" not in config.optimizer.frozen
    number = n + (4 if config.model.base == "float32" else 0) + (4 if learns else 0)
    hidden = rows * config.data.text_length * c.width * n
    return c.width * c.vocab_size * number + 3 * 4 * chunk * c.vocab_size + 2 * hidden


def abstract_batch(config: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays of a step [A, B, ...] as the pipeline produces them, without shardings."""
    limits = config.data.limits
    row = radfm.abstract_batch(
        config.model, text=limits.text_length, scans=limits.scans, vision_rows=limits.vision_rows,
        patches=limits.patch_length, planes=limits.planes, plane_dtype=jnp.dtype(config.data.storage),
    )  # fmt: skip
    index = row["plane_index"]
    row["plane_index"] = jax.ShapeDtypeStruct((*index.shape[:-1], config.data.channels), index.dtype)
    text = (1, limits.text_length)
    row |= {name: jax.ShapeDtypeStruct(text, jnp.int32) for name in ("targets", "tasks")}
    objective_arrays = config.objective.arrays if config.objective else ()
    row |= {name: jax.ShapeDtypeStruct(text, jnp.float32) for name in ("weights", *objective_arrays)}
    micro = (config.train.accumulation, config.train.batch // config.train.accumulation)
    return {name: jax.ShapeDtypeStruct((*micro, *x.shape[1:]), x.dtype) for name, x in row.items()}


def _shard(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))


def _bytes(tree) -> int:
    return sum(_shard(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def capacity(mesh: Mesh) -> int | None:
    """Return the bytes that JAX may use on a device of this process, or None if unknown (a CPU)."""
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    return (device.memory_stats() or {}).get("bytes_limit")


def amount(value: float, unit: str) -> str:
    """Format a count with three digits: 170.8e12 -> "171 TFLOP"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def about(count: float) -> str:
    """Format a whole number rounded to three digits: 2380429 -> "2,380,000"."""
    return f"{float(f'{count:.3g}'):,.0f}"


def duration(seconds: float) -> str:
    """Format seconds: 5000 -> "1 h 23 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
