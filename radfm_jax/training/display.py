"""Output of a run: tables before the first step, a progress bar, metrics.jsonl, TensorBoard and curves.png.

Process 0 writes all of it; other processes only log messages. metrics.jsonl has one line per step and evaluation. A
resumed run first removes the lines of steps that it repeats, then appends.
"""

from __future__ import annotations

import collections
import json
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich import filesize
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from input_pipeline import files
from input_pipeline.batching.report import PackingReport
from radfm_jax.checkpoints import run_directory
from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.runtime import console


class Display:
    """Progress bar and metrics of a run.

    Args:
      first: the first step after this (re)start.
      steps: number of steps of the run; None if it is not known yet (`set_steps`).
      active: False in all processes except process 0: they write no files and show no bar.
    """

    def __init__(self, workdir: Path, first: int, steps: int | None, active: bool = True):
        self.workdir, self.active, self.steps = workdir, active, steps
        if not active:
            return
        # Imported late: only process 0 needs it.
        from tensorboardX import SummaryWriter

        self.metrics = workdir / "metrics.jsonl"
        truncate(self.metrics, first)
        self._file = open(self.metrics, "a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first or None)
        # On a narrow terminal the metrics are cut off, not the step.
        full, cut = (lambda: Column(no_wrap=True, overflow="ignore")), Column(ratio=1, no_wrap=True)
        columns = (
            TextColumn("step", table_column=full()), MofNCompleteColumn(table_column=full()),
            BarColumn(bar_width=10, table_column=full()), TimeElapsedColumn(table_column=full()),
            TextColumn("/", table_column=full()), TimeRemainingColumn(table_column=full()),
            TextColumn("{task.fields[line]}", table_column=cut),
        )  # fmt: skip
        terminal = console.stderr.is_terminal
        self._bar = Progress(*columns, console=console.stderr, refresh_per_second=2, expand=True, disable=not terminal)
        self._task = self._bar.add_task("train", total=steps, completed=first, line="")
        self._bar.start()

    def set_steps(self, steps: int) -> None:
        """Set the number of steps of the run."""
        self.steps = steps
        if self.active:
            self._bar.update(self._task, total=steps)

    def record(self, step: int, values: dict[str, float], line: str = "", durable: bool = False) -> None:
        """Write values to metrics.jsonl and TensorBoard, and show `line` in the bar and the logs.

        `durable` values are on disk when this returns.
        """
        if line:
            if self.active:
                self._bar.update(self._task, completed=step, line=line)
            total = "" if self.steps is None else f"/{self.steps}"
            console.log(f"step {step}{total}  {line}", bar=self.active)
        if self.active:
            # JSON has no NaN and no infinities.
            line_values = {name: x if math.isfinite(x) else str(x) for name, x in values.items()}
            self._file.write(json.dumps({"step": step, **line_values}) + "\n")
            if durable:
                os.fsync(self._file.fileno())
            for name, x in values.items():
                if math.isfinite(x):
                    self._board.add_scalar(name, x, step)

    def close(self) -> None:
        if self.active:
            self._bar.stop()
            self._file.close()
            self._board.close()
            draw_curves(self.workdir)


def truncate(file: Path, step: int) -> None:
    """Remove the lines after `step` from a JSON Lines file, and an incomplete last line."""
    if not file.exists():
        return
    files.write_json_lines(file, (line for line in _complete_lines(file) if line["step"] <= step))


def read_metrics(workdir: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl; none if the file does not exist."""
    file = workdir / "metrics.jsonl"
    return list(_complete_lines(file)) if file.exists() else []


def _complete_lines(file: Path) -> Iterator[dict]:
    """Yield the lines up to the first incomplete one. A power failure can truncate a line or leave NUL bytes."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for text in lines:
            try:
                line = files.parse_json(text, nan=True)
            except ValueError:
                return
            if not isinstance(line, dict) or "step" not in line:
                return
            yield line


def draw_curves(workdir: Path) -> None:
    """Draw curves.png: losses, exact match of each task, speed and data wait."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(workdir)
    # `eval/...`: an earlier version evaluated data.test during training.
    exact = sorted(
        {k for x in lines for k in x if k.startswith(("validation/", "eval/")) and k.endswith("/exact_match")}
    )
    figure, (losses, matches, rates) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axes, names in (
        (losses, {"train/loss": "training", "validation/all/loss": "validation", "eval/all/loss": "test"}),
        (matches, {name: name.split("/")[1] for name in exact}),
        (rates, {"speed/samples_s": "samples/s", "speed/data_wait": "share of time spent waiting for data"}),
    ):
        for name, label in names.items():
            if points := [(x["step"], x[name]) for x in lines if isinstance(x.get(name), int | float)]:
                axes.plot(*np.array(points).T, label=label, marker="." if len(points) < 40 else None)
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    losses.set_title("weighted loss per token")
    matches.set_title("validation: share of answers with every token correct")
    rates.set_title("speed")
    rates.set_yscale("symlog", linthresh=1)
    figure.savefig(workdir / "curves.png", dpi=110)
    pyplot.close(figure)


def parameter_table(state: dict) -> Table:
    """Tabulate the parameters of each part, the trainable ones, and their bytes per device. `state` may be abstract."""
    table = Table("part", "parameters", "trainable", "bytes per device", title="parameters")
    parts: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(3, np.int64))
    for name, trainable in (("params", True), ("frozen", False)):
        for path, x in flatten(state[name]).items():
            parts[path.partition("/")[0]] += (x.size, x.size * trainable, device_bytes(x))
    for part, (size, trainable_size, bytes_) in sorted(parts.items()):
        trainable_text = "all" if trainable_size == size else f"{trainable_size:,}" if trainable_size else "frozen"
        table.add_row(part, f"{size:,}", trainable_text, filesize.decimal(bytes_))
    size, trainable_size, bytes_ = np.sum([*parts.values()], axis=0)
    table.add_row("all", f"{size:,}", f"{trainable_size:,}", filesize.decimal(bytes_), style="bold")
    table.add_row("optimizer", "", "", filesize.decimal(sum(device_bytes(x) for x in jax.tree.leaves(state["opt"]))))
    return table


def device_bytes(x) -> int:
    """Return the bytes on one device of an array, or of an abstract array with a sharding."""
    shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
    return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize


def memory_table(parts: dict[str, int], limit: int | None = None) -> Table:
    """Tabulate bytes per device of each part (estimate.memory), and their sum next to `limit` (estimate.capacity)."""
    table = Table("part", "bytes per device", title="estimated memory")
    for part, size in parts.items():
        table.add_row(part, filesize.decimal(size))
    total = sum(parts.values())
    available = "" if limit is None else f" of {filesize.decimal(limit)}"
    style = "bold red" if limit is not None and total > limit else "bold"
    table.add_row("all", filesize.decimal(total) + available, style=style)
    return table


def data_table(description: dict, counts: np.ndarray, windows: int) -> Table:
    """Tabulate the sources: their samples, and the samples per epoch (Mixture.counts)."""
    title = f"{counts.sum():,} samples per epoch, {windows} windows"
    table = Table("source", "samples", "per epoch", "held out", "in quarantine", title=title)
    for (name, s), count in zip(description["sources"].items(), counts, strict=True):
        table.add_row(name, f"{s['rows']:,}", f"{count:,}", f"{s['elsewhere']:,}", f"{s['left_out']:,}")
    return table


def result_lines(workdir: Path) -> list[str]:
    """Return lines with the paths of a finished run's results, and the commands that use them."""
    best, steps = run_directory.best(workdir), run_directory.steps(workdir)
    checkpoints = [f"checkpoints/{steps[-1]} (last step)"] if steps else []
    checkpoints += [f"checkpoints/{best.name} (lowest held-out loss)"] if best else []
    directory = shlex.quote(str(workdir))
    return [
        f"results in {workdir}: {', '.join([*checkpoints, 'metrics.jsonl', 'curves.png'])}",
        f"ask it:   python -m radfm_jax.generate --checkpoint {directory} --scan FILE --prompt QUESTION",
        f"score it: python -m radfm_jax.evaluate --config FILE --checkpoint {directory} --out DIR",
    ]


def packing_line(report: PackingReport) -> str:
    """Describe how full the rows were in one line."""
    shares = report.as_dict()
    padding = {k.removeprefix("padding: "): v for k, v in shares.items() if k.startswith("padding: ")}
    causes = ", ".join(f"{cause} {share:.1%}" for cause, share in padding.items() if share >= 0.0005)
    cut = f"; {report.cut_tokens:,} tokens and {report.dropped_scans} scans cut from long samples"
    return (
        f"{shares['real tokens']:.1%} real tokens, {shares['samples per row']:.1f} samples per row, "
        f"{shares['scans per row']:.1f} scans per row; padding: {causes or 'none'}"
        + (cut if report.cut_tokens or report.dropped_scans else "")
    )
