"""The rendezvous: processes find each other, or every one reports who is missing, wrong or different."""

import contextlib
import socket
import threading
import time

import pytest
from ports import free_port

from radfm_jax.runtime.cluster import ProcessInfo, StartError
from radfm_jax.runtime.rendezvous import rendezvous


def meet(hellos, timeout=20.0, port=None):
    """Run `rendezvous` for each (process, processes, properties) in a thread; return None or the exception of each."""
    port, results = port or free_port(), {}

    def run(number, process, processes, properties):
        try:
            info = ProcessInfo(f"127.0.0.1:{port}", processes, process, "flags")
            results[number] = rendezvous(info, properties, timeout)
        except Exception as e:
            results[number] = e

    threads = [threading.Thread(target=run, args=(n, *hello)) for n, hello in enumerate(hellos)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[n] for n in range(len(hellos))]


def test_all_processes_meet():
    assert meet([(i, 8, {"config": {"batch": 4}}) for i in range(8)]) == [None] * 8


@pytest.mark.parametrize(
    "hellos, words",
    [
        (
            [(0, 4), (2, 4)],
            r"processes 1, 3 of 4 did not connect to 127.0.0.1:\d+ within 1.5 s; connected: 0 \(.*, pid ",
        ),
        (
            [(0, 2), (1, 3)],
            r"process 1 \(.*\) was started as one of 3, process 0 \(.*\) as one of 2: give all",
        ),
        ([(0, 3), (1, 3), (1, 3)], "two processes have number 1 of 3: .*give each its own --process"),
    ],
)
def test_all_processes_report_a_missing_or_wrong_one(hellos, words):
    start_time = time.monotonic()
    for e in meet([(*hello, {}) for hello in hellos], timeout=1.5):
        with pytest.raises(StartError, match=words):
            raise e
    assert time.monotonic() - start_time < 10


def test_without_process_0():
    (e,) = meet([(1, 2, {})], timeout=0.5)
    with pytest.raises(StartError, match="did not reach process 0 within 0.5 s .* Was process 0 started, on 127.0.0.1"):
        raise e


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for e, words in zip(
            meet([(0, 2, {}), (1, 2, {})], 0.5, port),
            ("cannot listen on port .*Another program or an earlier run uses it", "another program uses that port"),
            strict=True,
        ):
            with pytest.raises(StartError, match=words):
                raise e


def test_other_connections_are_ignored():
    """Connections of a port scanner and of other protocols, before and between the processes."""
    port = free_port()

    def call():
        for data in (b"", b"GET / HTTP/1.0\r\n\r\n", b'{"process": 1}\n', b"[1]\n"):
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(data)
                    break
                time.sleep(0.02)

    caller = threading.Thread(target=call)
    caller.start()
    late = threading.Timer(0.5, lambda: results.extend(meet([(1, 2, {})], port=port)))
    results: list = []
    late.start()
    assert meet([(0, 2, {})], port=port) == [None]
    late.join()
    caller.join()
    assert results == [None]


def test_all_processes_report_differences():
    one = {"config": {"train": {"batch": 8, "steps": 1}}, "versions": {"jax": "1"}, "source code": "a" * 64}
    other = {"config": {"train": {"batch": 4}}, "versions": {"jax": "1"}, "source code": "b" * 64}
    for e in meet([(0, 3, one), (1, 3, other), (2, 3, one)]):
        assert isinstance(e, ValueError)
        assert str(e).splitlines() == [
            "the processes do not run the same:",
            "  config.train.batch is 8 in processes 0, 2, 4 in process 1",
            "  config.train.steps is 1 in processes 0, 2, missing in process 1",
            f'  source code is "{"a" * 11}...{"a" * 7}" in processes 0, 2, "{"b" * 11}...{"b" * 7}" in process 1',
        ]
