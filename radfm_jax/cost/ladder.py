"""The rungs between least memory and least time: remat policies and micro-batches of one batch size.

A step of B rows over W devices (of `data` and `fsdp`) is A micro-batches of B / (A W) rows a device. Every micro-batch
gathers the weights anew, so A = 1 sends least and keeps most. The *plain* program has one row a device in each
micro-batch: as the paper accumulates, and the most that FSDP sends.
"""

from __future__ import annotations

import dataclasses
import math

from radfm_jax.cost import estimate, flops
from radfm_jax.cost.program import CompileError, Program
from radfm_jax.cost.topology import Topology
from radfm_jax.models.layers import REMAT_POLICIES
from radfm_jax.training.experiment import Experiment

# Of a device's memory that must stay free: for the run time, NCCL, fragments, and what arithmetic does not see.
MARGIN = 0.1
# MFU counts recomputing as no work, and published figures are with full remat or near it.
ASSUMED_REMAT = "full"


@dataclasses.dataclass(frozen=True)
class Rung:
    """One setting, by arithmetic, and what the compiler said of it if it was asked.

    Attributes:
      config: with `train.batch`, `accumulation` and `remat` of this rung.
      rows: of a micro-batch on one device.
      memory: bytes a device by part (estimate.memory).
      received: bytes that FSDP brings into a device in a step (estimate.traffic).
      compute: seconds of a step's arithmetic at the stated MFU, recomputing included; None without a known device.
      program: of the compiler; refused: what it said instead.
    """

    config: Experiment
    topology: Topology
    rows: int
    memory: dict[str, int]
    received: float
    compute: float | None
    program: Program | None = None
    refused: str = ""

    @property
    def total(self) -> int:
        """Bytes a device: the compiler's, where it compiles for such a device, and the next batch, which is placed
        while this one computes."""
        if self.program is not None and self.topology.kind != "gpu":
            return self.program.peak + self.memory["batch"] // 2
        return sum(self.memory.values())

    @property
    def sent(self) -> float:
        """Bytes into a device in a step: compiled for TPUs, else by arithmetic."""
        if self.program is not None and self.topology.kind == "tpu":
            return sum(self.program.received.values())
        return self.received

    @property
    def margin(self) -> float | None:
        """Share of a device's memory that stays free; negative if it does not fit."""
        limit = self.topology.memory
        return None if limit is None else 1 - self.total / limit

    @property
    def fits(self) -> bool:
        return not self.refused and (self.margin is None or self.margin >= MARGIN)

    @property
    def name(self) -> str:
        train = self.config.train
        return f"batch {train.batch} = {train.accumulation} x {self.rows} a device, remat {train.remat}"

    @property
    def hidden(self) -> tuple[float, float] | None:
        """Seconds of a step (all that is sent hidden behind the arithmetic as far as it goes; nothing hidden)."""
        if self.compute is None:
            return None
        sending = self._sending
        return max(self.compute, sending), self.compute + sending

    @property
    def can_hide(self) -> float | None:
        """Share of the sending that there is arithmetic for."""
        if self.compute is None or not self._sending:
            return None
        return min(1.0, self.compute / self._sending)

    @property
    def _sending(self) -> float:
        return self.sent / self.topology.bandwidth if self.topology.bandwidth else 0.0


def rung(config: Experiment, topology: Topology, mfu: float | None) -> Rung:
    """One setting by arithmetic. Raises ValueError for rows that do not divide or a mesh that does not fit."""
    mesh = estimate.abstract_mesh(config.mesh, topology.count)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    memory = estimate.memory(config, mesh)
    received = estimate.traffic(config, mesh)
    compute = None
    if topology.peak is not None and mfu is not None:
        each = estimate.row_flops(config) * config.train.batch / topology.count
        compute = each / (mfu * topology.peak) * executed(config) / executed(config, ASSUMED_REMAT)
    rows = config.train.batch // config.train.accumulation // ways
    return Rung(config, topology, rows, memory, received, compute)


def executed(config: Experiment, remat: str | None = None) -> float:
    """FLOPs of one row that a step really computes: those that count, and what remat computes again."""
    remat = remat or config.train.remat
    limits, c = config.data.limits, config.model.llama
    parts = flops.forward(config.model, limits, config.data.channels)
    stacks = parts["llama"] + parts["vit"] + parts["perceiver"]
    attention = 2 * limits.text_length**2 * c.num_heads * c.head_dim * c.num_layers
    keys = 2 * limits.text_length * c.width * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.num_layers
    # Of the LLM alone what a policy spares is worth telling: it is all but a hundredth.
    again = {
        "full": stacks,
        "attention": stacks - attention,
        "projections": stacks - attention - keys,
        "dots": attention,
        "none": 0.0,
    }[remat]
    return estimate.row_flops(config) + again


def batch_for(config: Experiment, topology: Topology) -> int:
    """The batch of the config, or the next larger one that so many devices can share."""
    mesh = estimate.abstract_mesh(config.mesh, topology.count)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return math.ceil(config.train.batch / ways) * ways


def ladder(config: Experiment, topology: Topology, batches: list[int], mfu: float | None) -> list[Rung]:
    """All rungs of these batch sizes, the quickest first (`slowest`), those that do not fit last."""
    mesh = estimate.abstract_mesh(config.mesh, topology.count)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rungs = []
    for batch in batches:
        if batch < 1:
            raise ValueError(f"a batch of {batch} rows: at least 1 is needed")
        if batch % ways:
            raise ValueError(f"a batch of {batch} rows does not divide over {ways} devices of mesh.data and mesh.fsdp")
        a_device = batch // ways
        for accumulation in (a for a in range(1, a_device + 1) if a_device % a == 0):
            for remat in REMAT_POLICIES:
                rungs.append(rung(changed(config, batch, accumulation, remat), topology, mfu))
    return sorted(rungs, key=order)


def changed(config: Experiment, batch: int, accumulation: int, remat: str) -> Experiment:
    train = dataclasses.replace(config.train, batch=batch, accumulation=accumulation, remat=remat)
    return dataclasses.replace(config, train=train)


def plain(config: Experiment, topology: Topology, batch: int, mfu: float | None) -> Rung:
    """The program that gathers the weights for every row: one row a device a micro-batch, full remat."""
    mesh = estimate.abstract_mesh(config.mesh, topology.count)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return rung(changed(config, batch, batch // ways, "full"), topology, mfu)


def order(rung: Rung) -> tuple:
    """What fits first; then the least time a row with nothing hidden, which nobody can promise; then the most room."""
    batch = rung.config.train.batch
    seconds = rung.hidden[1] / batch if rung.hidden else executed(rung.config)
    return not rung.fits, round(seconds, 9), rung.total


def asked(rungs: list[Rung], compile_, tries: int = 3) -> tuple[list[Rung], Rung | None]:
    """The ladder with the compiler's word on its best rungs, and the best that it confirms, None if none of them.

    Args:
      compile_: Rung -> Program, may raise CompileError.
      tries: rungs that are compiled at most.
    """
    rungs, tried = list(rungs), 0
    while tried < tries:
        best = next((r for r in rungs if r.fits), None)
        if best is None or best.program is not None:
            return rungs, best
        at = rungs.index(best)
        rungs[at] = told(best, compile_)
        rungs.sort(key=order)
        tried += 1
    best = next((r for r in rungs if r.fits and r.program is not None), None)
    return rungs, best


def told(rung: Rung, compile_) -> Rung:
    """A rung with what the compiler says of it."""
    try:
        return dataclasses.replace(rung, program=compile_(rung))
    except CompileError as e:
        return dataclasses.replace(rung, refused=str(e))
