"""Processes that save: killed at any moment, ended right after a save, releasing their lock, and in pairs."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from saved_states import MESHES, mesh, names, save
from saving_child import abstract, assert_same, data_state, saver

from radfm_jax.checkpoints import train_state
from radfm_jax.checkpoints.run_directory import latest, step_directory, steps
from radfm_jax.checkpoints.train_state import restore

CHILD = Path(__file__).with_name("saving_child.py")
# A script finds modules in its own folder, but not the package unless it is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHILD.parents[1])}


class Children:
    """Jobs of saving_child.py."""

    def __init__(self, errors: Path):
        self.errors = errors
        command = [sys.executable, str(CHILD), "serve"]
        with errors.open("a") as f:
            self.server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=f, text=True, env=ENVIRONMENT
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.__exit__(None, None, None)  # closes its pipes, which ends it, and waits for it

    @contextlib.contextmanager
    def run(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pid, self.code, self.lines = int(self._line().removeprefix("pid ")), None, []
        try:
            yield self
        except BaseException:
            if self.code is None:
                os.kill(self.pid, signal.SIGKILL)
            raise
        finally:
            self.wait()

    def read(self) -> str:
        """Return the next line of the child, which must still run."""
        line = self._line()
        if line.startswith("exited "):
            self.code = int(line.removeprefix("exited "))
            raise AssertionError(f"the child exited: {self.errors.read_text()}")
        return line

    def _line(self) -> str:
        line = self.server.stdout.readline().strip()
        assert line, self.errors.read_text()
        return line

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        assert self.code == -signal.SIGKILL, "the kill did not fire"

    def wait(self) -> None:
        """Wait for the child; `lines` gets the rest of its output."""
        while self.code is None:
            line = self._line()
            if line.startswith("exited "):
                self.code = int(line.removeprefix("exited "))
            else:
                self.lines.append(line)


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    with Children(tmp_path_factory.mktemp("children") / "errors") as server:
        yield server


# --- kills and ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forked", [False, True])
def test_a_killed_process_releases_the_lock(forked, children, tmp_path):
    """Even if a process that it forked, such as a data worker, is still alive."""
    with children.run(job="hold", workdir=str(tmp_path), forked=forked) as child:
        grandchild = int(child.read().removeprefix("locked "))
        with pytest.raises(ValueError, match=rf"written by process {child.pid} on "):
            saver(tmp_path)
        child.kill()
    try:
        saver(tmp_path).close()
    finally:
        if forked:
            os.kill(grandchild, signal.SIGKILL)  # raises if it was not alive


@pytest.mark.parametrize("tries", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tries, children, tmp_path, capsys):
    """Kill a process that saves without pause and start it again in the same directory, repeatedly."""
    rng = np.random.default_rng(int(os.environ.get("SEED", 0)))
    last, partial, wrong = 0, 0, []
    for _ in range(tries):
        with children.run(job="loop", workdir=str(tmp_path)) as child:
            assert child.read() == f"from {last}"
            lines = [child.read() for _ in range(int(rng.integers(1, 4)))]
            time.sleep(float(rng.uniform(0, 0.3)))
            child.kill()
        started = int((lines + child.lines)[-1].removeprefix("started "))
        visible = steps(tmp_path)
        partial += any(n.endswith((".partial", ".replaced")) for n in names(tmp_path))
        for step in visible:
            try:
                assert_same(restore(step_directory(tmp_path, step), abstract(mesh())), step)
            except (ValueError, AssertionError) as e:
                wrong.append((step, str(e)))
        # The save before the last one reported is done (later ones may have started unread); two steps are kept.
        if visible[-1] < started - 1 or len(visible) > 3:
            wrong.append((started, visible))
        last = int(latest(tmp_path).name)
    with capsys.disabled():
        print(f"\nwrong: {len(wrong)} of {tries} kills, {partial} of them during a save; last step {last}")
    assert wrong == [] and partial
    saver(tmp_path).close()
    assert not [n for n in names(tmp_path) if n.endswith(".partial")]
    assert_same(restore(latest(tmp_path), abstract(mesh())), last)


# How the program ends, whether the save fails, and whether it ends inside `with Saver`.
ENDS = [(how, broken, closed) for how in ("return", "sys.exit", "exception") for broken in (0, 1) for closed in (0, 1)]
ENDS += [("os._exit", 0, 0)] * 4


@pytest.mark.parametrize("tries", [0, pytest.param(13, marks=pytest.mark.slow)])
def test_ends_right_after_a_save(tries, children, tmp_path, capsys):
    """The step is committed, or the exit code is not 0 and a line names the lost step."""
    quick = [("return", 0, 0), ("return", 1, 0), ("sys.exit", 1, 1), ("exception", 1, 1), ("exception", 0, 0)]
    counts = {}
    for number, (how, broken, closed) in enumerate(ENDS * tries or [*quick, ENDS[-1]]):
        workdir = tmp_path / str(number)
        children.errors.write_text("")
        with children.run(job="end", workdir=str(workdir), how=how, broken=broken, closed=closed) as child:
            child.wait()
        reported = f"step 2 was not saved at {workdir}/checkpoints/2" in children.errors.read_text()
        case = number, how, broken, closed
        if how == "os._exit":
            assert child.code == 0 and steps(workdir) in ([1], [1, 2]), case
        elif broken:
            assert child.code != 0 and reported and steps(workdir) == [1], case
        else:
            assert child.code == (how == "exception") and not reported and steps(workdir) == [1, 2], case
        for step in steps(workdir):
            assert_same(restore(step_directory(workdir, step), abstract(mesh())), step)
        counts[how] = counts.get(how, 0) + 1
        shutil.rmtree(workdir)
    with capsys.disabled():
        print(f"\nsilent: 0 of {counts}")


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_and_one(tmp_path):
    """Two processes restore what one saved and save what two and one restore (saving_child.pair).

    The disk is full in one of them only, and damage is in the share of the other.
    """
    save(tmp_path / "alone", 5, where=mesh(fsdp=8))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, str(CHILD), "pair", str(tmp_path / "run"), str(tmp_path / "alone"), port]
    pair = [
        subprocess.Popen([*command, str(p)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for p in range(2)
    ]
    outputs = [p.communicate(timeout=120) for p in pair]
    assert [(p.returncode, out) for p, (out, _) in zip(pair, outputs, strict=True)] == [(0, "done\n")] * 2, outputs
    directory = latest(tmp_path / "run")
    run = json.loads((directory / "run.json").read_text())
    assert (run["processes"], run["mesh"]["fsdp"], steps(tmp_path / "run")) == (2, 4, [2, 4])
    for sizes in MESHES.values():
        assert_same(restore(directory, abstract(mesh(**sizes))), 4)
    assert train_state.data_state(directory) == data_state(4) | {"lost": 1}
