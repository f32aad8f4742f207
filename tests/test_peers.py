"""Peers over a coordination service in memory: stopping together, losing one, failing alone and together."""

import contextlib
import random
import signal
import sys
import threading
import time

import jax
import pytest
from jax._src import distributed

from radfm_jax.runtime import faults, peers


class Service:
    """The coordination service, in memory."""

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


class Told:
    """In place of faults.Stop."""

    signal = None

    def __bool__(self):
        return self.signal is not None


@pytest.fixture
def company(monkeypatch):
    """Makes Peers over one Service; how each of them would have ended is in `ends`."""
    monkeypatch.setattr(peers, "POLL", 0.02)
    monkeypatch.setattr(peers, "TOGETHER", 1.0)
    made, ends, service = [], {}, Service()

    def leave(self, code):
        ends.setdefault(self.process, code)
        self._leaving.set()
        self._done.set()
        sys.exit()  # of this thread: in a process it would be its end

    def ended(work):
        def thread(self):
            with contextlib.suppress(SystemExit):
                work(self)

        return thread

    monkeypatch.setattr(peers.Peers, "_exit", leave)
    for name in ("_watch", "_call_the_roll"):
        monkeypatch.setattr(peers.Peers, name, ended(getattr(peers.Peers, name)))
    monkeypatch.setattr(distributed.global_state, "client", service)

    def make(count, limit=15.0):
        service.values.clear()
        service.barrier = threading.Barrier(count)
        made[:] = [peers.Peers(Told(), i, count, limit) for i in range(count)]
        return made

    make.ends, make.service = ends, service
    yield make
    for one in made:
        one._leaving.set()
        one._done.set()
        join(one)


def join(peer):
    for thread in peer._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_all_stop_at_the_same_step(company):
    """Processes that ask at their own pace, never more than two steps apart, as collectives hold them."""
    rng = random.Random(0)
    for attempt in range(20):
        group = company(4)
        asked, stopped = [0] * 4, {}

        def loop(i, group=group, asked=asked, stopped=stopped, attempt=attempt):
            own = random.Random(4 * attempt + i)
            while True:
                while asked[i] - min(asked[j] for j in range(4) if j not in stopped) > 1:
                    time.sleep(0.0005)
                time.sleep(own.uniform(0, 0.002))
                asked[i] += 1
                if group[i].stopping():
                    stopped[i] = asked[i]
                    return

        threads = [threading.Thread(target=loop, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0, 0.05))
        told = rng.randrange(4)
        group[told].stop.signal = signal.SIGTERM
        for thread in threads:
            thread.join(20)
        assert len(stopped) == 4 and len(set(stopped.values())) == 1, stopped
        assert {p.stopped_by for p in group} == {f"process {told} got SIGTERM"}
        for one in group:
            one._leaving.set()
            one._done.set()
            join(one)
    assert not company.ends


def test_a_process_that_has_come_to_the_end_does_not_hold_up_the_others(company, monkeypatch):
    """A signal arrives when one process will never ask again."""
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    first, second = company(2)
    for one in (first, second):
        assert not one.stopping()
    assert not first.stopping()
    ending = threading.Thread(target=first.__exit__, args=(None, None, None))
    ending.start()
    second.stop.signal = signal.SIGTERM
    time.sleep(0.2)
    answered = []
    asking = threading.Thread(target=lambda: answered.extend([second.stopping(), second.stopping()]), daemon=True)
    asking.start()
    asking.join(10)
    assert answered == [False, True]
    second.__exit__(None, None, None)
    ending.join(10)
    assert not ending.is_alive() and not company.ends


class Program:
    """The service's process; notes what is done in which order."""

    def __init__(self, done):
        self.done = done

    def kill(self):
        self.done.append("service killed")

    def communicate(self):
        self.done.append("service gone")


@pytest.mark.parametrize("leaves", [True, False])
def test_the_service_is_not_ended_before_the_others_have_left(company, monkeypatch, leaves):
    """Who is told of the roll while somebody leaves may get an error; who never leaves keeps the service alive."""
    done, calls = [], []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("left"))
    monkeypatch.setattr(peers, "FAREWELL", 1.0)
    first, second = company(2)
    first._service = Program(done)

    def roll(processes):
        if threading.current_thread().name != "farewell":
            return dict.fromkeys(processes, 1)
        calls.append(len(calls))
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: a task has left")
        return dict.fromkeys(processes[: 1 if leaves and len(calls) > 4 else 2], 1)

    monkeypatch.setattr(company.service, "get_live_nodes", roll)
    ending = threading.Thread(target=second.__exit__, args=(None, None, None))
    ending.start()
    first.__exit__(None, None, None)
    ending.join(10)
    assert len(calls) > 4 and not company.ends
    assert done[-3:] == ["left", "service killed", "service gone"] if leaves else done == ["left", "left"]


def test_a_process_that_gives_no_sign_of_life(company, capfd):
    group = company(3)
    time.sleep(0.2)
    assert not company.ends
    group[1]._leaving.set()
    group[1]._done.set()
    company.service.dead.add(1)
    for one in group:
        join(one)
    assert company.ends == {0: faults.REQUEUE, 2: faults.REQUEUE}
    said = capfd.readouterr().err
    assert "process 1 gives no sign of life (--peer-timeout 15)" in said and "Current thread" in said


def test_an_exception_in_one_process_ends_all_with_its_code(company, capfd):
    group = company(3)
    with pytest.raises(SystemExit), group[2].guard():
        raise ValueError("row 17 of vqa.csv is empty")
    for one in group[:2]:
        join(one)
    assert company.ends == {0: 2, 1: 2, 2: 2}
    said = capfd.readouterr().err
    assert said.count("process 2 ends with code 2: ValueError: row 17 of vqa.csv is empty") == 2


def test_an_exception_that_all_have_is_an_exception(company):
    """Then nobody waits for anybody in clean-up, and saves under way are finished."""
    group, raised = company(3), []

    def one(peer):
        with pytest.raises(KeyError), peer.guard():
            raise KeyError("in all")
        raised.append(peer.process)

    threads = [threading.Thread(target=one, args=(p,)) for p in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(raised) == [0, 1, 2] and not company.ends


def test_a_collective_that_fails_is_the_fault_of_who_is_lost(company, capfd):
    """The survivor is ended by what its thread learns, not by the exception that it has."""
    group = company(2, limit=1.0)
    group[1]._leaving.set()
    group[1]._done.set()
    threading.Timer(0.3, company.service.dead.add, (1,)).start()
    with pytest.raises(SystemExit), group[0].guard():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert company.ends[0] == faults.REQUEUE
    assert "process 1 gives no sign of life" in capfd.readouterr().err


def test_one_process_starts_nothing(monkeypatch):
    before = threading.active_count()
    alone = peers.Peers(stop := Told())
    with alone, alone.guard():
        assert not alone.stopping()
        stop.signal = signal.SIGTERM
        assert alone.stopping() and alone.stopped_by == "SIGTERM"
    assert threading.active_count() == before
