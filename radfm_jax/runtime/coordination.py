"""The coordination service of a run, as a separate program that process 0 starts (distributed.py).

`jax.distributed.initialize` runs the service inside process 0. Then JAX aborts all other processes as soon as process 0
dies, before they can log why. This program outlives process 0 long enough for the others to notice, and then exits.

    python -m radfm_jax.runtime.coordination PARENT ADDRESS PROCESSES START_TIMEOUT HEARTBEAT GRACE    (seconds)
"""

from __future__ import annotations

import os
import signal
import sys
import time

from radfm_jax.runtime import compat


def main(parent: str, address: str, processes: str, start_timeout: str, heartbeat: str, grace: str) -> None:
    # After a signal to the job, its processes still need the service until they have exited.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not sys.stdin.readline():
        return  # process 0 exited before the rendezvous was complete
    service = compat.start_coordination_service(
        address, int(processes), timeout=int(start_timeout), heartbeat=int(heartbeat)
    )
    print("up", flush=True)
    while os.getppid() == int(parent):
        time.sleep(0.5)
    time.sleep(float(grace))
    assert service is not None
    os._exit(0)  # a shutdown would wait for processes that are dead


if __name__ == "__main__":
    main(*sys.argv[1:])
