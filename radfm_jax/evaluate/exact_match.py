"""`python -m radfm_jax.evaluate --config=configs/x.py --checkpoint=DIR --out=DIR`: exact match on test rows.

A sample is correct if greedy decoding generates its reference token by token. Teacher forcing checks this without
decoding: each token of the reference must be the most likely one after the tokens before it.

OUT/exact_match.jsonl   a sample per line: source, row_id, study, task, question, reference, exact, scans_of
OUT/accuracy.json       the table
OUT/answers.jsonl       readable answers to some of the samples (own_answers.py)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress
from rich.table import Table
from rich.text import Text as Line

from input_pipeline import command_line, files
from input_pipeline.batching.pipeline import Rows, batches, prefetch
from input_pipeline.batching.report import RowInfo
from input_pipeline.config import DataConfig
from input_pipeline.datasets import sample_rng
from input_pipeline.field_rules import errors_of
from input_pipeline.samples import Text
from input_pipeline.sources import open_sources
from radfm_jax import api, terminal
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate import own_answers
from radfm_jax.evaluate.plausibility import few_steps
from radfm_jax.models.radfm import RadFM, segment_max
from radfm_jax.runtime import console
from radfm_jax.training import losses
from radfm_jax.training.experiment import Experiment

DESCRIPTION = """\
Score a checkpoint on the test sources of a config: exact-match accuracy by source and question, with 95 % intervals. A
second pass exchanges the scans between samples, as a control: it measures the accuracy without the right scan. Then the
model generates answers to some questions.

OUT/answers.jsonl has these questions with reference, answer, and whether the answer is correct.
"""
EPILOG = """\
examples:
  python -m radfm_jax.evaluate --config=configs/quickstart.py --checkpoint=runs/quickstart/finetune --out=scores
  python -m radfm_jax.evaluate --config=configs/x.py --checkpoint=runs/x/checkpoints/500 --out=scores --no-control
"""
# A source with at most this many questions gets one row per question. Balanced accuracy needs at most this many
# references.
FEW = 10


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A sample, and whether the model generates its reference."""

    source: str
    row_id: str
    study: str | None
    task: str
    question: str
    reference: str
    exact: bool
    scans_of: str = "own"  # or `another` sample (the control)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Exact-match accuracy on one kind of question."""

    kind: str
    samples: int
    exact: float
    low: float  # lower end of the 95 % interval of `exact` (Wilson)
    high: float
    balanced: float | None  # mean of the accuracies of each reference; None if there are more than `FEW` references


def main(argv: list[str] | None = None) -> int:
    parser = terminal.parser("python -m radfm_jax.evaluate", DESCRIPTION, EPILOG)
    command_line.add_config(parser)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="a run or a checkpoint")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output directory")
    parser.add_argument("--no-control", action="store_true", help="skip the pass with exchanged scans")
    parser.add_argument(
        "--answers", default=50, type=_count, metavar="N", help="number of questions of each source to "
        "generate answers to, or all (default: 50)"
    )  # fmt: skip
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    try:
        with errors_of(args.config):
            experiment = Experiment.from_dict(config)
        if not experiment.data.test:
            raise ValueError(f"{args.config}: data.test is empty: add a source")
        model = api.load(args.checkpoint)
        # The checkpoint knows its adapters; the config need not repeat them.
        options = {"lora": model.config.lora, "base": model.config.base}
        experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **options))
        if model.config != experiment.model:
            raise ValueError(f"{args.checkpoint} and {args.config} have different model sizes: pass the run's config")
        scored = evaluate(experiment, model.params, control=not args.no_control)
        write(scored, args.out)
        console.log(table(scored))
        answered = args.answers != 0 and _answer(args, experiment, model)
    except ValueError as error:
        terminal.message(f"error: {error}", style="red")
        return 2
    terminal.message(f"results: {args.out / 'accuracy.json'}, {args.out / 'exact_match.jsonl'}")
    if answered:
        terminal.message(
            f"next: read the answers that are not correct in {args.out / 'answers.jsonl'}; BLEU, ROUGE and other "
            "models: python -m radfm_jax.evaluate radbench --help"
        )
    return 0


def _count(text: str) -> int | None:
    """Return the number of --answers; None for all."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number or all (got {text!r})")
    return int(text)


def _answer(args: argparse.Namespace, experiment: Experiment, model: api.Model) -> bool:
    """Generate answers to some questions and print the counts. Returns whether there are any answers."""
    names = {"model": args.checkpoint.name, "checkpoint": checkpoint.digest(model.directory)}
    with terminal.answer_progress(every=50) as progress:
        scored, skips = own_answers.answer(
            experiment, model.params, args.out, per_source=args.answers, progress=progress, **names
        )
    for source, reasons in skips.items():
        for reason, count in reasons.items():
            terminal.message(f"not answered: {source}: {count:,} rows: {reason}")
    shown = Table("source", "answers", "correct", "refused", "failed", title="answers in words")
    for row in own_answers.by_source(scored):
        shown.add_row(*(Line(str(cell)) for cell in row))
    if scored:
        console.log(shown)
    for warning in (*few_steps(model.directory), *own_answers.warnings_of(scored)):
        terminal.message(f"warning: {warning}", style="red")
    return bool(scored)


def evaluate(config: Experiment, params: dict, *, control: bool = True, progress: bool = True) -> list[ExactMatch]:
    """Score all samples of the test sources; with `control`, a second time with the scans of another sample.

    Raises ValueError if the data are invalid.
    """
    step = functools.partial(_exact, config.compute, config.train.step.weighting, config.train.chunk)
    scored = []
    for shuffled in (False, True)[: 1 + control]:
        data = dataclasses.replace(config.data, shuffle_scans=shuffled)
        scans_of = "another" if shuffled else "own"
        texts = _Texts(data)
        with (
            Rows(data, "test", batch=config.train.batch, epochs=1) as rows,
            Progress(console=console.stderr, disable=not progress) as bar,
        ):
            task = bar.add_task(f"scoring with {scans_of} scans", total=len(rows.mixture))
            for infos, arrays in prefetch(batches(rows), lambda batch: (batch.rows, batch.arrays)):
                exact = jax.device_get(step(params, arrays))
                samples = list(_matches(infos, exact, texts, scans_of))
                scored += samples
                bar.update(task, advance=len(samples))
    return scored


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _exact(model, weighting: str, chunk: int, params: dict, batch: dict) -> jax.Array:
    """Return bool[B, T + 1]: whether every trained token of segment s is the most likely one."""
    _, _, out = losses.radfm_loss(RadFM(model), params, batch, weighting=weighting, chunk=chunk)
    return ~segment_max(batch["segments"], (out["weights"] > 0) & ~out["correct"])


def _matches(infos: Sequence[RowInfo | None], exact: np.ndarray, texts: _Texts, scans_of: str) -> Iterator[ExactMatch]:
    for info, exact_of_row in zip(infos, exact, strict=True):
        for segment, sample in enumerate(info.samples if info else (), 1):
            question, reference = texts[sample.source, sample.row_id]
            yield ExactMatch(
                sample.source, sample.row_id, sample.study, sample.task, question, reference,
                bool(exact_of_row[segment]), scans_of,
            )  # fmt: skip


class _Texts:
    """Map (source, row id) to the question and reference that the model reads."""

    def __init__(self, config: DataConfig):
        self.config, self.datasets = config, open_sources(config, "test")
        self.rows = {name: {d.row_id(i): i for i in range(len(d))} for name, d in self.datasets.items()}

    def __getitem__(self, key: tuple[str, str]) -> tuple[str, str]:
        source, sample_id = key
        rows, window, row_id = self.rows[source], None, sample_id
        if row_id not in rows:  # Dataset.sample_id of a row with windows
            row_id, _, number = sample_id.rpartition(".")
            window = int(number) - 1
        sample = self.datasets[source].sample(rows[row_id], sample_rng(self.config.seed, 0, source, sample_id), window)
        texts = {
            role: " ".join(p.text.strip() for p in sample.parts if isinstance(p, Text) and p.role == role)
            for role in ("instruction", "response", "interleaved")
        }
        return texts["instruction"], texts["response"] or texts["interleaved"]


def accuracies(matches: Iterable[ExactMatch]) -> list[Accuracy]:
    """Return the accuracy by source, and by question if the source has few of them."""
    by_source: dict[str, dict[str, list[ExactMatch]]] = {}
    for match in matches:
        by_source.setdefault(match.source, {}).setdefault(match.question, []).append(match)
    rows = []
    for source, questions in sorted(by_source.items()):
        if 1 < len(questions) <= FEW:
            rows += [_accuracy(f"{source}: {question}", group) for question, group in sorted(questions.items())]
        else:
            rows.append(_accuracy(source, [match for group in questions.values() for match in group]))
    return rows


def _accuracy(kind: str, matches: Sequence[ExactMatch]) -> Accuracy:
    references: dict[str, list[bool]] = {}
    for match in matches:
        references.setdefault(match.reference, []).append(match.exact)
    correct, n = sum(match.exact for match in matches), len(matches)
    balanced = float(np.mean([np.mean(x) for x in references.values()])) if len(references) <= FEW else None
    return Accuracy(kind, n, correct / n, *wilson(correct, n), balanced)


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927). It stays inside [0, 1] for small n and extreme values."""
    p = correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def _by_scans(matches: Sequence[ExactMatch]) -> dict[str, list[Accuracy]]:
    kinds = dict.fromkeys(match.scans_of for match in matches)
    return {kind: accuracies(match for match in matches if match.scans_of == kind) for kind in kinds}


def write(matches: Sequence[ExactMatch], out: Path) -> None:
    """Write exact_match.jsonl and accuracy.json."""
    out.mkdir(parents=True, exist_ok=True)
    files.write_json_lines(out / "exact_match.jsonl", map(dataclasses.asdict, matches))
    rows = {kind: [dataclasses.asdict(a) for a in accuracy] for kind, accuracy in _by_scans(matches).items()}
    files.write_json(out / "accuracy.json", rows)


def table(matches: Sequence[ExactMatch]) -> Table:
    """Return the table of the terminal: a row per kind of question, with the control in the last column."""
    shown = Table("question", "samples", "right", "95 % interval", "balanced", "scans exchanged", title="exact match")
    by_scans = _by_scans(matches)
    control = {a.kind: a for a in by_scans.get("another", ())}
    for a in by_scans.get("own", ()):
        exchanged = control.get(a.kind)
        shown.add_row(
            a.kind, f"{a.samples:,}", f"{a.exact:.1%}", f"{a.low:.1%} to {a.high:.1%}",
            "" if a.balanced is None else f"{a.balanced:.1%}", f"{exchanged.exact:.1%}" if exchanged else "",
        )  # fmt: skip
    return shown
