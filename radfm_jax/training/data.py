"""The data of a run: both splits, opened at once, and their batches on the devices."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import grain
import jax

from input_pipeline.batching.collate import Batch
from input_pipeline.batching.pipeline import Rows, batches, prefetch
from input_pipeline.config import DataConfig
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment


class OpenSplits:
    """Opens the training and test rows in background threads; `splits("train")` waits for one of them.

    A call raises the error with which the split failed to open. `shard` has Rows' arguments batch, host and hosts.
    """

    def __init__(self, config: DataConfig, shard: dict):
        families = {fields.get("family") for fields in config.sources().values()}
        if not config.workers and (config.records or "tfds" in families):
            # Imported before the threads start: while it is imported, imports in other threads return lazy modules.
            import tensorflow_datasets  # noqa: F401
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="opening")
        self._futures = {"train": self._threads.submit(Rows, config, "train", **shard)}
        if config.test:
            self._futures["test"] = self._threads.submit(Rows, config, "test", **shard, epochs=1)

    def __call__(self, split: str) -> Rows:
        return self._futures[split].result()

    def close(self) -> None:
        self._threads.shutdown()
        for future in self._futures.values():
            if future.exception() is None:
                future.result().close()


def check_model(config: Experiment, rows: Rows) -> None:
    """Raise ValueError if the data do not fit the model's latents or vocabulary."""
    latents, vocabulary = config.model.num_latents, config.model.llama.vocab_size
    if config.data.num_latents != latents:
        raise ValueError(f"data.num_latents is {config.data.num_latents}, but the model has {latents} latents per scan")
    pieces = rows.description["vocab_size"]
    if pieces != vocabulary:
        raise ValueError(f"{config.data.tokenizer} has {pieces} pieces, but model.llama.vocab_size is {vocabulary}")


def step_count(config: Experiment, rows: Rows) -> int:
    """Return `train.steps`, or the steps of `train.epochs` estimated from how the first window packs."""
    if config.train.steps:
        return config.train.steps
    rows_per_epoch = len(rows.plan(0, 0)) * rows.windows
    return math.ceil(config.train.epochs * rows_per_epoch / config.train.batch)


def device_batches(rows: Rows, mesh: jax.sharding.Mesh, accumulation: int) -> grain.DatasetIterator:
    """Iterate over (arrays [A, B, ...] on the devices, row infos), prefetched."""

    def put(batch: Batch):
        return train_step.put_batch(batch.arrays, mesh, accumulation), batch.rows

    return iter(prefetch(batches(rows), put))
