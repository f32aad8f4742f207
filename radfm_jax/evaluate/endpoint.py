"""Questions -> answers of a vision model behind an OpenAI-compatible endpoint.

    answers/NAME.jsonl            an answer per line: id, prompt, answer, ended, refused, made_with
    answers/NAME.failed.jsonl     a question without an answer per line: id, error
    answers/NAME.requests.jsonl   the log of the endpoint's answers, from which a run resumes (curate/llm.py)
    answers/NAME.endpoint.json    the settings of the log; a run with other settings raises an error

A request has the text of the question, with one image at each `<image-i>` mark (montage.py). The key of a request
hashes the settings and the question, not the pixels, so a resumed run does not read the scans of answered questions.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.curate import llm
from input_pipeline.files import read_json, write_json, write_json_lines
from radfm_jax.evaluate import montage
from radfm_jax.evaluate.model_answers import FAILED
from radfm_jax.evaluate.radbench import Question
from radfm_jax.inference.batch_files import locked_output

SYSTEM = "Answer the question about the radiology images. This is a benchmark: the answer is not used for patient care."
CHOICES = "Answer with one of: {}."
AHEAD = 4  # questions whose images are made while requests are in flight
_MARK = re.compile(r"<image-(\d+)>")
_UNSAFE = re.compile(r"[^\w.-]+")  # characters to replace in a file name


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A model at an endpoint, and the settings of its requests."""

    endpoint: llm.Endpoint
    layout: montage.Layout = montage.Layout()
    system: str = SYSTEM  # the system message; "" for none
    choices: bool = True  # name the choices of a closed question

    def settings(self) -> dict:
        """Return the settings that an answer depends on, in addition to its question."""
        layout = {"grid": self.layout.grid, "size": self.layout.size}
        asked = {"system": self.system, "choices": self.choices, "montage": layout}
        return {"endpoint": self.endpoint.base_url, **self.endpoint.settings(), **asked}

    def description(self) -> str:
        """Return the source of the answers, for the report."""
        host = urllib.parse.urlsplit(self.endpoint.base_url).hostname
        temperature = "" if self.endpoint.temperature is None else f"temperature {self.endpoint.temperature:g}, "
        return (
            f"{self.endpoint.model} at {host}, {temperature}at most {self.endpoint.max_tokens} tokens, volumes as "
            f"{self.layout.grid} x {self.layout.grid} slices in {self.layout.size} pixels"
        )

    def key(self, question: Question) -> str:
        scans = [dataclasses.asdict(scan) for scan in question.relative_scans()]
        content = [self.settings(), question.row_id, question.prompt, question.context, question.closed, scans]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def messages(self, question: Question) -> list[dict]:
        """Return the chat messages of a question. Raises ScanError, a ValueError, for a scan that cannot be used."""
        images = [montage.scan_image(scan, self.layout) for scan in question.scans]
        parts: list[dict] = []
        for k, piece in enumerate(_MARK.split(self.text(question))):
            if k % 2:
                image = images[int(piece) - 1]
                label = f"Image {piece}: {image.description()}" if image.description() else ""
                parts += [{"type": "text", "text": label}] if label else []
                parts.append({"type": "image_url", "image_url": {"url": image.data_url()}})
            elif piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": parts}]

    def text(self, question: Question) -> str:
        """Return the text of a question with its marks; scans without a mark come first."""
        marks = set(_MARK.findall(f"{question.context} {question.prompt}"))
        first = [f"<image-{i}>" for i in range(1, len(question.scans) + 1) if str(i) not in marks]
        choices = [CHOICES.format(", ".join(question.closed))] if self.choices and question.closed else []
        return " ".join(part for part in (*first, question.context, question.prompt, *choices) if part)


def is_loopback(url: str) -> bool:
    """Whether a URL is on this machine. Raises ValueError if it is not http(s), or has a user or a password."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--endpoint {url}: give a URL such as http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise ValueError("--endpoint has a user or a password, which would be recorded: use --key-variable")
    try:
        return parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        return False


class EndpointAnswers:
    """The answers of one model at an endpoint to the questions of a benchmark, and their files.

    Raises ValueError if the directory has answers of this name that were made with other settings.
    """

    def __init__(self, baseline: Baseline, questions: Sequence[Question], file: Path):
        """Open the log. file: answers/NAME.jsonl."""
        self.baseline, self.questions, self.file = baseline, questions, file
        self.log_file, self.settings_file = file.with_suffix(".requests.jsonl"), file.with_suffix(".endpoint.json")
        self._check_settings()
        self.log = llm.Answers(self.log_file)
        self.keys = {question.row_id: baseline.key(question) for question in questions}
        self.failures: dict[str, str] = {}  # id -> why its request could not be made

    def _check_settings(self) -> None:
        settings = self.baseline.settings()
        if self.settings_file.exists():
            recorded = read_json(self.settings_file, kind=dict)
            differing = sorted(k for k in {**recorded, **settings} if recorded.get(k) != settings.get(k))
            if differing and self.log_file.exists():
                values = ", ".join(f"{k} was {recorded.get(k)!r} and is {settings.get(k)!r}" for k in differing)
                remedy = "use another --name or --out"
                raise ValueError(f"{self.log_file} has answers with other settings: {values}; {remedy}")
        elif self.file.exists():
            raise ValueError(f"{self.file} has answers of another model: use another --name or --out")

    def unanswered(self) -> list[Question]:
        return [q for q in self.questions if self.keys[q.row_id] not in self.log]

    def estimate(self, questions: Sequence[Question], image_tokens: int | None = None) -> dict[str, str]:
        """Return the maximum cost of the requests for some questions, as lines of a table.

        image_tokens: tokens of an image; None: montage.image_tokens.
        """
        endpoint, images = self.baseline.endpoint, sum(len(q.scans) for q in questions)
        characters = sum(len(self.baseline.text(q)) + len(self.baseline.system) for q in questions)
        per_image = montage.image_tokens(self.baseline.layout) if image_tokens is None else image_tokens
        tokens_in = round(characters / llm.CHARACTERS_PER_TOKEN) + images * per_image
        tokens_out = len(questions) * endpoint.max_tokens
        lines = {
            "requests": f"{len(questions):,} ({len(self.questions) - len(self.unanswered()):,} are answered)",
            "images": f"{images:,}, at most {self.baseline.layout.size} pixels per side",
            "prompt tokens, estimated": f"{tokens_in:,} ({per_image} per image)",
            "answer tokens, at most": f"{tokens_out:,}",
        }
        if endpoint.price_in or endpoint.price_out:
            lines["cost, at most"] = f"{endpoint.cost(tokens_in, tokens_out):.2f}"
        return lines

    def ask(self, limit: int | None, done: Callable[[int, int], None]) -> llm.Counts:
        """Send up to `limit` requests for unanswered questions. The files of answers are written even after an error.

        Raises llm.Stop if the run cannot continue.
        """
        with locked_output(self.log_file):
            write_json(self.settings_file, self.baseline.settings())
            try:
                return llm.ask_all(self.baseline.endpoint, self.log, self._requests(limit, done), done)
            finally:
                self.write()

    def _requests(self, limit: int | None, done: Callable[[int, int], None]) -> Iterator[llm.Request]:
        made = 0
        for question, messages in _ahead(self.unanswered(), self.baseline.messages):
            if made == limit:
                return
            try:
                yield llm.Request(self.keys[question.row_id], messages())
                made += 1
            except ValueError as error:  # an unreadable scan
                self.failures[question.row_id] = str(error)
                done(1, 1)

    def write(self) -> None:
        """Write NAME.jsonl and NAME.failed.jsonl from the log."""
        made_with = self.baseline.settings()
        answers, failed = [], []
        for question in self.questions:
            key, row_id = self.keys[question.row_id], question.row_id
            if key not in self.log:
                reason = self.failures.get(row_id, "the endpoint gave no answer: run the command again")
                failed.append({"id": row_id, "error": reason})
                continue
            answer = self.log[key]
            if answer["kind"] == "rejected":
                failed.append({"id": row_id, "error": f"the endpoint rejected the request: {answer['finish']}"})
                continue
            context = {"context": question.context} if question.context else {}
            fields = {"id": row_id, "prompt": question.prompt, **context, "answer": answer["text"]}
            fields |= {"ended": "length" if answer["kind"] == "cut" else "stop", "tokens": answer["tokens_out"]}
            fields |= {"refused": True} if answer["kind"] == "refused" else {}
            answers.append(fields | {"made_with": made_with})
        write_json_lines(self.file, answers)
        write_json_lines(self.file.with_suffix(FAILED), failed)


def _ahead(questions: Iterable[Question], make: Callable) -> Iterator[tuple[Question, Callable]]:
    """Yield each question with a function that returns make(question). A thread computes the next few in advance."""
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        pending: collections.deque = collections.deque()
        for question in questions:
            pending.append((question, reader.submit(make, question)))
            if len(pending) > AHEAD:
                question, future = pending.popleft()
                yield question, future.result
        for question, future in pending:
            yield question, future.result


def _file_name(row_id: str) -> str:
    """Return a name that is safe and short, with a digest if it differs from the id: a/1 and a_1 are two files."""
    name = _UNSAFE.sub("_", row_id)[:80]
    return name if name == row_id else f"{name}-{hashlib.sha256(row_id.encode()).hexdigest()[:8]}"


def save_montages(questions: Sequence[Question], layout: montage.Layout, directory: Path) -> dict[str, str]:
    """Write the image of each scan as DIR/ID-IMAGE.png, and DIR/montages.jsonl. Returns scan path -> error.

    A line of montages.jsonl: id, image, file, slices, of, black, white.
    """
    lines, failed = [], {}
    for question in questions:
        for number, (scan, relative) in enumerate(zip(question.scans, question.relative_scans(), strict=True), 1):
            name = f"{_file_name(question.row_id)}-{number}.png"
            try:
                image = montage.scan_image(scan, layout)
            except ValueError as error:
                failed[relative.path] = str(error)
                continue
            montage.save(image, directory / name)
            shown = {"slices": image.numbers, "of": image.count, "black": image.low, "white": image.high}
            lines.append({"id": question.row_id, "image": number, "file": name, **shown})
    directory.mkdir(parents=True, exist_ok=True)
    write_json_lines(directory / "montages.jsonl", lines)
    return failed
