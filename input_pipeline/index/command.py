"""`python -m input_pipeline.prepare --config=FILE --out DIR`: read everything once, write the index."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from input_pipeline import command_line
from input_pipeline.config import DataConfig
from input_pipeline.index import summary
from input_pipeline.index.prepare import Refused, prepare
from input_pipeline.parallel import beam
from input_pipeline.parallel.workers import WorkerError

DESCRIPTION = """\
Read every row and every scan that data.train and data.test of a config name, once and whole, and write down what
training needs to know: the index. What cannot be used is left out and listed with its reason and what to do about it.
"""
EPILOG = """\
what is written to DIR:
  index.json, scans.parquet, rows.parquet   the index; put DIR into data.index of the config
  quarantine.jsonl                          every bad row and scan: file, row, reason, remedy
  cut.jsonl                                 rows of which text or scans are left out, as they are too long
  leaks.jsonl                               studies and scans that stand in train and in test
  duplicates.jsonl                          rows of equal content, scans of equal bytes (they are kept)
  summary.txt, summary.json, summary.png    counts by data set, split, task, modality, depth, length
  records/                                  with --records: every scan at its final size, ready for training

examples:
  python -m input_pipeline.prepare --config=configs/quickstart.py --out practice/index
  python -m input_pipeline.prepare --config=my.py --out index --records --config.data.storage=int16
  python -m input_pipeline.prepare --config=my.py --out index --strict      # fails if anything is in quarantine
  python -m input_pipeline.prepare --config=my.py --out /shared/index --runner flink \\
      --runner-option=--flink_master=host:8081

Ended in the middle, the same command goes on where it was. Run again later, only files whose size or time has changed
are read; --recheck reads all of them. The result depends neither on --workers nor on --runner.

With --runner the scans, most of the work, are read by Apache Beam's workers, which must see the data and DIR under the
same paths; tables and texts are read here, as always.

exit codes: 0 the index is there; 1 everything was read, but a leak (or, with --strict, the quarantine) stands against
it: the reports are there, index.json is not; 2 the config or a table cannot be used, or too many files crash their
reader; 130 interrupted.
"""


class Rate(ProgressColumn):
    """scans/s, rows/s."""

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text("" if speed is None or task.total is None else f"{speed:,.0f} {unit}/s", style="cyan")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m input_pipeline.prepare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --config.x is cut out by its beginning
    )
    command_line.add_config(parser)
    parser.add_argument("--out", metavar="DIR", help="directory of the index (default: data.index of the config)")
    parser.add_argument(
        "--records", action="store_true", help="also write the scans at their final size, as data.records reads them"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores; 0: none of its own)")
    beam.add_options(parser)
    parser.add_argument("--strict", action="store_true", help="exit 1 if anything at all is in quarantine")
    parser.add_argument(
        "--allow-leaks", action="store_true", help="write the index although train and test share studies or scans"
    )
    parser.add_argument("--recheck", action="store_true", help="read every file again, as if DIR were empty")
    argv = sys.argv[1:] if argv is None else argv
    args, config = command_line.parse(parser, argv)
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers {args.workers}: 0 or more are needed")

    console = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[bad]}"),
        console=console,
    )
    refused: list[str] = []
    try:
        data = DataConfig.from_dict(config.data if "data" in config else {})
        out = args.out or data.index
        if not out:
            raise ValueError("name the directory of the index: --out DIR")
        if args.records:
            # While TFDS is imported it puts an import function of its own in place, which ends the thread of the bars.
            importlib.import_module("input_pipeline.index.records")
        with bars:
            report = prepare(
                data,
                out,
                records=args.records,
                workers=args.workers,
                **beam.chosen(args),
                recheck=args.recheck,
                strict=args.strict,
                allow_leaks=args.allow_leaks,
                progress=lambda what, unit, total: _bar(bars, what, unit, total),
                said=lambda what: console.print(f"[yellow]in quarantine:[/yellow] {escape(what)}", soft_wrap=True),
            )
    except Refused as error:
        refused, report = error.reasons, error.report
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it was")
        return 130
    except (ValueError, OSError, WorkerError) as error:
        console.print(f"[red]error:[/red] {escape(_one_line(error))}", soft_wrap=True, highlight=False)
        return 2
    output = Console(width=None if sys.stdout.isatty() else 120)
    output.print(summary.render(report))
    listed = ["summary.txt", "summary.png", *(["quarantine.jsonl"] if report["quarantine"] else [])]
    print(f"{'Reports' if refused else 'Index'} in {out}: {', '.join(listed)}")
    for reason in refused:
        more = " (correct the tables, or add --allow-leaks)" if reason.startswith("train and test share") else ""
        console.print(f"[red]error:[/red] {escape(reason)}{more}", soft_wrap=True, highlight=False)
    if refused:
        return 1
    command = [f"--config={args.config}", *(a for a in argv if a.startswith("--config."))]
    if not data.index or Path(data.index).absolute() != Path(out).absolute():
        command = [c for c in command if not c.startswith("--config.data.index=")]
        command.append(f"--config.data.index={out}")
    command.append(f"--out {shlex.quote(str(out))}_pictures")
    quoted = " ".join(c if c.startswith("--out") else shlex.quote(c) for c in command)
    print(f"Look at what the model will see:  python -m input_pipeline.inspect {quoted}")
    return 0


def _bar(bars: Progress, what: str, unit: str, total: int | None):
    task = bars.add_task(what, total=total, unit=unit, bad="")
    count = {"bad": 0}

    def done(more: int, bad: int) -> None:
        count["bad"] += bad
        said = f"{count['bad']:,} bad" if count["bad"] else ""
        if total is None:
            bars.update(task, total=more, completed=more, bad=said)
        else:
            bars.update(task, advance=more, bad=said)

    return done


def _one_line(error: BaseException) -> str:
    """The message, with the notes that say where, and without tracebacks of workers."""
    if isinstance(error, OSError) and error.filename:
        said = f"{error.filename}: {error.strerror}"
    else:
        said = str(error).strip() or type(error).__name__
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    return " ".join(" ".join([said, *(f"({note})" for note in notes)]).split())
