"""Command line of `python -m input_pipeline.phantoms --out DIR`: write the practice data."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from input_pipeline.console import SafeConsole, argument_parser, print_error
from input_pipeline.phantoms.writing import write

DESCRIPTION = """\
Write labelled practice scans: X-ray, CT, MRI and ultrasound with no, one or two round lesions, as PNG, JPEG, DICOM and
NIfTI, with tables in the formats of RadFM's data. Every answer is visible in the image: the modality, whether there is
a lesion, on which side, in which half, how big, how many. The scans are synthetic and show no patient.
"""
EPILOG = """\
examples:
  python -m input_pipeline.phantoms --out practice                          # 3,950 scans
  python -m input_pipeline.phantoms --out tiny --train 40 --test 20 --validation 0   # one of each format
  python -m input_pipeline.phantoms --out large --train 20000 --test 1400   # 420 solitary lesions to score on

The same arguments give the same bytes (with the package versions listed in phantoms.json). The splits share no
phantom, and a larger data set starts with the scans of a smaller one. DIR is created when it is complete; if it exists,
its files are checked. Three in ten scans have a solitary lesion; only these have questions about side, level and size.
docs/phantoms.md has images, statistics, and the tests against shortcuts.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser("phantoms", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="directory to create")
    add("--train", type=int, default=3000, metavar="N", help="training scans (%(default)s)")
    add("--validation", type=int, default=150, metavar="N", help="validation scans (%(default)s)")
    add("--test", type=int, default=800, metavar="N", help="test scans (%(default)s)")
    add("--seed", type=int, default=0, help="random seed of the data set (%(default)s)")
    add("--size", type=int, default=128, help="rows and columns of a scan (%(default)s)")
    add("--volumes", type=float, default=0.12, metavar="SHARE", help="share of 3D scans, 0 to 0.5 (%(default)s)")
    add("--workers", type=int, metavar="N", help="processes (default: all cores)")
    args = parser.parse_args(argv)

    console = SafeConsole(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("drawing scans", total=args.train + args.validation + args.test)
            summary = write(**vars(args), progress=lambda n: bar.advance(task, n))
    except (ValueError, OSError) as error:
        print_error(console, error)
        return 2
    SafeConsole().print(summary_table(summary))
    state = "written" if summary["written"] else "already complete, all checksums agree"
    print(f"{args.out}: {summary['files']} files, {state} ({time.perf_counter() - start:.0f} s)")
    return 0


def summary_table(summary: dict) -> Table:
    """Return the counts of both splits, one line per value."""
    table = Table(title="Practice data")
    for heading in ("", "", *summary["counts"]):
        table.add_column(heading, justify="right" if heading else "left")
    splits = list(summary["counts"].values())
    for group in splits[0]:
        values = dict.fromkeys(value for split in splits for value in split[group])
        for k, value in enumerate(values):
            counts = (str(split[group].get(value, 0)) for split in splits)
            table.add_row(group if k == 0 else "", value, *counts, end_section=k == len(values) - 1)
    return table


if __name__ == "__main__":
    sys.exit(main())
