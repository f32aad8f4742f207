"""What a run will need, from arithmetic alone: memory a device by part, time of a step, steps of an epoch.

Nothing is compiled. Parameters and moments are exact (shapes and shardings of train_step.abstract_state); what a step
holds beside them follows from the formulas below, written in the letters of models/llama.py: T tokens of a device's
micro-batch, E width, F hidden width of an MLP, H and G query and key widths, V vocabulary, n bytes of a number.
Communication is not in the time: `traffic` says how much of it there is.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from radfm_jax.cost import flops
from radfm_jax.models import attention, radfm
from radfm_jax.models.layers import matmul_precision
from radfm_jax.runtime import sharding
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment, MeshConfig

# Bytes/s of one network adapter of 200 Gbit/s: the worst case. `plan` reckons with the links of a topology.
LINK = 25e9
# Share of the places in packed rows that hold tokens.
FULL_ROWS = 0.95
# What a training step reaches of the rate of one matrix product alone, where no published figure is known. CPU: the
# practice data's model took 0.8 s for 17.7 GFLOP (22 GFLOP/s) on two cores that multiplied at 188 GFLOP/s. Other
# devices: as published runs on the known ones.
SHARE_OF_PRODUCT = {"cpu": 0.12, "other": 0.4}


# --- the devices ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices of one kind.

    Attributes:
      count: of devices. rate: FLOP/s that a training step is expected to reach on each. said: how that is known.
    """

    count: int
    rate: float
    said: str


def published(kind: str, count: int) -> Hardware:
    """Devices that need not be here: `published("A100", 32)`. ValueError for a kind without a known peak."""
    name = flops.known(kind)
    if name is None:
        raise ValueError(f"the peak of a {kind!r} is not known; known: {', '.join(flops.PEAK)}")
    peak, share = flops.PEAK[name], flops.REACHED[name]
    return Hardware(count, share * peak, f"{share * 100:g} % of {amount(peak, 'FLOP/s')} on {count} x {name}")


def hardware(devices: Sequence[jax.Device], dtype: str = "bfloat16") -> Hardware:
    """The devices of a mesh, for products in `dtype`.

    By the published peak where it is known and the products are bfloat16; else by a product that is timed for 0.2 s.
    """
    first = next(device for device in devices if device.process_index == jax.process_index())
    if dtype == "bfloat16" and flops.known(first.device_kind):
        return published(first.device_kind, len(devices))
    rate = product_rate(first, dtype)
    # Simulated devices share the cores of one CPU.
    together = len(devices) if first.platform != "cpu" else jax.process_count()
    share = SHARE_OF_PRODUCT.get(first.platform, SHARE_OF_PRODUCT["other"])
    reached = f"the {amount(rate, 'FLOP/s')} that a {dtype} product reaches on this {first.device_kind}"
    return Hardware(len(devices), share * rate * together / len(devices), f"{share * 100:g} % of {reached}")


def product_rate(device: jax.Device, dtype: str, seconds: float = 0.2) -> float:
    """FLOP/s of the quickest of the matrix products that fit into `seconds`, after the one that compiles it."""
    m, k, n = (512, 512, 1024) if device.platform == "cpu" else (4096, 4096, 4096)
    left, right = (jax.device_put(np.ones(shape, dtype), device) for shape in ((m, k), (k, n)))
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=matmul_precision(dtype)))
    product(left, right).block_until_ready()
    quickest, end = math.inf, time.perf_counter() + seconds
    while quickest == math.inf or time.perf_counter() < end:
        began = time.perf_counter()
        product(left, right).block_until_ready()
        quickest = min(quickest, time.perf_counter() - began)
    return 2 * m * k * n / quickest


# --- time -------------------------------------------------------------------------------------------------------------


def row_flops(config: Experiment) -> float:
    """FLOPs of one row of a training step (flops.training)."""
    return flops.training(config.model, config.data.limits, config.optimizer.frozen, config.data.channels)


def step_seconds(config: Experiment, devices: Hardware) -> float:
    """Seconds of an optimizer step, all of its micro-batches together."""
    return row_flops(config) * config.train.batch / (devices.count * devices.rate)


def time_line(config: Experiment, steps: int, devices: Hardware) -> str:
    """One line for what is still to be done: `steps` optimizer steps."""
    each = step_seconds(config, devices)
    return (
        f"estimated time: {duration(steps * each)} for {steps:,} steps ({each:.3g} s a step: "
        f"{amount(row_flops(config), 'FLOP')} a row x {config.train.batch:,} rows at {devices.said}), "
        "evaluation, saving and communication not counted"
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source of the data holds, as far as it is known before `prepare` has read it.

    Attributes:
      rows: of its table.
      tokens, patches: of a sample on average. Each scan is 34 tokens, and 256 patches if it is 2D, 16 for each
        slice of a volume (at the paper's sizes).
    """

    rows: int
    tokens: float
    patches: float


@dataclasses.dataclass(frozen=True)
class Epoch:
    """An epoch of the data: its samples, the rows they fill, and the optimizer steps of `train.epochs` of them."""

    samples: float
    rows: float
    steps: int


def epoch(config: Experiment, sources: Mapping[str, Source]) -> Epoch:
    """What `data.train` of these sizes comes to.

    Rows are as many as the tokens fill at FULL_ROWS, or more if their scans need more. Raises ValueError for a source
    of `data.train` that has no size.
    """
    data = config.data
    named = data.sources("train")
    if missing := [name for name in named if name not in sources]:
        raise ValueError(f"no size is known of data.train sources {', '.join(missing)}")
    if data.mixture == "weights":
        shares = {name: fields.get("weight", 1.0) for name, fields in named.items()}
        whole = data.epoch_samples or sum(sources[name].rows for name in named)
        samples = {name: whole * share / sum(shares.values()) for name, share in shares.items()}
    else:
        samples = {name: sources[name].rows * fields.get("fraction", 1.0) for name, fields in named.items()}
    tokens = sum(count * sources[name].tokens for name, count in samples.items())
    patches = sum(count * sources[name].patches for name, count in samples.items())
    limits = data.limits
    rows = max(tokens / limits.text_length / FULL_ROWS, patches / (limits.vision_rows * limits.patch_length))
    steps = config.train.steps or math.ceil(config.train.epochs * rows / config.train.batch)
    return Epoch(sum(samples.values()), rows, steps)


# --- memory -----------------------------------------------------------------------------------------------------------


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh that a config makes of so many devices, without them. Raises ValueError if it makes none."""
    sizes = [config.data, config.fsdp, config.tensor]
    rest = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and rest > 0 and devices % rest == 0:
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices or min(sizes) < 1:
        asked = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in sharding.AXES)
        raise ValueError(f"{asked} does not make a mesh of {devices} devices")
    return AbstractMesh(tuple(sizes), sharding.AXES)


def memory(config: Experiment, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes on each device by part; their sum is what the step needs at its peak.

      parameters      of all parts, as they are kept (train_step.abstract_state)
      optimizer       moments of what learns
      gradients       float32, of what learns; twice with accumulation, where a sum is kept beside them
      batch           the arrays of a step, and of the next one, which is placed while this one computes
      activations     what remat keeps of every block until the backward pass (`kept`)
      working set     the most of: one block of the LLM or of the vision encoder in the backward pass with its gathered
                      weights, the patch embedding, the loss head, the update

    Raises:
      ValueError: rows that do not divide over micro-batches and devices.
    """
    ways, tensor = math.prod(mesh.shape[axis] for axis in sharding.BATCH), mesh.shape["tensor"]
    train, limits, vision = config.train, config.data.limits, config.model.vision
    if train.batch % (train.accumulation * ways):
        raise ValueError(
            f"train.batch {train.batch} is not a multiple of train.accumulation {train.accumulation} times the {ways} "
            f"devices of {' and '.join(f'mesh.{axis}' for axis in sharding.BATCH)}"
        )
    rows = train.batch // train.accumulation // ways
    state = _state(config, mesh)
    learning = _bytes(state["params"])
    in_float32 = sum(_shard(x) * 4 for x in jax.tree.leaves(state["params"]))
    # On a CPU there is no fused attention: scores of all pairs of tokens exist, but where rows are walked tile by tile.
    fused = not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "cpu"
    blocks = _stacks(config, rows, tensor, fused)
    return {
        "parameters": learning + _bytes(state["frozen"]),
        "optimizer": _bytes(state["opt"]),
        "gradients": in_float32 * (2 if train.accumulation > 1 else 1),
        "batch": 2 * train.accumulation * rows * _row_bytes(config),
        "activations": sum(stack.layers * stack.kept(train.remat) for stack in blocks.values()),
        "working set": max(
            *(2 * stack.live + weights for stack, weights in zip(blocks.values(), _gathered(config), strict=True)),
            # A plane times its scale, its norm, and the gradient of that, each float32.
            3 * 4 * rows * limits.vision_rows * limits.patch_length * math.prod(vision.patch) * config.data.channels,
            _head(config, rows),
            in_float32,
        ),
    }


def traffic(config: Experiment, mesh: Mesh | AbstractMesh) -> float:
    """Bytes that come into each device in a step, at the least, in the dtype of products: for every micro-batch the
    weights that lie over `fsdp` twice (forward and backward) and the gradients of what learns once. What is too small
    to lie over it (sharding.param_shardings) is only summed, as everything is over replicas of `data`. 0 on one
    device."""
    state, ways, replicas = _state(config, mesh), mesh.shape["fsdp"], mesh.shape["data"]
    summed = lambda n: 2 * (n - 1) / n  # noqa: E731  an all-reduce among n devices
    numbers = 0.0
    for name, passes in (("params", 3), ("frozen", 2)):
        for x in jax.tree.leaves(state[name]):
            learns = name == "params"
            lies_over = any("fsdp" in ((axis,) if isinstance(axis, str) else axis or ()) for axis in x.sharding.spec)
            numbers += _shard(x) * (passes * (ways - 1) if lies_over else learns * summed(ways))
            numbers += _shard(x) * learns * summed(replicas)
    return numbers * jnp.dtype(config.train.dtype).itemsize * config.train.accumulation


def _state(config: Experiment, mesh: Mesh | AbstractMesh) -> dict:
    # The dtype of products changes no shape.
    return train_step.abstract_state(config.model, config.optimizer, mesh)[0]


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A stack of equal blocks: bytes of a device's micro-batch in one of them.

    Attributes:
      entry: what comes in and goes on, T E n.
      attention: what attention gives, T H n. projections: with queries, keys, values, T (2 H + 2 G) n.
      dots: what attention gives, and every product with weights. live: all that one block makes.
    """

    layers: int
    entry: int
    attention: int
    projections: int
    dots: int
    live: int

    def kept(self, remat: str) -> int:
        """Of one block, until the backward pass reaches it (layers.REMAT_POLICIES)."""
        beside = {"full": 0, "attention": self.attention, "projections": self.projections, "dots": self.dots}
        return self.entry + beside[remat] if remat in beside else self.live


def _stacks(config: Experiment, rows: int, tensor: int, fused: bool) -> dict[str, _Stack]:
    limits, c, v, q = config.data.limits, config.model.llama, config.model.vision, config.model.perceiver
    n = jnp.dtype(config.train.dtype).itemsize
    patches = rows * limits.vision_rows * limits.patch_length
    latents = rows * limits.scans * q.num_latents
    inner_v, inner_q = v.num_heads * v.head_dim, q.num_heads * q.head_dim

    def stack(layers, tokens, keys, width, heads, query, key, hidden, more_keys=0):
        """`tokens` that ask `keys` each; `more_keys` whose keys and values a block gathers beside."""
        query, key, hidden = query // tensor, key // tensor, hidden // tensor
        # float32 scores and their softmax, where no kernel keeps them to itself.
        tiled = keys >= attention.MIN_TILED_LENGTH and keys % 128 == 0
        scores = 0 if fused or tiled else 2 * 4 * tokens * keys * heads // tensor
        products = query + 2 * key + width + hidden + width
        # Two norms, each also in float32, two sums, and what the activation makes of the hidden layer.
        live = n * tokens * (products + query + 4 * width + hidden) + 2 * 4 * tokens * width + scores
        return _Stack(
            layers,
            n * tokens * width,
            n * tokens * query,
            n * tokens * (2 * query + 2 * key),
            n * tokens * (products + query),
            live + n * more_keys * 2 * key,
        )

    return {
        "llama": stack(
            c.num_layers, rows * limits.text_length, limits.text_length, c.width, c.num_heads,
            c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, 2 * c.mlp_width,
        ),
        "vit": stack(
            v.num_layers, patches, limits.patch_length, v.width, v.num_heads, inner_v, inner_v, v.mlp_width
        ),
        "perceiver": stack(
            q.num_layers, latents, limits.patch_length + q.num_latents, q.width, q.num_heads, inner_q, inner_q,
            q.mlp_factor * q.width, rows * limits.scans * limits.patch_length,
        ),
    }  # fmt: skip


def _gathered(config: Experiment) -> list[int]:
    """Bytes of one whole block's weights in the dtype of products, and of their gradient if it learns: what FSDP brings
    together, and what a cast makes on one device."""
    n = jnp.dtype(config.train.dtype).itemsize
    found = []
    for name in ("llama", "vit", "perceiver"):
        tree = nn.unbox(radfm.abstract_params(config.model))[name]["blocks"]
        numbers = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(tree))
        # While one block computes, the next one's weights are on their way.
        found.append(numbers * n * (2 + (name not in config.optimizer.frozen)))
    return found


def _head(config: Experiment, rows: int) -> int:
    """Bytes of the loss: the head's kernel whole in float32 and its gradient, chunks of logits, the hidden states."""
    c, chunk = config.model.llama, min(config.train.chunk, rows * config.data.text_length)
    n = jnp.dtype(config.train.dtype).itemsize
    hidden = rows * config.data.text_length * c.width * n
    return c.width * c.vocab_size * (4 + 4 + n) + 3 * 4 * chunk * c.vocab_size + 2 * hidden


def abstract_batch(config: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a step [A, B, ...] as the pipeline makes them (models/radfm.py, with targets, tasks and weights),
    without shardings."""
    limits = config.data.limits
    of_row = radfm.abstract_batch(
        config.model,
        text=limits.text_length,
        scans=limits.scans,
        vision_rows=limits.vision_rows,
        patches=limits.patch_length,
        planes=limits.planes,
        plane_dtype=jnp.dtype(config.data.storage),
    )
    index = of_row["plane_index"]
    of_row["plane_index"] = jax.ShapeDtypeStruct((*index.shape[:-1], config.data.channels), index.dtype)
    text = (1, limits.text_length)
    of_row |= {name: jax.ShapeDtypeStruct(text, jnp.int32) for name in ("targets", "tasks")}
    of_row["weights"] = jax.ShapeDtypeStruct(text, jnp.float32)
    micro = (config.train.accumulation, config.train.batch // config.train.accumulation)
    return {name: jax.ShapeDtypeStruct((*micro, *x.shape[1:]), x.dtype) for name, x in of_row.items()}


def _row_bytes(config: Experiment) -> int:
    """Bytes of one row of a batch."""
    return sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in abstract_batch(config).values())


def _shard(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))


def _bytes(tree) -> int:
    return sum(_shard(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def capacity(mesh: Mesh) -> int | None:
    """Bytes that JAX may use on a device of this process, None where it does not say (a CPU)."""
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    return (device.memory_stats() or {}).get("bytes_limit")


# --- in words ---------------------------------------------------------------------------------------------------------


def summary(config: Experiment, devices: Hardware, sources: Mapping[str, Source] | None = None) -> list[str]:
    """Lines for the docstring of a config: memory a device, time of a step and, where sizes are known, of the run."""
    mesh = abstract_mesh(config.mesh, devices.count)
    parts, received = memory(config, mesh), traffic(config, mesh)
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    each, row = step_seconds(config, devices), amount(row_flops(config), "FLOP")
    lines = [
        f"memory: {sum(parts.values()) / 1e9:.0f} GB a device ({listed})",
        f"a step: {each:.3g} s ({row} a row x {config.train.batch} rows at {devices.said})",
    ]
    if received:
        lines.append(f"traffic: {received / 1e9:.0f} GB a step into each device, {received / LINK:.2g} s at 25 GB/s")
    if sources is not None:
        whole = epoch(config, sources)
        lines.append(
            f"steps: {about(whole.steps)} for {config.train.epochs:g} x {about(whole.rows)} rows of "
            f"{whole.samples / whole.rows:.2g} samples, {duration(whole.steps * each)} of arithmetic"
        )
    return lines


def amount(value: float, unit: str) -> str:
    """A count with three digits: 170.8e12 -> "171 TFLOP"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def about(count: float) -> str:
    """A whole number with three digits: 2380429 -> "2,380,000"."""
    return f"{float(f'{count:.3g}'):,.0f}"


def duration(seconds: float) -> str:
    """5000 -> "1 h 23 min"."""
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
