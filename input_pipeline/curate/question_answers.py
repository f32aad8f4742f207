"""pmc-casereport and vqa: question-answer pairs written by a language model from text about images."""

from __future__ import annotations

import argparse
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
from input_pipeline.samples import RowError

CASES = """\
Make question-answer pairs about the figures of case reports: PMC-CaseReport. SOURCE is the cases.jsonl of
`pmc-inline --cases`. For every sentence that refers to figures the model sees that sentence and the captions; what was
told of the patient before becomes the context of the row, so that the question is asked as in the clinic.
"""
VQA = """\
Make question-answer pairs from the findings and impressions of scans: Rad3D-VQA. SOURCE is a table of the family
rad3d_caption (JSON).
"""
EPILOG = """\
what is written to DIR:
  {table:<18}        read as the family {family}
  answers.jsonl             every answer of the endpoint, appended as it comes; keyed by a hash of what was asked
  report.json, problems.jsonl   report-{tool}.json, problems-{tool}.jsonl in a folder with another tool's report;
                            with --dry-run nothing but report-{tool}-dry-run.json and its problems

The key comes from the environment variable OPENAI_API_KEY (--key-variable) and is written nowhere. Begin with --dry-run:
it shows a request and says how many there are and what they cost at most. Ended at any moment, the same command goes on:
what has an answer is never asked again, also with --limit raised or rows added. Requests that no retry brings through are
left for the next run (exit code 1).

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
BACKGROUND = 12  # sentences of a case that become context at most; the reader shortens them further
_CASE_SECTION = re.compile(r"\bcases?\b|presentation|history|patient|report", re.IGNORECASE)
_AFTERWARDS = re.compile(r"discussion|conclusion|introduction|background|method|review|consent|abbreviation", re.I)


class Asked(NamedTuple):
    """One request: what the model sees, and what a row needs beside the pair."""

    text: str
    cells: dict


def main(tool: str, argv: list[str]) -> int:
    cases = tool == "pmc-casereport"
    said = EPILOG.format(
        tool=tool,
        table="casereport.csv" if cases else "vqa.csv",
        family="pmc_casereport" if cases else "rad3d_vqa",
        source="pmc/cases.jsonl" if cases else "rad3d/caption.json",
        out="case" if cases else "vqa",
    )
    parser = console.parser(tool, CASES if cases else VQA, said)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument("--base-url", default="https://api.openai.com/v1", metavar="URL", help="(%(default)s)")
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="(%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show a request and the estimate; ask nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N requests only")
    for name, kind, default, what in (
        ("concurrency", int, 8, "requests under way at once"),
        ("per-minute", float, 0, "requests begun a minute; 0: no limit"),
        ("timeout", float, 120, "seconds for one request"),
        ("retries", int, 6, "further tries of a request"),
        ("temperature", float, 0.7, "of the model"),
        ("max-tokens", int, 800, "of an answer"),
        ("price-in", float, 0, "of a million tokens sent"),
        ("price-out", float, 0, "of a million tokens received"),
        ("budget", float, 0, "stop when so much is spent; 0: no limit"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{what} (%(default)s)")
    if cases:
        parser.add_argument("--all-figures", action="store_true", help="also figures whose captions are not radiologic")
    args = parser.parse_args(argv)
    if args.concurrency < 1 or args.retries < 0 or args.max_tokens < 1 or args.timeout <= 0:
        parser.error("--concurrency and --max-tokens need at least 1, --retries 0, --timeout more than 0")
    if (
        args.limit is not None
        and args.limit < 1
        or min(args.per_minute, args.price_in, args.price_out, args.budget) < 0
    ):
        parser.error("--limit needs at least 1; --per-minute, --price-in, --price-out and --budget at least 0")
    if args.budget and not (args.price_in or args.price_out):
        parser.error("--budget needs --price-in and --price-out: without them nothing costs anything")
    if "@" in urllib.parse.urlsplit(args.base_url).netloc:
        parser.error("--base-url holds a user or a password, which would be written to the report: use --key-variable")
    options = {"dry_run": args.dry_run, "limit": args.limit, "all_figures": cases and args.all_figures}
    report: dict = {}

    def run(out, **more) -> dict:
        report.update(build(tool, args.source, out, endpoint(args), options, **more))
        return report

    code = console.run(args, run)
    left = code == 0 and (report["counts"].get("requests left for the next run") or report.get("stopped"))
    return 1 if left else code


def endpoint(args: argparse.Namespace) -> llm.Endpoint:
    names = (
        "base_url model key_variable concurrency per_minute timeout retries temperature max_tokens price_in price_out"
    )
    return llm.Endpoint(**{name: getattr(args, name) for name in f"{names} budget".split()})


def build(
    tool: str, source, directory, endpoint: llm.Endpoint, options: dict, progress=jobs.silent, said=lambda _: None
) -> dict:
    """Asks what has no answer yet, and writes the table of all that has; returns the report. Raises ValueError."""
    source, directory = Path(source).absolute(), Path(directory).absolute()
    shown = {"source": str(source), "base_url": endpoint.base_url, "model": endpoint.model,
             "temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens} | options  # fmt: skip
    report, result = Report(directory, tool, shown, trial=bool(options.get("dry_run"))), Result()
    found = case_requests if tool == "pmc-casereport" else caption_requests

    def asked(told: Result) -> Iterator[Asked]:
        """Read anew each time, so that no more than a request is in memory."""
        return itertools.islice(found(source, options, told), options.get("limit"))

    first = next(asked(Result()), None)
    if first is None:
        for _ in asked(result):
            pass
        report.add(result)
        report.write()
        raise ValueError(f"{source} has nothing to ask about: {dict(result.counts)}, see {report.listed}")
    answers = llm.Answers(directory / "answers.jsonl")
    if options.get("dry_run"):
        said("a request:\n" + json.dumps(qa_prompts.messages(first.text), indent=1, ensure_ascii=False))
        estimated = llm.estimate(endpoint, answers, (qa_prompts.messages(a.text) for a in asked(result)))
        report.add(result)
        report.counts |= estimated
        return report.write()
    for _ in asked(result):
        result.count("texts to ask about")
    report.add(result)
    done = progress(tool, "requests", result.counts["texts to ask about"])
    stopped = None
    counts = llm.Counts()
    try:
        counts = llm.ask_all(endpoint, answers, (qa_prompts.messages(a.text) for a in asked(Result())), done)
    except llm.Stop as error:
        stopped, counts = str(error), error.counts
        said(stopped)
    report.counts |= counts.to_dict(endpoint)
    if stopped:
        report.more["stopped"] = stopped
    _write(tool, directory, asked(Result()), answers, endpoint, report)
    return report.write()


def _write(tool: str, directory: Path, asked: Iterable[Asked], answers: llm.Answers, endpoint, report: Report) -> None:
    """The table, in the order of the source, whatever order the answers came in."""
    result, seen = Result(), set()  # 8 bytes of a hash of each row
    name, *header = _TABLES[tool]
    with layouts.Tables(directory, {name: header}) as out:
        for item in asked:
            key = llm.request_key(endpoint, qa_prompts.messages(item.text))
            if key not in answers:
                result.count("texts without an answer yet")
                continue
            answer = answers[key]
            if answer["kind"] in ("refused", "rejected", "empty"):
                result.count(f"answers: {answer['kind']}")
                result.problem(directory / "answers.jsonl", key, f"the endpoint's answer is {answer['kind']}",
                               f"{answer['text'] or answer['finish']}"[:200])  # fmt: skip
                continue
            for pair in qa_prompts.usable(answer["text"], answer["kind"] == "cut", result.count):
                row = item.cells | {"question": pair.question, "answer": pair.answer}
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


# --- what is asked about ----------------------------------------------------------------------------------------------


def _read(source: Path, result: Result) -> Iterator[tuple[int, dict]]:
    if not source.is_file():
        raise RowError(source, 0, "there is no such table", "give cases.jsonl, or JSON of rad3d_caption")
    if source.suffix == ".jsonl":
        return layouts.read_lines(source, result)
    return layouts.read("rad3d_caption", source, result)[1]


def case_requests(source: Path, options: dict, result: Result) -> Iterator[Asked]:
    """One request for each sentence of a case that refers to figures."""
    for number, case in _read(source, result):
        try:
            paper, told = case["paper"], case["sentences"]
            captions: dict[str, str] = case["captions"]
            named = [(s["text"], s["section"], s["img_ref"]) for s in told]
        except (KeyError, TypeError) as error:
            result.problem(source, number, f"is no case of pmc-inline: {error}", "run pmc-inline --cases anew")
            continue
        result.count("case reports")
        for k, (text, section, pictures) in enumerate(named):
            if not pictures or (section and _AFTERWARDS.search(section) and not _CASE_SECTION.search(section)):
                continue
            shown = [p for p in pictures if options["all_figures"] or _is_radiologic(captions.get(p, ""), text)]
            if not shown:
                result.count("sentences whose figures are not radiologic")
                continue
            said = [f"Caption: {captions[p]}" for p in shown if captions.get(p)]
            result.count("sentences with figures")
            yield Asked(
                "\n".join([f"Sentence: {text}", *dict.fromkeys(said)]),
                {"PMC_id": paper, "img_ref": str(shown), "context": background(named[:k])},
            )


def _is_radiologic(caption: str, sentence: str) -> bool:
    judged = radiology.by_caption(caption)
    return bool(judged) if judged is not None else radiology.by_caption(sentence) is True


def background(before: list[tuple[str, str, list[str]]]) -> str:
    """What was told of the patient before a sentence, without the sentences that speak of figures: those would give
    answers away."""
    told = [
        text for text, section, pictures in before
        if not pictures and not re.search(r"\bfig(?:ure)?s?\b", text, re.I)
        and not (section and _AFTERWARDS.search(section) and not _CASE_SECTION.search(section))
    ]  # fmt: skip
    return " ".join(told[:BACKGROUND])


def caption_requests(source: Path, options: dict, result: Result) -> Iterator[Asked]:
    """One request for each case with findings or an impression."""
    for number, row in _read(source, result):
        parts = {name: row.get(name) for name in ("finding", "impression")}
        said = {k: " ".join(v) if isinstance(v, list) else v for k, v in parts.items() if v}
        if not said or not isinstance(row["npy_path"], str) or not all(isinstance(v, str) for v in said.values()):
            result.problem(source, number, "finding and impression are blank or no text", "correct or remove the row")
            continue
        titles = {"finding": "Findings", "impression": "Impression"}
        yield Asked(
            " ".join(f"{titles[name]}: {text.strip()}" for name, text in said.items()), {"image_path": row["npy_path"]}
        )
