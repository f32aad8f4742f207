"""The coordination service of a run, a program of its own that process 0 starts (distributed.py).

It holds what the processes write for each other. If it lived in process 0, as JAX has it, the other processes would be
aborted by JAX in the moment in which process 0 dies, without a word of what happened. So it outlives process 0 for as
long as the others need to notice, and then ends.

    python -P coordination.py PARENT ADDRESS PROCESSES START HEARTBEAT GRACE      # seconds for the last three
"""

from __future__ import annotations

import os
import signal
import sys
import time

from jaxlib import _jax


def main(parent: str, address: str, processes: str, start: str, heartbeat: str, grace: str) -> None:
    # It is needed until the processes have ended, which a signal to all of them only begins.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not sys.stdin.readline():
        return  # process 0 has ended before the processes had met
    service = _jax.get_distributed_runtime_service(
        address,
        int(processes),
        heartbeat_timeout=int(heartbeat),
        cluster_register_timeout=int(start),
        shutdown_timeout=30,
        recoverable=True,  # or it would have JAX abort all others when one is lost
    )
    print("up", flush=True)
    while os.getppid() == int(parent):
        time.sleep(0.5)
    time.sleep(float(grace))
    assert service is not None
    os._exit(0)  # shutting it down would wait for processes that are dead


if __name__ == "__main__":
    main(*sys.argv[1:])
