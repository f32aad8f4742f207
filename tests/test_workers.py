"""The process pool: results, errors that name task and item, and no processes left behind."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from input_pipeline.parallel import workers
from input_pipeline.parallel.workers import Pool, WorkerError, heartbeat
from input_pipeline.samples import RowError

# --- functions that the workers import --------------------------------------------------------------------------------


def make(base: int = 10) -> dict:
    return {"base": base, "keeper": os.getpid()}


def make_in_parts() -> dict:
    for part in range(3):
        heartbeat(f"part {part}")
    return make()


def make_badly() -> None:
    raise RowError("train.csv", 3, "the label is blank", "fill it")


def make_and_die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def add(state: dict, number: int, wait: float = 0.0) -> int:
    time.sleep(wait)
    return state["base"] + number


def pids(state: dict) -> tuple[int, int]:
    time.sleep(0.2)
    return state["keeper"], os.getpid()


def square(state, values: np.ndarray) -> np.ndarray:
    return values**2


class Awkward(Exception):
    """Can be pickled, but not rebuilt."""

    def __init__(self, a, b):
        super().__init__(a)


def fail(state, how: str) -> None:
    if how == "row":
        raise RowError("train.csv", "17", "no such label", "one of a, b")
    if how == "awkward":
        raise Awkward(1, 2)
    raise KeyError(how)


def die(state, file: str) -> None:
    heartbeat("first.png")
    heartbeat(file)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(state, file: str, heartbeats: int = 0) -> str:
    for k in range(heartbeats):
        heartbeat(f"{k}.png")
        time.sleep(0.4)
    heartbeat(file)
    time.sleep(600)
    return "never"


def slowly(state, heartbeats: int) -> str:
    for k in range(heartbeats):
        heartbeat(f"{k}.png")
        time.sleep(0.4)
    return "done"


def take_memory(state, file: str) -> int:
    heartbeat(file)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), now + (64 << 20)))
    return len(np.ones(1 << 28))


def segfault(state, file: str) -> None:
    heartbeat(file)
    import ctypes

    ctypes.string_at(0)


@pytest.fixture(scope="module")
def pool():
    with Pool(functools.partial(make, 100), workers=2, timeout=20) as opened:
        yield opened


def gone(process_ids, seconds: float = 10.0) -> bool:
    """Return whether all processes end within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [pid for pid in process_ids if psutil.pid_exists(pid)]
        alive = [pid for pid in alive if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_belong_to_their_tasks(pool):
    """Slow and quick tasks, more than workers."""
    futures = [pool.submit(f"task {i}", add, i, 0.05 if i % 3 == 0 else 0.0) for i in range(12)]
    assert [f.result() for f in futures] == list(range(100, 112))


def test_arrays_are_sent_both_ways(pool):
    values = np.arange(1 << 18, dtype=np.int64).reshape(512, 512)
    np.testing.assert_array_equal(pool.submit("array", square, values).result(), values**2)


def test_the_state_is_made_once_and_shared(pool):
    results = [f.result() for f in [pool.submit("pids", pids) for _ in range(4)]]
    assert len({keeper for keeper, _ in results}) == 1
    workers = {worker for _, worker in results}
    assert len(workers) == 2 and not workers & {os.getpid(), results[0][0]}


def test_without_workers_tasks_run_here_when_their_result_is_needed():
    with Pool(make, workers=0) as local:
        assert local.submit("pids", pids).result() == (os.getpid(), os.getpid())
        never = local.submit("fails", fail, "row")
        assert local.submit("adds", add, 1).result() == 11
        with pytest.raises(RowError, match="no such label"):
            never.result()
        with pytest.raises(RowError):
            never.result()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_keeps_its_type_and_fields(pool):
    with pytest.raises(RowError, match="train.csv, row 17: no such label") as error:
        pool.submit("row", fail, "row").result()
    assert (error.value.row, error.value.remedy) == ("17", "one of a, b")
    assert not hasattr(error.value, "__notes__"), "an error about the data needs no traceback"
    with pytest.raises(KeyError, match="key") as error:
        pool.submit("key", fail, "key").result()
    assert "in fail" in "".join(error.value.__notes__) and "test_workers.py" in "".join(error.value.__notes__)
    with pytest.raises(RuntimeError, match="Awkward"):
        pool.submit("awkward", fail, "awkward").result()
    assert pool.submit("after", add, 1).result() == 101


def test_out_of_memory(pool):
    """A failed allocation is an error of that task, and the worker continues."""
    with Pool(make, workers=1, timeout=20) as own, pytest.raises(MemoryError):
        own.submit("large", take_memory, "large.nii.gz").result()


@pytest.mark.parametrize("end, named", [(die, "scan.dcm"), (segfault, "crash.dcm")])
def test_a_dead_worker_error_names_task_and_file(end, named):
    start = time.monotonic()
    with Pool(make, workers=2, timeout=20) as broken:
        waiting = [broken.submit("task 1", add, 1), broken.submit("row 7", end, named)]
        waiting += [broken.submit(f"later {i}", add, i, 0.1) for i in range(8)]
        with pytest.raises(WorkerError, match=f"row 7: worker died at {named}") as error:
            waiting[1].result()
        assert (error.value.task, error.value.item) == ("row 7", named)
        assert waiting[0].result() == 11
        after = [f.exception() for f in waiting[2:]]  # running tasks finish, the others get the same error
        assert after[-1] is error.value and all(e in (None, error.value) for e in after)
        assert broken.submit("too late", add, 1).exception() is error.value
    assert time.monotonic() - start < 30


def test_a_hung_worker_error_names_task_and_file():
    start = time.monotonic()
    with Pool(make, workers=1, timeout=1.0) as broken:
        with pytest.raises(WorkerError, match="row 9: worker sent no heartbeat for 1 s at hung.dcm") as error:
            broken.submit("row 9", hang, "hung.dcm", 1).result()
        assert (error.value.task, error.value.item) == ("row 9", "hung.dcm")
    assert time.monotonic() - start < 30


def test_a_heartbeat_restarts_the_timeout():
    with Pool(make, workers=1, timeout=1.0) as patient:
        assert patient.submit("slow", slowly, 4).result() == "done"  # 1.6 s in total


def test_a_heartbeat_of_make_restarts_its_timeout(monkeypatch):
    """The start may take longer than its limit, as long as the next heartbeat is in time."""
    with Pool(make_in_parts, workers=1) as opened:
        assert opened.submit("add", add, 1).result() == 11
    waiting = object.__new__(Pool)
    waiting._control, keeper = multiprocessing.Pipe()
    monkeypatch.setattr(workers, "START_TIMEOUT", 0.05)
    for part in range(3):
        keeper.send(("item", f"part {part}"))
    with pytest.raises(WorkerError, match="opening the data took more than 0 s at part 2"):
        waiting._wait_for_start()


def test_errors_of_make_are_raised():
    for count in (0, 1):
        with pytest.raises(RowError, match="train.csv, row 3: the label is blank"):
            Pool(make_badly, workers=count)
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        Pool(make_and_die, workers=1)


# --- no processes are left behind -------------------------------------------------------------------------------------


def test_close_leaves_no_process():
    closed = Pool(make, workers=2, timeout=20)
    results = [f.result() for f in [closed.submit("pids", pids) for _ in range(4)]]
    running = closed.submit("hang", hang, "x")
    not_started = [closed.submit("add", add, i, 5.0) for i in range(4)]
    time.sleep(0.3)
    closed.close()
    closed.close()
    assert gone({pid for both in results for pid in both})
    assert isinstance(running.exception(timeout=5), WorkerError)
    assert all(f.cancelled() or f.exception(timeout=5) for f in not_started) and any(f.cancelled() for f in not_started)
    with pytest.raises(RuntimeError, match="closed"):
        closed.submit("add", add, 1)


CALLER = """
import sys
sys.path[:0] = {paths!r}
import test_workers
from input_pipeline.parallel.workers import Pool

if __name__ == "__main__":
    pool = Pool(test_workers.make, workers=2, timeout=60)
    for future in [pool.submit("pids", test_workers.pids) for _ in range(4)]:
        print(*future.result())
    pool.submit("hang", test_workers.hang, "x")
    print("ready", flush=True)
    if {wait}:
        pool.submit("hang", test_workers.hang, "x").result()
"""


@pytest.mark.parametrize("end", ["killed", "forgets to close"])
def test_a_caller_that_ends_leaves_no_process(tmp_path, end):
    tests = Path(__file__).parent
    program = tmp_path / "caller.py"
    program.write_text(CALLER.format(paths=[str(tests), str(tests.parent)], wait=end == "killed"))
    caller = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    try:
        pids = set()
        for line in caller.stdout:
            if line.strip() == "ready":
                break
            pids |= set(map(int, line.split()))
        assert len(pids) == 3
        if end == "killed":
            assert all(psutil.pid_exists(pid) for pid in pids)
            caller.send_signal(signal.SIGKILL)
        assert caller.wait(10) == (-signal.SIGKILL if end == "killed" else 0)
        assert gone(pids)
    finally:
        with contextlib.suppress(ProcessLookupError):
            caller.kill()
        caller.stdout.close()
        caller.wait()
