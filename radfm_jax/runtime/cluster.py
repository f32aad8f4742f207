"""Which process of a run this is: from flags, environment variables, or the cluster that JAX detects."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping

from radfm_jax.runtime import compat, faults

VARIABLES = {"coordinator": "RADFM_COORDINATOR", "processes": "RADFM_PROCESSES", "process": "RADFM_PROCESS"}


class StartError(faults.Explained, RuntimeError):
    """The processes of a run did not find each other."""


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """The number of this process in a run of several processes, and how to reach process 0."""

    coordinator: str  # host:port on which process 0 listens
    processes: int
    process: int
    source: str  # what set these values: flags, the environment, or a kind of cluster
    devices: tuple[int, ...] | None = None  # numbers of the local accelerators that this process uses; None for all

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes} (coordinator {self.coordinator}, from {self.source})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run with several processes."""
    group = parser.add_argument_group(
        "several processes",
        "Detected automatically under SLURM (srun), Open MPI, on TPU pods and in indexed Kubernetes jobs. Elsewhere "
        "set all three of --coordinator, --processes and --process, or the environment variables "
        f"{', '.join(VARIABLES.values())}; launch/local.sh does this.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port on the machine of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes; 1 disables cluster detection")
    group.add_argument("--process", type=int, metavar="I", help="number of this process, from 0")
    for name, seconds, text in (
        ("--start-timeout", 120, "seconds to wait until all processes have started"),
        ("--peer-timeout", 15, "seconds without a heartbeat after which a process is considered lost"),
    ):
        group.add_argument(name, type=float, default=seconds, metavar="S", help=f"{text} (default %(default)s)")


def process_info(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> ProcessInfo | None:
    """Return which process this is; None if it is the only one.

    Raises ValueError if flags or variables are incomplete or invalid, StartError if a cluster has no coordinator.
    """
    values = {name: getattr(args, name) for name in VARIABLES}
    sources = {name: "flags" for name, value in values.items() if value is not None}
    for name, variable in VARIABLES.items():
        if values[name] is None and environ.get(variable):
            values[name], sources[name] = environ[variable], "the environment"
    if not sources:
        return _detect(environ, args.start_timeout)
    try:
        processes, process = (None if values[n] is None else int(values[n]) for n in ("processes", "process"))
    except ValueError as e:
        raise ValueError(f"{VARIABLES['processes']} and {VARIABLES['process']} must be integers: {e}") from None
    if processes == 1:
        return None
    names = {name: f"--{name} ({variable})" for name, variable in VARIABLES.items()}
    if missing := [names[name] for name, value in values.items() if value is None]:
        present = ", ".join(f"{names[name]} is {values[name]}" for name in sources)
        raise ValueError(f"{present}, but {' and '.join(missing)} not set: set all three, or --processes 1")
    host, _, port = str(values["coordinator"]).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"{names['coordinator']} must be HOST:PORT (got {values['coordinator']!r})")
    if not 0 <= process < processes:
        raise ValueError(f"{names['process']} must be 0 to {processes - 1} for {processes} processes (got {process})")
    return ProcessInfo(values["coordinator"], processes, process, sources["process"])


def _detect(environ: Mapping[str, str], timeout: float) -> ProcessInfo | None:
    """Return what JAX detects if the environment indicates several processes, otherwise None.

    Otherwise JAX is not called, because it may wait for a metadata server that a laptop does not have.
    """
    announced = {
        "Open MPI": environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1" or "OMPI_MCA_orte_hnp_uri" in environ,
        "SLURM": "SLURM_STEP_NODELIST" in environ and environ.get("SLURM_NTASKS", "1") != "1",
        "a TPU machine": compat.on_cloud_tpu(),
        "Kubernetes": "JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ,
    }
    name = next((name for name, is_announced in announced.items() if is_announced), None)
    if name is None:
        return None
    devices = environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(d) for d in devices.split(",")] if devices else None
    remedy = f"set --coordinator, --processes and --process (or {', '.join(VARIABLES.values())}), or --processes 1"
    try:
        coordinator, processes, process, devices = compat.detect_cluster(devices, timeout)
    except Exception as e:  # each kind of cluster raises the errors of its own library
        raise StartError(f"this looks like {name}, but cluster detection failed: {e}; {remedy}") from e
    if processes == 1 or (name == "a TPU machine" and coordinator is None):
        return None
    if None in (coordinator, processes, process):
        hint = " (pip install kubernetes lets JAX query the cluster)" if name == "Kubernetes" else ""
        raise StartError(f"this looks like {name}, but JAX does not find the coordinator{hint}: {remedy}")
    return ProcessInfo(coordinator, processes, process, name, None if devices is None else tuple(devices))
