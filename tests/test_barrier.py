"""The barrier of all processes: results by process, and errors of one that reach all."""

import threading

import jax
import pytest

from radfm_jax.runtime import barrier as module
from radfm_jax.runtime import compat
from radfm_jax.runtime.barrier import barrier, describe, forget


class Service:
    """A coordination service in memory, for processes that are threads."""

    def __init__(self, count):
        self.values, self.barrier = {}, threading.Barrier(count)

    def key_value_set(self, key, value):
        assert key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]

    def key_value_delete(self, prefix):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(prefix)}

    def wait_at_barrier(self, _, timeout):
        self.barrier.wait(timeout / 1000)


@pytest.fixture
def run(monkeypatch):
    """A function that calls `barrier` in three processes and returns the result or exception of each."""
    local, service = threading.local(), Service(3)
    monkeypatch.setattr(module.jax, "process_count", lambda: 3)
    monkeypatch.setattr(module.jax, "process_index", lambda: getattr(local, "index", 0))
    monkeypatch.setattr(compat, "coordination_client", lambda: service)

    def call(key, work):
        results = {}

        def target(index):
            local.index = index
            try:
                results[index] = barrier(key, lambda: work(index), timeout=10)
            except Exception as e:
                results[index] = e

        threads = [threading.Thread(target=target, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[i] for i in range(3)]

    call.service = service
    return call


def test_results_of_all_processes_in_order(run):
    assert run("save/1/hash", lambda index: {"process": index}) == [[{"process": i} for i in range(3)]] * 3
    assert len(run.service.values) == 3
    forget("save/1")
    assert run.service.values == {}


@pytest.mark.parametrize("error, raised", [(ValueError, ValueError), (OSError, OSError), (KeyError, OSError)])
def test_an_error_in_one_process_reaches_all(run, error, raised):
    def work(index):
        if index == 1:
            raise error("no space")
        return index

    results = run("x", work)
    assert [type(e) for e in results] == [raised, error, raised]
    assert str(results[0]) == str(results[2]) == f"process 1: {describe(results[1])}"


def test_mixed_errors_are_an_oserror(run):
    def work(index):
        raise (ValueError if index else OSError)(index)

    results = run("x", work)
    assert [type(e) for e in results] == [OSError, ValueError, ValueError]  # each raises its own


def test_a_single_process_does_not_serialise():
    value = object()
    assert jax.process_count() == 1 and barrier("x", lambda: value) == [value]
    assert barrier("y") == [None]


def test_describe_removes_source_locations():
    assert describe(OSError("full [source locations='a.cc:1']")) == "OSError: full"
    assert describe(KeyError()) == "KeyError" and describe(ValueError("x")) == "ValueError: x"
