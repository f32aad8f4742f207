"""The series of a study as a table for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from input_pipeline.images.scans.study.survey import Series, Study

HEADINGS = ("series", "description", "modality", "plane", "size", "slices", "spacing in mm", "notes")
NUMERIC = ("size", "slices", "spacing in mm")


def spacing_text(series: Series) -> str:
    """Return "0.7 x 0.7 x 1.25"; "?" where a distance is unknown, and "" if all are."""
    known = series.spacing_mm if series.slices > 1 else series.spacing_mm[:2]
    return "" if set(known) == {None} else " x ".join("?" if mm is None else f"{mm:.3g}" for mm in known)


def notes(series: Series) -> list[str]:
    """Return what distinguishes a series, and why it is not read."""
    burned_in = "burned-in annotation" if series.burned_in else ""
    return [text for text in (series.label, series.aside, burned_in) if text]


def cells(series: Series) -> list[str]:
    """Return the texts of a series under HEADINGS."""
    slices = str(series.slices) + (f", {len(series.volumes)} times" if len(series.volumes) > 1 else "")
    size = f"{series.rows} x {series.columns}"
    facts = [series.key, series.description, series.modality, series.plane, size, slices]
    return [*facts, spacing_text(series), "; ".join(notes(series))]


def print_report(console: Console, study: Study, chosen: Sequence[Series]) -> None:
    """Print the table, and what was set aside."""
    table = Table(title=f"{len(chosen)} series in {study.files:,} files")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in NUMERIC else "left", overflow="fold")
    for series in chosen:
        style = "dim" if series.aside else "red" if series.problem else ""
        table.add_row(*map(escape, cells(series)), style=style)
    console.print(table)
    for series in chosen:
        if series.problem:
            console.print(f"[red]series {series.key} cannot be read:[/red] {escape(series.problem)}", highlight=False)
    for entry in study.set_aside:
        names = ", ".join(entry.names[:3]) + (", ..." if entry.files > 3 else "")
        files = f"{entry.files:,} file{'s' * (entry.files != 1)}"
        console.print(f"set aside {files}: {escape(entry.reason)} ({escape(names)})", highlight=False)
    for name, reason in study.refused:
        console.print(f"[red]may be a slice, but cannot be read:[/red] {escape(f'{name} {reason}')}", highlight=False)


def series_dict(series: Series) -> dict:
    """Return the properties of a series as JSON values, without file names."""
    return {
        "series": series.key,
        "description": series.description,
        "modality": series.modality,
        "plane": series.plane,
        "label": series.label,
        "rows": series.rows,
        "columns": series.columns,
        "slices": series.slices,
        "volumes": len(series.volumes),
        "spacing_mm": list(series.spacing_mm),
        "set_aside": series.aside,
        "burned_in_annotation": series.burned_in,
        "readable": not series.problem,
    }


def as_dict(study: Study, chosen: Sequence[Series]) -> dict:
    """Return the report as JSON values, without file names."""
    return {
        "files": study.files,
        "series": [series_dict(series) for series in chosen],
        "set_aside": [{"reason": entry.reason, "files": entry.files} for entry in study.set_aside],
        "unreadable_files": len(study.refused),
    }
