"""The HTML page: one file with its images and style, no scripts, and nothing to download.

All text of a data set goes through `visible` or `spaced` (escaping.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from input_pipeline.inspect.escaping import POLICY, spaced, visible
from input_pipeline.inspect.images import ScanView
from input_pipeline.inspect.sampling import Overview
from input_pipeline.inspect.tokens import Token
from input_pipeline.inspect.views import RowView, SampleView
from input_pipeline.samples import TASKS

GENERATOR = "input_pipeline.inspect"
STYLE = Path(__file__).with_name("style.css")


def page(head: Overview, rows: Sequence[RowView]) -> str:
    """Return the HTML of the page."""
    return "".join(f"{line}\n" for line in _page(head, rows))


def _page(head: Overview, rows: Sequence[RowView]) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta name="generator" content="{GENERATOR}">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>What the model sees: {visible(head.config)}, {visible(head.split)}</title>"
    yield f"<style>\n{STYLE.read_text()}</style>\n</head>\n<body>"
    yield from _head(head, rows)
    for number, row in enumerate(rows):
        yield from _row(number, row)
    yield '<p class="faint">Images show the values 0 to 1 as black to white; large images are JPEGs.</p>'
    yield "</body>\n</html>"


# --- head -------------------------------------------------------------------------------------------------------------


def _head(head: Overview, rows: Sequence[RowView]) -> Iterator[str]:
    yield "<header>\n<h1>What the model sees</h1>"
    augmentation = "with the crops and flips of training" if head.training else "without crops and flips"
    yield (
        f"<p><b>{visible(head.config)}</b>, split <b>{visible(head.split)}</b>, epoch <b>{head.epoch}</b>: "
        f"{_count(len(rows), 'row')} of {rows[0].length if rows else 0} positions, scans {augmentation}.</p>"
    )
    if len(rows) < head.asked:
        yield f'<p class="note">{head.asked} rows were requested; the epoch has only these.</p>'
    settings = " · ".join(f"{visible(name)} {visible(value)}" for name, value in head.settings.items())
    yield f'<p class="faint">{settings}</p>\n</header>'
    yield from _warnings(rows)
    yield "<table>\n<tr><th>source</th><th>family</th>"
    yield "".join(f'<th class="number">{name}</th>' for name in ("rows", "in quarantine", "samples an epoch", "share"))
    yield "</tr>"
    for source in head.sources:
        counts = f"{source.rows:,}", f"{source.quarantined:,}", f"{source.samples:,}", f"{source.share:.1%}"
        cells = "".join(f'<td class="number">{value}</td>' for value in counts)
        yield f"<tr><td>{visible(source.name)}</td><td>{visible(source.family)}</td>{cells}</tr>"
    yield "</table>"
    yield from _packing(head)
    yield from _legend()
    if rows:
        links = " ".join(f'<a href="#row-{n}">{n}</a>' for n in range(len(rows)))
        yield f'<p class="faint">Rows: {links}</p>'


def _packing(head: Overview) -> Iterator[str]:
    """Yield the packing report as a bar and a table."""
    shares = {name: value for name, value in head.packing.items() if name.split(":")[0] in ("real tokens", "padding")}
    yield '<div class="bar">'
    start = 0.0
    for name, share in shares.items():
        if share:
            css = "real" if name == "real tokens" else "padding"
            yield _piece(start, share, 1.0, css, f"{name}: {share:.1%}")
        start += share
    yield "</div>\n<table>"
    for name, value in head.packing.items():
        shown = f"{value:.1%}" if name in shares else f"{value:,.1f}" if name.endswith("a row") else f"{value:,}"
        yield f'<tr><td>{visible(name)}</td><td class="number">{shown}</td></tr>'
    for name, share in (("trained", head.trained), ("medical terms", head.terms)):
        yield f'<tr><td>of the real tokens: {name}</td><td class="number">{share:.1%}</td></tr>'
    yield "</table>"


def _legend() -> Iterator[str]:
    swatch = lambda css, name: f'<span><span class="swatch {css}"></span>{name}</span>'  # noqa: E731
    tasks = "".join(swatch(_task(task), task) for task in TASKS)
    yield f'<div class="legend"><b>Rows</b>{tasks}{swatch("hatched", "visual tokens")}'
    yield f"{swatch('padding', 'padding')}</div>"
    yield (
        '<div class="legend"><b>Text</b><span class="t w0">not trained on</span><span class="t w1">trained, weight 1'
        '</span><span class="t w3">trained, weight 3: a medical term</span><span>the colour is the weight of the '
        'predicted token</span><span><span class="sign">·</span> space, <span class="sign">↵</span> line break</span>'
        '<span class="chip">BOS</span><span class="chip w1">EOS</span></div>'
    )


def _warnings(rows: Sequence[RowView]) -> Iterator[str]:
    lines = []
    for number, row in enumerate(rows):
        lines += [f'<a href="#row-{number}">row {number}</a>: {visible(warning)}' for warning in row.warnings]
        for sample in row.samples:
            link = f'<a href="#row-{number}-sample-{sample.number}">row {number}, sample {sample.number}</a>'
            lines += [f"{link}: {visible(warning)}" for warning in sample.warnings]
    if lines:
        yield _box(_count(len(lines), "warning"), lines)


def _box(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<div class="warnings" role="alert"><h3>{title}</h3><ul>{items}</ul></div>'


# --- a row ------------------------------------------------------------------------------------------------------------


def _row(number: int, row: RowView) -> Iterator[str]:
    yield f'<section id="row-{number}">\n<h2>Row {number}</h2>'
    yield (
        f'<p class="faint">epoch {row.epoch}, window {row.window}, row {row.row} · '
        f"{row.tokens} of {row.length} positions ({row.tokens / row.length:.1%}) · "
        f"{_count(len(row.samples), 'sample')} · {_count(len(row.scans), 'scan')}</p>"
    )
    yield '<div class="bar">'
    for sample in row.samples:
        title = (
            f"sample {sample.number}: {sample.source} {sample.row_id}, {sample.task}, {sample.places} tokens, "
            f"{sample.visual} of them visual"
        )
        yield _piece(sample.place, sample.places, row.length, _task(sample.task), title)
    for first, length in row.latents:
        yield _piece(first, length, row.length, "hatched", "")
    empty = row.length - row.tokens
    if empty:
        yield _piece(row.tokens, empty, row.length, "padding", f"padding, {empty} positions: {row.padding}")
    yield "</div>"
    if empty:
        yield f'<p class="faint">Padding: {_count(empty, "position")}, {visible(row.padding or "cause unknown")}.</p>'
    owners = {scan.slot: scan for scan in row.scans}
    for vision_row, runs in enumerate(row.vision):
        yield '<div class="bar vision">'
        for slot, first, patches in runs:
            title = f"vision row {vision_row}, slot {slot}: {patches} patches"
            if slot in owners:
                shown = ", ".join(map(str, owners[slot].samples)) or "none"
                title += f", {_size(owners[slot])}, shown by sample {shown}"
            yield _piece(first, patches, row.vision_length, "slot", title, _hue(slot))
        free = row.vision_length - sum(patches for *_, patches in runs)
        if free:
            title = f"vision row {vision_row}: {free} of {row.vision_length} patches free"
            yield _piece(row.vision_length - free, free, row.vision_length, "padding", title)
        yield "</div>"
    if row.warnings:
        yield _box("In this row", [visible(warning) for warning in row.warnings])
    for sample in row.samples:
        yield from _sample(number, sample, owners)
    yield "</section>"


def _piece(first: float, length: float, total: float, css: str, title: str, style: str = "") -> str:
    label = f' title="{visible(title)}"' if title else ""
    position = f"left:{first / total:.4%};width:{length / total:.4%}"
    return f'<i class="{css}" style="{position}{";" if style else ""}{style}"{label}></i>'


def _task(task: str) -> str:
    return f"task-{task}" if task in TASKS else "task-other"


def _hue(slot: int) -> str:
    # The golden angle gives neighbouring slots different hues for any number of slots.
    return f"--hue:{slot * 137.508 % 360:.0f}"


def _size(scan: ScanView) -> str:
    return " × ".join(map(str, scan.shape)) + " voxels"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "es" if noun.endswith("ch") else "s")


# --- a sample ---------------------------------------------------------------------------------------------------------


def _sample(row: int, sample: SampleView, scans: dict[int, ScanView]) -> Iterator[str]:
    yield f'<article class="sample" id="row-{row}-sample-{sample.number}">'
    yield (
        f'<h3>Sample {sample.number} <span class="task {_task(sample.task)}">{visible(sample.task)}</span> '
        f"{visible(sample.source)}, row {visible(sample.row_id)}</h3>"
    )
    yield (
        f'<p class="faint">study {"known" if sample.study_known else "unknown"} · {_count(sample.places, "token")}: '
        f"{sample.visual} visual, {sample.trained} trained, {sample.terms} of these medical terms</p>"
    )
    if sample.cut:
        yield f'<p class="note">{_count(sample.cut, "token")} of text cut: the sample was too long.</p>'
    if sample.dropped_scans:
        yield (
            f'<p class="note">{_count(sample.dropped_scans, "scan")} left out: more than data.max_scans, or their '
            "marks were in text that was cut.</p>"
        )
    if sample.warnings:
        yield _box("In this sample", [visible(warning) for warning in sample.warnings])
    for image, slot in enumerate(sample.slots, 1):
        if slot in scans:
            yield from _scan(row, image, scans[slot], first=scans[slot].samples[0] == sample.number)
    yield f'<div class="text">{"".join(_token(token, sample.slots) for token in sample.tokens)}</div>'
    yield "</article>"


def _scan(row: int, image: int, scan: ScanView, first: bool) -> Iterator[str]:
    repeated = " (one slice, repeated)" if scan.slices == 1 else ""
    colour = "colour" if scan.channels > 1 else "gray"
    quantum = f", {scan.scale:.3g} a step" if scan.dtype != "float32" else ""
    yield (
        f'<div class="scan"><p class="faint"><span class="swatch slot" style="{_hue(scan.slot)}"></span>'
        f"<b>image {image}</b> · slot {scan.slot}, vision row {scan.vision_row} · {_size(scan)}{repeated}, {colour} · "
        f"{_count(scan.patches, 'patch')} · values {scan.low:.2f} to {scan.high:.2f}, "
        f"mean {scan.mean:.3f} ({scan.dtype}{quantum})</p>"
    )
    images, css = scan.images, "deep" if scan.slices > 1 else "flat"
    if not first:
        images, css = (scan.thumbnail,), "again"
        link = f'<a href="#row-{row}-sample-{scan.samples[0]}">sample {scan.samples[0]}</a>'
        yield f'<p class="faint">The same slot as in {link}, encoded once:</p>'
    yield f'<div class="strip {css}">'
    for shown in images:
        label = f"slice {shown.slice} of {scan.slices}" if scan.slices > 1 else "its slice"
        caption = f"<figcaption>{label}</figcaption>" if scan.slices > 1 else ""
        yield (
            f'<figure><img src="{shown.uri}" width="{shown.width}" height="{shown.height}" '
            f'alt="image {image}, {label}">{caption}</figure>'
        )
    yield "</div></div>"


def _token(token: Token, slots: Sequence[int]) -> str:
    weight = f"w{token.weight:g}" if token.weight in (0, 1, 3) else "odd"
    title = f"position {token.place}, id {token.id}, weight {token.weight:g}" + (
        "" if token.seen else ", not attended to"
    )
    match token.kind:
        case "text":
            return f'<span class="t {weight}" title="{title}">{spaced(token.text)}</span>'
        case "byte":
            return f'<span class="t {weight} sign" title="{title}: another byte of the previous character">▪</span>'
        case "image":
            latents = token.places - 2 if token.places > 2 else token.places
            style = _hue(slots[token.image - 1])
            label = f"image {token.image} · {latents} tokens"
            return f'<span class="chip image" style="{style}" title="{title}">{label}</span>'
        case "lost":
            return f'<span class="chip odd" title="{title}">image left out · {token.places - 2} tokens</span>'
        case "mark":
            return f'<span class="chip odd" title="{title}">{visible(token.text)}</span>'
        case "unknown":
            return f'<span class="chip {weight}" title="{title}">id {token.id}: no text</span>'
    return f'<span class="chip {weight}" title="{title}">{token.kind.upper()}</span>'
