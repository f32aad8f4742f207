"""Candidates of a plan: combinations of batch size, micro-batches and remat policy, each with memory and time.

A step of B rows over W devices (`data` x `fsdp`) has A micro-batches of B / (A W) rows per device. FSDP gathers the
weights for each micro-batch, so A = 1 minimizes traffic and maximizes memory. The *plain* candidate has one
row per device and micro-batch, as in the paper; its traffic is the maximum.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from radfm_jax.cost import adapters, estimate, flops
from radfm_jax.cost.program import CompileError, Program
from radfm_jax.cost.topology import Topology
from radfm_jax.models.layers import REMAT_POLICIES
from radfm_jax.training.experiment import Experiment

# Share of a device's memory that must stay free: for the runtime, NCCL, fragmentation, and errors of the estimate.
MARGIN = 0.1
# MFU does not count recomputation, and published figures are with full remat or close to it.
ASSUMED_REMAT = "full"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting, estimated by arithmetic and optionally compiled."""

    config: Experiment  # with this candidate's `train.batch`, `accumulation` and `remat`
    topology: Topology
    rows: int  # rows of a micro-batch on one device
    memory: dict[str, int]  # bytes per device by part (estimate.memory)
    estimated_traffic: float  # bytes that FSDP sends into a device per step (estimate.traffic)
    compute: float | None  # seconds of a step at the assumed MFU, with recomputation; None without a known device
    program: Program | None = None  # the compiled train step
    compile_error: str = ""  # the compiler's message if it failed

    @property
    def total(self) -> int:
        """Bytes per device: those of the compiled program if it is for this kind of device, else the estimate."""
        if self.program is not None and self.topology.kind != "gpu":
            # The next batch is put on the device while this one computes.
            return self.program.peak + self.memory["batch"] // 2
        return sum(self.memory.values())

    @property
    def traffic(self) -> float:
        """Bytes into a device per step: those of the compiled program for TPUs, else the estimate."""
        if self.program is not None and self.topology.kind == "tpu":
            return sum(self.program.received.values())
        return self.estimated_traffic

    @property
    def margin(self) -> float | None:
        """Share of a device's memory that stays free; negative if the candidate does not fit."""
        limit = self.topology.memory
        return None if limit is None else 1 - self.total / limit

    @property
    def fits(self) -> bool:
        return not self.compile_error and (self.margin is None or self.margin >= MARGIN)

    @property
    def name(self) -> str:
        train = self.config.train
        return f"batch {train.batch} = {train.accumulation} x {self.rows} per device, remat {train.remat}"

    @property
    def communication(self) -> float:
        """Seconds of a step's traffic at the topology's bandwidth."""
        return self.traffic / self.topology.bandwidth if self.topology.bandwidth else 0.0

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Seconds per step with full overlap of communication and arithmetic, and without any overlap."""
        if self.compute is None:
            return None
        return max(self.compute, self.communication), self.compute + self.communication

    @property
    def can_hide(self) -> float | None:
        """Share of the communication that arithmetic can hide."""
        if self.compute is None or not self.communication:
            return None
        return min(1.0, self.compute / self.communication)


def evaluate(
    config: Experiment, topology: Topology, mfu: float | None, *, batch: int, accumulation: int, remat: str,
    state: dict | None = None,
) -> Candidate:  # fmt: skip
    """Estimate one setting by arithmetic. `state` is estimate.abstract_state, if the caller has it.

    Raises ValueError if rows do not divide, or if the mesh does not match the topology.
    """
    train = dataclasses.replace(config.train, batch=batch, accumulation=accumulation, remat=remat)
    config = dataclasses.replace(config, train=train)
    mesh = estimate.abstract_mesh(config.mesh, topology.count)
    memory = estimate.memory(config, mesh, platform(topology), state)
    traffic, compute = estimate.traffic(config, mesh, state), None
    if topology.peak is not None and mfu is not None:
        flops_per_device = estimate.row_flops(config) * batch / topology.count
        recomputation = executed_flops(config) / executed_flops(config, ASSUMED_REMAT)
        compute = flops_per_device / (mfu * topology.peak) * recomputation
    rows = batch // accumulation // row_shards(config, topology)
    return Candidate(config, topology, rows, memory, traffic, compute)


def executed_flops(config: Experiment, remat: str | None = None) -> float:
    """Return the FLOPs that a step executes per row: those that MFU counts, and recomputation."""
    limits, c = config.data.limits, config.model.llama
    parts = flops.forward(config.model, limits, config.data.channels)
    stacks = parts["llama"] + parts["vit"] + parts["perceiver"] + sum(adapters.forward(config.model, limits).values())
    attention = flops.decoder_attention(c, limits.text_length)
    keys = 2 * limits.text_length * c.width * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.num_layers
    # Savings of a policy are counted for the language model only, which has 99 % of them.
    recomputed = {
        "full": stacks, "attention": stacks - attention, "projections": stacks - attention - keys, "dots": attention,
        "none": 0.0,
    }  # fmt: skip
    return estimate.row_flops(config) + recomputed[remat or config.train.remat]


def row_shards(config: Experiment, topology: Topology) -> int:
    """Return the number of devices that the rows of a batch are divided over."""
    mesh = estimate.abstract_mesh(config.mesh, topology.count)
    return mesh.shape["data"] * mesh.shape["fsdp"]


def platform(topology: Topology) -> str | None:
    """Return JAX's name of the platform of a topology's devices; None for simulated ones."""
    return {"tpu": "tpu", "gpu": "cuda"}.get(topology.kind)


def accumulations(config: Experiment, topology: Topology, batch: int) -> list[int]:
    """Return the numbers of micro-batches that a batch can be divided into."""
    per_device = batch // row_shards(config, topology)
    return [count for count in range(1, per_device + 1) if per_device % count == 0]


def batch_for(config: Experiment, topology: Topology) -> int:
    """Return the config's batch size, or the next larger one that the devices can share."""
    shards = row_shards(config, topology)
    return math.ceil(config.train.batch / shards) * shards


def candidates(config: Experiment, topology: Topology, batches: list[int], mfu: float | None) -> list[Candidate]:
    """Return all candidates of these batch sizes in the order of `rank`."""
    shards, result = row_shards(config, topology), []
    state = estimate.abstract_state(config, estimate.abstract_mesh(config.mesh, topology.count))
    for batch in batches:
        if batch < 1:
            raise ValueError(f"a batch of {batch} rows: must be at least 1")
        if batch % shards:
            raise ValueError(
                f"a batch of {batch} rows does not divide over {shards} devices of mesh.data and mesh.fsdp"
            )
        for accumulation, remat in itertools.product(accumulations(config, topology, batch), REMAT_POLICIES):
            setting = {"batch": batch, "accumulation": accumulation, "remat": remat}
            result.append(evaluate(config, topology, mfu, **setting, state=state))
    return sorted(result, key=rank)


def plain(config: Experiment, topology: Topology, batch: int, mfu: float | None) -> Candidate:
    """Return the candidate that gathers the weights for every row: one row per device and micro-batch, full remat."""
    accumulation = batch // row_shards(config, topology)
    return evaluate(config, topology, mfu, batch=batch, accumulation=accumulation, remat="full")


def rank(candidate: Candidate) -> tuple:
    """Sort key: candidates that fit first, then by time per row without overlap, then by memory."""
    seconds = candidate.step_seconds
    cost = seconds[1] / candidate.config.train.batch if seconds else executed_flops(candidate.config)
    return not candidate.fits, round(cost, 9), candidate.total


def compile_best(
    ranked: list[Candidate], compiler: Callable[[Candidate], Program], tries: int = 3
) -> tuple[list[Candidate], Candidate | None]:
    """Compile the best candidate until one is confirmed to fit, at most `tries` times.

    Returns the candidates, ranked again, and the best confirmed one, or None.
    """
    ranked = list(ranked)
    for _ in range(tries):
        best = next((c for c in ranked if c.fits), None)
        if best is None or best.program is not None:
            return ranked, best
        ranked[ranked.index(best)] = compiled(best, compiler)
        ranked.sort(key=rank)
    return ranked, next((c for c in ranked if c.fits and c.program is not None), None)


def compiled(candidate: Candidate, compiler: Callable[[Candidate], Program]) -> Candidate:
    """Return a candidate with its compiled program, or with the compiler's error."""
    try:
        return dataclasses.replace(candidate, program=compiler(candidate))
    except CompileError as e:
        return dataclasses.replace(candidate, compile_error=str(e))
