"""Ways to train a model, and the devices that each fits on: full, frozen, LoRA, QLoRA.

A method changes only `optimizer.frozen`, `model.lora` and `model.base` of a config. It is estimated (estimate.memory)
with full remat, and with the number of micro-batches whose memory is smallest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from radfm_jax.cost import candidates, estimate
from radfm_jax.cost.topology import GPUS, Topology, gpus
from radfm_jax.models.lora import LoraConfig
from radfm_jax.training.experiment import Experiment

CONFIG = "the config"  # the method that changes nothing
# Method -> whether the language model is frozen, whether it has adapters, the type that holds it.
METHODS = {
    "full": (False, False, "float32"),
    "frozen": (True, False, "float32"),
    "frozen, bfloat16": (True, False, "bfloat16"),
    "LoRA": (True, True, "bfloat16"),
    "QLoRA": (True, True, "nf4"),
}
LENGTHS = (512, 1024, 2048, 4096, 8192)  # values of data.text_length
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # numbers of devices
STATE = ("parameters", "optimizer", "gradients")  # parts of the memory
LANGUAGE_MODEL = "llama"


@dataclasses.dataclass(frozen=True)
class Fit:
    """The candidate of a method with the smallest memory on a topology."""

    method: str
    topology: Topology
    config: Experiment
    memory: dict[str, int]  # bytes per device by part (estimate.memory)

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def state(self) -> int:
        """Bytes per device of STATE."""
        return sum(self.memory[part] for part in STATE)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one device."""
        train = self.config.train
        return train.batch // train.accumulation // candidates.row_shards(self.config, self.topology)

    @property
    def fits(self) -> bool:
        """Whether candidates.MARGIN of the memory stays free."""
        return self.topology.memory is None or self.total <= (1 - candidates.MARGIN) * self.topology.memory

    def as_dict(self) -> dict:
        """Return JSON values: bytes per device, and the settings."""
        train = self.config.train
        return {
            "method": self.method, "topology": self.topology.text, "text_length": self.config.data.text_length,
            "fits": self.fits, "memory_total": self.total, "memory_of_state": self.state, "memory_by_part": self.memory,
            "batch": train.batch, "accumulation": train.accumulation, "rows_per_device": self.rows,
            "remat": train.remat,
        }  # fmt: skip


def variant(config: Experiment, method: str) -> Experiment:
    """Return a config with another method; CONFIG returns it unchanged.

    "full" trains all parts. Other methods freeze the language model in addition to the parts that the config freezes.
    """
    if method == CONFIG:
        return config
    is_frozen, has_adapters, base = METHODS[method]
    frozen = tuple(dict.fromkeys((*config.optimizer.frozen, LANGUAGE_MODEL))) if is_frozen else ()
    adapters = (config.model.lora or LoraConfig()) if has_adapters else None
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora=adapters, base=base),
        optimizer=dataclasses.replace(config.optimizer, frozen=frozen),
    )


def fits(config: Experiment, topology: Topology, method: str, lengths: Sequence[int]) -> list[Fit]:
    """Return the leanest candidate of a method for rows of each number of tokens (`data.text_length`).

    Raises ValueError if the mesh does not match the topology.
    """
    config = variant(config, method)
    mesh, platform = estimate.abstract_mesh(config.mesh, topology.count), candidates.platform(topology)
    state, result = estimate.abstract_state(config, mesh), []
    for length in lengths:
        rows = dataclasses.replace(config, data=dataclasses.replace(config.data, text_length=length))
        settings = list(_leanest_settings(rows, topology))
        memories = [estimate.memory(setting, mesh, platform, state) for setting in settings]
        leanest = min(range(len(settings)), key=lambda i, memories=memories: sum(memories[i].values()))
        result.append(Fit(method, topology, settings[leanest], memories[leanest]))
    return result


def _leanest_settings(config: Experiment, topology: Topology) -> Iterator[Experiment]:
    """Yield the config with full remat and each number of micro-batches."""
    batch = candidates.batch_for(config, topology)
    for accumulation in candidates.accumulations(config, topology, batch):
        train = dataclasses.replace(config.train, batch=batch, accumulation=accumulation, remat="full")
        yield dataclasses.replace(config, train=train)


def table(config: Experiment, topology: Topology, lengths: Sequence[int] = LENGTHS) -> dict[str, list[Fit]]:
    """Return the fits of every method for rows of `lengths` tokens, and of the config's own length, in order."""
    lengths = sorted({*lengths, config.data.text_length})
    return {method: fits(config, topology, method, lengths) for method in METHODS}


def smallest(config: Experiment, method: str) -> Fit | None:
    """Return the fit on the smallest listed GPU, or on the smallest number of them; None if even the most do not fit.

    GPUs are compared by memory. The mesh of the config must suit one of COUNTS.
    """
    by_memory = sorted(GPUS, key=lambda name: GPUS[name].memory)
    suited, problem = 0, ""
    for count in COUNTS:
        try:
            estimate.abstract_mesh(config.mesh, count)
        except ValueError as error:
            problem = problem or str(error)
            continue
        suited += 1
        names = [name for name in by_memory if count <= GPUS[name].node or GPUS[name].network]
        # The memory that a step needs does not depend on the kind of GPU.
        [needed] = fits(config, gpus(count, names[-1]), method, [config.data.text_length])
        for name in names:
            found = dataclasses.replace(needed, topology=gpus(count, name))
            if found.fits:
                return found
    if not suited:
        raise ValueError(problem)
    return None
