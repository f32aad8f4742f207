"""Asks any OpenAI-compatible endpoint, and keeps every answer: nothing is lost, nothing is paid twice.

    request (messages, model, settings) -> key, a hash of its content -> a line of answers.jsonl, once and for ever

An answer is appended and flushed to disk before anything else is done with it. A run that is ended, by whatever means,
goes on with the keys that have no line; what was under way at that moment (at most `concurrency` requests) is asked
again.
The endpoint's key comes from the environment and is never written: it is cut out of every message, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

FINAL = ("answered", "cut", "refused", "rejected", "empty")
CHARACTERS_A_TOKEN = 4.0  # of English, roughly: for estimates only


class Stop(ValueError):
    """The endpoint will answer nothing more: a wrong key, an unknown model, no credit, the budget is spent.

    Attributes: counts: what the run had done until then.
    """

    counts: Counts


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Attributes:
    key_variable: the environment variable with the key; "" for a server that wants none.
    concurrency: requests under way at once. per_minute: requests begun a minute at most; 0: no limit.
    timeout: seconds for one request. retries: further tries of one request before it is left for the next run.
    price_in, price_out: for a million tokens, in whatever currency; budget: stop when so much is spent; 0: no limit.
    """

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    per_minute: float = 0.0
    timeout: float = 120.0
    retries: int = 6
    first_wait: float = 1.0
    temperature: float = 0.7
    max_tokens: int = 800
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float = 0.0

    def key(self) -> str:
        """ "" for a server that wants none. Raises ValueError if the variable is not set."""
        if not self.key_variable:
            return ""
        found = os.environ.get(self.key_variable, "").strip()
        if not found:
            raise ValueError(
                f"the environment variable {self.key_variable} has no key: export it, or name another one with "
                "--key-variable (--key-variable '' for a server that wants none)"
            )
        return found

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


def request_key(endpoint: Endpoint, messages: list[dict]) -> str:
    """What makes two requests the same: the model, the settings and every word."""
    content = [endpoint.model, endpoint.temperature, endpoint.max_tokens, messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:32]


class Answers:
    """answers.jsonl: what was answered, by key. In memory is where each line begins.

    A line that a kill left half-written is cut off; it was no answer yet.
    """

    def __init__(self, file: Path):
        self.file, self._places, whole = file, {}, 0
        if file.is_file():
            with open(file, "rb") as lines:
                for line in lines:
                    try:
                        value = json.loads(line) if line.endswith(b"\n") else None
                    except ValueError as error:
                        raise ValueError(
                            f"{file}: a line is damaged ({error}): mend it or move the file away"
                        ) from None
                    if value is None:
                        break
                    self._places.setdefault(value["key"], whole)
                    whole += len(line)
            os.truncate(file, whole)
        self._at = whole

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> dict:
        with open(self.file, "rb") as lines:
            lines.seek(self._places[key])
            return json.loads(lines.readline())

    def append(self, answer: dict) -> None:
        if answer["key"] in self._places:
            return
        line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        with open(self.file, "ab") as out:
            out.write(line)
            out.flush()
            os.fsync(out.fileno())
        self._places[answer["key"]] = self._at
        self._at += len(line)


@dataclasses.dataclass
class Counts:
    """What a run did. Every request ends as known, as one of FINAL, or as left for the next run."""

    requests: int = 0
    known: int = 0
    left: int = 0
    sent: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    ended: dict[str, int] = dataclasses.field(default_factory=dict)
    retried: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self, endpoint: Endpoint) -> dict:
        out = {
            "requests": self.requests,
            "requests answered before, or equal to another": self.known,
            "requests sent": self.sent,
            **{f"requests {kind}": count for kind, count in sorted(self.ended.items())},
            **{f"retries after {why}": count for why, count in sorted(self.retried.items())},
            "requests left for the next run": self.left,
            "tokens in": self.tokens_in,
            "tokens out": self.tokens_out,
        }
        if endpoint.price_in or endpoint.price_out:
            out["cost"] = f"{endpoint.cost(self.tokens_in, self.tokens_out):.4f}"
        return out


def estimate(endpoint: Endpoint, answers: Answers, requests: Iterable[list[dict]]) -> dict:
    """What a run would ask and cost, without asking: tokens from the number of characters, answers at full length."""
    known = asked = characters = 0
    seen = set()
    for messages in requests:
        key = request_key(endpoint, messages)
        if key in answers or key in seen:
            known += 1
            continue
        seen.add(key)
        asked += 1
        characters += sum(len(m["content"]) for m in messages)
    tokens = round(characters / CHARACTERS_A_TOKEN)
    most = asked * endpoint.max_tokens
    return {
        "requests to send": asked,
        "requests answered before, or equal to another": known,
        "tokens in, estimated": tokens,
        "tokens out, at most": most,
        "cost, at most": f"{endpoint.cost(tokens, most):.2f}",
    }


def ask_all(
    endpoint: Endpoint,
    answers: Answers,
    requests: Iterable[list[dict]],
    done: Callable[[int, int], None] = lambda more, bad: None,
) -> Counts:
    """Asks everything that has no answer yet.

    Raises:
      Stop: see there; what was answered is kept.
      ValueError: no key, or the openai package is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise ValueError(f"asking needs the openai package: pip install openai ({error})") from None
    return asyncio.run(_Asking(openai, endpoint, answers, done).run(requests))


class _Asking:
    def __init__(self, openai, endpoint: Endpoint, answers: Answers, done):
        self.openai, self.endpoint, self.answers, self.done = openai, endpoint, answers, done
        self.secret = endpoint.key()
        self.counts = Counts()
        self.next_start = 0.0
        self.paused_until = 0.0
        self.stopping = False

    async def run(self, requests: Iterable[list[dict]]) -> Counts:
        # Its own retries are switched off: ours are counted, and end where the user says.
        client = self.openai.AsyncOpenAI(
            base_url=self.endpoint.base_url, api_key=self.secret or "none", timeout=self.endpoint.timeout, max_retries=0
        )
        waiting: dict[asyncio.Task, str] = {}
        under_way: set[str] = set()
        async with client:
            try:
                for key, messages in self._new(requests, under_way):
                    if len(waiting) >= self.endpoint.concurrency:
                        await self._some(waiting, under_way)
                    self._check_budget()
                    under_way.add(key)
                    waiting[asyncio.create_task(self._ask(client, key, messages))] = key
                while waiting:
                    await self._some(waiting, under_way)
            except Stop as stop:
                stop.counts = self.counts
                raise
            finally:
                self.stopping = True
                # What is on its way has been paid for: it is waited for, whatever ended the run.
                if waiting:
                    await asyncio.gather(*waiting, return_exceptions=True)
        return self.counts

    def _new(self, requests, under_way) -> Iterator[tuple[str, list[dict]]]:
        for messages in requests:
            self.counts.requests += 1
            key = request_key(self.endpoint, messages)
            if key in self.answers or key in under_way:
                self.counts.known += 1
                self.done(1, 0)
                continue
            yield key, messages

    def _check_budget(self) -> None:
        """What is under way may still go beyond it."""
        spent = self.endpoint.cost(self.counts.tokens_in, self.counts.tokens_out)
        if self.endpoint.budget and spent >= self.endpoint.budget:
            raise Stop(f"the budget of {self.endpoint.budget:g} is spent ({spent:.4f}): raise --budget to go on")

    async def _some(self, waiting, under_way) -> None:
        ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in ready:
            under_way.discard(waiting.pop(task))
            task.result()  # raises Stop

    async def _ask(self, client, key: str, messages: list[dict]) -> None:
        endpoint, wait = self.endpoint, self.endpoint.first_wait
        for attempt in range(endpoint.retries + 1):
            await self._turn()
            self.counts.sent += 1
            try:
                answer = await client.chat.completions.create(
                    model=endpoint.model,
                    messages=messages,
                    temperature=endpoint.temperature,
                    max_tokens=endpoint.max_tokens,
                )
                self._keep(key, answer, attempt + 1)
                return
            except Exception as error:  # told apart by kind: what is none of the endpoint's faults is raised again
                why, pause = self._judge(error, wait)
            if why == "rejected":
                self._write(key, "rejected", "", pause, attempt + 1, 0, 0)
                return
            if self.stopping:
                break
            if attempt < endpoint.retries:
                self.counts.retried[why] = self.counts.retried.get(why, 0) + 1
                await asyncio.sleep(pause)
            wait = min(2 * wait, 60.0)
        self.counts.left += 1
        self.done(1, 1)

    async def _turn(self) -> None:
        """Waits until a request may begin: the rate, and what a 429 asked for."""
        while True:
            now = time.monotonic()
            start = max(self.next_start, self.paused_until)
            if now >= start:
                if self.endpoint.per_minute:
                    self.next_start = max(now, self.next_start) + 60.0 / self.endpoint.per_minute
                return
            await asyncio.sleep(start - now)

    def _judge(self, error: Exception, wait: float) -> tuple[str, float | str]:
        """(why it is tried again, seconds until then), or ("rejected", the reason). Raises Stop, or the error."""
        openai = self.openai
        if isinstance(error, openai.APITimeoutError):
            return "no answer in time", wait
        if isinstance(error, openai.APIConnectionError):
            return "a broken connection", wait
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status == 429:
                if "insufficient_quota" in str(error):
                    raise Stop(f"the endpoint says that the credit is used up: {self._said(error)}") from None
                pause = _seconds(error.response.headers.get("retry-after")) or wait
                self.paused_until = max(self.paused_until, time.monotonic() + pause)
                return "429 (too many requests)", pause
            if status >= 500 or status in (408, 409, 425):
                return f"{status} (fault of the server)", wait
            if status in (401, 403, 404):
                raise Stop(f"the endpoint refuses to serve ({status}): {self._said(error)}") from None
            return "rejected", f"{status}: {self._said(error)}"
        if isinstance(error, openai.APIError | ValueError | KeyError | TypeError | AttributeError | IndexError):
            return "an answer that is no answer", wait  # not JSON, or not of the protocol's shape
        raise error

    def _keep(self, key: str, answer, attempts: int) -> None:
        choice = answer.choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
        refusal = getattr(choice.message, "refusal", None)
        usage = answer.usage
        tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
        if not isinstance(text, str):
            raise ValueError("the text of the answer is no text")
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

    def _said(self, error) -> str:
        return " ".join(self._without_key(str(error)).split())[:200]

    def _without_key(self, text: str) -> str:
        return text.replace(self.secret, "...") if self.secret else text


def _seconds(text: str | None) -> float:
    try:
        return min(max(float(text or 0), 0.0), 600.0)
    except ValueError:
        return 0.0
