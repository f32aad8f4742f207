"""Run the gdcm decoder in a child process.

gdcm is the only permissively licensed decoder of lossless JPEG. On some damaged streams it aborts its process, and on
many others it returns a partial image and reports the error on stderr only. In a child process an abort, a timeout and
a message on stderr become errors, and memory is limited. One child serves all frames of a process.

This file contains both ends. The child runs it as a program and imports nothing else of this package.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time

LENGTHS = struct.Struct("<QQ")
SECONDS = 60  # per frame, including the child's start; measured: 0.5 s start, 0.05 s for 1024 x 1024
MEMORY = 6 << 30  # address space of the child, bytes


class DecoderError(RuntimeError):
    """A frame that could not be decoded, with the decoder's message."""


def send(stream, info: dict, data: bytes) -> None:
    text = json.dumps(info).encode()
    stream.write(LENGTHS.pack(len(text), len(data)) + text)
    stream.write(data)
    stream.flush()


def receive(stream) -> tuple[dict, bytes] | None:
    """Return the next (info, data); None if the stream ends."""
    head = stream.read(LENGTHS.size)
    if len(head) < LENGTHS.size:
        return None
    text_size, data_size = LENGTHS.unpack(head)
    text, data = stream.read(text_size), stream.read(data_size)
    return (json.loads(text), data) if len(text) == text_size and len(data) == data_size else None


class Child:
    def __init__(self):
        self.owner = os.getpid()
        command = [sys.executable, "-P", "-W", "ignore", __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def stop(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # raised by the flush of a request that the child did not read
            self.process.stdin.close()
        self.process.stdout.close()

    def request(self, info: dict, frame: bytes) -> tuple[dict, bytes]:
        deadline = time.monotonic() + SECONDS
        timer = threading.Timer(SECONDS, self.process.kill)
        timer.start()
        try:
            send(self.process.stdin, info, frame)
            answer = receive(self.process.stdout)
        except BrokenPipeError:
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            late = time.monotonic() >= deadline
            raise DecoderError(f"the decoder did not finish within {SECONDS} s" if late else "the decoder crashed")
        return answer


_child: Child | None = None
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held the lock at the time of the fork


def _stop() -> None:
    global _child
    if _child is not None:
        _child.stop()
        _child = None


os.register_at_fork(after_in_child=_renew_lock)
atexit.register(_stop)


def decode(syntax: str, frame: bytes, options: dict):
    """Decode one frame. Takes options (JSON values) and returns (pixels, meta) of pydicom's `Decoder.as_array`.

    Raises DecoderError if the decoder raised, printed a message, crashed, or exceeded its time or memory.
    """
    import numpy as np

    global _child
    with _lock:
        if _child is None or _child.owner != os.getpid():
            _stop()
            _child = Child()
        try:
            info, data = _child.request({"syntax": str(syntax), "options": options}, frame)
        except BaseException:  # including an interrupt: the next request must not read the rest of this answer
            _stop()
            raise
    if "error" in info:
        raise DecoderError(info["error"])
    return np.frombuffer(data, info["dtype"]).reshape(info["shape"]), info


def serve() -> None:
    """Decode frames from stdin to stdout until stdin ends (in the child)."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    messages = tempfile.TemporaryFile()  # receives what C code prints
    os.dup2(messages.fileno(), 1)
    os.dup2(messages.fileno(), 2)
    from pydicom import encaps, pixels, uid

    while received := receive(source):
        (request, frame), data = received, b""
        messages.seek(0)
        messages.truncate()
        try:
            decoder = pixels.get_decoder(uid.UID(request["syntax"]))
            buffer = encaps.encapsulate([frame], has_bot=False)
            options = request["options"]
            array, meta = decoder.as_array(buffer, index=0, validate=False, decoding_plugin="gdcm", **options)
            data = array.tobytes()
            photometric = str(meta["photometric_interpretation"])
            info = {"dtype": array.dtype.str, "shape": array.shape, "photometric_interpretation": photometric}
        except Exception as error:  # sent to the parent, which raises it
            info = {"error": " ".join(str(error).split()) or type(error).__name__}
        messages.seek(0)
        if message := messages.read(500).decode("ascii", "replace").strip():
            info, data = {"error": message.splitlines()[0]}, b""
        send(target, info, data)


if __name__ == "__main__":
    serve()
