"""The data of a run: the training and validation rows, opened at once, and their batches on the devices."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import jax

from input_pipeline.batching.collate import Batch
from input_pipeline.batching.pipeline import Rows, batches, prefetch
from input_pipeline.config import DataConfig
from input_pipeline.field_rules import raise_problems
from radfm_jax.evaluate import radbench
from radfm_jax.models.encoders.kinds import data_problems
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.objectives import Objective


class OpenSplits:
    """Opens the training and validation rows in background threads; `splits("train")` waits for one of them.

    A call raises the error of a split that failed to open. `shard` has the arguments batch, host and hosts of Rows.
    `objective` decides the segments of a sample.
    """

    def __init__(self, config: DataConfig, shard: dict, objective: Objective | None = None):
        read = config.sources("train") | config.sources("validation")
        families = {fields.get("family") for fields in read.values()}
        if not config.workers and (config.records or "tfds" in families):
            # Import this before the threads start: during this import, imports in other threads return lazy modules.
            import tensorflow_datasets  # noqa: F401
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="opening")
        form = lambda training: objective.form(training) if objective else None  # noqa: E731
        self._futures = {"train": self._threads.submit(Rows, config, "train", **shard, form=form(True))}
        if config.validates:
            shard = shard | {"epochs": 1, "form": form(False)}
            self._futures["validation"] = self._threads.submit(Rows, config, "validation", **shard)

    def __call__(self, split: str) -> Rows:
        return self._futures[split].result()

    def close(self) -> None:
        self._threads.shutdown()
        for future in self._futures.values():
            if future.exception() is None:
                future.result().close()


def check_validation(config: Experiment) -> None:
    """Raise ValueError if a validation source is a test table, unless `train.validate_on_test`."""
    file = lambda fields: (Path(fields["root"]).absolute() / fields["table"], fields.get("split"))  # noqa: E731
    tests, problems = {file(fields) for fields in config.data.sources("test").values()}, []
    for name, fields in config.data.sources("validation").items():
        words = {*re.split("[^a-z0-9]+", str(fields["table"]).lower()), fields.get("split")}
        if file(fields) in tests:
            problems.append(f"data.validation.{name} reads {fields['table']}, which data.test reads too")
        elif fields["family"] in radbench.DATASETS and "test" in words:
            title = radbench.DATASETS[fields["family"]].title
            problems.append(f"data.validation.{name} reads {fields['table']}, a test table of RadBench ({title})")
    if problems and not config.train.validate_on_test:
        raise ValueError(
            f"{'; '.join(problems)}: the best step would be selected on test data. Use data.validation_share or "
            "another table, or set train.validate_on_test=True"
        )


def check_model(config: Experiment, rows: Rows) -> None:
    """Raise ValueError if the data do not fit the model's latents, vision encoder or vocabulary."""
    latents, vocabulary = config.model.num_latents, config.model.llama.vocab_size
    if config.data.num_latents != latents:
        raise ValueError(f"data.num_latents is {config.data.num_latents}, but the model has {latents} latents per scan")
    raise_problems(data_problems(config.model.vision, config.data))
    pieces = rows.description["vocab_size"]
    if pieces != vocabulary:
        padded = ""
        if pieces < vocabulary:
            padded = f": if the vocabulary of the model is padded, set data.vocab_size={vocabulary}"
        reason = f"{config.data.tokenizer} has {pieces} pieces, but model.llama.vocab_size is {vocabulary}{padded}"
        raise ValueError(reason)


def step_count(config: Experiment, rows: Rows) -> int:
    """Return `train.steps`, or the steps of `train.epochs`, estimated from the packing of the first window."""
    if config.train.steps:
        return config.train.steps
    rows_per_epoch = len(rows.plan(0, 0)) * rows.windows
    return math.ceil(config.train.epochs * rows_per_epoch / config.train.batch)


def device_batches(rows: Rows, mesh: jax.sharding.Mesh, accumulation: int) -> grain.DatasetIterator:
    """Iterate over (arrays [A, B, ...] on the devices, row infos), prefetched."""

    def put(batch: Batch):
        return train_step.put_batch(batch.arrays, mesh, accumulation), batch.rows

    return iter(prefetch(batches(rows), put))
