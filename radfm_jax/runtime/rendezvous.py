"""The rendezvous of all processes before JAX connects them: is every process there, and do all run the same?

Each process sends its number and the properties of its run to process 0 as one line of JSON, and gets the same answer.
They use a plain socket on the port that the coordination service takes over afterwards. JAX alone cannot report which
process is missing or has a wrong number: it waits, and then aborts the process with a C++ stack.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from input_pipeline.files import sha256_of_file
from radfm_jax.runtime.cluster import ProcessInfo, StartError
from radfm_jax.training.experiment import flat

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_MESSAGE_BYTES = 2**22


def run_properties(config: Mapping, workdir: Path) -> dict:
    """Return what must be equal in all processes: config, workdir, source code, data index, package versions."""
    root = Path(__file__).resolve().parents[2]
    source = hashlib.sha256()
    for path in sorted(p for package in ("radfm_jax", "input_pipeline") for p in (root / package).rglob("*.py")):
        source.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    index = Path(config.get("data", {}).get("index", "")) / "index.json"
    properties = {
        "config": config,
        "workdir": str(Path(workdir).absolute()),
        "source code": source.hexdigest(),
        "data index": sha256_of_file(index) if index.is_file() else "missing",
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
    }
    return json.loads(json.dumps(properties, default=str))


def differences(properties: Mapping[int, Mapping]) -> list[str]:
    """Return one line per property that is not equal in all processes. `properties` is keyed by process number."""
    by_process = {process: flat(values) for process, values in sorted(properties.items())}
    lines = []
    for key in dict.fromkeys(k for values in by_process.values() for k in values):
        processes: dict[str, list[int]] = {}
        for process, values in by_process.items():
            processes.setdefault(values.get(key, "missing"), []).append(process)
        if len(processes) > 1:
            lines.append(f"{key} is " + ", ".join(f"{_shorten(v)} in {_list(p)}" for v, p in processes.items()))
    return lines


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:12]}...{text[-8:]}"


def _list(processes: list[int]) -> str:
    numbers = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process {numbers}" if len(processes) == 1 else f"processes {numbers}"


def rendezvous(info: ProcessInfo, properties: dict, timeout: float, stop=()) -> None:
    """Return when all processes have connected and run the same.

    Args:
      properties: of `run_properties`.
      timeout: seconds from now.
      stop: true after a signal to end the process.
    Raises:
      StartError: processes are missing, or have a wrong number or count. Every process that connected raises it.
      ValueError: properties differ; every process raises it.
      InterruptedError: `stop` became true.
    """
    meeting = _Rendezvous(info, properties, timeout, stop)
    answer = meeting.lead() if info.process == 0 else meeting.join()
    if "same" in answer:
        raise ValueError(answer["same"])
    if "error" in answer:
        raise StartError(answer["error"])


class _Rendezvous:
    def __init__(self, info: ProcessInfo, properties: dict, timeout: float, stop):
        self.info, self.timeout, self.stop = info, timeout, stop
        self.deadline = time.monotonic() + timeout
        self.hello = {
            "radfm_jax": 1, "process": info.process, "processes": info.processes,
            "host": f"{socket.gethostname()}, pid {os.getpid()}", "properties": properties,
        }  # fmt: skip

    # --- process 0 ----------------------------------------------------------------------------------------------------

    def lead(self) -> dict:
        """Collect the hellos of all processes and send every one the same answer."""
        hellos, connections = {0: self.hello}, {}
        with contextlib.ExitStack() as opened:
            listener = opened.enter_context(self._listen())
            answer = self._collect(listener, hellos, connections, opened)
            for connection in connections.values():
                _send(connection, answer)
        return answer

    def _listen(self) -> socket.socket:
        host, port = self.info.address
        while True:
            try:
                if host in LOOPBACK:
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    listener = socket.create_server((host, port), backlog=1024, family=family)
                elif socket.has_dualstack_ipv6():
                    options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
                    listener = socket.create_server(("", port), backlog=1024, **options)
                else:
                    listener = socket.create_server(("", port), backlog=1024)
                listener.settimeout(0.2)
                return listener
            except OSError as e:
                # An earlier run on this port keeps it until its last process has exited.
                if e.errno != errno.EADDRINUSE or time.monotonic() > self.deadline:
                    raise StartError(
                        f"{self.info} cannot listen on port {port}: {e.strerror or e}. Another program or an earlier "
                        "run uses it: choose another port, or end that program"
                    ) from None
            self._pause()

    def _collect(self, listener: socket.socket, hellos: dict, connections: dict, opened) -> dict:
        """Fill `hellos` and `connections` by process number; return the answer for all of them."""
        count = self.info.processes
        while len(hellos) < count:
            self._check_stop()
            if time.monotonic() > self.deadline:
                connected = ", ".join(f"{p} ({hello['host']})" for p, hello in sorted(hellos.items()))
                missing = _list([p for p in range(count) if p not in hellos])
                return {
                    "error": f"{missing} of {count} did not connect to {self.info.coordinator} within "
                    f"{self.timeout:g} s; connected: {connected}. Check the logs of the missing processes: were they "
                    "started with the same --coordinator and --processes, and can their machines reach that port?"
                }
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            opened.enter_context(connection)
            connection.settimeout(2)
            hello = self._receive(connection, 0)
            if hello is None or hello.get("radfm_jax") != 1:
                connection.close()  # not a process of this project
                continue
            number = hello["process"]
            if hello["processes"] != count:
                connections[-1] = connection
                return {
                    "error": f"process {number} ({hello['host']}) was started as one of {hello['processes']}, "
                    f"process 0 ({self.hello['host']}) as one of {count}: give all processes the same --processes"
                }
            # A process that was restarted in the meantime replaces its closed connection.
            if number in hellos and (number == 0 or not _is_closed(connections[number])):
                connections[-1] = connection
                return {
                    "error": f"two processes have number {number} of {count}: {hellos[number]['host']}, and "
                    f"{hello['host']}: give each its own --process"
                }
            hellos[number], connections[number] = hello, connection
        if lines := differences({p: hello.get("properties", {}) for p, hello in hellos.items()}):
            return {"same": "the processes do not run the same:\n  " + "\n  ".join(lines)}
        return {"ok": True}

    # --- the other processes ------------------------------------------------------------------------------------------

    def join(self) -> dict:
        """Send this process's hello to process 0 and return its answer."""
        host, port = self.info.address
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=5)
                break
            except OSError as e:
                reason = e.strerror or str(e)
            if time.monotonic() > self.deadline:
                raise StartError(
                    f"{self.info} did not reach process 0 within {self.timeout:g} s ({reason}). Was process 0 started, "
                    f"on {host}, with the same --coordinator? Can this machine reach port {port} of {host}?"
                )
            self._pause()
        # Process 0 may have started a little later, and its answer names the missing processes: wait longer for it.
        deadline = self.deadline + min(self.timeout, 5)
        with connection:
            _send(connection, self.hello)
            connection.settimeout(0.2)
            answer = self._receive(connection, deadline)
        if answer is None:
            problem = f"got no answer within {self.timeout:g} s" if time.monotonic() > deadline else "was disconnected"
            raise StartError(
                f"{self.info} {problem} at {self.info.coordinator}. Either process 0 has exited (see its log), or "
                "another program uses that port: choose another"
            )
        return answer

    def _receive(self, connection: socket.socket, deadline: float) -> dict | None:
        """Return one line of JSON, or None if none arrives before the deadline or it is not a JSON object."""
        data = b""
        while not data.endswith(b"\n") and len(data) < MAX_MESSAGE_BYTES:
            try:
                part = connection.recv(2**16)
            except TimeoutError:
                self._check_stop()
                if time.monotonic() > deadline:
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

    def _check_stop(self) -> None:
        if self.stop:
            raise InterruptedError

    def _pause(self) -> None:
        self._check_stop()
        time.sleep(0.2)


def _send(connection: socket.socket, value: dict) -> None:
    try:
        connection.settimeout(5)
        connection.sendall(json.dumps(value).encode() + b"\n")
    except OSError as e:
        logging.getLogger(__name__).warning("a process disconnected during the rendezvous: %s", e)


def _is_closed(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
