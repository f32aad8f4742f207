"""Send requests to an OpenAI-compatible endpoint, and log answers so that none is lost or paid for twice.

    request (messages, model, settings) -> key, a hash of its content -> one line of answers.jsonl

An answer is appended and synced to disk before it is used. A resumed run sends the requests whose keys have no line,
including those in flight at the interruption (at most `concurrency`). The API key comes from the environment.
It is never written, and is removed from answers and messages.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

from input_pipeline.field_rules import Count, Size, above, at_least, check_fields, one_of
from input_pipeline.files import parse_json
from input_pipeline.messages import redacted

FIELDS = frozenset({"key", "kind", "text", "finish", "tokens_out"})  # of an answer that are read again
LENGTH_LIMITS = ("max_tokens", "max_completion_tokens")  # names of the parameter
CHARACTERS_PER_TOKEN = 4.0  # roughly, for English; used for estimates only


class Stop(ValueError):
    """The run cannot continue: a wrong key, an unknown model, no credit, or the budget is spent."""

    counts: Counts  # counts of the run so far


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An endpoint, and the limits and prices of its use."""

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the API key; "" for a server without one
    concurrency: Size = 8  # maximum number of concurrent requests
    per_minute: Annotated[float, at_least(0)] = 0.0  # maximum number of requests per minute; 0: no limit
    timeout: Annotated[float, above(0)] = 120.0  # seconds for one request
    retries: Count = 6  # retries of one request before it is deferred to the next run
    first_wait: Annotated[float, at_least(0)] = 1.0  # seconds before the first retry; doubled for each later one
    temperature: Annotated[float, at_least(0)] | None = 0.7  # None: not sent, for models that reject it
    max_tokens: Size = 800
    # The parameter of the length limit: `max_completion_tokens` for models that reject the older name.
    max_tokens_name: Annotated[str, one_of(LENGTH_LIMITS)] = LENGTH_LIMITS[0]
    direct: bool = False  # follow no redirect and use no proxy: requests reach this address only
    price_in: Annotated[float, at_least(0)] = 0.0  # price of a million tokens sent, in any currency
    price_out: Annotated[float, at_least(0)] = 0.0  # price of a million tokens received
    budget: Annotated[float, at_least(0)] = 0.0  # stop after this cost; 0: no limit

    def __post_init__(self):
        check_fields(self, "endpoint")

    def key(self) -> str:
        """Return the API key, or "" if none is used. Raises ValueError if the variable is not set."""
        if not self.key_variable:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            remedy = "export it, or name another one with --key-variable (--key-variable '' for a server without a key)"
            raise ValueError(f"the environment variable {self.key_variable} has no key: {remedy}")
        return key

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def settings(self) -> dict:
        """Return all parameters of a request except its messages."""
        settings = {"model": self.model, self.max_tokens_name: self.max_tokens}
        return settings if self.temperature is None else settings | {"temperature": self.temperature}


class Request(NamedTuple):
    """A request with an explicit key, for messages that are expensive to hash (images)."""

    key: str
    messages: list[dict]


def request_key(endpoint: Endpoint, messages: list[dict]) -> str:
    """Return the key of a request, which depends on the model, the settings and the messages."""
    content = [endpoint.model, endpoint.temperature, endpoint.max_tokens, messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:32]


class Answers:
    """The answers in answers.jsonl by key. Only the offset of each line is kept in memory.

    An incomplete last line, from a killed run, is removed.
    """

    def __init__(self, file: Path):
        self.file, self._offsets, end = file, {}, 0
        if file.is_file():
            with open(file, "rb") as lines:
                for line in lines:
                    try:
                        value = parse_json(line) if line.endswith(b"\n") else None
                    except ValueError as error:
                        raise ValueError(f"{file}: a line is not JSON ({error}): correct or move the file") from None
                    if not line.endswith(b"\n"):
                        break
                    if not isinstance(value, dict) or not value.keys() >= FIELDS or not isinstance(value["key"], str):
                        raise ValueError(f"{file}: a line is not an answer with {', '.join(sorted(FIELDS))}")
                    self._offsets.setdefault(value["key"], end)
                    end += len(line)
            os.truncate(file, end)
        self._end = end

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, key: str) -> dict:
        with open(self.file, "rb") as lines:
            lines.seek(self._offsets[key])
            return parse_json(lines.readline())

    def append(self, answer: dict) -> None:
        if answer["key"] in self._offsets:
            return
        line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        with open(self.file, "ab") as out:
            out.write(line)
            out.flush()
            os.fsync(out.fileno())
        self._offsets[answer["key"]] = self._end
        self._end += len(line)


@dataclasses.dataclass
class Counts:
    """Counts of a run. Every request was known before, has ended, or is left for the next run."""

    requests: int = 0
    known: int = 0
    left: int = 0
    sent: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    ended: dict[str, int] = dataclasses.field(default_factory=dict)  # by kind: answered, cut, refused, rejected, empty
    retried: dict[str, int] = dataclasses.field(default_factory=dict)  # number of retries by reason

    def to_dict(self, endpoint: Endpoint) -> dict:
        out = {
            "requests": self.requests,
            "requests answered before, or equal to another": self.known,
            "requests sent": self.sent,
            **{f"requests {kind}": count for kind, count in sorted(self.ended.items())},
            **{f"retries after {reason}": count for reason, count in sorted(self.retried.items())},
            "requests left for the next run": self.left,
            "tokens in": self.tokens_in,
            "tokens out": self.tokens_out,
        }
        if endpoint.price_in or endpoint.price_out:
            out["cost"] = f"{endpoint.cost(self.tokens_in, self.tokens_out):.4f}"
        return out


def estimate(endpoint: Endpoint, answers: Answers, requests: Iterable[list[dict]]) -> dict:
    """Estimate the requests and the maximum cost of a run. All answers are assumed to reach the length limit."""
    known = new = characters = 0
    seen = set()
    for messages in requests:
        key = request_key(endpoint, messages)
        if key in answers or key in seen:
            known += 1
            continue
        seen.add(key)
        new += 1
        characters += sum(len(m["content"]) for m in messages)
    tokens, most = round(characters / CHARACTERS_PER_TOKEN), new * endpoint.max_tokens
    return {
        "requests to send": new,
        "requests answered before, or equal to another": known,
        "tokens in, estimated": tokens,
        "tokens out, at most": most,
        "cost, at most": f"{endpoint.cost(tokens, most):.2f}",
    }


def ask_all(
    endpoint: Endpoint,
    answers: Answers,
    requests: Iterable[list[dict] | Request],
    done: Callable[[int, int], None] = lambda more, bad: None,
) -> Counts:
    """Send every request without an answer, and report the progress to done(requests, failures).

    Raises Stop if the run cannot continue, and ValueError if there is no key or the openai package is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise ValueError(f"requests need the openai package: pip install openai ({error})") from None
    return asyncio.run(_Client(openai, endpoint, answers, done).run(requests))


class _Client:
    def __init__(self, openai, endpoint: Endpoint, answers: Answers, done):
        self.openai, self.endpoint, self.answers, self.done = openai, endpoint, answers, done
        self.secret, self.counts, self.stopping = endpoint.key(), Counts(), False
        self.next_start = self.paused_until = 0.0  # earliest start of a request, by the rate and after a 429

    async def run(self, requests: Iterable[list[dict] | Request]) -> Counts:
        http = {"follow_redirects": False, "trust_env": False} if self.endpoint.direct else {}
        client = self.openai.AsyncOpenAI(
            base_url=self.endpoint.base_url,
            api_key=self.secret or "none",
            timeout=self.endpoint.timeout,
            max_retries=0,  # retries are done here, to count and limit them
            http_client=self.openai.DefaultAsyncHttpxClient(**http),
        )
        tasks: dict[asyncio.Task, str] = {}
        async with client:
            try:
                for request in requests:
                    self.counts.requests += 1
                    own_key = isinstance(request, Request)
                    key, messages = request if own_key else (request_key(self.endpoint, request), request)
                    if key in self.answers or key in tasks.values():
                        self.counts.known += 1
                        self.done(1, 0)
                        continue
                    if len(tasks) >= self.endpoint.concurrency:
                        await self._wait(tasks)
                    self._check_budget()
                    tasks[asyncio.create_task(self._ask(client, key, messages))] = key
                while tasks:
                    await self._wait(tasks)
            except Stop as stop:
                stop.counts = self.counts
                raise
            finally:
                self.stopping = True
                # Requests in flight are paid for, so always wait for them.
                if tasks:
                    await asyncio.gather(*tasks, return_exceptions=True)
        return self.counts

    def _check_budget(self) -> None:
        """Raise Stop if the budget is spent. Requests in flight may still exceed it."""
        spent = self.endpoint.cost(self.counts.tokens_in, self.counts.tokens_out)
        if self.endpoint.budget and spent >= self.endpoint.budget:
            raise Stop(f"the budget of {self.endpoint.budget:g} is spent ({spent:.4f}): increase --budget to continue")

    async def _wait(self, tasks: dict[asyncio.Task, str]) -> None:
        ready, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ready:
            del tasks[task]
            task.result()  # raises Stop

    async def _ask(self, client, key: str, messages: list[dict]) -> None:
        endpoint, wait = self.endpoint, self.endpoint.first_wait
        for attempt in range(endpoint.retries + 1):
            await self._wait_for_rate()
            self.counts.sent += 1
            try:
                answer = await client.chat.completions.create(messages=messages, **endpoint.settings())
                self._keep(key, answer, attempt + 1)
                return
            except Exception as error:  # _classify raises all errors that are not the endpoint's
                reason, pause = self._classify(error, wait)
            if reason == "rejected":
                self._write(key, "rejected", "", pause, attempt + 1, 0, 0)
                return
            if self.stopping:
                break
            if attempt < endpoint.retries:
                self.counts.retried[reason] = self.counts.retried.get(reason, 0) + 1
                await asyncio.sleep(pause)
            wait = min(2 * wait, 60.0)
        self.counts.left += 1
        self.done(1, 1)

    async def _wait_for_rate(self) -> None:
        """Wait until the rate limit and the retry-after of a 429 permit a request."""
        while True:
            now = time.monotonic()
            start = max(self.next_start, self.paused_until)
            if now >= start:
                if self.endpoint.per_minute:
                    self.next_start = max(now, self.next_start) + 60.0 / self.endpoint.per_minute
                return
            await asyncio.sleep(start - now)

    def _classify(self, error: Exception, wait: float) -> tuple[str, float | str]:
        """Return (reason for a retry, seconds to wait), or ("rejected", reason). Raise Stop or re-raise if fatal."""
        openai = self.openai
        if isinstance(error, openai.APITimeoutError):
            return "no answer in time", wait
        if isinstance(error, openai.APIConnectionError):
            return "a broken connection", wait
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status == 429:
                if "insufficient_quota" in str(error):
                    raise Stop(f"the endpoint reports that no credit is left: {self._message(error)}") from None
                pause = _seconds(error.response.headers.get("retry-after")) or wait
                self.paused_until = max(self.paused_until, time.monotonic() + pause)
                return "429 (too many requests)", pause
            if status >= 500 or status in (408, 409, 425):
                return f"{status} (server error)", wait
            if status in (401, 403, 404) or status < 400:  # below 400: a redirect that is not followed
                raise Stop(f"the endpoint refuses requests ({status}): {self._message(error)}") from None
            return "rejected", f"{status}: {self._message(error)}"
        if isinstance(error, openai.APIError | ValueError | KeyError | TypeError | AttributeError | IndexError):
            return "an invalid response", wait  # not JSON, or not of the protocol's form
        raise error

    def _keep(self, key: str, answer, attempts: int) -> None:
        choice = answer.choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
        refusal = getattr(choice.message, "refusal", None)
        usage = answer.usage
        tokens = [usage.prompt_tokens, usage.completion_tokens] if usage else [0, 0]
        tokens = [n if type(n) is int and n > 0 else 0 for n in tokens]  # the client does not check types
        if not isinstance(text, str):
            raise ValueError("the content of the answer is not text")
        kind = "answered"
        if refusal or finish == "content_filter":
            kind, text = "refused", refusal or text
        elif finish == "length":
            kind = "cut"
        elif not text.strip():
            kind = "empty"
        self._write(key, kind, text, finish or "", attempts, *tokens)

    def _write(self, key, kind: str, text: str, finish, attempts: int, tokens_in: int, tokens_out: int) -> None:
        self.answers.append({
            "key": key, "kind": kind, "text": self._without_key(text), "finish": self._without_key(str(finish)),
            "attempts": attempts, "tokens_in": tokens_in, "tokens_out": tokens_out, "model": self.endpoint.model,
        })  # fmt: skip
        self.counts.ended[kind] = self.counts.ended.get(kind, 0) + 1
        self.counts.tokens_in += tokens_in
        self.counts.tokens_out += tokens_out
        self.done(1, kind != "answered")

    def _message(self, error) -> str:
        return " ".join(self._without_key(str(error)).split())[:200]

    def _without_key(self, text: str) -> str:
        """Return a text without the key, and with "?" for lone surrogates, which UTF-8 cannot store."""
        return redacted(text, self.secret).encode("utf-8", "replace").decode()


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or 0)
        return min(seconds, 600.0) if seconds > 0 else 0.0  # NaN included
    except ValueError:
        return 0.0
