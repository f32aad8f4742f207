"""A local server of the OpenAI chat protocol that fails on demand and counts what it served."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TURNS = (
    "User: What is seen in image {0}?\nAssistant: A lesion of kind {0}.\nUser: Where is it?\nAssistant: On the left."
)


class Server:
    """A server that runs while its context is open.

    Args:
      plans: text in the last message of a request -> outcome of each attempt: {"case 3": ["429", "500", "ok"]}. The
        last outcome repeats. Other requests succeed.
      pause: seconds for a successful answer.
    Attributes:
      tries: last message -> number of requests.
      served: last message -> number of complete answers, which a provider would bill.
      keys: API keys received.
    """

    def __init__(self, plans: dict[str, list[str]] | None = None, pause: float = 0.0):
        self.plans, self.pause = plans or {}, pause
        self.tries, self.served, self.keys = Counter(), Counter(), set()
        self.most = self.now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer._answer(self)

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

    def _answer(self, handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        with self._lock:
            self.keys.add(handler.headers["Authorization"])
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
            error = json.dumps({"error": {"message": f"no: {handler.headers['Authorization']}", "code": what}}).encode()
            return self._send(handler, int(what), error, {"Retry-After": "0.05"} if what == "429" else {})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
        choice["message"]["content"] = TURNS.format(asked.split()[1] if len(asked.split()) > 1 else "x")
        if what == "length":
            choice["finish_reason"] = "length"
            choice["message"]["content"] = choice["message"]["content"][:-4]
        elif what == "refusal":
            choice["message"] |= {"content": None, "refusal": "I will not."}
        elif what == "sorry":
            choice["message"]["content"] = "I'm sorry, but I can't help with that."
        elif what == "empty":
            choice["message"]["content"] = ""
        elif what == "echo":
            # A model that repeats the key, for instance because of a prompt injection.
            choice["message"]["content"] = (
                f"User: Which key is seen?\nAssistant: It is {handler.headers['Authorization'].split()[1]}, or none."
            )
        elif what == "echo refusal":
            choice["message"] |= {"content": None, "refusal": f"Not with {handler.headers['Authorization']}."}
        elif what == "surrogate":
            choice["message"]["content"] = "User: What?\nAssistant: \ud800."
        elif what == "none":
            choice["message"]["content"] = "NONE"
        answer = {
            "id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }  # fmt: skip
        if what == "token texts":
            answer["usage"] = {"prompt_tokens": "100", "completion_tokens": -5, "total_tokens": None}
        data = json.dumps([] if what == "shape" else {} if what == "nothing" else answer).encode()
        if what == "bad json":
            data = data[:-10]
        elif what == "cut off":
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
            return None
        elif what not in ("slow", "shape", "nothing"):
            time.sleep(self.pause)
            with self._lock:
                self.served[asked] += 1
        return self._send(handler, 200, data, {})

    def _send(self, handler, status: int, data: bytes, headers: dict) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
