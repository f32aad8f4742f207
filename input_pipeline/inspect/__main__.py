"""`python -m input_pipeline.inspect --config=configs/x.py --out DIR`: what the model will see, as a page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from input_pipeline import command_line
from input_pipeline.config import SPLITS, DataConfig
from input_pipeline.files import make_directory
from input_pipeline.inspect.facts import RowView
from input_pipeline.inspect.look import Head, look
from input_pipeline.inspect.page import GENERATOR, page
from input_pipeline.parallel.workers import WorkerError

DESCRIPTION = """\
Write a page that shows what the model will see: packed rows as bars, each sample's scans as pictures and its text token
by token, coloured by its weight in the loss. Rows come from the pipeline that training uses, and everything on the page
is taken from the arrays that a training step gets, not from the files.
"""
EPILOG = """\
examples:
  python -m input_pipeline.inspect --config=configs/quickstart.py --out pictures
  python -m input_pipeline.inspect --config=configs/quickstart.py --out test_pictures --split test --rows 2
  python -m input_pipeline.inspect --config=configs/quickstart.py --out later --epoch 3 --config.data.text_length=1024

DIR/index.html opens in any browser, from the disk; DIR/rows.json has the same facts without the pictures. Both hold
text and pictures of the data set: treat them as you treat the data. What to look for:
  - the red box at the top: constant scans, samples without a weight, scans that could not be loaded
  - blue and orange text is what the model learns to say; orange weighs three times (medical terms)
  - grey in the bars is padding; its cause stands below the row

The index that the config names must be there: python -m input_pipeline.prepare --config=FILE --out DIR.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m input_pipeline.inspect",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_config(parser)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="for index.html and rows.json")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which tables (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="the first N rows of the epoch (%(default)s)")
    parser.add_argument(
        "--epoch", type=int, default=0, metavar="E", help="order, prompts and crops of it (%(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="instead of data.seed")
    parser.add_argument("--workers", type=int, metavar="N", help="instead of data.workers; 0: this process alone")
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    for name, least in (("rows", 1), ("epoch", 0), ("seed", 0), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: at least {least} is needed")
    if "data" not in config:
        parser.error(f"{args.config}: the config has no group `data`")

    console = Console(stderr=True)
    try:
        changes = {name: getattr(args, name) for name in ("seed", "workers") if getattr(args, name) is not None}
        data = dataclasses.replace(DataConfig.from_dict(config.data), **changes)
        _refuse_foreign(args.out)
        with console.status("planning the first window"):
            head, rows = look(data, args.split, args.rows, args.epoch, args.config)
        _write(args.out, head, rows)
    except (ValueError, OSError, WorkerError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    warnings = sum(len(row.warnings) + sum(len(s.warnings) for s in row.samples) for row in rows)
    samples, scans = sum(len(row.samples) for row in rows), sum(len(row.scans) for row in rows)
    print(
        f"{args.out / 'index.html'}: {len(rows)} rows, {samples} samples, {scans} scans, "
        f"{head.packing['real tokens']:.1%} of the places hold tokens, {warnings} warnings"
    )
    return 0


def _refuse_foreign(out: Path) -> None:
    """ValueError if writing would replace what this command has not written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no directory: choose another --out")
    own = f'<meta name="generator" content="{GENERATOR}">'
    there = [out / name for name in ("index.html", "rows.json") if (out / name).exists()]
    if there and not (there[0].name == "index.html" and own in there[0].read_text(errors="replace")[:400]):
        raise ValueError(f"{there[0]} is not of this command and would be replaced: choose another --out")


def _write(out: Path, head: Head, rows: list[RowView]) -> None:
    """rows.json, then index.html; each appears whole."""
    make_directory(out)
    facts = {"head": dataclasses.asdict(head), "rows": [row.as_dict() for row in rows]}
    for name, text in (("rows.json", json.dumps(facts, indent=1)), ("index.html", page(head, rows))):
        part = out / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)


if __name__ == "__main__":
    sys.exit(main())
