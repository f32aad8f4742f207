"""launch/local.sh: what it starts, what it passes on, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In place of radfm_jax.train: says what it was given, and ends or waits as its number is told.
TRAIN = """
import os, signal, sys, time
number = os.environ["RADFM_PROCESS"]
how = sys.argv[2 + int(number)]
print(number, os.environ["RADFM_PROCESSES"], os.environ["JAX_NUM_CPU_DEVICES"], how, sys.argv[1], flush=True)
if how == "waits":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    signal.signal(signal.SIGINT, lambda *_: os._exit(75))
if how in ("waits", "hangs"):
    time.sleep(60)
sys.exit(int(how))
"""


@pytest.fixture
def local(tmp_path):
    """launch/local.sh in a repository whose training is TRAIN."""
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
    "hows, code", [("0 0", 0), ("75 75", 75), ("75 0", 1), ("2 75", 2), ("75 1", 1), ("0 70", 70), ("3 hangs", 137)]
)
def test_local_ends_with_the_worst_code(hows, code, local, tmp_path):
    started = local("2", "--devices", "3", "--", "--workdir=run", *hows.split(), GRACE="1")
    out, err = started.communicate(timeout=30)
    first, second = hows.split()
    assert started.returncode == code, err
    assert out == f"0 2 3 {first} --workdir=run\n"
    log = (tmp_path / "run" / "logs" / "1.log").read_text()
    assert log == f"1 2 3 {second} --workdir=run\n"
    assert (f"process 1 ended with code {137 if second == 'hangs' else second}; the end of" in err) == (
        second not in ("0", "75")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(number, local, tmp_path):
    # Where tests run in the background signals are ignored, which children would inherit, and Bash cannot undo.
    before = signal.signal(number, signal.default_int_handler)
    started = local("2", "--", "--workdir=run", "waits", "waits")
    signal.signal(number, before)
    assert started.stdout.readline() == "0 2 1 waits --workdir=run\n"
    until = time.monotonic() + 20
    while not (log := tmp_path / "run" / "logs" / "1.log").is_file() or not log.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)  # it says that before it listens
    started.send_signal(number)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 75, err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "the number of processes comes first, not ''"),
        (("two",), "the number of processes comes first, not 'two'"),
        (("2", "--config=x"), "'--config=x' is not known here; what is meant for training comes after --"),
        (("2", "--devices=x", "--", "--workdir=a"), "--devices needs a number, not 'x'"),
        (("2",), "there is nothing after --"),
        (("2", "--", "--config=x"), "--workdir=DIR is missing behind --"),
    ],
)
def test_local_refuses(arguments, words, local):
    started = local(*arguments)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 2 and words in err
