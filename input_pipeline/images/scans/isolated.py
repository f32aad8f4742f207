"""A decoder that may end its process, in a process of its own.

gdcm is the one permissively licensed decoder of JPEG lossless. On some damaged streams it aborts the process that calls
it, and on many others it makes a picture of what it could read and says so on stderr only. Here it runs in a child: an
abort, a hang and a complaint become errors, and its memory has a limit. One child serves all frames of a process.

This file is both ends: imported by the parent, and run as the child's program (which imports nothing of this package).
"""

from __future__ import annotations

import atexit
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time

LENGTHS = struct.Struct("<QQ")
SECONDS = 60  # for one frame, the child's start included; measured 0.5 s for the start, 0.05 s for 1024 x 1024
MEMORY = 6 << 30  # address space of the child


class DecoderError(RuntimeError):
    """The frame could not be decoded; the message says what the decoder said."""


class Child:
    """The decoding process."""

    def __init__(self):
        self.owner = os.getpid()
        command = [sys.executable, "-P", "-W", "ignore", __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def end(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def read(self, count: int, deadline: float) -> bytearray:
        out, pipe = bytearray(), self.process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while len(out) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise DecoderError(f"the decoder did not end within {SECONDS} s")
            got = os.read(pipe, min(count - len(out), 1 << 20))
            if not got:
                raise DecoderError("the decoder crashed")
            out += got
        return out

    def ask(self, options: dict, frame: bytes) -> tuple[dict, bytearray]:
        deadline = time.monotonic() + SECONDS
        text = json.dumps(options).encode()
        try:
            for part in (LENGTHS.pack(len(text), len(frame)), text, frame):
                view = memoryview(part)
                while view:
                    view = view[os.write(self.process.stdin.fileno(), view) :]
        except BrokenPipeError:
            raise DecoderError("the decoder crashed") from None
        sizes = LENGTHS.unpack(self.read(LENGTHS.size, deadline))
        info = json.loads(bytes(self.read(sizes[0], deadline)))
        return info, self.read(sizes[1], deadline)


_child: Child | None = None
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it when this process was forked


def _end() -> None:
    global _child
    if _child is not None:
        _child.end()
        _child = None


os.register_at_fork(after_in_child=_renew_lock)
atexit.register(_end)


def decode(syntax: str, frame: bytes, options: dict):
    """One encoded frame -> (pixels, pydicom's description of them), as pydicom's `Decoder.as_array` gives them.

    Args:
      options: of pydicom's decoder, JSON values.
    Raises:
      DecoderError: the decoder raised, complained, crashed, took too long or too much memory.
    """
    import numpy as np

    global _child
    with _lock:
        if _child is None or _child.owner != os.getpid():
            _end()
            _child = Child()
        try:
            info, data = _child.ask({"syntax": str(syntax), "options": options}, frame)
        except BaseException:  # also an interrupt: half an answer must not be read as the next one
            _end()
            raise
    if "error" in info:
        raise DecoderError(info["error"])
    return np.frombuffer(data, info["dtype"]).reshape(info["shape"]), info


def serve() -> None:
    """The child: frames in, pixels out, until its input ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    said = tempfile.TemporaryFile()  # what C code prints
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    from pydicom import encaps, pixels, uid

    while len(head := source.read(LENGTHS.size)) == LENGTHS.size:
        text, size = LENGTHS.unpack(head)
        asked, frame, data = json.loads(source.read(text)), source.read(size), b""
        said.seek(0)
        said.truncate()
        try:
            decoder = pixels.get_decoder(uid.UID(asked["syntax"]))
            buffer = encaps.encapsulate([frame], has_bot=False)
            array, found = decoder.as_array(buffer, index=0, validate=False, decoding_plugin="gdcm", **asked["options"])
            data = array.tobytes()
            photometric = str(found["photometric_interpretation"])
            info = {"dtype": array.dtype.str, "shape": array.shape, "photometric_interpretation": photometric}
        except Exception as error:  # reported to the parent, which raises it
            info = {"error": " ".join(str(error).split()) or type(error).__name__}
        said.seek(0)
        if complaint := said.read(500).decode("ascii", "replace").strip():
            info, data = {"error": complaint.splitlines()[0]}, b""
        text = json.dumps(info).encode()
        target.write(LENGTHS.pack(len(text), len(data)) + text)
        target.write(data)
        target.flush()


if __name__ == "__main__":
    serve()
