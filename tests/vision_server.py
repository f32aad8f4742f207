"""A loopback server of the OpenAI chat protocol for requests with images, which records what it receives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class VisionServer:
    """A server that runs while its context is open.

    Args:
      answer: user content (a list of parts) -> text, or an int for that HTTP status.
    Attributes:
      requests: bodies received.
      authorizations: Authorization headers received.
    """

    def __init__(self, answer: Callable[[list[dict]], str | int]):
        self.answer, self.requests, self.authorizations = answer, [], []
        self.location = ""  # where a redirect leads
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.authorizations.append(self.headers["Authorization"])
                text = outer.answer(body["messages"][-1]["content"])
                if isinstance(text, int):
                    return self.send(text, {"error": {"message": f"no: {self.headers['Authorization']}"}})
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
                answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                return self.send(200, answer | {"usage": usage})

            def send(self, status: int, value: dict) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if outer.location:
                    self.send_header("Location", outer.location)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self):
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def text_of(content: list[dict]) -> str:
    return " ".join(part["text"] for part in content if part["type"] == "text")
