"""Devices and their published memory, peak FLOP/s and link speeds.

None of them needs to be present, and launch/gke.py reads topologies without JAX.

    v5p:4x4x2    v5e:8x8    v6e:4x8    v4:2x4x4     TPU slices
    gpu:32xA100-80GB    gpu:16xH100    gpu:1xH200   nodes of 8 GPUs, one network adapter per GPU
    gpu:1xRTX4090-24GB    gpu:2xL40S-48GB           GPUs of one machine, connected by PCIe
    cpu:4                                           simulated devices of this machine
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device."""

    name: str  # key in flops.PEAK
    memory: float  # bytes
    link: float  # bytes/s in one direction of one TPU link to a neighbour, or of a GPU's share of NVLink or PCIe
    network: float = 0.0  # bytes/s of a GPU's adapter between nodes; 0: unknown, so all devices are in one node
    node: int = 8  # GPUs per node
    bus: str = "NVLink"  # what connects the GPUs of a node
    torus: int = 0  # minimum length of a TPU slice's axis that is closed to a ring


# TPU: cloud.google.com/tpu/docs (memory, interconnect per chip), divided by the chip's links: four of v5e and v6e in
# two dimensions, six of v4 and v5p in three. v4 and v5p close their axes from a cube of 4 on, v5e and v6e at 16.
TPUS = {
    "v4": Chip("TPU v4", 32 * GIB, 45e9, torus=4),
    "v5e": Chip("TPU v5e", 16 * GIB, 45e9, torus=16),
    "v5p": Chip("TPU v5p", 95 * GIB, 90e9, torus=4),
    "v6e": Chip("TPU v6e", 32 * GIB, 90e9, torus=16),
}
PCIE_4, PCIE_5 = ({"link": link, "bus": bus} for link, bus in ((31.5e9, "PCIe 4.0 x16"), (63e9, "PCIe 5.0 x16")))
# Data sheets. A100, H100 and H200: the SXM versions; NVLink has 600 or 900 GB/s in both directions together; one
# adapter per GPU of 200 Gbit/s (DGX A100) or 400 Gbit/s (DGX H100, H200). The others: PCIe, which is an upper limit,
# because GPUs without peer-to-peer access copy through the memory of the host.
GPUS = {
    "RTX4080-16GB": Chip("RTX 4080", 16e9, **PCIE_4),
    "RTX3090-24GB": Chip("RTX 3090", 24e9, **PCIE_4),
    "RTX4090-24GB": Chip("RTX 4090", 24e9, **PCIE_4),
    "L4-24GB": Chip("L4", 24e9, **PCIE_4),
    "A10-24GB": Chip("A10", 24e9, **PCIE_4),
    "RTX5090-32GB": Chip("RTX 5090", 32e9, **PCIE_5),
    "A100-40GB": Chip("A100", 40e9, 300e9, 25e9),
    "A40-48GB": Chip("A40", 48e9, **PCIE_4),
    "A6000-48GB": Chip("RTX A6000", 48e9, **PCIE_4),
    "RTX6000Ada-48GB": Chip("RTX 6000 Ada", 48e9, **PCIE_4),
    "L40S-48GB": Chip("L40S", 48e9, **PCIE_4),
    "A100-80GB": Chip("A100", 80e9, 300e9, 25e9),
    "H100": Chip("H100", 80e9, 450e9, 50e9),
    "H200": Chip("H200", 141e9, 450e9, 50e9),
}
KNOWN = (
    "v4:2x4x4, v5e:8x8, v5p:4x4x2, v6e:4x8, gpu:32xA100-80GB, gpu:16xH100, gpu:1xRTX4090-24GB, cpu:4; GPUs: "
    + ", ".join(GPUS)
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices of one kind."""

    text: str  # the command-line argument
    kind: str  # tpu, gpu or cpu
    count: int
    shape: tuple[int, ...] = ()  # axis lengths of a TPU slice
    chip: Chip | None = None  # None for simulated CPU devices
    device: str = ""  # key of a GPU in GPUS

    @property
    def memory(self) -> float | None:
        return self.chip.memory if self.chip else None

    @property
    def peak(self) -> float | None:
        """bfloat16 FLOP/s per device."""
        from radfm_jax.cost import flops  # imports JAX, which launch/gke.py does not have

        return flops.PEAK[self.chip.name] if self.chip else None

    @property
    def bandwidth(self) -> float | None:
        """Maximum bytes/s that a ring over all devices sends into each of them; None for a CPU or a single device.

        TPU: all links of a chip to neighbours in the slice; an axis without wrap-around counts one link, not two.
        GPU: NVLink or PCIe inside a node; across nodes all its adapters, because NVLink forwards what they receive.
        """
        if self.chip is None or self.count == 1:
            return None
        if self.kind == "tpu":
            # The axes of a cube are closed together, those of a flat slice one by one.
            lengths = [min(self.shape)] * 3 if len(self.shape) == 3 else self.shape
            closed = [length >= self.chip.torus for length in lengths]
            return sum(1 + ring for size, ring in zip(self.shape, closed, strict=True) if size > 1) * self.chip.link
        if self.count <= self.chip.node:
            return self.chip.link
        return min(self.chip.link, self.chip.node * self.chip.network)

    @property
    def bandwidth_text(self) -> str:
        """Description of the bandwidth and its links."""
        if self.bandwidth is None:
            return "no network" if self.chip else "simulated: no link speed and no peak, so no times"
        rate = f"{self.bandwidth / 1e9:g} GB/s into each device"
        if self.kind == "tpu":
            return f"{rate}: {self.bandwidth / self.chip.link:g} links of {self.chip.link / 1e9:g} GB/s"
        if self.count <= self.chip.node:
            return f"{rate}: {self.chip.bus}"
        return f"{rate}: {self.chip.node} adapters per node of {self.chip.network / 1e9:g} GB/s, then {self.chip.bus}"


def parse(text: str) -> Topology:
    """Parse a --topology argument. Raises ValueError for an unknown one."""
    kind, _, rest = text.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+)*", rest):
        shape = tuple(int(size) for size in rest.split("x"))
        dimensions = 3 if kind in ("v4", "v5p") else 2
        if len(shape) != dimensions or min(shape) < 1:
            example = next(name for name in KNOWN.split(", ") if name.startswith(kind))
            raise ValueError(f"{text}: a slice of {kind} has {dimensions} dimensions, for example {example}")
        return Topology(text, "tpu", math.prod(shape), shape, TPUS[kind])
    if kind == "gpu" and (match := re.fullmatch(r"(\d+)x([\w-]+)", rest)) and int(match[1]) > 0:
        count, name = int(match[1]), match[2].lower()
        names = [known for known in GPUS if name in (known.lower(), known.lower().partition("-")[0])]
        if len(names) > 1:
            raise ValueError(f"{text}: choose a memory size: {' or '.join(f'gpu:{count}x{name}' for name in names)}")
        if names:
            return gpus(count, names[0], text)
    if kind == "cpu" and rest.isdigit() and int(rest) > 0:
        return Topology(text, "cpu", int(rest))
    raise ValueError(f"{text!r} is not a topology; examples: {KNOWN}")


def gpus(count: int, name: str, text: str = "") -> Topology:
    """Return `count` GPUs of a kind in GPUS. Raises ValueError for more than a node if nodes are not connected."""
    chip, text = GPUS[name], text or f"gpu:{count}x{name}"
    if count > chip.node and not chip.network:
        raise ValueError(f"{text}: at most {chip.node}, because {name} has no published network between machines")
    return Topology(text, "gpu", count, chip=chip, device=name)
