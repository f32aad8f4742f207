"""The rendezvous before JAX connects the processes: wait until all have started, and check that they run the same.

Each process sends its number and the properties of its run to process 0 as one line of JSON, and gets the same answer.
They use a plain socket on the port that the coordination service takes over afterwards. JAX alone cannot report which
process is missing or has a wrong number: it waits, and then aborts the process with a C++ stack.
"""

from __future__ import annotations

import asyncio
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

from input_pipeline.files import parse_json, sha256_of_file
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
    """Wait until all processes have connected with equal `run_properties`.

    Raises:
      StartError: processes are missing, or have a wrong number or count. Every process that connected raises it.
      ValueError: properties differ; every process raises it.
      InterruptedError: `stop` became true, after a signal.
    """
    meeting = _Rendezvous(info, properties, timeout, stop)
    answer = asyncio.run(meeting.join() if info.process else meeting.lead())
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
        # In process 0: the message of each process, and its connection.
        self.hellos: dict[int, dict] = {0: self.hello}
        self.readers: dict[int, asyncio.StreamReader] = {}

    async def lead(self) -> dict:
        """Collect the hello messages of all processes and send each the same answer."""
        answer, writers = asyncio.get_running_loop().create_future(), []

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello = await _receive(reader, 2)
            if hello is None or hello.get("radfm_jax") != 1 or answer.done():
                writer.close()  # not a process of this project
                return
            writers.append(writer)
            if result := self._add(hello, reader):
                answer.set_result(result)

        server = await self._listen(on_connection)
        try:
            result = await self._wait(answer, self.deadline)
        except TimeoutError:
            connected = ", ".join(f"{p} ({hello['host']})" for p, hello in sorted(self.hellos.items()))
            missing = _list([p for p in range(self.info.processes) if p not in self.hellos])
            result = {
                "error": f"{missing} of {self.info.processes} did not connect to {self.info.coordinator} within "
                f"{self.timeout:g} s; connected: {connected}. Check the logs of the missing processes: were they "
                "started with the same --coordinator and --processes, and can their machines reach that port?"
            }
        finally:
            server.close()
        for writer in writers:
            await _send(writer, result)
            writer.close()
        return result

    async def _listen(self, on_connection) -> asyncio.Server:
        host, port = self.info.address
        while True:
            try:
                return await asyncio.start_server(
                    on_connection, host if host in LOOPBACK else None, port, limit=MAX_MESSAGE_BYTES, backlog=1024
                )
            except OSError as e:
                # The port of an earlier run stays in use until its last process has exited.
                if e.errno != errno.EADDRINUSE or time.monotonic() > self.deadline:
                    raise StartError(
                        f"{self.info} cannot listen on port {port}: {e.strerror or e}. Another program or an earlier "
                        "run uses it: choose another port, or end that program"
                    ) from None
            await self._pause()

    def _add(self, hello: dict, reader: asyncio.StreamReader) -> dict | None:
        """Add a process. Return the answer for all processes if this is the last one, or if it is invalid."""
        number, count, hellos = hello["process"], self.info.processes, self.hellos
        if hello["processes"] != count:
            return {
                "error": f"process {number} ({hello['host']}) was started as one of {hello['processes']}, "
                f"process 0 ({self.hello['host']}) as one of {count}: give all processes the same --processes"
            }
        # A process that was restarted in the meantime replaces its closed connection.
        if number in hellos and (number == 0 or not self.readers[number].at_eof()):
            return {
                "error": f"two processes have number {number} of {count}: {hellos[number]['host']}, and "
                f"{hello['host']}: give each its own --process"
            }
        hellos[number], self.readers[number] = hello, reader
        if len(hellos) < count:
            return None
        if lines := differences({p: hello.get("properties", {}) for p, hello in hellos.items()}):
            return {"same": "the processes do not run the same:\n  " + "\n  ".join(lines)}
        return {"ok": True}

    async def join(self) -> dict:
        """Send this process's hello to process 0 and return its answer."""
        host, port = self.info.address
        while True:
            try:
                connection = asyncio.open_connection(host, port, limit=MAX_MESSAGE_BYTES)
                reader, writer = await asyncio.wait_for(connection, 5)
                break
            except OSError as e:
                reason = e.strerror or str(e) or "timeout"
            if time.monotonic() > self.deadline:
                raise StartError(
                    f"{self.info} did not reach process 0 within {self.timeout:g} s ({reason}). Was process 0 started, "
                    f"on {host}, with the same --coordinator? Can this machine reach port {port} of {host}?"
                )
            await self._pause()
        await _send(writer, self.hello)
        # Process 0 may have started a little later, and its answer names the missing processes: wait longer for it.
        deadline, problem = self.deadline + min(self.timeout, 5), "was disconnected"
        try:
            answer = await self._wait(asyncio.ensure_future(_receive(reader)), deadline)
        except TimeoutError:
            answer, problem = None, f"got no answer within {self.timeout:g} s"
        writer.close()
        if answer is None:
            raise StartError(
                f"{self.info} {problem} at {self.info.coordinator}. Either process 0 has exited (see its log), or "
                "another program uses that port: choose another"
            )
        return answer

    async def _wait(self, future: asyncio.Future, deadline: float):
        """Return the result of a future. Raises TimeoutError after the deadline, InterruptedError on a signal."""
        while not future.done():
            if self.stop:
                raise InterruptedError
            if time.monotonic() > deadline:
                raise TimeoutError
            await asyncio.wait([future], timeout=0.2)
        return future.result()

    async def _pause(self) -> None:
        if self.stop:
            raise InterruptedError
        await asyncio.sleep(0.2)


async def _send(writer: asyncio.StreamWriter, value: dict) -> None:
    writer.transport.set_write_buffer_limits(0)  # `drain` then waits until all is sent
    try:
        writer.write(json.dumps(value).encode() + b"\n")
        await asyncio.wait_for(writer.drain(), 5)
    except OSError as e:
        logging.getLogger(__name__).warning("a process disconnected during the rendezvous: %s", e)


async def _receive(reader: asyncio.StreamReader, timeout: float | None = None) -> dict | None:
    """Return one line of JSON; None if the peer disconnects, is too slow, or sends anything but a JSON object."""
    try:
        value = parse_json(await asyncio.wait_for(reader.readline(), timeout))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
