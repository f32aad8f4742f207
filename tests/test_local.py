"""launch/local.sh: the processes it starts, the signals it forwards, and its exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Replaces radfm_jax.train: prints its arguments, then exits or waits as the argument of its rank says.
TRAIN = """
import os, signal, sys, time
rank = os.environ["RADFM_PROCESS"]
action = sys.argv[2 + int(rank)]
print(rank, os.environ["RADFM_PROCESSES"], os.environ["JAX_NUM_CPU_DEVICES"], action, sys.argv[1], flush=True)
if action == "waits":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    signal.signal(signal.SIGINT, lambda *_: os._exit(75))
if action in ("waits", "hangs"):
    time.sleep(60)
sys.exit(int(action))
"""


@pytest.fixture
def local(tmp_path):
    """Start launch/local.sh in a repository whose radfm_jax.train is TRAIN."""
    for name in ("launch", "radfm_jax"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "launch" / "local.sh").write_text((ROOT / "launch" / "local.sh").read_text())
    (tmp_path / "radfm_jax" / "train.py").write_text(TRAIN)

    def start(*arguments, **environment):
        return subprocess.Popen(
            ["bash", str(tmp_path / "launch" / "local.sh"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable, **environment},
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    "actions, code", [("0 0", 0), ("75 75", 75), ("75 0", 1), ("2 75", 2), ("75 1", 1), ("0 70", 70), ("3 hangs", 137)]
)
def test_exit_code(actions, code, local, tmp_path):
    started = local("2", "--devices", "3", "--", "--workdir=run", *actions.split(), GRACE="1")
    out, err = started.communicate(timeout=30)
    first, second = actions.split()
    assert started.returncode == code, err
    assert out == f"0 2 3 {first} --workdir=run\n"
    log = (tmp_path / "run" / "logs" / "1.log").read_text()
    assert log == f"1 2 3 {second} --workdir=run\n"
    assert (f"process 1 exited with code {137 if second == 'hangs' else second}; end of" in err) == (
        second not in ("0", "75")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_forwarded(number, local, tmp_path):
    # A background shell ignores signals; children would inherit that, and Bash cannot undo it.
    before = signal.signal(number, signal.default_int_handler)
    started = local("2", "--", "--workdir=run", "waits", "waits")
    signal.signal(number, before)
    assert started.stdout.readline() == "0 2 1 waits --workdir=run\n"
    until = time.monotonic() + 20
    while not (log := tmp_path / "run" / "logs" / "1.log").is_file() or not log.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)  # it prints before it installs its handlers
    started.send_signal(number)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 75, err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "the first argument must be the number of processes, not ''"),
        (("two",), "the first argument must be the number of processes, not 'two'"),
        (("2", "--config=x"), "unknown option '--config=x'; arguments of training go after --"),
        (("2", "--devices=x", "--", "--workdir=a"), "--devices needs a number, not 'x'"),
        (("2",), "arguments of training are missing after --"),
        (("2", "--", "--config=x"), "--workdir=DIR is missing after --"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words, local):
    started = local(*arguments)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 2 and words in err
