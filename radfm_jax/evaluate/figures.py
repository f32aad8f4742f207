"""The pictures of a report, as PNG files: radar and bars (Figure 1 of the paper), calibration, lengths of answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from radfm_jax.evaluate import metrics, published, scoring
from radfm_jax.evaluate.radbench import TASKS
from radfm_jax.evaluate.scoring import Line, ScoredAnswer

PAPER = ("accuracy", "f1", "bleu", "rouge", "umls_precision", "umls_recall")  # what Table 4 has
COLOURS = (
    "#1f5fa8", "#c2571a", "#2e7d4f", "#7a3f98", "#9c2f2f", "#6b6b6b", "#17a0b4", "#d9a514", "#e377c2", "#6b4a2b",
    "#8fbf3f", "#1b1f5e",
)  # fmt: skip
GRAYS = ("#c9ced4", "#9aa1a9", "#5f666e")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def averages(lines: Sequence[Line], comparable: Collection[str]) -> dict[str, dict[str, float]]:
    """model -> task -> mean of the metrics that Table 4 has for the task, published models included for the tasks that
    are `comparable`. A model that lacks one of the metrics has no mean: it would be one of other things."""
    found: dict[str, dict[str, float]] = {}
    for name in published.MODELS:
        for task in (task for task in published.TABLE if task in comparable):
            values = [value for value, _, _ in published.values(name, task).values()]
            found.setdefault(f"{name}, published", {})[task] = float(np.mean(values))
    for line in lines:
        if line.grouping == "task":
            value = float(np.mean([line.metrics[m].value for m in published.TABLE[line.task]]))
            if np.isfinite(value):
                found.setdefault(line.model, {})[line.task] = value
    return found


def radar(lines: Sequence[Line], file: Path, comparable: Collection[str] = tuple(TASKS)) -> None:
    """A spoke for each task, logarithmic, from 1 to 100 per cent; what was not scored has no corner."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), subplot_kw={"polar": True}, layout="constrained")
    angles = {task: 2 * np.pi * k / len(TASKS) for k, task in enumerate(TASKS)}
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    found = averages(lines, comparable)
    own = list(dict.fromkeys(line.model for line in lines))
    for model, of in found.items():
        theirs = model.endswith(", published")
        colour = GRAYS[published.MODELS.index(model.removesuffix(", published"))] if theirs else _colour(own, model)
        # A task without a value breaks the line: what stands on both sides of it are no neighbours.
        radii = [np.log10(max(100 * of[task], 1)) if task in of else np.nan for task in TASKS]
        axes.plot(
            [*angles.values(), 0.0], [*radii, radii[0]], "--" if theirs else "-", color=colour, label=model,
            marker="o", markersize=4, linewidth=1.2 if theirs else 2,
        )  # fmt: skip
    axes.set_xticks(list(angles.values()), [name.replace(" ", "\n", 1) for name in TASKS.values()])
    axes.set_ylim(0, 2)
    axes.set_yticks(np.log10([2, 5, 10, 20, 50, 100]), ["2", "5", "10", "20", "50", "100 %"], color="#555", fontsize=7)
    axes.tick_params(axis="x", pad=14)
    axes.set_title("mean of a task's metrics, logarithmic", pad=18)
    if found:
        axes.legend(loc="upper left", bbox_to_anchor=(1.12, 1.0), frameon=False, fontsize=8)
    _save(pyplot, figure, file)


def bars(lines: Sequence[Line], file: Path, comparable: Collection[str] = tuple(TASKS)) -> None:
    """A panel for each task: its metrics of Table 4, a bar for each model with its 95 % interval."""
    pyplot = _pyplot()
    whole = [line for line in lines if line.grouping == "task"]
    own = list(dict.fromkeys(line.model for line in whole))
    widths = [len(published.TABLE[task]) for task in TASKS]
    figure, panels = pyplot.subplots(
        1, len(TASKS), figsize=(14, 3.6), sharey=True, layout="constrained", gridspec_kw={"width_ratios": widths}
    )
    names = [f"{name}, published" for name in published.MODELS] + own
    step = 0.84 / len(names)
    for panel, task in zip(panels, TASKS, strict=True):
        of_metric = list(published.TABLE[task])
        beside = names if task in comparable else own  # the bars of a metric stand around its name
        for k, name in enumerate(beside):
            if name in own:
                line = next((one for one in whole if (one.model, one.task) == (name, task)), None)
                found = {m: (i.value, i.low, i.high) for m, i in line.metrics.items()} if line else {}
                colour = _colour(own, name)
            else:
                found, colour = published.values(published.MODELS[k], task), GRAYS[k]
            for x, metric in enumerate(of_metric):
                value, low, high = (100 * v for v in found.get(metric, (np.nan,) * 3))
                if np.isfinite(value):
                    error = [[max(value - low, 0)], [max(high - value, 0)]]
                    at = x + step * (k - (len(beside) - 1) / 2)
                    panel.bar(at, value, step, color=colour, label=name)
                    panel.errorbar(at, value, error, color="#222", linewidth=0.8)
        panel.set_xticks(range(len(of_metric)), [scoring.TITLES[m].replace("S-", "S\n") for m in of_metric], fontsize=8)
        panel.set_title(TASKS[task].replace(" ", "\n", 1), fontsize=10)
        panel.set_ylim(0, 100)
    panels[0].set_ylabel("%")
    handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    ordered = [name for name in names if name in handles]
    figure.legend([handles[n] for n in ordered], ordered, loc="outside lower center", ncols=6, frameon=False)
    _save(pyplot, figure, file)


def _colour(own: Sequence[str], model: str) -> str:
    return COLOURS[list(own).index(model) % len(COLOURS)]


def calibration(scored: Mapping[str, Sequence[ScoredAnswer]], file: Path) -> bool:
    """How often yes is right by the probability of yes, and the ROC curves; False if no model gave probabilities."""
    found = {}
    for model, all_of in scored.items():
        some = [one for one in all_of if one.question.task == "diagnosis"]
        if some and scoring.of_probabilities(some):
            found[model] = scoring.probabilities(some)
    if not found:
        return False
    pyplot = _pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for model, (score, positive) in found.items():
        colour = _colour(list(scored), model)  # the one it has in the other pictures
        which = metrics.bin_of(score, 10)
        counts = np.bincount(which, minlength=10)
        held = counts > 0
        means = np.bincount(which, score, 10)[held] / counts[held]
        shares = np.bincount(which, positive, 10)[held] / counts[held]
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
    left.set(xlabel='probability of "yes"', ylabel="share that is yes", title="calibration, ten bins")
    middle.set(xlabel='probability of "yes"', ylabel="questions", title="how sure it is")
    right.set(xlabel="no, taken for yes", ylabel="yes, found", title="ROC")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    _save(pyplot, figure, file)
    return True


def lengths(scored: Mapping[str, Sequence[ScoredAnswer]], file: Path) -> None:
    """Words of answers and references by task."""
    pyplot = _pyplot()
    first = next(iter(scored.values()))
    tasks = [task for task in TASKS if any(one.question.task == task for one in first)]
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(2.9 * len(tasks), 3), layout="constrained", squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        rows = {"reference": [one.question.references[0] for one in first if one.question.task == task]}
        rows |= {m: [one.given.text for one in of if one.question.task == task] for m, of in scored.items()}
        counts = [[len(text.split()) for text in texts] for texts in rows.values()]
        panel.boxplot(
            counts, orientation="horizontal", whis=(5, 95), showfliers=False, tick_labels=list(rows), widths=0.5
        )
        panel.invert_yaxis()
        panel.set(title=TASKS[task], xlabel="words (box: quartiles, whiskers: 5 and 95 %)")
        panel.xaxis.label.set_fontsize(7)
        panel.set_xlim(left=0)
    _save(pyplot, figure, file)


def _save(pyplot, figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
