"""Signals and a stuck step, each in its own process."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from radfm_jax.checkpoints.step_writer import SaveError
from radfm_jax.runtime import faults


def run(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)


def test_a_stuck_step_exits_with_stacks():
    done = run(
        """
        import time
        from radfm_jax.runtime.faults import Watchdog
        def waits_for_a_peer():
            time.sleep(50)
        with Watchdog(0.4) as watchdog:
            for step in range(4):  # within the limit
                watchdog.alive(f"step {step}")
                time.sleep(0.2)
            waits_for_a_peer()
        """
    )
    assert done.returncode == faults.STUCK == 70
    assert "stuck: step 3 has taken" in done.stderr and "train.step_timeout is 0.4" in done.stderr
    assert "waits_for_a_peer" in done.stderr


def test_a_closed_watchdog_does_nothing():
    done = run(
        """
        import time
        from radfm_jax.runtime.faults import Watchdog
        with Watchdog(0.2):
            pass
        time.sleep(0.6)
        """
    )
    assert done.returncode == 0 and not done.stderr


def test_one_signal_sets_the_flag_and_a_second_one_exits():
    before = signal.getsignal(signal.SIGTERM)
    with faults.Stop() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    done = run(
        """
        import os, signal
        from radfm_jax.runtime.faults import Stop
        with Stop():
            os.kill(os.getpid(), signal.SIGINT)
            print("still running", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("never")
        """
    )
    assert done.returncode == 128 + signal.SIGTERM and done.stdout == "still running\n"


def test_a_signal_during_native_code_is_seen_at_once():
    """PBKDF2 with these rounds takes hours and releases the interpreter lock, as a compilation does."""
    done = run(
        """
        import hashlib, os, signal, threading, time
        from radfm_jax.runtime.faults import Stop
        def leave(number):
            print(number.name, flush=True)
            os._exit(75)
        with Stop() as stop:
            with stop.calling(leave):
                pass
            os.kill(os.getpid(), signal.SIGTERM)  # after the block a signal only sets the flag
            print(bool(stop), flush=True)
        with Stop() as stop, stop.calling(leave):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        """
    )
    assert done.returncode == 75 and done.stdout.split() == ["True", "SIGTERM"], done.stderr


def test_errors_without_a_traceback():
    full = OSError(errno.ENOSPC, "No space left on device", "/data/metrics.jsonl")
    assert faults.message(full) == "/data/metrics.jsonl cannot be written: No space left on device"
    assert faults.message(ValueError("wrong field")) == "wrong field"
    noted = ValueError("no map matches")
    noted.add_note("in the second group")
    noted.add_note("-----\nJAX has removed its internal frames. Set JAX_TRACEBACK_FILTERING=off to include these.")
    noted.add_note("in a worker:\nTraceback (most recent call last):\n ...")
    assert faults.message(noted) == "no map matches\nin the second group"
    assert faults.message(SaveError("step 2 was not saved")) == "step 2 was not saved"
    assert faults.message(OSError(errno.ENOENT, "No such file")) is None and faults.message(KeyError("bug")) is None
