"""What a model card says about training and scores, from the records of a checkpoint's runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from input_pipeline.files import read_json
from radfm_jax.checkpoints import run_directory
from radfm_jax.inference import stored

MAX_STAGES = 10  # runs that are followed through `init_from`
METRICS = {"samples": "samples", "exact_match": "exact match", "token_accuracy": "token accuracy", "loss": "loss"}
ACCURACY = "accuracy.json"  # of `radfm_jax.evaluate`


def training(src) -> str:
    """Return Markdown about the stages, the data and the validation metrics of a checkpoint's training.

    Paths of the training machine are not shown, only the names of runs and sources.
    """
    runs = list(_stages(Path(src)))
    if not runs:
        origin = stored.origin_of(src)
        known = f" The weights are step {origin['step']} of the run `{origin['training']}`." if origin else ""
        return f"The checkpoint has no record of its training data.{known}"
    name, run = runs[-1]
    sources = _value(run, "config", "data", "train") or {}
    start = _value(runs[0][1], "config", "checkpoint", "init_from")
    lines = [f"- initialised from `{Path(start).name}` (no record of that run in this export)"] if start else []
    parts = ["\n".join([*lines, *(f"- `{stage}`: {_stage(record)}" for stage, record in runs)])]
    if sources:
        kinds = [f"`{source}` ({_value(options, 'family') or 'unknown family'})" for source, options in sources.items()]
        parts.append(f"Training sources of `{name}`: {', '.join(kinds)}.")
    if rows := _metrics(run.get("metrics") or {}):
        parts += [f"Scores of step {run.get('step')} on the validation samples of the run:", _table(rows)]
    return "\n\n".join(parts)


def scores(directory) -> str:
    """Return Markdown with the table of an output directory of `radfm_jax.evaluate`.

    Raises ValueError if it has no accuracy.json, or a damaged one.
    """
    path = Path(directory) / ACCURACY
    if not path.is_file():
        raise ValueError(f"{directory} has no {ACCURACY}: pass the output directory of `python -m radfm_jax.evaluate`")
    content = read_json(path, kind=dict)
    try:
        control = {line["kind"]: f"{line['exact']:.1%}" for line in content.get("another", ())}
        rows = [
            (x["kind"], f"{x['samples']:,}", f"{x['exact']:.1%} ({x['low']:.1%} to {x['high']:.1%})",
             control.get(x["kind"], ""))
            for x in content["own"]
        ]  # fmt: skip
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}): evaluate again") from None
    head = ("test questions", "samples", "exact match (95 % interval)", "with another patient's scans")
    return _table([head, *rows])


def _stages(src: Path) -> Iterator[tuple[str, dict]]:
    """Yield (name, run.json) of the runs that led to a checkpoint, as far as they can be read, the first one first."""
    runs: list[tuple[str, dict]] = []
    directory: Path | None = src.absolute()
    while directory is not None and len(runs) < MAX_STAGES:
        try:
            run = run_directory.read_run(directory)
        except (OSError, ValueError):  # another version, or a checkpoint without a run
            break
        runs.append((str(stored.origin_of(directory).get("training") or directory.name), run))
        directory = _parent(_value(run, "config", "checkpoint", "init_from"), directory)
    yield from reversed(runs)


def _parent(init_from: Any, directory: Path) -> Path | None:
    """Return the checkpoint that a run started from; its path may be relative to the folder of the training."""
    if not isinstance(init_from, str) or not init_from:
        return None
    candidates = (folder / init_from for folder in (Path.cwd(), *directory.parents))
    found = next((path for path in candidates if path.is_dir()), None)
    try:
        return None if found is None else run_directory.select_checkpoint(found)
    except ValueError:
        return None


def _stage(run: Mapping) -> str:
    """Return the steps, the batch and the frozen parts of a run."""
    config = run.get("config") or {}
    facts = [f"{run.get('step')} steps"]
    for label, path in (
        ("batch", ("train", "batch")), ("optimizer", ("optimizer", "method")),
        ("learning rate", ("optimizer", "learning_rate")), ("preprocessing", ("data", "preprocess")),
        ("frozen", ("optimizer", "frozen")),
    ):  # fmt: skip
        if value := _value(config, *path):
            facts.append(f"{label} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    return ", ".join(facts)


def _metrics(metrics: Mapping) -> list[tuple[str, ...]]:
    """Return a table of the validation metrics by task; empty without any."""
    names = [key.split("/") for key in metrics if key.startswith("validation/") and key.count("/") == 2]
    tasks, columns = dict.fromkeys(n[1] for n in names), [m for m in METRICS if any(n[2] == m for n in names)]
    rows = [
        (task, *(_number(metrics.get(f"validation/{task}/{metric}"), metric) for metric in columns)) for task in tasks
    ]
    return [("task", *(METRICS[metric] for metric in columns)), *rows] if rows else []


def _number(value: Any, metric: str) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if metric == "samples" else f"{value:.3f}" if metric == "loss" else f"{value:.1%}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def _value(record: Any, *path: str) -> Any:
    """Return a value of nested mappings, or None."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record
