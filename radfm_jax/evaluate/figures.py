"""Figures of a report, as PNG files: radar and bars (Figure 1 of the paper), calibration, answer lengths."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from radfm_jax.evaluate import metrics, published, scoring
from radfm_jax.evaluate.radbench import TASKS
from radfm_jax.evaluate.scoring import ScoredAnswer, ScoreRow

COLOURS = (
    "#1f5fa8", "#c2571a", "#2e7d4f", "#7a3f98", "#9c2f2f", "#6b6b6b", "#17a0b4", "#d9a514", "#e377c2", "#6b4a2b",
    "#8fbf3f", "#1b1f5e",
)  # fmt: skip
GRAYS = ("#c9ced4", "#9aa1a9", "#5f666e")
PUBLISHED = {f"{name}, published": gray for name, gray in zip(published.MODELS, GRAYS, strict=True)}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def averages(rows: Sequence[ScoreRow], comparable: Collection[str]) -> dict[str, dict[str, float]]:
    """Return model -> task -> mean of the task's metrics in Table 4.

    Published models are included for the `comparable` tasks. A model that lacks a metric has no mean, because means
    over different metrics are not comparable.
    """
    means: dict[str, dict[str, float]] = {}
    for name in published.MODELS:
        for task in (task for task in published.TABLE if task in comparable):
            values = [value for value, _, _ in published.values(name, task).values()]
            means.setdefault(f"{name}, published", {})[task] = float(np.mean(values))
    for row in rows:
        if row.grouping == "task":
            value = float(np.mean([row.metrics[m].value for m in published.TABLE[row.task]]))
            if np.isfinite(value):
                means.setdefault(row.model, {})[row.task] = value
    return means


def radar(rows: Sequence[ScoreRow], file: Path, comparable: Collection[str] = tuple(TASKS)) -> None:
    """Draw a radar plot with a logarithmic axis from 1 to 100 per cent per task. A task without a mean has no point."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), subplot_kw={"polar": True}, layout="constrained")
    angles = {task: 2 * np.pi * k / len(TASKS) for k, task in enumerate(TASKS)}
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    means = averages(rows, comparable)
    colours = PUBLISHED | _colours(row.model for row in rows)
    for model, tasks in means.items():
        is_published = model in PUBLISHED
        # nan leaves a gap in the line at a task without a value.
        radii = [np.log10(max(100 * tasks[task], 1)) if task in tasks else np.nan for task in TASKS]
        axes.plot(
            [*angles.values(), 0.0], [*radii, radii[0]], "--" if is_published else "-", color=colours[model],
            label=model, marker="o", markersize=4, linewidth=1.2 if is_published else 2,
        )  # fmt: skip
    axes.set_xticks(list(angles.values()), [name.replace(" ", "\n", 1) for name in TASKS.values()])
    axes.set_ylim(0, 2)
    axes.set_yticks(np.log10([2, 5, 10, 20, 50, 100]), ["2", "5", "10", "20", "50", "100 %"], color="#555", fontsize=7)
    axes.tick_params(axis="x", pad=14)
    axes.set_title("mean of a task's metrics, logarithmic", pad=18)
    if means:
        axes.legend(loc="upper left", bbox_to_anchor=(1.12, 1.0), frameon=False, fontsize=8)
    _save(pyplot, figure, file)


def bars(rows: Sequence[ScoreRow], file: Path, comparable: Collection[str] = tuple(TASKS)) -> None:
    """Draw a panel per task with its metrics of Table 4: a bar per model with its 95 % interval."""
    pyplot = _pyplot()
    task_rows = {(row.model, row.task): row for row in rows if row.grouping == "task"}
    own = list(dict.fromkeys(model for model, _ in task_rows))
    widths = [len(published.TABLE[task]) for task in TASKS]
    figure, panels = pyplot.subplots(
        1, len(TASKS), figsize=(14, 3.6), sharey=True, layout="constrained", gridspec_kw={"width_ratios": widths}
    )
    colours = PUBLISHED | _colours(own)
    names = [*PUBLISHED, *own]
    step = 0.84 / len(names)
    for panel, task in zip(panels, TASKS, strict=True):
        task_metrics = list(published.TABLE[task])
        shown = names if task in comparable else own  # centres the bars of a metric on its label
        for k, name in enumerate(shown):
            if name in own:
                row = task_rows.get((name, task))
                values = {m: (i.value, i.low, i.high) for m, i in row.metrics.items()} if row else {}
            else:
                values = published.values(published.MODELS[k], task)
            for x, metric in enumerate(task_metrics):
                value, low, high = (100 * v for v in values.get(metric, (np.nan,) * 3))
                if np.isfinite(value):
                    error = [[max(value - low, 0)], [max(high - value, 0)]]
                    position = x + step * (k - (len(shown) - 1) / 2)
                    panel.bar(position, value, step, color=colours[name], label=name)
                    panel.errorbar(position, value, error, color="#222", linewidth=0.8)
        labels = [scoring.TITLES[m].replace("S-", "S\n") for m in task_metrics]
        panel.set_xticks(range(len(labels)), labels, fontsize=8)
        panel.set_title(TASKS[task].replace(" ", "\n", 1), fontsize=10)
        panel.set_ylim(0, 100)
    panels[0].set_ylabel("%")
    handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    ordered = [name for name in names if name in handles]
    figure.legend([handles[n] for n in ordered], ordered, loc="outside lower center", ncols=6, frameon=False)
    _save(pyplot, figure, file)


def _colours(models: Iterable[str]) -> dict[str, str]:
    """Return model -> colour, the same in all figures."""
    return dict(zip(dict.fromkeys(models), itertools.cycle(COLOURS), strict=False))


def calibration(scored: Mapping[str, Sequence[ScoredAnswer]], file: Path) -> bool:
    """Draw calibration, histogram and ROC curves of the probability of yes. Returns False if no model recorded it."""
    diagnoses = {m: [a for a in answers if a.question.task == "diagnosis"] for m, answers in scored.items()}
    curves = {
        m: scoring.probabilities(answers) for m, answers in diagnoses.items() if scoring.probability_metrics(answers)
    }
    if not curves:
        return False
    pyplot = _pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for model, (score, positive) in curves.items():
        colour = _colours(scored)[model]
        bins = metrics.bin_of(score, 10)
        counts = np.bincount(bins, minlength=10)
        filled = counts > 0
        means = np.bincount(bins, score, 10)[filled] / counts[filled]
        shares = np.bincount(bins, positive, 10)[filled] / counts[filled]
        left.plot(means, shares, marker="o", color=colour, label=model)
        middle.hist(score, np.linspace(0, 1, 21), histtype="step", color=colour, label=model)
        order = np.argsort(-score, kind="stable")
        ends = np.r_[np.flatnonzero(np.diff(score[order])), len(order) - 1]
        yes, no = np.cumsum(positive[order])[ends], np.cumsum(~positive[order])[ends]
        if positive.any() and not positive.all():
            area = metrics.auc(score, positive)(np.ones(len(score)))
            right.plot(np.r_[0, no / no[-1]], np.r_[0, yes / yes[-1]], color=colour, label=f"{model}: AUC {area:.3f}")
    for axes in (left, right):
        axes.plot([0, 1], [0, 1], ":", color="#888")
        axes.set_aspect("equal")
        axes.legend(frameon=False, fontsize=8)
    left.set(xlabel='probability of "yes"', ylabel="share of yes", title="calibration, ten bins")
    middle.set(xlabel='probability of "yes"', ylabel="questions", title="distribution")
    right.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC")
    _save(pyplot, figure, file)
    return True


def lengths(scored: Mapping[str, Sequence[ScoredAnswer]], file: Path) -> None:
    """Draw the number of words of answers and references, by task."""
    pyplot = _pyplot()
    first = next(iter(scored.values()))
    tasks = [task for task in TASKS if any(a.question.task == task for a in first)]
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(2.9 * len(tasks), 3), layout="constrained", squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        texts = {"reference": [a.question.references[0] for a in first if a.question.task == task]}
        texts |= {m: [a.answer.text for a in answers if a.question.task == task] for m, answers in scored.items()}
        counts = [[len(text.split()) for text in model_texts] for model_texts in texts.values()]
        options = {"orientation": "horizontal", "whis": (5, 95), "showfliers": False, "widths": 0.5}
        panel.boxplot(counts, tick_labels=list(texts), **options)
        panel.invert_yaxis()
        panel.set(title=TASKS[task], xlabel="words (box: quartiles, whiskers: 5 and 95 %)")
        panel.xaxis.label.set_fontsize(7)
        panel.set_xlim(left=0)
    _save(pyplot, figure, file)


def _save(pyplot, figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
