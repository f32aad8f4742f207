"""The Grain chain: mixture -> windows -> planned rows -> loaded rows -> batches -> device.

    with Rows(config, "train", batch=32, host=0, hosts=4) as rows:
        for batch in prefetch(batches(rows), place):     # place: Batch -> arrays on the devices
            ...

    epoch 0                                                    epoch 1
    | window 0          | window 1          | window 2       | window 0 ...
    | row 0 1 2 3 4 5 6 | row 0 1 2 3 4 5 6 7 | ...
      `--batch--' `---batch----'    of each batch, host h loads its share of the rows

The samples of an epoch are shuffled as one, and cut into windows. A window is planned (rows.RowMaker.pack) before
anything is loaded, and its rows follow from the seed, the epoch and the window alone: not from hosts, workers, or when
the run was interrupted. Windows and epochs follow each other without a gap; only the end of the last epoch, if there is
one, is filled up with empty rows.

The state is the place of the next batch's first row, and what the plan depends on; a state of other data is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from input_pipeline.batching import packing
from input_pipeline.batching.rows import PADDING, Planned, RowInfo, RowMaker
from input_pipeline.config import DataConfig
from input_pipeline.parallel.workers import Pool

CHUNK = 256  # samples that a worker measures at a time
# What decides the rows, beside the data themselves.
DECIDING = (
    "terms", "preprocess", "storage", "size_2d", "size_3d", "depth", "records", "mixture", "epoch_samples", "window",
    "text_length", "vision_rows", "patch_length", "planes", "scans", "share_scans", "shuffle_scans", "max_scans",
    "num_latents", "crop", "flips", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Batch:
    """This host's rows of a global batch.

    Attributes:
      arrays: as drawn in radfm_jax/models/radfm.py, with targets and tasks int32[B, T], weights
        float32[B, T].
      rows: what stands in each; None for an empty row behind the end of the data.
    """

    arrays: dict[str, np.ndarray]
    rows: tuple[RowInfo | None, ...]


class Mixture:
    """Which samples an epoch has, and in which order.

    Args:
      sources: of RowMaker.describe, in order.
      weights: shares of `samples` by weight, instead of each source's own fraction of its rows.
    """

    def __init__(self, sources: dict[str, dict], *, seed: int, weights: bool, samples: int = 0):
        self.seed = seed
        self.sizes = np.array([s["rows"] for s in sources.values()], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        if weights:
            shares = np.array([s["weight"] for s in sources.values()])
            exact = shares / shares.sum() * (samples or int(self.sizes.sum()))
            self.counts = np.floor(exact).astype(np.int64)
            largest_remainders = np.argsort(-(exact - self.counts), kind="stable")
            self.counts[largest_remainders[: round(exact.sum()) - int(self.counts.sum())]] += 1
        else:
            fractions = [s["fraction"] for s in sources.values()]
            self.counts = np.array([max(round(n * f), 1) for n, f in zip(self.sizes, fractions, strict=True)])

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self.counts.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """int64[len(self)]: the samples of an epoch, as numbers that count through all sources.

        A source is gone through again and again, each time in another order; an epoch takes the next `count` of that.
        So a fifth of the rows an epoch shows each row once in five epochs.
        """
        parts = []
        for source, (size, count) in enumerate(zip(self.sizes.tolist(), self.counts.tolist(), strict=True)):
            at, end = epoch * count, (epoch + 1) * count
            while at < end:
                turn, first = divmod(at, size)
                last = min(size, first + end - at)
                order = self._rng(0, source, turn).permutation(size)
                parts.append(self.starts[source] + order[first:last])
                at += last - first
        return self._rng(1, epoch, 0).permutation(np.concatenate(parts))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64((self.seed, *key)))


class Rows(grain.IterDataset):
    """The rows of one host, in order, as a Grain data set of (arrays of one row, RowInfo or None).

    Args:
      split: "train" or "test".
      batch: rows of the global batch. host, hosts: which share of it this process loads.
      epochs: None goes on for ever.
      training: random crops and flips; default: whether the split is "train".
    Raises:
      ValueError: as RowMaker, and a batch that the hosts cannot share evenly.
    """

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
    ):
        super().__init__()
        if batch % hosts or not 0 <= host < hosts:
            raise ValueError(f"{batch} rows a batch cannot be shared evenly by {hosts} hosts (this is host {host})")
        training = split == "train" if training is None else training
        self.config, self.batch_rows, self.host, self.hosts, self.epochs = config, batch, host, hosts, epochs
        self.local_rows = batch // hosts
        self.pool = Pool(functools.partial(RowMaker, config, split, training), config.workers, config.worker_timeout)
        try:
            self.description = self.pool.submit("describing the data", RowMaker.describe).result()
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
        deciding = {name: _plain(getattr(config, name)) for name in DECIDING}
        sources = {
            name: [s["rows"], s["weight"] if config.mixture == "weights" else s["fraction"]]
            for name, s in self.description["sources"].items()
        }
        self.identity = {"split": split, "training": training, **deciding, **self.description["identity"]}
        self.identity |= {f"rows and share of {name}": value for name, value in sources.items()}
        # Planning runs ahead of loading; one window at a time.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner") if config.workers else None
        self._plans: collections.OrderedDict[tuple[int, int], Future] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> RowIterator:
        return RowIterator(self)

    def begin(self, state: dict[str, Any] | None = None) -> None:
        """Begins to plan what will be asked for first: from a state on, or the beginning."""
        if self._planner is not None:
            self._planned(*((state["epoch"], state["window"]) if state else (0, 0)))

    def plan(self, epoch: int, window: int) -> list[Planned]:
        """The rows of a window. Planning of the next one begins."""
        return self._planned(epoch, window).result()

    def _planned(self, epoch: int, window: int) -> Future:
        following = divmod(epoch * self.windows + window + 1, self.windows)
        with self._lock:
            for wanted in ((epoch, window), following):
                if wanted not in self._plans and (self.epochs is None or wanted[0] < self.epochs):
                    if self._planner is None:
                        if wanted == (epoch, window):
                            self._plans[wanted] = done = Future()
                            done.set_result(self._plan(*wanted, eager=True))
                    else:
                        self._plans[wanted] = self._planner.submit(self._plan, *wanted, eager=not self._plans)
            found = self._plans[epoch, window]
            self._plans.move_to_end((epoch, window))
            while len(self._plans) > 4:
                self._plans.popitem(last=False)
        return found

    def _plan(self, epoch: int, window: int, eager: bool) -> list[Planned]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.mixture.epoch(epoch)
        samples = np.array_split(self._order[1], self.windows)[window]
        chunks = [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]
        what = f"epoch {epoch}, window {window}"
        # While rows are loaded, one worker at a time plans ahead; when nothing can be loaded yet, all do.
        width = len(chunks) if eager else 1
        parts, pending = [], collections.deque()
        for chunk in chunks:
            pending.append(self.pool.submit(f"texts of {what}", RowMaker.measure, epoch, chunk))
            if len(pending) == width:
                parts.append(pending.popleft().result())
        parts += [future.result() for future in pending]
        key = (self.config.seed, 2, epoch, window)
        return self.pool.submit(f"plan of {what}", RowMaker.pack, samples, parts, key).result()

    def load(self, planned: Planned, place: tuple[int, int, int]) -> Future:
        """A row, soon."""
        what = "epoch {}, window {}, row {}".format(*place)
        return self.pool.submit(what, RowMaker.load, planned, *place)

    @functools.cached_property
    def empty(self) -> dict[str, np.ndarray]:
        """A row without samples."""
        dtype, channels = np.dtype(self.config.storage), self.config.channels
        row = packing.assemble(packing.Row(), [], [], {}, self.config.limits, plane_dtype=dtype, channels=channels)
        return row | {"planes": row["planes"][:0], "tasks": np.zeros_like(row["segments"])}

    def close(self) -> None:
        """Ends the workers."""
        self.pool.close()
        if self._planner is not None:
            self._planner.shutdown(cancel_futures=True)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _Place:
    """A row in the stream: where it stands, where its batch began, whether it is the host's last of the batch."""

    at: tuple[int, int, int]
    batch: tuple[int, int, int]
    number: int  # among the host's rows of the batch
    planned: Planned | None


class RowIterator(grain.DatasetIterator):
    """Loads `read_ahead` rows ahead, in order; the state is the place of the row that is delivered next."""

    def __init__(self, rows: Rows):
        super().__init__()
        self._rows = rows
        self._restart((0, 0, 0), 0, 0)

    def _restart(self, batch: tuple[int, int, int], delivered: int, lost: int) -> None:
        self._batch, self._delivered, self._lost = batch, delivered, lost
        self._stream = self._walk(batch, delivered)
        self._ahead: collections.deque[tuple[_Place, Future | None]] = collections.deque()

    def _walk(self, start: tuple[int, int, int], delivered: int) -> Iterator[_Place]:
        """This host's rows from a batch's first row on."""
        rows = self._rows
        epoch, window, row = start
        number, batch = 0, start
        mine = range(rows.host * rows.local_rows, (rows.host + 1) * rows.local_rows)
        while rows.epochs is None or epoch < rows.epochs:
            planned = rows.plan(epoch, window)
            while row < len(planned):
                if number == 0:
                    batch = epoch, window, row
                if number in mine and number - mine.start >= delivered:
                    yield _Place((epoch, window, row), batch, number - mine.start, planned[row])
                row += 1
                number += 1
                if number == rows.batch_rows:
                    number, delivered = 0, 0
            row -= len(planned)  # a state may point behind the end of a window
            epoch, window = divmod(epoch * rows.windows + window + 1, rows.windows)
        while number % rows.batch_rows:
            if number in mine and number - mine.start >= delivered:
                yield _Place((epoch, window, row), batch, number - mine.start, None)
            number += 1

    def __next__(self) -> tuple[dict[str, np.ndarray], RowInfo | None]:
        rows = self._rows
        wanted = 1 + (rows.config.read_ahead if rows.config.workers else 0)
        while len(self._ahead) < wanted and (place := next(self._stream, None)) is not None:
            self._ahead.append((place, None if place.planned is None else rows.load(place.planned, place.at)))
        if not self._ahead:
            raise StopIteration
        place, future = self._ahead[0]
        arrays, info = (rows.empty, None) if future is None else future.result()
        if info is not None and info.left_out:
            self._lost += len(info.left_out)
            if self._lost > rows.config.allowed_loss:
                allowed = f"data.allowed_loss is {rows.config.allowed_loss}"
                raise ValueError(f"{self._lost} scans could not be loaded, {allowed}: {'; '.join(info.left_out)}")
        self._ahead.popleft()
        if place.number + 1 == rows.local_rows:
            epoch, window, row = place.batch
            self._batch, self._delivered = (epoch, window, row + rows.batch_rows), 0
        else:
            self._batch, self._delivered = place.batch, place.number + 1
        return arrays, info

    def get_state(self) -> dict[str, Any]:
        """Plain values; the same on every host between batches."""
        epoch, window, row = self._batch
        return {
            "epoch": epoch,
            "window": window,
            "row": row,
            "delivered": self._delivered,
            "lost": self._lost,
            "data": self._rows.identity,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there. ValueError: a state of other data or other settings, every difference named."""
        now, then = self._rows.identity, state["data"]
        differences = [
            f"{key} is {_short(now.get(key))}, was {_short(then.get(key))}"
            for key in [*now, *(key for key in then if key not in now)]
            if now.get(key) != then.get(key)
        ]
        if differences:
            raise ValueError(f"this state of the data is of another run: {'; '.join(differences)}")
        if state["delivered"] >= self._rows.local_rows:
            raise ValueError(
                f"{state['delivered']} rows of a batch were delivered, a host now has {self._rows.local_rows}"
            )
        self._restart((state["epoch"], state["window"], state["row"]), state["delivered"], state["lost"])


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(rows: Rows) -> grain.IterDataset:
    """The host's rows of each global batch, as Batch."""
    return rows.batch(rows.local_rows, batch_fn=functools.partial(join, planes=rows.config.planes))


def join(rows: Sequence[tuple[dict[str, np.ndarray], RowInfo | None]], planes: int) -> Batch:
    """Rows -> a batch; their planes are filled up with zeros to M = `planes`."""
    first = rows[0][0]
    arrays = {name: np.stack([row[name] for row, _ in rows]) for name in first if name != "planes"}
    arrays["planes"] = np.zeros((len(rows), planes, *first["planes"].shape[1:]), first["planes"].dtype)
    for i, (row, _) in enumerate(rows):
        arrays["planes"][i, : len(row["planes"])] = row["planes"]
    return Batch(arrays, tuple(info for _, info in rows))


def prefetch(dataset: grain.IterDataset, place: Callable[[Batch], Any] | None = None, buffer: int = 2):
    """Batches ahead of the step, in a thread; `place` puts each on the devices there.

    Args:
      place: Batch -> what the step takes; None leaves it on the host.
      buffer: batches ready; with `place` they take device memory.
    """
    placed = dataset if place is None else dataset.map(place)
    return grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=buffer)


@dataclasses.dataclass
class PackingReport:
    """How full the rows were. `add` what each batch delivered."""

    text_length: int
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    scans: int = 0
    cut_tokens: int = 0
    dropped_scans: int = 0
    left_out: int = 0
    padding: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys((*PADDING, "empty row"), 0))

    def add(self, rows: Sequence[RowInfo | None]) -> None:
        for info in rows:
            self.rows += 1
            if info is None:
                self.padding["empty row"] += self.text_length
                continue
            self.samples += len(info.samples)
            self.tokens += info.tokens
            self.scans += info.scans
            self.cut_tokens += sum(s.cut for s in info.samples)
            self.dropped_scans += sum(s.dropped_scans for s in info.samples)
            self.left_out += len(info.left_out)
            if info.padding:
                self.padding[info.padding] += self.text_length - info.tokens

    def as_dict(self) -> dict[str, float]:
        """Shares of all places in the rows; samples, scans a row."""
        places, rows = max(self.rows * self.text_length, 1), max(self.rows, 1)
        return {
            "real tokens": self.tokens / places,
            **{f"padding: {cause}": count / places for cause, count in self.padding.items()},
            "samples a row": self.samples / rows,
            "scans a row": self.scans / rows,
            "cut tokens": self.cut_tokens,
            "dropped scans": self.dropped_scans,
            "scans left out": self.left_out,
        }


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:13] + "..." + text[-4:]
