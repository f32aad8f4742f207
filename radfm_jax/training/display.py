"""What a run shows: tables before step 0, a progress bar, metrics.jsonl, TensorBoard, a picture of the curves.

Process 0 shows it, and writes what is kept; the others say their lines to their logs. metrics.jsonl is the record: a
line per logged step, append-only; a resumed run goes on in it, and lines of steps that are run again are cut off first.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from input_pipeline.batching.report import PackingReport
from radfm_jax.checkpoints.checkpoint import flatten

record: Console | None = None  # the log of process 0, if there are several: gets the lines, but not the bar


def say(*what) -> None:
    """A line, or a table, on standard error."""
    for console in (Console(stderr=True), record):
        if console is not None:
            console.print(*_literally(what), highlight=False, soft_wrap=True)


def _literally(what) -> list:
    """Words in square brackets are no markup: rows, paths and settings may hold some."""
    return [Text(x) if isinstance(x, str) else x for x in what]


class Display:
    """Where the numbers of a run go.

    Args:
      workdir: metrics.jsonl, tensorboard/ and curves.png are written here.
      first, steps: the step to go on from, and the last one.
    """

    def __init__(self, workdir: Path, first: int, steps: int, active: bool = True):
        self.workdir, self.active, self.steps = workdir, active, steps
        self.console = Console(stderr=True)
        self._bar = None
        if not active:
            return
        # Imported late: only the process that writes needs it.
        from tensorboardX import SummaryWriter

        self.metrics = workdir / "metrics.jsonl"
        cut_off(self.metrics, first)
        self._file = open(self.metrics, "a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first or None)
        # On a narrow terminal the end of what is shown is cut, not where the run stands.
        whole, cut = (lambda: Column(no_wrap=True, overflow="ignore")), Column(ratio=1, no_wrap=True)
        columns = (
            TextColumn("step", table_column=whole()), MofNCompleteColumn(table_column=whole()),
            BarColumn(bar_width=10, table_column=whole()), TimeElapsedColumn(table_column=whole()),
            TextColumn("/", table_column=whole()), TimeRemainingColumn(table_column=whole()),
            TextColumn("{task.fields[shown]}", table_column=cut),
        )  # fmt: skip
        self._bar = Progress(
            *columns, console=self.console, refresh_per_second=2, expand=True, disable=not self.console.is_terminal
        )
        self._task = self._bar.add_task("train", total=steps, completed=first, shown="")
        self._bar.start()

    def say(self, *what) -> None:
        """A line, or a table, above the bar."""
        for console in (self.console, record):
            if console is not None:
                console.print(*_literally(what))

    def log(self, step: int, values: dict[str, float], shown: str = "") -> None:
        """A line of metrics.jsonl, and scalars of TensorBoard; names with a slash are grouped there."""
        line = f"step {step}/{self.steps}  {shown}"
        if shown and record is not None:
            record.print(line, highlight=False, soft_wrap=True)
        if not self.active:
            if shown:
                self.console.print(line, highlight=False, soft_wrap=True)
            return
        self._file.write(json.dumps({"step": step, **{k: _number(v) for k, v in values.items()}}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        if shown:
            self._bar.update(self._task, completed=step, shown=shown)
            if not self.console.is_terminal:
                self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.active:
            self._bar.stop()
            self._file.close()
            self._board.close()
            curves(self.workdir)


def _number(value):
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def cut_off(file: Path, step: int) -> None:
    """Drops the lines behind `step`, and a last line that a kill cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
    partial = file.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(file)


def read(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def curves(workdir: Path) -> None:
    """curves.png: training and held-out loss, exact match by task, rate of samples and data wait."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read(workdir)
    series = lambda name: [(x["step"], x[name]) for x in lines if isinstance(x.get(name), int | float)]  # noqa: E731
    exact = sorted({k for x in lines for k in x if k.startswith("eval/") and k.endswith("/exact_match")})
    figure, (losses, matches, rates) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axes, names in (
        (losses, {"train/loss": "training", "eval/all/loss": "held out"}),
        (matches, {name: name.split("/")[1] for name in exact}),
        (rates, {"speed/samples_s": "samples/s", "speed/data_wait": "share of the time spent waiting for data"}),
    ):
        for name, label in names.items():
            if points := series(name):
                axes.plot(*np.array(points).T, label=label, marker="." if len(points) < 40 else None)
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    losses.set_title("loss a token, weighted")
    matches.set_title("held out: share of answers with every token right")
    rates.set_title("speed")
    rates.set_yscale("symlog", linthresh=1)
    figure.savefig(workdir / "curves.png", dpi=110)
    pyplot.close(figure)


# --- before step 0 ----------------------------------------------------------------------------------------------------


def parameter_table(state: dict) -> Table:
    """Parts, what of them learns, and bytes on this process's first device. `state` may be abstract."""
    table = Table("part", "parameters", "learning", "bytes a device", title="parameters")
    total = {}
    for name, learns in (("params", True), ("frozen", False)):
        for path, x in flatten(state[name]).items():
            entry = total.setdefault(path.partition("/")[0], [0, 0, 0])
            entry[0] += x.size
            entry[1] += x.size * learns
            entry[2] += device_bytes(x)
    for part, (size, learning, held) in sorted(total.items()):
        table.add_row(
            part, f"{size:,}", "all" if learning == size else f"{learning:,}" if learning else "frozen", mb(held)
        )
    sums = [sum(x[i] for x in total.values()) for i in range(3)]
    table.add_row("all", f"{sums[0]:,}", f"{sums[1]:,}", mb(sums[2]), style="bold")
    moments = sum(device_bytes(x) for x in jax.tree.leaves(state["opt"]))
    table.add_row("optimizer", "", "", mb(moments))
    return table


def device_bytes(x) -> int:
    shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
    return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize


def mb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def memory_table(parts: dict[str, int], limit: int | None = None) -> Table:
    """Bytes a device by part (estimate.memory), their sum, and what there is (estimate.capacity), if that is known."""
    table = Table("part", "bytes a device", title="memory, estimated")
    for part, size in parts.items():
        table.add_row(part, mb(size))
    total = sum(parts.values())
    of = "" if limit is None else f" of {mb(limit)}"
    table.add_row("all", mb(total) + of, style="bold red" if limit is not None and total > limit else "bold")
    return table


def data_table(description: dict, samples: int, windows: int) -> Table:
    """Sources with their rows and shares."""
    table = Table(
        "source", "rows", "in quarantine", "share an epoch", title=f"{samples:,} samples an epoch, {windows} windows"
    )
    for name, s in description["sources"].items():
        table.add_row(name, f"{s['rows']:,}", f"{s['left_out']:,}", f"{s['fraction']:g}")
    return table


def packing_line(report: PackingReport) -> str:
    """One line of how full the rows were."""
    shares = report.as_dict()
    causes = ", ".join(
        f"{k.removeprefix('padding: ')} {v:.1%}" for k, v in shares.items() if k.startswith("padding: ") and v >= 0.0005
    )
    cut = f"; {report.cut_tokens:,} tokens and {report.dropped_scans} scans cut from long samples"
    return (
        f"{shares['real tokens']:.1%} real tokens, {shares['samples a row']:.1f} samples a row, "
        f"{shares['scans a row']:.1f} scans a row; padding: {causes or 'none'}"
        + (cut if report.cut_tokens or report.dropped_scans else "")
    )
