"""Memory of the host process. Nothing happens if the C library is not glibc."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # options of glibc's mallopt
AT_ONCE = 256 << 10  # bytes
GROWN = 32 << 20  # bytes, the largest value that glibc itself chooses as blocks are freed


def release() -> None:
    """Make malloc return freed memory to the operating system: hundreds of megabytes after a compilation."""
    _call("malloc_trim", 0)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Return freed blocks of at least AT_ONCE bytes to the operating system at once, where large arrays come and go.

    glibc otherwise keeps freed blocks of up to 32 MiB, and small blocks between them prevent `release`. Afterwards
    blocks are kept again, since a training step frees and allocates the same ones.
    """
    _call("mallopt", MMAP_THRESHOLD, AT_ONCE)
    try:
        yield
    finally:
        _call("mallopt", MMAP_THRESHOLD, GROWN)
        _call("mallopt", TRIM_THRESHOLD, 2 * GROWN)


def _call(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), name)(*arguments)
