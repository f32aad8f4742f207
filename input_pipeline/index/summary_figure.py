"""Draws summary.png: the panels of figure 4 of the paper (2D and 3D, modalities, tasks), and text lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from input_pipeline.index.summary import edges

COLOURS = {"train": "#2b6a99", "validation": "#6b9e4a", "test": "#e08e2b"}
BAD = "#c0392b"
MAX_SOURCES = 40  # data sets with the most rows
MAX_GROUPS = 8  # bars of a panel; the last one combines all others


def draw(report: dict, file: Path) -> None:
    """Draw the content of summary.json."""
    sources = _largest(report["sources"], MAX_SOURCES)
    bottom_height = 0.9 + 0.28 * len(sources)  # inches
    height = 1.0 + 2 * 4.1 + bottom_height + 0.7
    figure = Figure(figsize=(16, height), dpi=100)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3, 3, left=0.14, right=0.97, top=1 - 1.0 / height, bottom=0.7 / height, wspace=0.42,
        height_ratios=(3.2, 3.2, bottom_height), hspace=0.9 / ((6.4 + bottom_height) / 3),
    )  # fmt: skip
    splits = report["splits"]
    _dimensions(figure.add_subplot(grid[0, 0]), splits)
    _grouped(figure.add_subplot(grid[0, 1]), "Modalities of the scans", splits, "modalities")
    _grouped(figure.add_subplot(grid[0, 2]), "Tasks of the rows", splits, "tasks")
    _depths(figure.add_subplot(grid[1, 0]), splits)
    _lengths(figure.add_subplot(grid[1, 1]), "Instruction and context", splits, "instruction")
    _lengths(figure.add_subplot(grid[1, 2]), "Response", splits, "response")
    _rows(figure.add_subplot(grid[2, :2]), sources)
    _terms(figure.add_subplot(grid[2, 2]), sources)
    rows, scans = report["rows"], report["scans"]
    skipped = f"rows {rows['bad'] + rows['not_opened']:,}, scans {scans['bad']:,}"
    title = f"{rows['good']:,} good rows and {scans['good']:,} good scans; skipped: {skipped}"
    figure.suptitle(title, fontsize=14, y=1 - 0.35 / height)
    figure.savefig(file, format="png")


def _largest(sources: dict, shown: int) -> dict:
    """Return the sources with the most rows, in their original order."""
    first = sorted(sources, key=lambda name: -sources[name]["good"] - sources[name]["bad"])[:shown]
    return {name: source for name, source in sources.items() if name in first}


def _tidy(axes, title: str, grid: str | None = "x") -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color="#e4e6e8")


def _count_axis(axis) -> None:
    """Label an axis with integers, 12000 as 12k."""
    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    short = lambda v: f"{v / 1e6:g}M" if v >= 1e6 else f"{v / 1e3:g}k" if v >= 1e4 else f"{v:g}"  # noqa: E731
    axis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))


def _dimensions(axes, splits: dict) -> None:
    """Draw a ring for each split, train outside."""
    axes.set_title("2D and 3D scans", loc="left", fontsize=12, fontweight="bold")
    if not any(sum(values["scans"].values()) for values in splits.values()):
        _empty(axes)
        return
    names, shades = ("2D", "3D"), ("#7fb2d9", "#1f4e79")
    lines, radius = [], 1.0
    for split, values in splits.items():
        counts = [values["scans"]["2d"], values["scans"]["3d"]]
        lines.append(f"{split}\n{counts[0]:,} 2D\n{counts[1]:,} 3D")
        if sum(counts):
            axes.pie(counts, radius=radius, colors=shades, startangle=90, counterclock=False,
                     wedgeprops={"width": 0.26, "edgecolor": "white", "linewidth": 2})  # fmt: skip
        radius -= 0.3
    caption = f"from the outside: {', '.join(splits)}" if len(splits) > 1 else next(iter(splits), "")
    patches = [axes.plot([], [], "s", color=shade, markersize=10)[0] for shade in shades]
    axes.legend(patches, names, loc="center left", bbox_to_anchor=(0.93, 0.92), frameon=False, fontsize=10)
    axes.text(1.15, -0.1, "\n\n".join(lines), fontsize=10, va="center", ha="left")
    axes.text(0, -1.14, caption, fontsize=9, ha="center", va="top", color="#55595e")


def _grouped(axes, title: str, splits: dict, field: str) -> None:
    """Draw one bar per split for each value, the most frequent at the top."""
    _tidy(axes, title)
    names = dict.fromkeys(name for values in splits.values() for name in values[field])
    names = sorted(names, key=lambda n: -sum(values[field].get(n, 0) for values in splits.values()))
    if not names:
        _empty(axes)
        return
    first, rest = (names, []) if len(names) <= MAX_GROUPS else (names[: MAX_GROUPS - 1], names[MAX_GROUPS - 1 :])
    labels = first + ([f"{len(rest)} others"] if rest else [])
    positions, height = np.arange(len(labels)), 0.8 / max(len(splits), 1)
    for i, (split, values) in enumerate(splits.items()):
        counts = [values[field].get(n, 0) for n in first]
        counts += [sum(values[field].get(n, 0) for n in rest)] if rest else []
        bars = axes.barh(positions + i * height, counts, height, color=COLOURS[split], label=split)
        axes.bar_label(bars, labels=[f"{c:,}" for c in counts], padding=3, fontsize=8)
    axes.set_yticks(positions + height * (len(splits) - 1) / 2, labels)
    axes.invert_yaxis()
    most = max((max(values[field].values(), default=0) for values in splits.values()), default=0)
    axes.set_xlim(0, 1.25 * max(most, 1))
    _count_axis(axes.xaxis)
    _legend(axes, splits, "lower right")


def _empty(axes) -> None:
    axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="#55595e")
    axes.axis("off")


def _legend(axes, splits: dict, where: str) -> None:
    if len(splits) > 1:
        axes.legend(loc=where, frameon=False, fontsize=9)


def _depths(axes, splits: dict) -> None:
    _tidy(axes, "Slices of the 3D scans", "y")
    depths = {split: {int(d): n for d, n in values["depths"].items()} for split, values in splits.items()}
    most = max((d for counts in depths.values() for d in counts), default=0)
    if not most:
        _empty(axes)
        return
    width = max(most // 24, 1)
    bins = np.arange(0, most + 2 * width, width)
    values, weights = [list(counts) for counts in depths.values()], [list(n.values()) for n in depths.values()]
    colours = [COLOURS[split] for split in depths]
    axes.hist(values, bins, weights=weights, color=colours, label=list(depths), stacked=True)
    axes.margins(y=0.25)
    axes.set_xlabel("slices")
    axes.set_ylabel("scans")
    _count_axis(axes.yaxis)
    _legend(axes, splits, "upper right")


def _lengths(axes, title: str, splits: dict, field: str) -> None:
    """Draw shares instead of counts, so that a small split is visible next to a large one."""
    _tidy(axes, f"{title}: tokens per row", "y")
    longest = max((len(values[field]["counts"]) for values in splits.values()), default=0)
    if not longest:
        _empty(axes)
        return
    positions, width = np.arange(longest), 0.8 / max(len(splits), 1)
    for i, (split, values) in enumerate(splits.items()):
        counts = np.array(values[field]["counts"] + [0] * (longest - len(values[field]["counts"])), float)
        label = f"{split}: median {values[field]['median']}, maximum {values[field]['most']:,}"
        axes.bar(positions + i * width, 100 * counts / max(counts.sum(), 1), width, color=COLOURS[split], label=label)
    axes.set_xticks(positions + width * (len(splits) - 1) / 2, edges(longest), fontsize=8 if longest > 9 else 9)
    axes.set_xlabel("tokens, from")
    axes.set_ylabel("% of rows")
    axes.margins(y=0.28)
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def _rows(axes, sources: dict) -> None:
    positions = np.arange(len(sources))
    good = np.array([s["good"] for s in sources.values()])
    bad = np.array([s["bad"] + s["not_opened"] for s in sources.values()])
    axes.barh(positions, good, 0.7, color=[COLOURS[s["split"]] for s in sources.values()])
    axes.barh(positions, bad, 0.7, left=good, color=BAD)
    for y, (g, b) in enumerate(zip(good, bad, strict=True)):
        axes.annotate(f"{g:,}" + (f" and {b:,} skipped" if b else ""), (g + b, y), (4, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(positions, [name if len(name) < 28 else name[:25] + "..." for name in sources])
    axes.set_xlim(0, 1.25 * max((good + bad).max(), 1))
    _count_axis(axes.xaxis)
    _tidy(axes, "Rows of the data sets")
    for split in dict.fromkeys(s["split"] for s in sources.values()):
        axes.barh([0], [0], color=COLOURS[split], label=split)
    axes.barh([0], [0], color=BAD, label="skipped")
    axes.set_ylim(len(positions) - 0.4, -0.6)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=3, frameon=False, fontsize=9)


def _terms(axes, sources: dict) -> None:
    positions = np.arange(len(sources))
    shares = [100 * s["term_share"] for s in sources.values()]
    axes.barh(positions, [100] * len(positions), 0.7, color="#eef0f2")
    bars = axes.barh(positions, shares, 0.7, color=[COLOURS[s["split"]] for s in sources.values()])
    axes.bar_label(bars, labels=[f"{s:.0f} %" for s in shares], padding=3, fontsize=9)
    axes.set_yticks(positions, [""] * len(positions))  # the panel to the left has the names at these heights
    axes.set_ylim(len(positions) - 0.4, -0.6)
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the trained tokens")
    _tidy(axes, "Medical terms (weight 3)")
