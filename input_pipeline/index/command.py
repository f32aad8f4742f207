"""Command line of `python -m input_pipeline.prepare --config=FILE --out DIR`."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from functools import partial
from pathlib import Path

from rich.markup import escape

from input_pipeline import command_line
from input_pipeline.config import DataConfig
from input_pipeline.console import SafeConsole, add_bar, argument_parser, print_error, progress_bars, stdout_console
from input_pipeline.field_rules import errors_of
from input_pipeline.index import summary
from input_pipeline.index.prepare import Refused, prepare
from input_pipeline.parallel import beam
from input_pipeline.parallel.workers import WorkerError
from input_pipeline.sources import describe_terms

DESCRIPTION = """\
Read and check every row and every scan that data.train, data.validation and data.test of a config name, and write the
index, which is what training reads. Rows and scans that cannot be used are skipped and listed, each with its reason and
a remedy.
"""
EPILOG = """\
files written to DIR:
  index.json, scans.parquet, rows.parquet   the index; set data.index of the config to DIR
  quarantine.jsonl                          every bad row and scan: file, row, reason, remedy
  notices.jsonl                             usable scans with doubtful contrast, shape or metadata
  cut.jsonl                                 rows with text or scans cut because they are too long
  leaks.jsonl                               studies and scans that are in several splits
  duplicates.jsonl                          rows with equal content, scans with equal bytes (they are kept)
  summary.txt, summary.json, summary.png    counts by data set, split, task, modality, depth, length
  records/                                  with --records: every scan at its final size, ready for training

examples:
  python -m input_pipeline.prepare --config=configs/quickstart.py --out practice/index
  python -m input_pipeline.prepare --config=my.py --out index --records --config.data.storage=int16
  python -m input_pipeline.prepare --config=my.py --out index --strict      # fails if anything is in quarantine
  python -m input_pipeline.prepare --config=my.py --out /shared/index --runner flink \\
      --runner-option=--flink_master=host:8081

Run the same command again to resume an interrupted run. A later run reads only files whose size or time has changed,
and nothing at all if no file, option or package has changed. --recheck reads all of them. The result depends neither
on --workers nor on --runner.

With --runner, Apache Beam's workers read the scans, which is most of the work. They must see the data and DIR under
the same paths. Tables and texts are always read locally.

exit codes:
  0    the index was written
  1    all data was read and the reports were written, but no index.json, because of a leak or (with --strict) the
       quarantine
  2    the config or a table cannot be used, or too many files crash their reader
  130  interrupted
"""


def _parser() -> argparse.ArgumentParser:
    # No abbreviations, because command_line.parse handles --config.x by its prefix.
    parser = argument_parser("prepare", DESCRIPTION, EPILOG, allow_abbrev=False)
    command_line.add_config(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", help="directory of the index (default: data.index of the config)")
    add("--records", action="store_true", help="also write the scans at their final size, for data.records")
    add("--workers", type=int, metavar="N", help="processes (default: all cores; 0: run in this process)")
    beam.add_options(parser)
    add("--strict", action="store_true", help="exit 1 if anything is in quarantine")
    add("--allow-leaks", action="store_true", help="write the index although splits share studies or scans")
    add("--recheck", action="store_true", help="read every file again, as if DIR were empty")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    args, config = command_line.parse(parser, argv)
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers must be 0 or more (got {args.workers})")

    console = SafeConsole(stderr=True)
    bars = progress_bars(console)
    refused: list[str] = []
    try:
        with errors_of(args.config):
            data = DataConfig.from_dict(config.data if "data" in config else {})
        out = args.out or data.index
        if not out:
            raise ValueError("name the directory of the index: --out DIR")
        if args.records:
            # Import TFDS before the progress bars start. Its import replaces `__import__`, which ends their thread.
            importlib.import_module("input_pipeline.index.records")
        options = {name: getattr(args, name) for name in ("records", "workers", "recheck", "strict", "allow_leaks")}
        warn = lambda message: console.print(f"[yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)  # noqa: E731
        with bars:
            report = prepare(
                data, out, **options, **beam.runner_arguments(args), progress=partial(add_bar, bars), log=warn
            )
    except Refused as error:
        refused, report = error.reasons, error.report
    except KeyboardInterrupt:
        console.print("interrupted: run the same command to resume")
        return 130
    except (ValueError, OSError, WorkerError) as error:
        print_error(console, error)
        return 2
    stdout_console().print(summary.render(report))
    stdout_console().print(describe_terms(data.terms, data.umls_types), soft_wrap=True, markup=False)
    files = ["summary.txt", "summary.png", *(["quarantine.jsonl"] if report["quarantine"] else [])]
    print(f"{'Reports' if refused else 'Index'} in {out}: {', '.join(files)}")
    for reason in refused:
        remedy = " (correct the tables, or add --allow-leaks)" if reason.startswith("the splits share") else ""
        print_error(console, reason + remedy)
    if refused:
        return 1
    print(f"Inspect the model's inputs:  {_inspect_command(args.config, argv, data.index, out)}")
    return 0


def _inspect_command(config_file: str, argv: list[str], index: str | None, out: str) -> str:
    """Return the `input_pipeline.inspect` command for the new index."""
    options = [f"--config={config_file}", *(a for a in argv if a.startswith("--config."))]
    if not index or Path(index).absolute() != Path(out).absolute():
        options = [option for option in options if not option.startswith("--config.data.index=")]
        options.append(f"--config.data.index={out}")
    quoted = " ".join(map(shlex.quote, options))
    return f"python -m input_pipeline.inspect {quoted} --out {shlex.quote(str(out))}_pictures"
