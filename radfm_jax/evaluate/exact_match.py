"""`python -m radfm_jax.evaluate --config=configs/x.py --checkpoint=DIR --out=DIR`: exact match on held-out rows.

A sample is right if greedy decoding says its reference token by token. That is known without decoding: each token of
the reference must be the most likely one after those before it.

OUT/answers.jsonl     a line a sample: source, row_id, study, task, question, reference, exact, scans_of
OUT/accuracy.json     the table
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from input_pipeline import command_line
from input_pipeline.batching.pipeline import Rows, batches, prefetch
from input_pipeline.batching.report import RowInfo
from input_pipeline.config import DataConfig
from input_pipeline.datasets import sample_rng
from input_pipeline.samples import Text
from input_pipeline.sources import open_sources
from radfm_jax import api
from radfm_jax.models.radfm import RadFM, segment_max
from radfm_jax.runtime import console
from radfm_jax.training import losses
from radfm_jax.training.experiment import Experiment

DESCRIPTION = """\
Scores a checkpoint on the test sources of a config: how many answers are right to the letter, by source and question,
with 95 % intervals; and the same with the scans exchanged between samples, where only what can be guessed without
looking is left.
"""
EPILOG = """\
examples:
  python -m radfm_jax.evaluate --config=configs/quickstart.py --checkpoint=runs/quickstart/finetune --out=scores
  python -m radfm_jax.evaluate --config=configs/x.py --checkpoint=runs/x/checkpoints/500 --out=scores --no-control
"""
# Sources with few questions are told apart by question, answers of which there are few are balanced.
FEW = 10


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A sample and whether its reference is what the model says.

    Attributes:
      scans_of: `own`, or `another` sample's (the control).
    """

    source: str
    row_id: str
    study: str | None
    task: str
    question: str
    reference: str
    exact: bool
    scans_of: str = "own"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Shares of right answers to one kind of question.

    Attributes:
      exact: of all. low, high: its 95 % interval (Wilson).
      balanced: mean over the references, each counting once; None if there are more than `FEW`.
    """

    kind: str
    samples: int
    exact: float
    low: float
    high: float
    balanced: float | None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m radfm_jax.evaluate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_config(parser)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="a run, or one of its steps")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results are written")
    parser.add_argument("--no-control", action="store_true", help="leave out the pass with exchanged scans")
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    try:
        experiment = Experiment.from_dict(config)
        if not experiment.data.test:
            raise ValueError(f"{args.config}: data.test names no source")
        model = api.load(args.checkpoint)
        if model.config != experiment.model:
            raise ValueError(f"{args.checkpoint} has other sizes than the model of {args.config}")
        scored = evaluate(experiment, model.params, control=not args.no_control)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(scored, args.out)
    console.log(table(scored))
    return 0


def evaluate(config: Experiment, params: dict, *, control: bool = True, progress: bool = True) -> list[ExactMatch]:
    """Every sample of the test sources; with `control` once more with the scans of another one.

    Raises ValueError: mistakes in the data.
    """
    step = jax.jit(functools.partial(_exact, config.compute, config.train.step.weighting, config.train.chunk))
    scored = []
    for shuffled in (False, True)[: 1 + control]:
        data = dataclasses.replace(config.data, shuffle_scans=shuffled)
        what = "another" if shuffled else "own"
        texts = _Texts(data)
        with contextlib.ExitStack() as opened:
            rows = opened.enter_context(Rows(data, "test", batch=config.train.batch, epochs=1))
            bar = opened.enter_context(Progress(console=Console(stderr=True), disable=not progress))
            task = bar.add_task(f"scoring, scans of {'others' if shuffled else 'their own'}", total=len(rows.mixture))
            for infos, arrays in prefetch(batches(rows), lambda batch: (batch.rows, batch.arrays)):
                exact = jax.device_get(step(params, arrays))
                found = list(_of_rows(infos, exact, texts, what))
                scored += found
                bar.update(task, advance=len(found))
    return scored


def _exact(model, weighting: str, chunk: int, params: dict, batch: dict) -> jax.Array:
    """bool[B, T + 1]: whether every trained token of segment s is the most likely one."""
    _, _, out = losses.radfm_loss(RadFM(model), params, batch, weighting=weighting, chunk=chunk)
    return ~segment_max(batch["segments"], (out["weights"] > 0) & ~out["correct"])


def _of_rows(infos: Sequence[RowInfo | None], exact: np.ndarray, texts: _Texts, scans_of: str) -> Iterator[ExactMatch]:
    for info, right in zip(infos, exact, strict=True):
        for segment, sample in enumerate(info.samples if info else (), 1):
            question, reference = texts[sample.source, sample.row_id]
            yield ExactMatch(
                sample.source, sample.row_id, sample.study, sample.task, question, reference, bool(right[segment]),
                scans_of,
            )  # fmt: skip


class _Texts:
    """(source, row id) -> question and reference, as the model is given them."""

    def __init__(self, config: DataConfig):
        self.config, self.datasets = config, open_sources(config, "test")
        self.rows = {name: {d.row_id(i): i for i in range(len(d))} for name, d in self.datasets.items()}

    def __getitem__(self, key: tuple[str, str]) -> tuple[str, str]:
        source, row_id = key
        rng = sample_rng(self.config.seed, 0, source, row_id)
        sample = self.datasets[source].sample(self.rows[source][row_id], rng)
        said = {
            role: " ".join(p.text.strip() for p in sample.parts if isinstance(p, Text) and p.role == role)
            for role in ("instruction", "response", "interleaved")
        }
        return said["instruction"], said["response"] or said["interleaved"]


# --- what they add up to ----------------------------------------------------------------------------------------------


def accuracies(scored: Iterable[ExactMatch]) -> list[Accuracy]:
    """By source, and by question where a source has few of them."""
    by_source: dict[str, dict[str, list[ExactMatch]]] = {}
    for one in scored:
        by_source.setdefault(one.source, {}).setdefault(one.question, []).append(one)
    found = []
    for source, questions in sorted(by_source.items()):
        if 1 < len(questions) <= FEW:
            found += [_accuracy(f"{source}: {question}", some) for question, some in sorted(questions.items())]
        else:
            found.append(_accuracy(source, [one for some in questions.values() for one in some]))
    return found


def _accuracy(kind: str, some: Sequence[ExactMatch]) -> Accuracy:
    references: dict[str, list[bool]] = {}
    for one in some:
        references.setdefault(one.reference, []).append(one.exact)
    right, n = sum(one.exact for one in some), len(some)
    balanced = float(np.mean([np.mean(x) for x in references.values()])) if len(references) <= FEW else None
    return Accuracy(kind, n, right / n, *wilson(right, n), balanced)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): inside [0, 1] also for few samples and shares near 0 or 1."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def write(scored: Sequence[ExactMatch], out: Path) -> None:
    """answers.jsonl and accuracy.json."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "answers.jsonl", "w") as file:
        file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in scored)
    found = {
        scans_of: [dataclasses.asdict(a) for a in accuracies(one for one in scored if one.scans_of == scans_of)]
        for scans_of in dict.fromkeys(one.scans_of for one in scored)
    }
    (out / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")


def table(scored: Sequence[ExactMatch]) -> Table:
    """Rows: kinds of questions. Columns: samples, exact match and its interval, balanced; the control."""
    shown = Table("question", "samples", "right", "95 % interval", "balanced", "scans exchanged", title="exact match")
    control = {a.kind: a for a in accuracies(one for one in scored if one.scans_of == "another")}
    for a in accuracies(one for one in scored if one.scans_of == "own"):
        guessed = control.get(a.kind)
        shown.add_row(
            a.kind, f"{a.samples:,}", f"{a.exact:.1%}", f"{a.low:.1%} to {a.high:.1%}",
            "" if a.balanced is None else f"{a.balanced:.1%}", f"{guessed.exact:.1%}" if guessed else "",
        )  # fmt: skip
    return shown
