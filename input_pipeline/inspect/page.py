"""The HTML page (page.html): one file with its images and style, no scripts, and nothing to download.

Jinja passes every value through `escaping.visible`, so no text of a data set can become markup.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from input_pipeline.inspect.escaping import POLICY, spaced, visible
from input_pipeline.inspect.images import ScanView
from input_pipeline.inspect.sampling import Overview
from input_pipeline.inspect.views import RowView
from input_pipeline.samples import TASKS

GENERATOR = "input_pipeline.inspect"
FOLDER = Path(__file__).parent


def page(head: Overview, rows: Sequence[RowView]) -> str:
    """Return the HTML of the page."""
    shares = {name: value for name, value in head.packing.items() if name.split(":")[0] in ("real tokens", "padding")}
    starts = [0.0, *itertools.accumulate(shares.values())]
    warnings = []
    for number, row in enumerate(rows):
        warnings += [(number, None, warning) for warning in row.warnings]
        warnings += [(number, sample.number, warning) for sample in row.samples for warning in sample.warnings]
    template = _environment().get_template("page.html")
    return template.render(
        generator=GENERATOR,
        policy=Markup(POLICY),
        style=Markup((FOLDER / "style.css").read_text()),
        tasks=TASKS,
        head=head,
        rows=rows,
        warnings=warnings,
        shares=list(zip(shares, starts, shares.values(), strict=False)),
        packing=[(name, _number(name, value, shares)) for name, value in head.packing.items()],
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(visible(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "fmt": format,
        "spaced": lambda text: Markup(spaced(text)),
        "plural": lambda n, noun: f"{n} {noun}" + ("" if n == 1 else "es" if noun.endswith("ch") else "s"),
        "task": lambda task: f"task-{task}" if task in TASKS else "task-other",
        # The golden angle gives neighbouring slots different hues for any number of slots.
        "hue": lambda slot: f"--hue:{slot * 137.508 % 360:.0f}",
        "size": _size,
        "shown_by": lambda scan: f", {_size(scan)}, shown by sample {', '.join(map(str, scan.samples)) or 'none'}",
        "by_slot": lambda scans: {scan.slot: scan for scan in scans},
    }
    return environment


def _size(scan: ScanView) -> str:
    return " × ".join(map(str, scan.shape)) + " voxels"


def _number(name: str, value: float, shares: dict[str, float]) -> str:
    return f"{value:.1%}" if name in shares else f"{value:,.1f}" if name.endswith("a row") else f"{value:,}"
