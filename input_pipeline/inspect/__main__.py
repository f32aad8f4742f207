"""`python -m input_pipeline.inspect --config=configs/x.py --out DIR`: write a page that shows what the model sees."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from input_pipeline import command_line
from input_pipeline.config import SPLITS, DataConfig
from input_pipeline.console import SafeConsole, argument_parser, print_error
from input_pipeline.field_rules import errors_of
from input_pipeline.files import make_directory, write_text
from input_pipeline.inspect.page import GENERATOR, page
from input_pipeline.inspect.sampling import first_rows
from input_pipeline.parallel.workers import WorkerError

DESCRIPTION = """\
Write a page that shows what the model sees: packed rows as bars, each sample's scans as images, and its text token by
token, coloured by weight in the loss. Rows come from the pipeline that training uses. Images and text are taken from
the arrays of a training step, not from the files; warnings about a scan's contrast are those of `prepare`.
"""
EPILOG = """\
examples:
  python -m input_pipeline.inspect --config=configs/quickstart.py --out pictures
  python -m input_pipeline.inspect --config=configs/quickstart.py --out test_pictures --split test --rows 2
  python -m input_pipeline.inspect --config=configs/quickstart.py --out later --epoch 3 --config.data.text_length=1024

Open DIR/index.html in any browser. DIR/rows.json has the same content without the images. Both contain text and images
of the data set: protect them as you protect the data. What to check:
  - warnings, in the red box at the top: constant scans, lost contrast, samples without a weight, scans that could not
    be loaded
  - blue and orange text is what the model learns to generate; orange text (medical terms) has three times the weight
  - grey in the bars is padding; its cause is given below the row

The config's index must exist: python -m input_pipeline.prepare --config=FILE --out DIR.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argument_parser("inspect", DESCRIPTION, EPILOG)
    command_line.add_config(parser)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", type=Path, help="directory for index.html and rows.json")
    add("--split", choices=SPLITS, default="train", help="the split to show (%(default)s)")
    add("--rows", type=int, default=8, metavar="N", help="show the first N rows of the epoch (%(default)s)")
    add("--epoch", type=int, default=0, metavar="E", help="epoch, which decides order, prompts and crops (%(default)s)")
    add("--seed", type=int, metavar="S", help="overrides data.seed")
    add("--workers", type=int, metavar="N", help="overrides data.workers; 0 uses no workers")
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    for name, least in (("rows", 1), ("epoch", 0), ("seed", 0), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least} (got {value})")
    if "data" not in config:
        parser.error(f"{args.config}: the config has no `data` group")

    console = SafeConsole(stderr=True)
    try:
        overrides = {name: getattr(args, name) for name in ("seed", "workers") if getattr(args, name) is not None}
        with errors_of(args.config):
            data = dataclasses.replace(DataConfig.from_dict(config.data), **overrides)
        _check_output(args.out)
        with console.status("planning the first window"):
            head, rows = first_rows(data, args.split, args.rows, args.epoch, args.config)
        make_directory(args.out)
        content = {"head": dataclasses.asdict(head), "rows": [row.as_dict() for row in rows]}
        write_text(args.out / "rows.json", json.dumps(content, indent=1))
        write_text(args.out / "index.html", page(head, rows))
    except (ValueError, OSError, WorkerError) as error:
        print_error(console, error)
        return 2
    warnings = sum(len(row.warnings) + sum(len(s.warnings) for s in row.samples) for row in rows)
    samples, scans = sum(len(row.samples) for row in rows), sum(len(row.scans) for row in rows)
    print(
        f"{args.out / 'index.html'}: {len(rows)} rows, {samples} samples, {scans} scans, "
        f"{head.packing['real tokens']:.1%} of the positions hold tokens, {warnings} warnings"
    )
    return 0


def _check_output(out: Path) -> None:
    """Raise ValueError if `out` has an index.html or rows.json that this command did not write."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a directory: choose another --out")
    generator = f'<meta name="generator" content="{GENERATOR}">'
    existing = [out / name for name in ("index.html", "rows.json") if (out / name).exists()]
    if existing and (existing[0].suffix != ".html" or generator not in existing[0].read_text(errors="replace")[:400]):
        raise ValueError(f"{existing[0]} was not written by this command: choose another --out")


if __name__ == "__main__":
    sys.exit(main())
