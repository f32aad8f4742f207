"""Facts -> one HTML page that opens from a disk: pictures and style inside, no scripts, nothing fetched.

Text of a data set may hold anything. All of it goes through `visible` or `spaced`: escaped, and what would act without
being seen (controls, bidirectional marks, zero widths) is named.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from input_pipeline.inspect.facts import RowView, SampleView
from input_pipeline.inspect.look import Head
from input_pipeline.inspect.pictures import ScanView
from input_pipeline.inspect.texts import Token
from input_pipeline.samples import TASKS

GENERATOR = "input_pipeline.inspect"
STYLE = Path(__file__).with_name("style.css")
# Nothing in the page may run or load anything, whatever it says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: object) -> str:
    """HTML of any text, for content and attributes: escaped, every character seen or named (⟨U+202E⟩)."""
    return "".join(_named(c) if _is_unseen(c) else html.escape(c) for c in str(text))


def visible_lines(text: str) -> str:
    """`visible`, with line ends as line ends; none before or behind the text."""
    return "<br>".join(map(visible, text.strip().replace("\r\n", "\n").split("\n")))


def spaced(text: str) -> str:
    """`visible`, with a dot in each space and a sign before each line end; both are copied as they were."""
    parts = []
    for c in text:
        if c == " ":
            parts.append('<span class="space"> </span>')
        elif c == "\n":
            parts.append('<span class="sign">↵</span>\n')
        else:
            parts.append(visible(c))
    return "".join(parts)


def _is_unseen(c: str) -> bool:
    kind = unicodedata.category(c)
    return kind in _UNSEEN or (kind == "Zs" and c != " ")


def _named(c: str) -> str:
    return f"⟨U+{ord(c):04X}⟩"


def page(head: Head, rows: Sequence[RowView]) -> str:
    """The whole page."""
    return "".join(f"{line}\n" for line in _page(head, rows))


def _page(head: Head, rows: Sequence[RowView]) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta name="generator" content="{GENERATOR}">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>What the model sees: {visible(head.config)}, {visible(head.split)}</title>"
    yield f"<style>\n{STYLE.read_text()}</style>\n</head>\n<body>"
    yield from _head(head, rows)
    for number, row in enumerate(rows):
        yield from _row(number, row)
    yield '<p class="faint">Pictures show the values 0 to 1 as black to white; large ones are JPEGs.</p>'
    yield "</body>\n</html>"


# --- head -------------------------------------------------------------------------------------------------------------


def _head(head: Head, rows: Sequence[RowView]) -> Iterator[str]:
    yield "<header>\n<h1>What the model sees</h1>"
    how = "with the crops and flips of training" if head.training else "without crops and flips"
    yield (
        f"<p><b>{visible(head.config)}</b>, split <b>{visible(head.split)}</b>, epoch <b>{head.epoch}</b>: "
        f"{_count(len(rows), 'row')} of {rows[0].length if rows else 0} places, scans {how}.</p>"
    )
    if len(rows) < head.asked:
        yield f'<p class="note">{head.asked} rows were asked for; the epoch has no more than these.</p>'
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


def _packing(head: Head) -> Iterator[str]:
    """The report of the rows as a bar and a table."""
    shares = {name: value for name, value in head.packing.items() if name.split(":")[0] in ("real tokens", "padding")}
    yield '<div class="bar">'
    at = 0.0
    for name, share in shares.items():
        if share:
            look = "real" if name == "real tokens" else "padding"
            yield _piece(at, share, 1.0, look, f"{name}: {share:.1%}")
        at += share
    yield "</div>\n<table>"
    for name, value in head.packing.items():
        shown = f"{value:.1%}" if name in shares else f"{value:,.1f}" if name.endswith("a row") else f"{value:,}"
        yield f'<tr><td>{visible(name)}</td><td class="number">{shown}</td></tr>'
    for name, share in (("trained", head.trained), ("medical terms", head.terms)):
        yield f'<tr><td>of the real tokens: {name}</td><td class="number">{share:.1%}</td></tr>'
    yield "</table>"


def _legend() -> Iterator[str]:
    swatch = lambda look, name: f'<span><span class="swatch {look}"></span>{name}</span>'  # noqa: E731
    tasks = "".join(swatch(_task(task), task) for task in TASKS)
    yield f'<div class="legend"><b>Rows</b>{tasks}{swatch("hatched", "visual tokens")}'
    yield f"{swatch('padding', 'padding')}</div>"
    yield (
        '<div class="legend"><b>Text</b><span class="t w0">not trained on</span><span class="t w1">trained, weight 1'
        '</span><span class="t w3">trained, weight 3: a medical term</span><span>the colour is that of the token '
        'to be predicted</span><span><span class="sign">·</span> a space, <span class="sign">↵</span> a line end</span>'
        '<span class="chip">BOS</span><span class="chip w1">EOS</span></div>'
    )


def _warnings(rows: Sequence[RowView]) -> Iterator[str]:
    lines = []
    for number, row in enumerate(rows):
        lines += [f'<a href="#row-{number}">row {number}</a>: {visible(said)}' for said in row.warnings]
        for sample in row.samples:
            link = f'<a href="#row-{number}-sample-{sample.number}">row {number}, sample {sample.number}</a>'
            lines += [f"{link}: {visible(said)}" for said in sample.warnings]
    if lines:
        title = "1 thing to look at" if len(lines) == 1 else f"{len(lines)} things to look at"
        yield _box(title, lines)


def _box(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<div class="warnings" role="alert"><h3>{title}</h3><ul>{items}</ul></div>'


# --- a row ------------------------------------------------------------------------------------------------------------


def _row(number: int, row: RowView) -> Iterator[str]:
    yield f'<section id="row-{number}">\n<h2>Row {number}</h2>'
    yield (
        f'<p class="faint">epoch {row.epoch}, window {row.window}, row {row.row} of the plan · '
        f"{row.tokens} of {row.length} places ({row.tokens / row.length:.1%}) · {_count(len(row.samples), 'sample')} · "
        f"{_count(len(row.scans), 'scan')}</p>"
    )
    yield '<div class="bar">'
    for sample in row.samples:
        title = (
            f"sample {sample.number}: {sample.source} {sample.row_id}, {sample.task}, {sample.places} tokens, "
            f"{sample.visual} of them visual"
        )
        yield _piece(sample.place, sample.places, row.length, _task(sample.task), title)
    for place, places in row.latents:
        yield _piece(place, places, row.length, "hatched", "")
    empty = row.length - row.tokens
    if empty:
        yield _piece(row.tokens, empty, row.length, "padding", f"padding, {empty} places: {row.padding}")
    yield "</div>"
    if empty:
        yield f'<p class="faint">Padding: {_count(empty, "place")}, {visible(row.padding or "cause unknown")}.</p>'
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
        yield _box("In this row", [visible(said) for said in row.warnings])
    for sample in row.samples:
        yield from _sample(number, sample, owners)
    yield "</section>"


def _piece(first: float, length: float, whole: float, look: str, title: str, style: str = "") -> str:
    label = f' title="{visible(title)}"' if title else ""
    place = f"left:{first / whole:.4%};width:{length / whole:.4%}"
    return f'<i class="{look}" style="{place}{";" if style else ""}{style}"{label}></i>'


def _task(task: str) -> str:
    return f"task-{task}" if task in TASKS else "task-other"


def _hue(slot: int) -> str:
    # The golden angle keeps neighbours apart however many there are.
    return f"--hue:{slot * 137.508 % 360:.0f}"


def _size(scan: ScanView) -> str:
    return " × ".join(map(str, scan.shape)) + " voxels"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "es" if what.endswith("ch") else "s")


# --- a sample ---------------------------------------------------------------------------------------------------------


def _sample(row: int, sample: SampleView, scans: dict[int, ScanView]) -> Iterator[str]:
    yield f'<article class="sample" id="row-{row}-sample-{sample.number}">'
    yield (
        f'<h3>Sample {sample.number} <span class="task {_task(sample.task)}">{visible(sample.task)}</span> '
        f"{visible(sample.source)}, row {visible(sample.row_id)}</h3>"
    )
    yield (
        f'<p class="faint">study {"known" if sample.study_known else "not stated"} · {_count(sample.places, "token")}: '
        f"{sample.visual} visual, {sample.trained} trained, {sample.terms} of them terms</p>"
    )
    if sample.cut:
        yield f'<p class="note">{_count(sample.cut, "token")} of text cut: the sample was too long.</p>'
    if sample.dropped_scans:
        yield (
            f'<p class="note">{_count(sample.dropped_scans, "scan")} left out: more than data.max_scans, or their '
            "place was in text that was cut.</p>"
        )
    if sample.warnings:
        yield _box("In this sample", [visible(said) for said in sample.warnings])
    for image, slot in enumerate(sample.slots, 1):
        if slot in scans:
            yield from _scan(row, image, scans[slot], first=scans[slot].samples[0] == sample.number)
    yield f'<div class="text">{"".join(_token(token, sample.slots) for token in sample.tokens)}</div>'
    yield "</article>"


def _scan(row: int, image: int, scan: ScanView, first: bool) -> Iterator[str]:
    one = " (one slice, repeated)" if scan.slices == 1 else ""
    colour = "colour" if scan.channels > 1 else "gray"
    quantum = f", {scan.scale:.3g} a step" if scan.dtype != "float32" else ""
    yield (
        f'<div class="scan"><p class="faint"><span class="swatch slot" style="{_hue(scan.slot)}"></span>'
        f"<b>image {image}</b> · slot {scan.slot}, vision row {scan.vision_row} · {_size(scan)}{one}, {colour} · "
        f"{_count(scan.patches, 'patch')} · values {scan.low:.2f} to {scan.high:.2f}, "
        f"mean {scan.mean:.3f} ({scan.dtype}{quantum})</p>"
    )
    pictures, look = scan.pictures, "deep" if scan.slices > 1 else "flat"
    if not first:
        pictures, look = (scan.thumbnail,), "again"
        where = f'<a href="#row-{row}-sample-{scan.samples[0]}">sample {scan.samples[0]}</a>'
        yield f'<p class="faint">The same slot as in {where}, encoded once:</p>'
    yield f'<div class="strip {look}">'
    for shown in pictures:
        label = f"slice {shown.slice} of {scan.slices}" if scan.slices > 1 else "its slice"
        caption = f"<figcaption>{label}</figcaption>" if scan.slices > 1 else ""
        yield (
            f'<figure><img src="{shown.uri}" width="{shown.width}" height="{shown.height}" '
            f'alt="image {image}, {label}">{caption}</figure>'
        )
    yield "</div></div>"


def _token(token: Token, slots: Sequence[int]) -> str:
    weight = f"w{token.weight:g}" if token.weight in (0, 1, 3) else "odd"
    where = f"place {token.place}, id {token.id}, weight {token.weight:g}" + ("" if token.seen else ", not attended to")
    match token.kind:
        case "text":
            return f'<span class="t {weight}" title="{where}">{spaced(token.text)}</span>'
        case "byte":
            return f'<span class="t {weight} sign" title="{where}: a further byte of the character before">▪</span>'
        case "image":
            latents = token.places - 2 if token.places > 2 else token.places
            style = _hue(slots[token.image - 1])
            label = f"image {token.image} · {latents} tokens"
            return f'<span class="chip image" style="{style}" title="{where}">{label}</span>'
        case "lost":
            return f'<span class="chip odd" title="{where}">image left out · {token.places - 2} tokens</span>'
        case "mark":
            return f'<span class="chip odd" title="{where}">{visible(token.text)}</span>'
        case "unknown":
            return f'<span class="chip {weight}" title="{where}">id {token.id}: no text</span>'
    return f'<span class="chip {weight}" title="{where}">{token.kind.upper()}</span>'
