"""The options of `radbench --endpoint`, the confirmation of its costs, and the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from input_pipeline.curate import llm
from radfm_jax import terminal
from radfm_jax.evaluate import endpoint, montage
from radfm_jax.evaluate.radbench import Question


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model at an endpoint."""
    group = parser.add_argument_group("a model behind an OpenAI-compatible endpoint")
    add = group.add_argument
    add("--endpoint", metavar="URL", help="for instance http://localhost:8000/v1 of vLLM; needs --model")
    add("--model", metavar="NAME", help="name of the model at the endpoint")
    add("--allow-remote", action="store_true", help="permit an endpoint on another machine, which receives the images "
        "and texts of all questions")  # fmt: skip
    add("--key-variable", metavar="NAME", help="environment variable with the API key (default: OPENAI_API_KEY for a "
        "remote endpoint, none for a local one); the key is never recorded")  # fmt: skip
    add("--yes", action="store_true", help="do not ask for confirmation of the costs; required without a terminal")
    add("--limit", type=int, metavar="N", help="send at most N requests in this run; the next run continues")
    numbers = (
        ("--concurrency", int, 8, "maximum number of concurrent requests"),
        ("--per-minute", float, 0.0, "maximum number of requests per minute; 0: no limit"),
        ("--timeout", float, 120.0, "seconds for one request"),
        ("--retries", int, 6, "retries of a request"),
        ("--price-in", float, 0.0, "price of a million tokens sent"),
        ("--price-out", float, 0.0, "price of a million tokens received"),
        ("--budget", float, 0.0, "stop after this cost; 0: no limit"),
        ("--grid", int, 4, "tiles per side of the montage of a volume"),
        ("--image-size", int, 1024, "maximum number of pixels per side of an image"),
    )
    for name, kind, default, text in numbers:
        add(name, type=kind, default=default, metavar="N", help=f"{text} (default: {default:g})")
    add("--image-tokens", type=int, metavar="N", help="tokens per image, for the estimate (default: GPT-4o's rule)")
    add("--temperature", default="0", metavar="T", help="temperature; `none` for models that reject it (default: 0)")
    add("--max-tokens-name", default="max_tokens", metavar="NAME", help="parameter for the length limit, "
        "max_completion_tokens for newer models (default: max_tokens)")  # fmt: skip
    add("--system", default=endpoint.SYSTEM, metavar="TEXT", help="system message; '' for none (default: %(default)s)")
    add("--no-choices", action="store_true", help="do not name the choices of closed questions")
    add("--montages", type=Path, metavar="DIR", help="write the images that the endpoint receives, and exit")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program for invalid combinations of options."""
    if args.endpoint and not args.model:
        parser.error("--endpoint needs --model NAME")
    if args.model and not args.endpoint:
        parser.error("--model needs --endpoint URL")
    if args.budget and not (args.price_in or args.price_out):
        parser.error("--budget needs --price-in and --price-out")
    least = {"limit": 1, "concurrency": 1, "per_minute": 0, "retries": 0, "price_in": 0, "price_out": 0, "budget": 0}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum} (got {value})")
    if not args.timeout > 0:
        parser.error(f"--timeout must be above 0 (got {args.timeout})")


def layout(args: argparse.Namespace) -> montage.Layout:
    return montage.Layout(args.grid, args.image_size)


def baseline(args: argparse.Namespace) -> endpoint.Baseline:
    """Return the `Baseline` that the options describe.

    Raises ValueError for a remote endpoint without --allow-remote, a missing key, or an invalid number.
    """
    local = endpoint.is_loopback(args.endpoint)
    if not local and not args.allow_remote:
        raise ValueError(
            f"{args.endpoint} is not on this machine: it would receive the images and texts of all questions. Add "
            "--allow-remote if the terms of every data set and your institution permit that"
        )
    variable = args.key_variable
    if variable is None:
        variable = "" if local else "OPENAI_API_KEY"
    try:
        temperature = None if args.temperature == "none" else float(args.temperature)
    except ValueError:
        raise ValueError(f"--temperature must be a number or none (got {args.temperature!r})") from None
    names = ("concurrency", "per_minute", "timeout", "retries", "price_in", "price_out", "budget", "max_tokens_name")
    made = llm.Endpoint(
        args.endpoint.rstrip("/"), args.model, variable, temperature=temperature, direct=local,
        max_tokens=args.max_new_tokens or 200, **{name: getattr(args, name) for name in names},
    )  # fmt: skip
    made.key()
    return endpoint.Baseline(made, layout(args), args.system, not args.no_choices)


def answer(args: argparse.Namespace, made: endpoint.Baseline, questions: Sequence[Question], file: Path) -> bool:
    """Show the costs, send the requests, and return whether all questions were tried.

    Raises ValueError if the costs are not confirmed, and llm.Stop if the run cannot continue.
    """
    answers = endpoint.EndpointAnswers(made, questions, file)
    todo = answers.unanswered()
    limited = todo[: args.limit] if args.limit else todo
    if limited:
        _confirm(args, answers, limited)
        with terminal.answer_progress(every=50) as progress:
            counts = [0, 0]

            def done(more: int, bad: int) -> None:
                counts[0] += more - bad
                counts[1] += bad
                progress(*counts, len(limited))

            sent = answers.ask(args.limit, done)
        for label, value in sent.to_dict(made.endpoint).items():
            terminal.message(f"{label}: {value}")
    else:
        answers.write()
    waiting = len(answers.unanswered()) - len(answers.failures)
    if args.limit and waiting > 0:
        terminal.message(
            f"{waiting:,} of {len(questions):,} questions have no answer yet: run the same command again; scores "
            "follow when all are answered"
        )
    return not args.limit or waiting <= 0


def _confirm(args: argparse.Namespace, answers: endpoint.EndpointAnswers, questions: Sequence[Question]) -> None:
    for label, value in answers.estimate(questions, args.image_tokens).items():
        terminal.message(f"{label}: {value}")
    where = "this machine" if endpoint.is_loopback(args.endpoint) else "another machine"
    terminal.message(f"The images and texts of these questions are sent to {args.endpoint} ({where}).")
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("nothing was sent: add --yes to send the requests")
    if input("Send them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was sent")
