"""pmc-casereport and vqa: question-answer pairs written by a language model from text about images."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from input_pipeline.curate import console, jobs, layouts, llm, qa_prompts, radiology
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.datasets.json_tables import stream_jsonl
from input_pipeline.datasets.rows import Row
from input_pipeline.samples import RowError

CASES = """\
Make question-answer pairs about the figures of case reports: PMC-CaseReport. SOURCE is the cases.jsonl of
`pmc-inline --cases`. For every sentence that refers to figures, the model sees the sentence and the captions. The text
about the patient before it becomes the context of the row, as in clinical practice. MedMD has all figures; `radmd`
drops pairs about figures that are not radiologic, and those about sizes and ages.
"""
VQA = """\
Make question-answer pairs from the findings and impressions of scans: Rad3D-VQA. SOURCE is a table of the family
rad3d_caption (JSON).
"""
_EPILOG = """\
output in DIR:
  {table:<18}        family {family}
  answers.jsonl             every answer of the endpoint, appended as it arrives; keyed by a hash of the request
  report.json, problems.jsonl   report-{tool}.json, problems-{tool}.jsonl in a folder with the report of another tool;
                            with --dry-run only report-{tool}-dry-run.json and its problems

The API key comes from the environment variable OPENAI_API_KEY (--key-variable) and is never written. Start with
--dry-run, which prints a request, the number of requests and their maximum cost. An interrupted run resumes with the
same command. An answered request is never sent again, even if --limit is increased or rows are added. Requests that
fail after all retries are deferred to the next run (exit code 1).

examples:
  python -m input_pipeline.curate {tool} {source} --out {out} --model gpt-4o-mini --dry-run --price-in 0.15 --price-out 0.6
  python -m input_pipeline.curate {tool} {source} --out {out} --model gpt-4o-mini --limit 100 --budget 1 \\
      --price-in 0.15 --price-out 0.6
  python -m input_pipeline.curate {tool} {source} --out {out} --model my-llama --base-url http://localhost:8000/v1 \\
      --key-variable '' --concurrency 64
"""  # noqa: E501
_TABLES = {
    "pmc-casereport": ("casereport.csv", "PMC_id", "img_ref", "context", "question", "answer"),
    "vqa": ("vqa.csv", "image_path", "question", "answer"),
}
BACKGROUND = 12  # maximum number of sentences that become the context; the reader shortens it further
_CASE_SECTION = re.compile(r"\bcases?\b|presentation|history|patient|report", re.IGNORECASE)
_OTHER_SECTION = re.compile(r"discussion|conclusion|introduction|background|method|review|consent|abbreviation", re.I)


class Request(NamedTuple):
    """A chat request, and the output row's cells other than the question and answer."""

    messages: list[dict[str, str]]
    cells: dict


def _base_url(text: str) -> str:
    if "@" in urllib.parse.urlsplit(text).netloc:
        reason = "has a user or a password, which would be written to the report: use --key-variable"
        raise argparse.ArgumentTypeError(reason)
    return text


def _add_options(parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the input table")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    url = "https://api.openai.com/v1"
    parser.add_argument("--base-url", type=_base_url, default=url, metavar="URL", help="(%(default)s)")
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="(%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print one request and the estimate; do not send it")
    parser.add_argument("--limit", type=console.at_least(1), metavar="N", help="only the first N requests")
    count, amount = console.at_least(0), console.at_least(0, float)
    for name, kind, default, text in (
        ("concurrency", console.at_least(1), 8, "maximum number of concurrent requests"),
        ("per-minute", amount, 0, "maximum number of requests per minute; 0: no limit"),
        ("timeout", console.number_that_is("above 0", lambda value: value > 0), 120, "seconds for one request"),
        ("retries", count, 6, "retries of a request"),
        ("temperature", float, 0.7, "temperature of the model"),
        ("max-tokens", console.at_least(1), 800, "maximum length of an answer"),
        ("price-in", amount, 0, "price of a million tokens sent"),
        ("price-out", amount, 0, "price of a million tokens received"),
        ("budget", amount, 0, "stop after this cost; 0: no limit"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (%(default)s)")


def _add_case_options(parser) -> None:
    _add_options(parser)
    text = "only figures whose captions are radiologic: fewer requests, if only RadMD is built"
    parser.add_argument("--radiologic", action="store_true", help=text)


def _check(args) -> str:
    if args.budget and not (args.price_in or args.price_out):
        return "--budget needs --price-in and --price-out to compute the cost"
    return ""


def _run(tool: str, args, directory: Path, **running) -> dict:
    names = {field.name for field in dataclasses.fields(llm.Endpoint)}
    endpoint = llm.Endpoint(**{name: value for name, value in vars(args).items() if name in names})
    radiologic = getattr(args, "radiologic", False)
    options = {"dry_run": args.dry_run, "limit": args.limit, "radiologic": radiologic}
    report = curate(tool, args.source, directory, endpoint, options, **running)
    return report | {"incomplete": report["counts"].get("requests left for the next run") or report.get("stopped")}


def _epilog(tool: str, family: str, source: str, out: str) -> str:
    return _EPILOG.format(tool=tool, table=_TABLES[tool][0], family=family, source=source, out=out)


TOOLS = {
    "pmc-casereport": console.Tool(
        CASES, _epilog("pmc-casereport", "pmc_casereport", "pmc/cases.jsonl", "case"), _add_case_options, _run, _check
    ),
    "vqa": console.Tool(VQA, _epilog("vqa", "rad3d_vqa", "rad3d/caption.json", "vqa"), _add_options, _run, _check),
}


def curate(
    tool: str, source, directory, endpoint: llm.Endpoint, options: dict, progress=jobs.no_progress, log=jobs.no_log
) -> dict:
    """Send the unanswered requests and write the table of all answers. Returns the report. Raises ValueError."""
    source, directory = Path(source).absolute(), Path(directory).absolute()
    shown = {name: getattr(endpoint, name) for name in ("base_url", "model", "temperature", "max_tokens")}
    shown = {"source": str(source)} | shown | options
    dry_run = bool(options.get("dry_run"))
    report, result = Report(directory, tool, shown, dry_run), Result()
    make_requests = case_requests if tool == "pmc-casereport" else caption_requests

    def requests(result: Result) -> Iterator[Request]:
        """Yield the requests. Each pass reads the source again, so that only one request is in memory."""
        return itertools.islice(make_requests(source, options, result), options.get("limit"))

    first = next(requests(Result()), None)
    if first is None:
        for _ in requests(result):
            pass
        report.add(result)
        report.write()
        raise ValueError(f"{source} has no text for a request: {dict(result.counts)}, see {report.problems_file}")
    answers = llm.Answers(directory / "answers.jsonl")
    if dry_run:
        log("a request:\n" + json.dumps(first.messages, indent=1, ensure_ascii=False))
        estimate = llm.estimate(endpoint, answers, (request.messages for request in requests(result)))
        report.add(result)
        report.counts |= estimate
        return report.write()
    for _ in requests(result):
        result.count("texts to ask about")
    report.add(result)
    done = progress(tool, "requests", result.counts["texts to ask about"])
    try:
        counts = llm.ask_all(endpoint, answers, (request.messages for request in requests(Result())), done)
    except llm.Stop as stop:
        counts = stop.counts
        log(str(stop))
        report.more["stopped"] = str(stop)
    report.counts |= counts.to_dict(endpoint)
    _write(tool, directory, requests(Result()), answers, endpoint, report)
    return report.write()


def _write(tool: str, directory: Path, requests: Iterable[Request], answers, endpoint, report: Report) -> None:
    """Write the table in the order of the source, regardless of the order of the answers."""
    result, seen = Result(), set()  # 8-byte hashes of the rows
    name, *header = _TABLES[tool]
    with layouts.Tables(directory, {name: header}) as out:
        for request in requests:
            key = llm.request_key(endpoint, request.messages)
            if key not in answers:
                result.count("texts without an answer yet")
                continue
            answer = answers[key]
            kind, text = answer["kind"], answer["text"]
            if kind in ("refused", "rejected", "empty"):
                result.count(f"answers: {kind}")
                reason = f"the endpoint's answer is {kind}"
                result.problem(answers.file, key, reason, str(text or answer["finish"])[:200])
                continue
            for pair in qa_prompts.usable_pairs(text, kind == "cut", result.count):
                row = request.cells | {"question": pair.question, "answer": pair.answer}
                if tool == "pmc-casereport":
                    row |= {"question": f"Q: {pair.question}", "answer": f"A: {pair.answer}"}
                content = hashlib.blake2b(json.dumps(list(row.values())).encode(), digest_size=8).digest()
                if content in seen:
                    result.count("pairs dropped: the same row twice")
                else:
                    seen.add(content)
                    out.write(name, row)
    result.count("rows written", out.rows[name])
    report.add(result)


def _read(source: Path, result: Result) -> Iterator[tuple[int, dict]]:
    if not source.is_file():
        raise RowError(source, 0, "table not found", "use cases.jsonl, or JSON of rad3d_caption")
    if source.suffix == ".jsonl":
        return layouts.good_rows(stream_jsonl(source), result)
    return layouts.read("rad3d_caption", source, result)[1]


def _is_case_section(section: str) -> bool:
    return not section or not _OTHER_SECTION.search(section) or bool(_CASE_SECTION.search(section))


def case_requests(source: Path, options: dict, result: Result) -> Iterator[Request]:
    """Yield one request for each sentence of a case report that refers to figures."""
    for number, case in _read(source, result):
        try:
            paper, captions = case["paper"], case["captions"]
            sentences = [(s["text"], s["section"], s["img_ref"]) for s in case["sentences"]]
        except (KeyError, TypeError) as error:
            result.problem(source, number, f"not a case of pmc-inline: {error}", "run pmc-inline --cases again")
            continue
        result.count("case reports")
        for k, (text, section, figures) in enumerate(sentences):
            if not figures or not _is_case_section(section):
                continue
            shown = [f for f in figures if not options["radiologic"] or _is_radiologic(captions.get(f, ""), text)]
            if not shown:
                result.count("sentences whose figures are not radiologic")
                continue
            result.count("sentences with figures")
            lines = dict.fromkeys(f"Caption: {captions[f]}" for f in shown if captions.get(f))
            cells = {"PMC_id": paper, "img_ref": str(shown), "context": background(sentences[:k])}
            yield Request(qa_prompts.messages("\n".join([f"Sentence: {text}", *lines])), cells)


def _is_radiologic(caption: str, sentence: str) -> bool:
    verdict = radiology.by_caption(caption)
    return bool(verdict) if verdict is not None else radiology.by_caption(sentence) is True


def background(before: list[tuple[str, str, list[str]]]) -> str:
    """Return the case text before a sentence. Sentences about figures are dropped: they may contain the answer."""
    texts = [
        text for text, section, figures in before
        if not figures and not re.search(r"\bfig(?:ure)?s?\b", text, re.I) and _is_case_section(section)
    ]  # fmt: skip
    return " ".join(texts[:BACKGROUND])


def caption_requests(source: Path, options: dict, result: Result) -> Iterator[Request]:
    """Yield one request for each case with findings or an impression; its pairs are about all scans of the case."""
    titles = {"finding": "Findings", "impression": "Impression"}
    for number, cells in _read(source, result):
        row = Row(source, number, cells, source.parent)
        try:
            texts = {title: text for name, title in titles.items() if (text := " ".join(row.prose(name)))}
            paths = row.names("npy_path")
            if not texts or not paths:
                raise row.error("npy_path is blank" if texts else "finding and impression are blank")
        except RowError as error:
            result.error(error)
            continue
        text = " ".join(f"{title}: {text}" for title, text in texts.items())
        yield Request(qa_prompts.messages(text), {"image_path": paths[0] if len(paths) == 1 else str(paths)})
