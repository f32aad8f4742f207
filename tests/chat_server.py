"""Local servers of the OpenAI chat protocol: one that fails on demand, and one for requests with images."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """A server that runs while its context is open. `reply` answers a request; `keys` are the API keys received."""

    usage = (100, 20)  # prompt and completion tokens of each answer

    def __init__(self):
        self.keys = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.add(self.headers["Authorization"])
                outer.reply(self, body["messages"][-1]["content"], body)

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

    def completion(self, finish_reason: str = "stop", **message) -> dict:
        prompt, completion = self.usage
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", **message}}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        }  # fmt: skip

    def send(self, handler, status: int, value, headers: dict | None = None, sent: slice = slice(None)) -> None:
        """Send a value as JSON, or bytes as they are. `sent` is the part that reaches the client."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for name, text in headers.items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(data[sent])

    def refuse(self, handler, status: int, headers: dict | None = None) -> None:
        """Send an error that repeats the API key."""
        error = {"message": f"no: {handler.headers['Authorization']}", "code": str(status)}
        self.send(handler, status, {"error": error}, headers)


class VisionServer(ChatServer):
    """A server for requests with images, which records what it receives.

    Args:
      answer: user content (a list of parts) -> text, or an int for that HTTP status.
    Attributes:
      requests: bodies received.
      authorizations: Authorization headers received.
      location: where a redirect leads.
    """

    usage = (1000, 10)

    def __init__(self, answer: Callable[[list[dict]], str | int]):
        super().__init__()
        self.answer, self.requests, self.authorizations, self.location = answer, [], [], ""

    def reply(self, handler, asked: list[dict], body: dict) -> None:
        self.requests.append(body)
        self.authorizations.append(handler.headers["Authorization"])
        text = self.answer(asked)
        headers = {"Location": self.location} if self.location else {}
        if isinstance(text, int):
            self.refuse(handler, text, headers)
        else:
            self.send(handler, 200, self.completion(content=text), headers)


def text_of(content: list[dict]) -> str:
    return " ".join(part["text"] for part in content if part["type"] == "text")


TURNS = (
    "User: What is seen in image {0}?\nAssistant: A lesion of kind {0}.\nUser: Where is it?\nAssistant: On the left."
)


class FailingServer(ChatServer):
    """A server that fails on demand and counts what it served.

    Args:
      plans: text in the last message of a request -> outcome of each attempt: {"case 3": ["429", "500", "ok"]}. The
        last outcome repeats. Other requests succeed.
      pause: seconds for a successful answer.
    Attributes:
      tries: last message -> number of requests.
      served: last message -> number of complete answers, which a provider would bill.
      most: largest number of requests at one time.
    """

    def __init__(self, plans: dict[str, list[str]] | None = None, pause: float = 0.0):
        super().__init__()
        self.plans, self.pause = plans or {}, pause
        self.tries, self.served = Counter(), Counter()
        self.most = self.now = 0
        self._lock = threading.Lock()

    def reply(self, handler, asked: str, body: dict) -> None:
        with self._lock:
            plan = next((p for word, p in self.plans.items() if word in asked), ["ok"])
            what = plan[min(self.tries[asked], len(plan) - 1)]
            self.tries[asked] += 1
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            self._do(handler, asked, what)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client had gone: that is what a time-out looks like from here
        finally:
            with self._lock:
                self.now -= 1

    def _do(self, handler, asked: str, what: str) -> None:
        if what == "slow":
            time.sleep(3.0)
        if what in ("429", "500", "503", "401", "400", "404"):
            return self.refuse(handler, int(what), {"Retry-After": "0.05"} if what == "429" else {})
        key = handler.headers["Authorization"]
        turns = TURNS.format(asked.split()[1] if len(asked.split()) > 1 else "x")
        message = {
            "length": {"finish_reason": "length", "content": turns[:-4]},
            "refusal": {"content": None, "refusal": "I will not."},
            "sorry": {"content": "I'm sorry, but I can't help with that."},
            "empty": {"content": ""},
            # A model that repeats the key, for instance because of a prompt injection.
            "echo": {"content": f"User: Which key is seen?\nAssistant: It is {key and key.split()[1]}, or none."},
            "echo refusal": {"content": None, "refusal": f"Not with {key}."},
            "surrogate": {"content": "User: What?\nAssistant: \ud800."},
            "none": {"content": "NONE"},
        }.get(what, {"content": turns})
        answer = self.completion(**message)
        if what == "token texts":
            answer["usage"] = {"prompt_tokens": "100", "completion_tokens": -5, "total_tokens": None}
        data = json.dumps([] if what == "shape" else {} if what == "nothing" else answer).encode()
        if what == "bad json":
            data = data[:-10]
        elif what == "cut off":
            handler.close_connection = True
            return self.send(handler, 200, data, sent=slice(len(data) // 2))
        elif what not in ("slow", "shape", "nothing"):
            time.sleep(self.pause)
            with self._lock:
                self.served[asked] += 1
        return self.send(handler, 200, data)
