"""Private APIs of JAX and Python, one function each.

No other module imports `jax._src` or `jaxlib`, or uses a private attribute of a library, so an upgrade that breaks one
fails here. Imports are inside the functions because the coordination service starts faster without JAX.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence


def coordination_client():
    """Return the client of JAX's coordination service; None in a run of one process.

    Remove this when there is a public key-value store, barrier and liveness check in `jax.distributed`.
    `jax.experimental.multihost_utils` synchronises through collectives, which a background thread must not start.
    """
    from jax._src import distributed

    return distributed.global_state.client


def connect(coordinator: str, process: int, processes: int, *, timeout: float, heartbeat: int) -> None:
    """Connect to a running coordination service. `jax.distributed.initialize` would start another one."""
    from jax._src import distributed
    from jax._src.lib import _jax

    client = _jax.get_distributed_runtime_client(
        coordinator, process, init_timeout=int(timeout), use_compression=True, heartbeat_timeout=heartbeat
    )
    client.connect()
    state = distributed.global_state
    state.client, state.coordinator_address = client, coordinator
    state.process_id, state.num_processes = process, processes
    if partition := os.environ.get("JAX_PARTITION_INDEX"):
        state.partition_index = int(partition)


def start_coordination_service(address: str, processes: int, *, timeout: int, heartbeat: int):
    """Start a coordination service and return it. It stops when the object is deleted.

    The public API starts the service in process 0 only.
    """
    from jaxlib import _jax

    return _jax.get_distributed_runtime_service(
        address, processes, heartbeat_timeout=heartbeat, cluster_register_timeout=timeout, shutdown_timeout=30,
        recoverable=True,  # otherwise JAX aborts all processes when one is lost
    )  # fmt: skip


def detect_cluster(devices: Sequence[int] | None, timeout: float) -> tuple:
    """Return (coordinator, processes, process, devices) as JAX detects them. No public API does this yet."""
    from jax._src import clusters

    return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, devices, None, int(timeout))


def on_cloud_tpu() -> bool:
    """Return whether this machine is a Cloud TPU VM. The public checks initialise devices."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return running_in_cloud_tpu_vm


def before_thread_pools_shut_down(callback: Callable[[], None]) -> None:
    """Call `callback` at exit while thread pools still work. `atexit` hooks are too late: the pools have stopped then.

    Python has no public hook for this. These hooks run in reverse order, so concurrent.futures must register first.
    """
    import concurrent.futures.thread  # noqa: F401

    threading._register_atexit(callback)
