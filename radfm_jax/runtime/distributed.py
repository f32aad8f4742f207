"""Start the processes of a run.

    with distributed.start(args, workdir, config, stop) as peers:       before the first use of JAX's devices
        ...

1. `cluster.process_info` finds out which process this is.
2. `rendezvous` waits for all processes and compares what they run.
3. Process 0 starts the service in `coordination.py`, all processes connect to it, and `peers.Peers` watches the others.

`jax.distributed.initialize` is not used because it runs the coordination service inside process 0 (coordination.py).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from input_pipeline.console import SafeConsole
from radfm_jax.runtime import cluster, compat, console, coordination, faults
from radfm_jax.runtime.cluster import ProcessInfo, StartError
from radfm_jax.runtime.peers import Peers
from radfm_jax.runtime.rendezvous import LOOPBACK, rendezvous, run_properties


def start(args: argparse.Namespace, workdir: Path, config: Mapping, stop: faults.Stop) -> Peers:
    """Connect this process to the others of its run. A run of one process needs no connection.

    Args:
      args: the options of `cluster.add_arguments`.
      workdir: gets logs/PROCESS.log if there are several processes.
      config: config of the run; it must be equal in all processes.
      stop: set by signals.
    Raises:
      StartError: processes are missing. ValueError: invalid options, or processes that do not run the same.
      InterruptedError: a signal arrived before all processes had connected.
    """
    info = cluster.process_info(args)
    if info is None:
        return Peers(stop)
    if args.start_timeout <= 0 or args.peer_timeout < 2:
        raise ValueError("--start-timeout must be above 0, --peer-timeout at least 2 seconds")
    heartbeat = math.ceil(args.peer_timeout)
    service = _launch_service(info, heartbeat, grace=args.peer_timeout + 10) if info.process == 0 else None
    try:
        rendezvous(info, run_properties(config, workdir), args.start_timeout, stop)
        log = _open_log(workdir, info)
        if service is not None:
            service.stdin.write("go\n")
            service.stdin.flush()
            if service.stdout.readline() != "up\n":
                raise StartError(
                    f"the coordination service of {info} exited with code {service.wait()}: did another program just "
                    "take its port? Start again, or choose another port"
                )
        _connect(info, args.start_timeout, heartbeat)
    except BaseException:
        if service is not None:
            service.kill()
            service.wait()
        raise
    return Peers(stop, info.process, info.processes, args.peer_timeout, service=service, log=log)


def _launch_service(info: ProcessInfo, heartbeat: int, grace: float) -> subprocess.Popen:
    """Start coordination.py. It loads during the rendezvous, and starts the service when it reads a line."""
    host, port = info.address
    address = f"{host}:{port}" if host in LOOPBACK else f"[::]:{port}"
    arguments = [os.getpid(), address, info.processes, 600, heartbeat, grace]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", coordination.__name__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a reader of process 0's stderr would otherwise wait for this program as well
        text=True,
        env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "PYTHONPATH": path},
    )


def _connect(info: ProcessInfo, timeout: float, heartbeat: int) -> None:
    # With the preemption service, JAX's own SIGTERM handler would replace that of faults.Stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if info.devices is not None:
        visible = ",".join(map(str, info.devices))
        jax.config.update("jax_cuda_visible_devices", visible)
        jax.config.update("jax_rocm_visible_devices", visible)
    compat.connect(info.coordinator, info.process, info.processes, timeout=timeout, heartbeat=heartbeat)
    if jax.default_backend() == "cpu":
        # Gloo keeps the connections of the first collective, but waits only half a minute for them. Later some
        # processes may still compile what others read from the cache.
        multihost_utils.sync_global_devices("radfm_jax")


def _open_log(workdir: Path, info: ProcessInfo):
    """Open WORKDIR/logs/PROCESS.log. Process 0 also keeps its console; the others redirect all output to the log."""
    path = Path(workdir) / "logs" / f"{info.process}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open(path, "a", buffering=1)
    except OSError as e:
        raise ValueError(f"{path} cannot be written: {e.strerror or e}") from e
    log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}  {info}, on {socket.gethostname()}, pid {os.getpid()}\n")
    if info.process:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        return log
    console.log_file = SafeConsole(file=log, width=120)
    logging.captureWarnings(True)
    root = logging.getLogger()
    for stream in (sys.stderr, log):  # after a handler is installed, warnings do not reach the console by default
        handler = logging.StreamHandler(stream)
        handler.setLevel(logging.WARNING)
        root.addHandler(handler)
    return log
