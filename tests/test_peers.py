"""Peers over a coordination service in memory: common stop, a lost peer, failures of one and of all."""

import contextlib
import random
import signal
import sys
import threading
import time

import jax
import pytest

from radfm_jax.runtime import compat, faults, peers


class Service:
    """A coordination service in memory."""

    def __init__(self):
        self.values, self.dead, self.lock = {}, set(), threading.Lock()

    def get_live_nodes(self, processes):
        return dict.fromkeys(set(processes) - self.dead, 1)

    def wait_at_barrier(self, _, timeout):
        self.barrier.wait(timeout / 1000)

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.lock:
            assert allow_overwrite or key not in self.values
            self.values[key] = value

    def key_value_dir_get(self, prefix):
        with self.lock:
            return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


class Stop:
    """A stand-in for faults.Stop."""

    signal = None

    def __bool__(self):
        return self.signal is not None


@pytest.fixture
def make_peers(monkeypatch):
    """A function that makes Peers over one Service; `exits` has their exit codes."""
    monkeypatch.setattr(peers, "POLL", 0.02)
    monkeypatch.setattr(peers, "SAME_CAUSE", 1.0)
    made, exits, service = [], {}, Service()

    def exit_thread(self, code):
        exits.setdefault(self.process, code)
        self._leaving.set()
        self._done.set()
        sys.exit()  # ends this thread, where the real method ends the process

    def quiet(target):
        def run(self):
            with contextlib.suppress(SystemExit):
                target(self)

        return run

    monkeypatch.setattr(peers.Peers, "_exit", exit_thread)
    for name in ("_watch_news", "_watch_liveness"):
        monkeypatch.setattr(peers.Peers, name, quiet(getattr(peers.Peers, name)))
    monkeypatch.setattr(compat, "coordination_client", lambda: service)

    def make(count, timeout=15.0):
        service.values.clear()
        service.barrier = threading.Barrier(count)
        made[:] = [peers.Peers(Stop(), i, count, timeout) for i in range(count)]
        return made

    make.exits, make.service = exits, service
    yield make
    for peer in made:
        leave(peer)
        join(peer)


def leave(peer):
    peer._leaving.set()
    peer._done.set()


def join(peer):
    for thread in peer._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_all_stop_at_the_same_step(make_peers):
    """The processes run at different speeds, but collectives keep them at most two steps apart."""
    rng = random.Random(0)
    for attempt in range(20):
        group = make_peers(4)
        counts, stopped = [0] * 4, {}

        def loop(i, group=group, counts=counts, stopped=stopped, attempt=attempt):
            pace = random.Random(4 * attempt + i)
            while True:
                while counts[i] - min(counts[j] for j in range(4) if j not in stopped) > 1:
                    time.sleep(0.0005)
                time.sleep(pace.uniform(0, 0.002))
                counts[i] += 1
                if group[i].stopping():
                    stopped[i] = counts[i]
                    return

        threads = [threading.Thread(target=loop, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0, 0.05))
        signalled = rng.randrange(4)
        group[signalled].stop.signal = signal.SIGTERM
        for thread in threads:
            thread.join(20)
        assert len(stopped) == 4 and len(set(stopped.values())) == 1, stopped
        assert {p.stopped_by for p in group} == {f"process {signalled} got SIGTERM"}
        for peer in group:
            leave(peer)
            join(peer)
    assert not make_peers.exits


def test_a_finished_process_does_not_block_the_others(make_peers, monkeypatch):
    """A signal arrives after the last call of `stopping` in one process."""
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    first, second = make_peers(2)
    for peer in (first, second):
        assert not peer.stopping()
    assert not first.stopping()
    ending = threading.Thread(target=first.__exit__, args=(None, None, None))
    ending.start()
    second.stop.signal = signal.SIGTERM
    time.sleep(0.2)
    answers = []
    calls = threading.Thread(target=lambda: answers.extend([second.stopping(), second.stopping()]), daemon=True)
    calls.start()
    calls.join(10)
    assert answers == [False, True]
    second.__exit__(None, None, None)
    ending.join(10)
    assert not ending.is_alive() and not make_peers.exits


class Program:
    """A stand-in for the process of the service that records calls."""

    def __init__(self, done):
        self.done = done

    def kill(self):
        self.done.append("service killed")

    def communicate(self):
        self.done.append("service gone")


@pytest.mark.parametrize("leaves", [True, False])
def test_the_service_ends_after_the_others_have_disconnected(make_peers, monkeypatch, leaves):
    """An error while a process disconnects is ignored; a process that stays connected keeps the service alive."""
    done, calls = [], []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("left"))
    monkeypatch.setattr(peers, "SHUTDOWN_TIMEOUT", 1.0)
    first, second = make_peers(2)
    first.service = Program(done)

    def live_nodes(processes):
        if threading.current_thread().name != "disconnects":
            return dict.fromkeys(processes, 1)
        calls.append(len(calls))
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: a task has left")
        return dict.fromkeys(processes[: 1 if leaves and len(calls) > 4 else 2], 1)

    monkeypatch.setattr(make_peers.service, "get_live_nodes", live_nodes)
    ending = threading.Thread(target=second.__exit__, args=(None, None, None))
    ending.start()
    first.__exit__(None, None, None)
    ending.join(10)
    assert len(calls) > 4 and not make_peers.exits
    assert done[-3:] == ["left", "service killed", "service gone"] if leaves else done == ["left", "left"]


def test_a_process_without_heartbeat(make_peers, capfd):
    group = make_peers(3)
    time.sleep(0.2)
    assert not make_peers.exits
    leave(group[1])
    make_peers.service.dead.add(1)
    for peer in group:
        join(peer)
    assert make_peers.exits == {0: faults.REQUEUE, 2: faults.REQUEUE}
    output = capfd.readouterr().err
    assert "process 1 sends no heartbeat (--peer-timeout 15)" in output and "Current thread" in output


def test_an_exception_in_one_process_exits_all_with_its_code(make_peers, capfd):
    group = make_peers(3)
    with pytest.raises(SystemExit), group[2].abort_on_error():
        raise ValueError("row 17 of vqa.csv is empty")
    for peer in group[:2]:
        join(peer)
    assert make_peers.exits == {0: 2, 1: 2, 2: 2}
    output = capfd.readouterr().err
    assert output.count("process 2 exits with code 2: ValueError: row 17 of vqa.csv is empty") == 2


def test_an_exception_in_all_processes_propagates(make_peers):
    """Then no clean-up waits for another process, and saves under way are finished."""
    group, raised = make_peers(3), []

    def fail(peer):
        with pytest.raises(KeyError), peer.abort_on_error():
            raise KeyError("in all")
        raised.append(peer.process)

    threads = [threading.Thread(target=fail, args=(p,)) for p in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(raised) == [0, 1, 2] and not make_peers.exits


def test_a_failed_collective_is_attributed_to_the_lost_process(make_peers, capfd):
    """The liveness check exits the survivor before its own exception does."""
    group = make_peers(2, timeout=1.0)
    leave(group[1])
    threading.Timer(0.3, make_peers.service.dead.add, (1,)).start()
    with pytest.raises(SystemExit), group[0].abort_on_error():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert make_peers.exits[0] == faults.REQUEUE
    assert "process 1 sends no heartbeat" in capfd.readouterr().err


def test_one_process_starts_nothing(monkeypatch):
    before = threading.active_count()
    alone = peers.Peers(stop := Stop())
    with alone, alone.abort_on_error():
        assert not alone.stopping()
        stop.signal = signal.SIGTERM
        assert alone.stopping() and alone.stopped_by == "SIGTERM"
    assert threading.active_count() == before
