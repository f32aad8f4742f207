"""`python -m input_pipeline.series STUDY`: list the series of a DICOM study."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TextColumn

from input_pipeline.console import SafeConsole, argument_parser, print_error, stdout_console
from input_pipeline.files import make_directory, write_text
from input_pipeline.images.scans.base import ScanError
from input_pipeline.images.scans.study.reading import OpenStudy, open_study
from input_pipeline.images.scans.study.selection import select
from input_pipeline.images.scans.study.survey import Series
from input_pipeline.series import nifti, page, report

DESCRIPTION = """\
List the image series of a DICOM study: a folder of any depth, a DICOMDIR, a zip or a tar (.gz). Files that are no scans
(reports, segmentations, presentation states, copies, ...) are counted with the reason. Localizers, secondary captures
and derived reformats are listed, but a scan path selects them by their number only.
"""
EPILOG = """\
examples:
  python -m input_pipeline.series study/                                  # the table
  python -m input_pipeline.series export.zip --html series.html           # a page with an image of each series
  python -m input_pipeline.series study/DICOMDIR --nifti out              # NIfTI and JSON of each series
  python -m input_pipeline.series study/ --series "axial lung" --nifti out
  python -m input_pipeline.series study/ --json | jq '.series[].series'

The first column is the number of a series. Two parts of one series that must not be mixed (echoes, magnitude and phase,
sizes, ...) are 3.1 and 3.2. To use a series:
  python -m radfm_jax.generate --checkpoint DIR --scan study/ --series 3.1 --prompt "..."
  {"scans": [{"path": "study/", "series": "axial lung"}], ...}            in a JSON Lines table

Words select the series that match all of them: a number, a modality (CT), a plane (axial, coronal, sagittal), words of
the description, or `largest`, the one with the most slices. A selection must match exactly one series.
A series of several times also needs the volume: --volume 0, or "volume": 0.

Only headers are read, except for --html and --nifti. No output has names, ids, dates or UIDs of a header. The table
names files that cannot be read. The description of a series is free text: look at it before you share an output.

exit codes:
  0    success
  1    a series could not be drawn or written; the others were
  2    invalid arguments, or a path that is no study
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argument_parser("series", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("study", metavar="STUDY", help="folder, DICOMDIR, zip or tar of DICOM files")
    add("--series", metavar="WORDS", help="only this series; by its number, also one that was set aside")
    add("--html", metavar="FILE", type=Path, help="write a page with an image of each series")
    add("--nifti", metavar="DIR", type=Path, help="write each volume as .nii.gz, with a .json of its properties")
    add("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    console = SafeConsole(stderr=True)
    try:
        with Progress(TextColumn("reading headers"), MofNCompleteColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            with open_study(args.study, advance=lambda count: bar.advance(task, count)) as opened:
                bar.stop()
                return run(args, opened, console)
    except (ValueError, OSError) as error:
        print_error(console, error)
        return 2


def run(args: argparse.Namespace, opened: OpenStudy, console: SafeConsole) -> int:
    """Print and write what the arguments request. Returns the exit code."""
    study = opened.study
    chosen = list(study.series) if args.series is None else [select(args.study, study, args.series)]
    if args.json:
        print(json.dumps(report.as_dict(study, chosen), indent=1, ensure_ascii=False))
    else:
        report.print_report(stdout_console(), study, chosen)
    failed = 0
    if args.html:
        make_directory(args.html.absolute().parent)
        views = [page.view(opened, series) for series in chosen]
        failed += sum(bool(view.error) for view in views)
        write_text(args.html, page.page(study, views))
        print(f"{args.html}: {len(views)} series", file=sys.stderr)
    if args.nifti:
        make_directory(args.nifti)
        for series in chosen:
            if args.series is not None or not series.aside:
                failed += not write_series(opened, series, args.nifti, console)
    return int(failed > 0)


def write_series(opened: OpenStudy, series: Series, directory: Path, console: SafeConsole) -> bool:
    """Write the volumes of a series. Returns whether all were written; an error is printed."""
    try:
        for file in nifti.write(opened, series, directory):
            print(file, file=sys.stderr)
    except ScanError as error:
        print_error(console, f"series {series.key} is not written: {error}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
