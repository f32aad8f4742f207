"""Several processes become one run: which of them this one is, that all are there, and that all run the same.

    with distributed.start(args, workdir, facts, stop) as peers:        the first use of JAX's devices comes after this
        ...

    process_info()     flags, else environment, else what JAX finds of SLURM, Open MPI, TPU pods and Kubernetes
    meet()      every process tells process 0 who it is and what it would run; all get the same answer
    start()     coordination.py, the client of JAX for it, logs, and peers.py for all that comes later

They meet over a plain socket, on the port that the coordination service has afterwards, as JAX cannot say who is
missing or which number is wrong: it waits, and then aborts the process with a C++ stack.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
from jax._src import clusters, distributed  # what is found of a cluster, before anything is connected
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.lib import _jax
from jax.experimental import multihost_utils
from rich.console import Console

from radfm_jax.runtime import coordination, faults
from radfm_jax.runtime.peers import Peers
from radfm_jax.training import display
from radfm_jax.training.experiment import flat

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
VARIABLES = {"coordinator": "RADFM_COORDINATOR", "processes": "RADFM_PROCESSES", "process": "RADFM_PROCESS"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SIZE_OF_HELLO = 2**22


class StartError(RuntimeError):
    """The processes of a run did not come together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run of several processes."""
    group = parser.add_argument_group(
        "several processes",
        "Found by themselves under SLURM (srun), Open MPI, on TPU pods and in indexed Kubernetes jobs. Elsewhere give "
        "all three of --coordinator, --processes and --process, or the environment variables "
        f"{', '.join(VARIABLES.values())}; launch/local.sh does so.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port on the machine of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are; 1: none but this one, whatever")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--start-timeout", type=float, default=120, metavar="S", help="seconds until all must be there (%(default)s)"
    )
    group.add_argument(
        "--peer-timeout", type=float, default=15, metavar="S",
        help="seconds without a sign of life until a process counts as lost (%(default)s)",
    )  # fmt: skip


# --- which process is this? -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """One process among several.

    Attributes:
      coordinator: host:port at which process 0 listens.
      found: where this is known from.
      devices: the accelerators of this machine that are for this process, by number; None: all of them.
    """

    coordinator: str
    processes: int
    process: int
    found: str
    devices: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes} (coordinator {self.coordinator}, from {self.found})"


def process_info(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> ProcessInfo | None:
    """Which process this is; None if it is the only one.

    Raises:
      ValueError: flags or variables that are incomplete or make no sense.
      StartError: there is a cluster, but it cannot be made out.
    """
    given = {name: getattr(args, name) for name in VARIABLES}
    found = {name: "flags" for name, value in given.items() if value is not None}
    for name, variable in VARIABLES.items():
        if given[name] is None and environ.get(variable):
            given[name], found[name] = environ[variable], "the environment"
    if not found:
        return _cluster(environ, args.start_timeout)
    try:
        processes, process = (None if given[n] is None else int(given[n]) for n in ("processes", "process"))
    except ValueError as e:
        raise ValueError(f"{VARIABLES['processes']} and {VARIABLES['process']} must be numbers: {e}") from None
    if processes == 1:
        return None
    names = {name: f"--{name} ({variable})" for name, variable in VARIABLES.items()}
    if missing := [names[name] for name, value in given.items() if value is None]:
        there = ", ".join(f"{names[name]} is {given[name]}" for name in found)
        raise ValueError(f"{there}, but there is no {' and no '.join(missing)}: give all three, or --processes 1")
    host, _, port = str(given["coordinator"]).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"{names['coordinator']} is {given['coordinator']!r}: give HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(f"{names['process']} is {process}, of {processes} processes: give 0 to {processes - 1}")
    return ProcessInfo(given["coordinator"], processes, process, found["process"])


def _cluster(environ: Mapping[str, str], timeout: float) -> ProcessInfo | None:
    """What JAX finds, where something announces several processes: a laptop must not wait for a metadata server."""
    tasks = environ.get("SLURM_NTASKS", "1")
    announced = {
        "Open MPI": environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1" or "OMPI_MCA_orte_hnp_uri" in environ,
        "SLURM": "SLURM_STEP_NODELIST" in environ and tasks != "1",
        "a TPU machine": running_in_cloud_tpu_vm,
        "Kubernetes": "JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ,
    }
    name = next((name for name, here in announced.items() if here), None)
    if name is None:
        return None
    devices = environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(d) for d in devices.split(",")] if devices else None
    help_ = f"give --coordinator, --processes and --process (or {', '.join(VARIABLES.values())}), or --processes 1"
    try:
        coordinator, processes, process, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, devices, None, int(timeout)
        )
    except Exception as e:  # of whatever a cluster's own library raises
        raise StartError(f"this looks like {name}, but it cannot be made out: {e}; {help_}") from e
    if processes == 1 or (name == "a TPU machine" and coordinator is None):
        return None
    if None in (coordinator, processes, process):
        hint = " (pip install kubernetes lets JAX ask the cluster)" if name == "Kubernetes" else ""
        raise StartError(f"this looks like {name}, but JAX does not find the coordinator{hint}: {help_}")
    return ProcessInfo(coordinator, processes, process, name, None if devices is None else tuple(devices))


# --- what would it run? -----------------------------------------------------------------------------------------------


def facts(config: Mapping, workdir: Path) -> dict:
    """What must be the same in all processes: config, directory, code, versions, index of the data."""
    root = Path(__file__).resolve().parents[2]
    source = hashlib.sha256()
    for path in sorted(p for package in ("radfm_jax", "input_pipeline") for p in (root / package).rglob("*.py")):
        source.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    index = Path(config.get("data", {}).get("index", "")) / "index.json"
    return json.loads(
        json.dumps(
            {
                "config": config,
                "workdir": str(Path(workdir).absolute()),
                "source code": source.hexdigest(),
                "data index": hashlib.sha256(index.read_bytes()).hexdigest() if index.is_file() else "missing",
                "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
            },
            default=str,
        )
    )


def differences(found: Mapping[int, Mapping]) -> list[str]:
    """{process: facts} -> a line for each fact that is not the same in all of them."""
    facts_of = {process: flat(of) for process, of in found.items()}
    lines = []
    for key in dict.fromkeys(k for of in facts_of.values() for k in of):
        values: dict[str, list[int]] = {}
        for process, of in sorted(facts_of.items()):
            values.setdefault(of.get(key, "not there"), []).append(process)
        if len(values) > 1:
            lines.append(f"{key} is " + ", ".join(f"{_short(v)} in {_numbers(p)}" for v, p in values.items()))
    return lines


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:12]}...{text[-8:]}"


def _numbers(processes: list[int]) -> str:
    some = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process {some}" if len(processes) == 1 else f"processes {some}"


# --- rendezvous -------------------------------------------------------------------------------------------------------


def meet(where: ProcessInfo, run: dict, timeout: float, stop=()) -> None:
    """Returns when all processes are there and run the same.

    Args:
      run: of `facts`.
      timeout: seconds from now.
      stop: true if the process was told to end.
    Raises:
      StartError: in every process that was reached: which are missing, which have another number or count.
      ValueError: in every process: what is not the same.
      InterruptedError: `stop`.
    """
    hello = {
        "radfm_jax": 1, "process": where.process, "processes": where.processes,
        "host": f"{socket.gethostname()}, pid {os.getpid()}", "facts": run,
    }  # fmt: skip
    until = time.monotonic() + timeout
    if where.process == 0:
        came: dict[int, tuple[socket.socket | None, dict]] = {0: (None, hello)}
        try:
            with _listen(where, until, stop) as listener:
                answer = _gather(where, came, listener, until, timeout, stop)
                for connection, _ in came.values():
                    if connection is not None:
                        _send(connection, answer)
        finally:
            for connection, _ in came.values():
                if connection is not None:
                    connection.close()
    else:
        # Process 0 may have begun a little later, and knows best who is missing: its answer is worth the wait.
        answer = _ask(where, hello, until, until + min(timeout, 5), timeout, stop)
    if "same" in answer:
        raise ValueError(answer["same"])
    if "error" in answer:
        raise StartError(answer["error"])


def _listen(where: ProcessInfo, until: float, stop) -> socket.socket:
    host, port = where.address
    while True:
        try:
            if host in LOOPBACK:
                listener = socket.create_server((host, port), backlog=1024, family=_family(host))
            elif socket.has_dualstack_ipv6():
                listener = socket.create_server(("", port), backlog=1024, family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                listener = socket.create_server(("", port), backlog=1024)
            listener.settimeout(0.2)
            return listener
        except OSError as e:
            # A run that has just ended here keeps its port until its last process has noticed.
            if e.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise StartError(
                    f"{where} cannot listen at port {port}: {e.strerror or e}. Another program has it, or an earlier "
                    "run that has not ended: choose another port, or end that program"
                ) from None
        _pause(stop)


def _gather(where: ProcessInfo, came: dict, listener: socket.socket, until: float, timeout: float, stop) -> dict:
    """Fills {process: (connection, what it said)}; the answer for all of them."""
    while len(came) < where.processes:
        if stop:
            raise InterruptedError
        if time.monotonic() > until:
            there = ", ".join(f"{p} ({said['host']})" for p, (_, said) in sorted(came.items()))
            missing = _numbers([p for p in range(where.processes) if p not in came])
            return {
                "error": f"{missing} of {where.processes} did not come to {where.coordinator} within {timeout:g} s; "
                f"there are: {there}. Look at the logs of the missing: were they started, with the same --coordinator "
                "and --processes, and can their machines reach that port?"
            }
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(2)
        said = _receive(connection)
        if said is None or said.get("radfm_jax") != 1:
            connection.close()  # whoever that is, it is none of ours
            continue
        number = said["process"]
        if said["processes"] != where.processes:
            came[-1] = connection, said
            return {
                "error": f"process {number} ({said['host']}) was started as one of {said['processes']} processes, "
                f"process 0 ({came[0][1]['host']}) as one of {where.processes}: give all the same number"
            }
        if number in came and (number == 0 or not _gone(came[number][0])):
            came[-1] = connection, said
            return {
                "error": f"two processes say that they are process {number} of {where.processes}: "
                f"{came[number][1]['host']}, and {said['host']}: give each its own number"
            }
        came[number] = connection, said
    if lines := differences({p: said["facts"] for p, (_, said) in came.items()}):
        return {"same": "the processes would not run the same:\n  " + "\n  ".join(lines)}
    return {"ok": True}


def _ask(where: ProcessInfo, hello: dict, connect_until: float, until: float, timeout: float, stop) -> dict:
    host, port = where.address
    why = "nobody answered"
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError as e:
            why = e.strerror or str(e)
        if time.monotonic() > connect_until:
            raise StartError(
                f"{where} did not reach process 0 within {timeout:g} s ({why}). Was process 0 started, on {host}, with "
                f"the same --coordinator? Can this machine reach port {port} of {host}?"
            )
        _pause(stop)
    with connection:
        _send(connection, hello)
        connection.settimeout(0.2)
        answer = _receive(connection, until, stop)
    if answer is None:
        late = time.monotonic() > until
        raise StartError(
            f"{where} "
            + (f"got no answer within {timeout:g} s" if late else "was cut off")
            + f" at {where.coordinator}. "
            "Either process 0 has ended (see its log), or some other program has that port: choose another"
        )
    return answer


def _send(connection: socket.socket, value: dict) -> None:
    try:
        connection.settimeout(5)
        connection.sendall(json.dumps(value).encode() + b"\n")
    except OSError as e:
        logging.getLogger(__name__).warning("a process that had come is gone: %s", e)


def _receive(connection: socket.socket, until: float = 0, stop=()) -> dict | None:
    """A line of JSON; None if none comes, or it is something else."""
    data = b""
    while not data.endswith(b"\n") and len(data) < SIZE_OF_HELLO:
        try:
            part = connection.recv(2**16)
        except TimeoutError:
            if stop:
                raise InterruptedError from None
            if time.monotonic() > until:
                return None
            continue
        except OSError:
            return None
        if not part:
            return None
        data += part
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _gone(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _pause(stop) -> None:
    if stop:
        raise InterruptedError
    time.sleep(0.2)


# --- start ------------------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, workdir: Path, run: Mapping, stop: faults.Stop) -> Peers:
    """Joins the processes of this run, if there are several; a single one starts nothing.

    Args:
      args: with what `add_arguments` added.
      workdir: gets logs/PROCESS.log if there are several.
      run: the config, as `facts` takes it.
      stop: set by signals.
    Raises:
      StartError: not all came. ValueError: mistakes in the flags, or processes that would not run the same.
      InterruptedError: told to end before all were there.
    """
    where = process_info(args)
    if where is None:
        return Peers(stop)
    meet_timeout, peer_timeout = args.start_timeout, args.peer_timeout
    if meet_timeout <= 0 or peer_timeout < 2:
        raise ValueError("--start-timeout must be above 0, --peer-timeout at least 2 seconds")
    heartbeat = math.ceil(peer_timeout)
    service = _service(where, heartbeat, grace=peer_timeout + 10) if where.process == 0 else None
    try:
        meet(where, facts(run, workdir), meet_timeout, stop)
        log = _log(workdir, where)
        if service is not None:
            service.stdin.write("go\n")
            service.stdin.flush()
            if service.stdout.readline() != "up\n":
                raise StartError(
                    f"the coordination service of {where} ended with code {service.wait()}: was its port taken by "
                    "another program in this moment? Start again, or choose another port"
                )
        _connect(where, heartbeat, meet_timeout)
        _greet()
    except BaseException:
        if service is not None:
            service.kill()
            service.wait()
        raise
    return Peers(stop, where.process, where.processes, peer_timeout, service=service, log=log)


def _service(where: ProcessInfo, heartbeat: int, grace: float) -> subprocess.Popen:
    """coordination.py, waiting for the word to begin; it takes as long to load as the others take to come."""
    host, port = where.address
    address = f"{host}:{port}" if host in LOOPBACK else f"[::]:{port}"
    arguments = [os.getpid(), address, where.processes, 600, heartbeat, grace]
    return subprocess.Popen(
        [sys.executable, "-P", coordination.__file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # or whoever reads that of process 0 to its end waits for this program as well
        text=True,
        env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ},
    )


def _connect(where: ProcessInfo, heartbeat: int, timeout: float) -> None:
    """What jax.distributed.initialize does, but for the service that it would start in process 0."""
    # Signals are ours: JAX's own notice of them would take SIGTERM away from `Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if where.devices is not None:
        visible = ",".join(map(str, where.devices))
        jax.config.update("jax_cuda_visible_devices", visible)
        jax.config.update("jax_rocm_visible_devices", visible)
    client = _jax.get_distributed_runtime_client(
        where.coordinator, where.process, init_timeout=int(timeout), use_compression=True, heartbeat_timeout=heartbeat
    )
    client.connect()
    state = distributed.global_state
    state.client, state.coordinator_address = client, where.coordinator
    state.process_id, state.num_processes = where.process, where.processes
    if partition := os.environ.get("JAX_PARTITION_INDEX"):
        state.partition_index = int(partition)


def _greet() -> None:
    """A first collective of CPU devices, while all have just met: the connection that it makes is kept. Gloo waits half
    a minute for it, no longer, and later some processes may still compile what others took from the cache."""
    if jax.default_backend() == "cpu":
        multihost_utils.sync_global_devices("radfm_jax")


def _log(workdir: Path, where: ProcessInfo):
    """WORKDIR/logs/PROCESS.log, open. Process 0 goes on speaking to the console too; of the others, everything that
    they or a library print goes here alone."""
    path = Path(workdir) / "logs" / f"{where.process}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open(path, "a", buffering=1)
    except OSError as e:
        raise ValueError(f"{path} cannot be written: {e.strerror or e}") from e
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    log.write(f"--- {began}  {where}, on {socket.gethostname()}, pid {os.getpid()}\n")
    if where.process:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        return log
    display.record = Console(file=log, width=120)
    logging.captureWarnings(True)
    root = logging.getLogger()
    for stream in (sys.stderr, log):  # once there is any handler, warnings no longer go to the console by themselves
        handler = logging.StreamHandler(stream)
        handler.setLevel(logging.WARNING)
        root.addHandler(handler)
    return log
