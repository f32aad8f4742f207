"""Memory of the host process."""

from __future__ import annotations

import contextlib
import ctypes


def release() -> None:
    """Make malloc return freed memory to the operating system: hundreds of megabytes after a compilation.

    Does nothing if the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
