"""Memory of the host process."""

from __future__ import annotations

import ctypes


def release() -> None:
    """Gives back to the operating system what is freed but kept by malloc: after a compilation, hundreds of megabytes.

    Does nothing where the C library is not glibc.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
