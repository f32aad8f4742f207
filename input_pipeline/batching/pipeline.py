"""The Grain iterators: mixture -> windows -> planned rows -> loaded rows -> batches -> devices.

    with Rows(config, "train", batch=32, host=0, hosts=4) as rows:
        for batch in prefetch(batches(rows), device_put):     # device_put: Batch -> arrays on the devices
            ...

    epoch 0                                                    epoch 1
    | window 0          | window 1          | window 2       | window 0 ...
    | row 0 1 2 3 4 5 6 | row 0 1 2 3 4 5 6 7 | ...
      `--batch--' `---batch----'    of each batch, host h loads its share of the rows

The samples of an epoch are shuffled, and divided into windows. A window is planned before anything is loaded. Its rows
depend on the seed, the epoch and the window alone: not on hosts, workers, or an interruption. Windows and epochs follow
each other without a gap; only the end of the last epoch, if there is one, is padded with empty rows.

The state of an iterator is the position of the next batch and the settings that decide the rows. An iterator rejects a
state that was saved with other settings or other data.

The iterators use Grain's `IterDataset`, `batch`, `map` and `ThreadPrefetchIterDataset`. `mp_prefetch` does not fit: its
workers each open the data again, and it cannot name the file that killed or blocked a worker; the workers of
parallel/workers.py share one copy of the data. `ElasticIterator` is not needed: a position in the global rows is the
same on any number of hosts. TFDS reads the records (index/records.py); it does not plan or pack rows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from input_pipeline.batching.collate import Batch, LoadedRow, collate_batch, collate_row
from input_pipeline.batching.load import RowLoader
from input_pipeline.batching.mixture import Mixture
from input_pipeline.batching.plan import PlannedRow
from input_pipeline.batching.report import RowInfo
from input_pipeline.config import DataConfig
from input_pipeline.files import fingerprint
from input_pipeline.parallel.workers import Pool
from input_pipeline.text.alternatives import Form

CHUNK = 256  # samples that a worker measures at a time
CACHED_PLANS = 4  # windows
# The settings that decide the rows, in addition to the data; part of the state.
IDENTITY_FIELDS = (
    "terms", "preprocess", "storage", "size_2d", "size_3d", "depth", "records", "mixture", "epoch_samples", "window",
    "text_length", "vision_rows", "patch_length", "planes", "scans", "share_scans", "shuffle_scans", "max_scans",
    "num_latents", "crop", "flips", "seed",
)  # fmt: skip

Position = tuple[int, int, int]
"""Epoch, window, row."""


class Rows(grain.IterDataset):
    """The rows of one host, in order, as a Grain data set of (arrays of one row, RowInfo or None)."""

    def __init__(
        self,
        config: DataConfig,
        split: str = "train",
        *,
        batch: int,
        host: int = 0,
        hosts: int = 1,
        epochs: int | None = None,
        training: bool | None = None,
        form: Form | None = None,
    ):
        """Open the data in worker processes.

        Args:
          split: "train", "validation" or "test".
          batch: rows of the global batch. host, hosts: the share of it that this process loads.
          epochs: number of epochs; None repeats forever.
          training: apply random crops and flips; default: whether the split is "train".
          form: the segments of a sample (text/alternatives.py); None: one, with its response.
        Raises:
          ValueError: as RowLoader, and if the hosts cannot share a batch evenly.
        """
        super().__init__()
        if batch % hosts or not 0 <= host < hosts:
            raise ValueError(f"{batch} rows a batch cannot be shared evenly by {hosts} hosts (this is host {host})")
        training = split == "train" if training is None else training
        self.config, self.batch_rows, self.host, self.hosts, self.epochs = config, batch, host, hosts, epochs
        self.local_rows = batch // hosts
        self.pool = Pool(
            functools.partial(RowLoader, config, split, training, form), config.workers, config.worker_timeout
        )
        try:
            self.description = self.pool.submit("describing the data", RowLoader.describe).result()
        except BaseException:
            self.pool.close()
            raise
        self.mixture = Mixture(
            self.description["sources"],
            seed=config.seed,
            weights=config.mixture == "weights" and split == "train",
            samples=config.epoch_samples,
        )
        self.windows = -(-len(self.mixture) // config.window)
        settings = {name: getattr(config, name) for name in IDENTITY_FIELDS} | config.own_patches
        settings["flips"] = list(config.flips)  # JSON returns lists, not tuples
        if config.fit != "stretch":  # states saved before this setting existed have none
            settings["fit"] = config.fit
        if form is not None:
            settings["segments of a sample"] = repr(form)
        if config.terms.startswith("umls:"):
            settings["umls_types"] = list(config.umls_types)
        self.identity = {"split": split, "training": training, **settings, **self.description["identity"]}
        share = "weight" if config.mixture == "weights" else "fraction"
        for name, source in self.description["sources"].items():
            sides = [] if source["sides"] is None else [fingerprint(source["sides"])]
            self.identity[f"rows and share of {name}"] = [source["rows"], source[share], *sides]
        # One thread plans one window at a time, ahead of loading.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner") if config.workers else None
        self._cached_plan = functools.lru_cache(maxsize=CACHED_PLANS)(self._start_plan)
        self._shuffled: tuple[int, np.ndarray] | None = None  # the latest epoch and its samples

    def __iter__(self) -> RowIterator:
        return RowIterator(self)

    def prefetch_plan(self, state: dict[str, Any] | None = None) -> None:
        """Start to plan, in the background, the first window or the window of a saved state."""
        if self._planner is not None:
            self._cached_plan(*((state["epoch"], state["window"]) if state else (0, 0)))

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError with every difference if a state was saved with other data or settings."""
        current, saved = self.identity, state["data"]
        differences = [
            f"{key} is {_short(current.get(key))}, was {_short(saved.get(key))}"
            for key in dict.fromkeys([*current, *saved])
            if current.get(key) != saved.get(key)
        ]
        if not differences:
            return
        tables, saved_tables = self.description["tables"], state.get("tables", {})
        sources = self.config.sources(self.identity["split"])
        changed = [
            f"{sources[name]['root']}/{sources[name]['table']}"
            for name, checksum in tables.items()
            if checksum != saved_tables.get(name, checksum)
        ]
        raise ValueError(
            f"the data differ from those of the saved state: {'; '.join(differences)}. "
            + (f"These tables have changed: {', '.join(changed)}. " if changed else "")
            + "Restore them and run prepare again, or start another run from these parameters: another --workdir, and "
            "checkpoint.init_from"
        )

    def plan(self, epoch: int, window: int) -> list[PlannedRow]:
        """Return the rows of a window, and start to plan the next one in the background."""
        result = self._cached_plan(epoch, window)
        next_epoch, next_window = divmod(epoch * self.windows + window + 1, self.windows)
        if self._planner is not None and (self.epochs is None or next_epoch < self.epochs):
            self._cached_plan(next_epoch, next_window)
        return result()

    def _start_plan(self, epoch: int, window: int) -> Callable[[], list[PlannedRow]]:
        """Plan a window, with workers in the background, and return a function that returns its rows."""
        if self._planner is None:
            rows = self._plan_window(epoch, window, eager=True)
            return lambda: rows
        first = not self._cached_plan.cache_info().currsize
        return self._planner.submit(self._plan_window, epoch, window, eager=first).result

    def _plan_window(self, epoch: int, window: int, eager: bool) -> list[PlannedRow]:
        """Measure the samples of a window in the workers, then plan it in one of them.

        eager: use all workers, since there is nothing to load yet; otherwise one at a time.
        """
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, self.mixture.epoch(epoch)
        samples = np.array_split(self._shuffled[1], self.windows)[window]
        chunks = [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]
        name = f"epoch {epoch}, window {window}"
        width = len(chunks) if eager else 1
        parts, pending = [], collections.deque[Future]()
        for chunk in chunks:
            pending.append(self.pool.submit(f"texts of {name}", RowLoader.measure, epoch, chunk))
            if len(pending) == width:
                parts.append(pending.popleft().result())
        parts += [future.result() for future in pending]
        rng_key = (self.config.seed, 2, epoch, window)
        return self.pool.submit(f"plan of {name}", RowLoader.plan, samples, parts, rng_key).result()

    @functools.cached_property
    def empty_row(self) -> dict[str, np.ndarray]:
        """The arrays of a row without samples."""
        config, dtype = self.config, np.dtype(self.config.storage)
        arrays = collate_row(
            LoadedRow(), config.limits, plane_dtype=dtype, channels=config.channels, patch=config.patch
        )
        return arrays | {"tasks": np.zeros_like(arrays["segments"])}

    def close(self) -> None:
        """Stop the workers."""
        self.pool.close()
        if self._planner is not None:
            self._planner.shutdown(cancel_futures=True)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _ScheduledRow:
    """A row of this host."""

    position: Position
    batch: Position  # position of the first row of its global batch
    index: int  # among this host's rows of the batch
    planned: PlannedRow | None  # None for an empty row after the end of the data


class RowIterator(grain.DatasetIterator):
    """Loads `read_ahead` rows ahead, in order. The state is the position of the row that is delivered next."""

    def __init__(self, rows: Rows):
        super().__init__()
        self._rows = rows
        self._restart((0, 0, 0), 0, 0)

    def _restart(self, batch: Position, delivered: int, lost: int) -> None:
        self._batch, self._delivered, self._lost = batch, delivered, lost
        self._schedule = self._schedule_from(batch, delivered)
        self._ahead: collections.deque[tuple[_ScheduledRow, Future | None]] = collections.deque()

    def _schedule_from(self, start: Position, delivered: int) -> Iterator[_ScheduledRow]:
        """Yield this host's rows from the start of a batch, except those already delivered."""
        rows = self._rows
        epoch, window, row = start
        index, batch = 0, start  # index in the global batch
        local = range(rows.host * rows.local_rows, (rows.host + 1) * rows.local_rows)
        while rows.epochs is None or epoch < rows.epochs:
            planned = rows.plan(epoch, window)
            while row < len(planned):
                if index == 0:
                    batch = epoch, window, row
                if index in local and index - local.start >= delivered:
                    yield _ScheduledRow((epoch, window, row), batch, index - local.start, planned[row])
                row += 1
                index += 1
                if index == rows.batch_rows:
                    index, delivered = 0, 0
            row -= len(planned)  # a state may point past the end of a window
            epoch, window = divmod(epoch * rows.windows + window + 1, rows.windows)
        while index % rows.batch_rows:
            if index in local and index - local.start >= delivered:
                yield _ScheduledRow((epoch, window, row), batch, index - local.start, None)
            index += 1

    def __next__(self) -> tuple[dict[str, np.ndarray], RowInfo | None]:
        """Return the next row.

        Raises:
          RowError: a scan cannot be loaded. ValueError: more scans than `data.allowed_loss` cannot be loaded.
          WorkerError: a worker died or hung.
        """
        rows = self._rows
        count = 1 + (rows.config.read_ahead if rows.config.workers else 0)
        while len(self._ahead) < count and (row := next(self._schedule, None)) is not None:
            future = None
            if row.planned is not None:
                name = "epoch {}, window {}, row {}".format(*row.position)
                future = rows.pool.submit(name, RowLoader.load, row.planned, *row.position)
            self._ahead.append((row, future))
        if not self._ahead:
            raise StopIteration
        row, future = self._ahead[0]
        arrays, info = (rows.empty_row, None) if future is None else future.result()
        if info is not None and info.left_out:
            self._lost += len(info.left_out)
            if self._lost > rows.config.allowed_loss:
                allowed = f"data.allowed_loss is {rows.config.allowed_loss}"
                raise ValueError(f"{self._lost} scans could not be loaded, {allowed}: {'; '.join(info.left_out)}")
        self._ahead.popleft()
        if row.index + 1 == rows.local_rows:
            epoch, window, first = row.batch
            self._batch, self._delivered = (epoch, window, first + rows.batch_rows), 0
        else:
            self._batch, self._delivered = row.batch, row.index + 1
        return arrays, info

    def get_state(self) -> dict[str, Any]:
        """Return the state as JSON values. At the end of a batch, all hosts have the same state."""
        epoch, window, row = self._batch
        state = {"epoch": epoch, "window": window, "row": row, "delivered": self._delivered, "lost": self._lost}
        return state | {"data": self._rows.identity, "tables": self._rows.description["tables"]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state. Raises ValueError with every difference if it was saved with other data or settings."""
        self._rows.check_state(state)
        if state["delivered"] >= self._rows.local_rows:
            raise ValueError(
                f"the saved state is after row {state['delivered']} of a batch, but this host has only "
                f"{self._rows.local_rows} rows of one: resume with the same number of hosts"
            )
        self._restart((state["epoch"], state["window"], state["row"]), state["delivered"], state["lost"])


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:13] + "..." + text[-4:]


def batches(rows: Rows) -> grain.IterDataset:
    """Group the host's rows by global batch, as Batch."""
    return rows.batch(rows.local_rows, batch_fn=functools.partial(collate_batch, planes=rows.config.planes))


def prefetch(dataset: grain.IterDataset, device_put: Callable[[Batch], Any] | None = None, buffer: int = 2):
    """Load batches ahead of the training step, in a thread.

    Args:
      device_put: Batch -> the input of the step, called in that thread; None leaves batches on the host.
      buffer: number of batches to keep ready; with `device_put` they use device memory.
    """
    dataset = dataset if device_put is None else dataset.map(device_put)
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=buffer)
