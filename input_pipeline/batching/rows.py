"""What a worker does for the pipeline: measures samples, packs a window of them, loads a planned row.

`RowMaker` holds what that needs, opened once: tables, index, tokenizer, medical terms. Its three steps are pure
functions of the config, the epoch and the samples named, so it does not matter which worker takes them, or on how many
hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from input_pipeline.batching import packing
from input_pipeline.config import DataConfig, fingerprint
from input_pipeline.datasets import sample_rng
from input_pipeline.images import scans
from input_pipeline.images.augment import augment
from input_pipeline.images.intensity import one_channel_if_gray
from input_pipeline.images.planes import (
    Volume,
    patch_count,
    patch_grid,
    patch_positions,
    plane_count,
    planes,
    released_shape,
)
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index.index import Index, IndexedScan, scan_key
from input_pipeline.parallel import workers
from input_pipeline.samples import TASKS, RowError, Sample, Scan
from input_pipeline.sources import encode_row, open_sources, rows_shown, terms_of, tokenizer_of
from input_pipeline.text.tokens import Encoded

# Why a place of a row holds no token.
PADDING = ("no sample is that short", "no room for another scan", "end of the window")
# Rad3D-Modality's own code scales each scan by itself; the others scale all scans of a sample together.
SCALED_ALONE = ("rad3d_modality",)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What planning needs of n samples with m scans in all.

    Attributes:
      tokens: int32[n].
      first: int64[n + 1]; scans first[i] to first[i + 1] of the following are those of sample i.
      scans: int64[m], number of the scan in the index.
      patches, planes: int32[m].
    """

    tokens: np.ndarray
    first: np.ndarray
    scans: np.ndarray
    patches: np.ndarray
    planes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Planned:
    """A row before anything is loaded.

    Attributes:
      samples: int64[k], numbers in the mixture.
      places: (slot, vision row) of each scan, in the order in which the samples name them first.
      tokens: real tokens.
      padding: one of PADDING, or "" in a full row.
    """

    samples: np.ndarray
    places: tuple[tuple[int, int], ...]
    tokens: int
    padding: str


@dataclasses.dataclass(frozen=True)
class SampleInRow:
    """Which sample stands in a row.

    Attributes:
      cut, dropped_scans: text tokens and scans that had to be left out, the sample being too long.
    """

    source: str
    row_id: str
    task: str
    study: str | None
    tokens: int
    cut: int
    dropped_scans: int


@dataclasses.dataclass(frozen=True)
class RowInfo:
    """What a row is: for logs, reports and for finding it again.

    Attributes:
      epoch, window, row: its place in the plan.
      samples: in the order of the segments, segment 1 first.
      tokens, padding: as planned. scans: slots in use.
      left_out: what failed to load, within `data.allowed_loss`.
    """

    epoch: int
    window: int
    row: int
    samples: tuple[SampleInRow, ...]
    tokens: int
    padding: str
    scans: int
    left_out: tuple[str, ...] = ()


class RowMaker:
    """See the head of this file.

    Args:
      split: "train" or "test".
      training: random crops and flips.
    Raises:
      ValueError: tables that cannot be read, an index of other data.
    """

    def __init__(self, config: DataConfig, split: str, training: bool):
        self.config, self.split, self.training = config, split, training
        sources = config.sources(split)
        if not sources:
            raise ValueError(f"data.{split} names no source")
        self.index = Index(config.index)
        self.index.check(sources)
        self.datasets = open_sources(config, split)
        self.names = list(self.datasets)
        self.good = [self._good_rows(name) for name in self.names]
        self.starts = np.concatenate([[0], np.cumsum([len(good) for good in self.good])])
        self.shown = {}
        if config.shuffle_scans:
            self.shown = {
                name: rows_shown(name, self.datasets[name], good, config.seed)
                for name, good in zip(self.names, self.good, strict=True)
            }
        self.scans = self.index.scans(sources)
        self.check_channels()
        self._sizes = functools.lru_cache(maxsize=4096)(self._sizes_of)  # a measure is taken for every scan of an epoch
        self.tokenizer = tokenizer_of(config)
        self.terms = terms_of(config.terms)
        self.released = config.preprocess == "released"
        self.read = functools.lru_cache(maxsize=2)(self._read)  # the questions about one scan often stand side by side
        self.records = None
        if config.records:
            from input_pipeline.index.records import Records

            fields = ("storage", "size_2d", "size_3d", "depth")
            self.index.check_records({name: getattr(config, name) for name in fields})
            self.records = Records(self.index.directory / "records")

    def check_channels(self) -> None:
        """ValueError for scans in colour where the config promises gray ones."""
        if colour := int((self.scans.shapes[:, -1] > self.config.channels).sum()):
            roots = {self.index.tables[name]["root"] for name in self.names}
            one = self.index.first_colour_scan(self.config.channels, roots)
            raise ValueError(
                f"data.channels is {self.config.channels}, but {colour:,} scans are in colour, such as {one}: make it 3"
            )

    def _good_rows(self, name: str) -> np.ndarray:
        rows, bad = len(self.datasets[name]), self.index.bad_rows(name)
        if len(bad) != rows:
            raise ValueError(
                f"source {name} has {rows} rows, the index {self.index.directory} knows {len(bad)}: run prepare again"
            )
        good = np.flatnonzero(~bad)
        if not len(good):
            raise ValueError(f"source {name}: all {rows} rows are in quarantine, see quarantine.jsonl of the index")
        return good

    def describe(self) -> dict:
        """Sources with their number of good rows and their shares, and what identifies all of it."""
        sources = self.config.sources(self.split)
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "sources": {
                name: {
                    "rows": len(good),
                    "left_out": len(dataset) - len(good),
                    "fraction": dataset.fraction,
                    "weight": float(sources[name].get("weight", 1.0)),
                }
                for (name, dataset), good in zip(self.datasets.items(), self.good, strict=True)
            },
            "identity": {
                "index": self.index.identity,
                "tokenizer": self.tokenizer.fingerprint,
                "sources": fingerprint([[name, self.index.tables[name]["sha256"]] for name in self.names]),
            },
        }

    # --- a sample ---

    def sample(self, number: int, epoch: int) -> tuple[str, Sample, Encoded]:
        """Source, sample and tokens of one number of the mixture. Raises RowError."""
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        name, config = self.names[which], self.config
        dataset, row = self.datasets[name], int(self.good[which][number - self.starts[which]])
        shown = self.shown[name][row] if self.shown else None
        sample, encoded = encode_row(config, name, dataset, row, epoch, self.tokenizer, self.terms, shown)
        return name, sample, encoded

    def _facts(self, root, scan: Scan) -> IndexedScan:
        """Of a scan that was planned, so the index knows it."""
        return self.scans[self.scans.number(scan_key(root, scan))]

    def _shapes(self, name: str, sample: Sample, encoded: Encoded) -> list[tuple[int, int, int]]:
        """(number, patches, planes) of each scan of a sample."""
        numbers = []
        for scan in encoded.scans:
            number = self.scans.number(scan_key(self.datasets[name].root, scan))
            if number is None:
                row = f"{sample.row_id} of {name}"
                raise RowError(scan.path, row, "the index does not know it", "run prepare again")
            numbers.append(number)
        shapes = [self.scans[number].shape for number in numbers]
        final = None
        if self.released and shapes:  # the depth of all scans of a sample is that of the deepest
            final = released_shape([shape[2] for shape in shapes])
        return [(number, *self._sizes(shape, final)) for number, shape in zip(numbers, shapes, strict=True)]

    def _sizes_of(self, shape: tuple[int, int, int, int], final: tuple[int, int, int] | None) -> tuple[int, int]:
        """Patches and planes of a scan."""
        config, (*shape, channels) = self.config, shape
        return (
            patch_count(shape, config.preprocess, final, config.sizes),
            plane_count(shape, channels, config.preprocess, final, config.sizes),
        )

    def measure(self, epoch: int, samples: np.ndarray) -> Measured:
        """Tokens and scans of these numbers of the mixture."""
        tokens, first, shapes = [], [0], []
        for number in samples.tolist():
            name, sample, encoded = self.sample(number, epoch)
            tokens.append(len(encoded.ids))
            shapes += self._shapes(name, sample, encoded)
            first.append(len(shapes))
        columns = np.array(shapes, np.int64).reshape(-1, 3).T
        return Measured(
            np.array(tokens, np.int32),
            np.array(first, np.int64),
            columns[0],
            columns[1].astype(np.int32),
            columns[2].astype(np.int32),
        )

    # --- a window ---

    def pack(self, samples: np.ndarray, parts: Sequence[Measured], key: tuple[int, ...]) -> list[Planned]:
        """The rows of a window, in an order drawn by `key` (seed, epoch, window).

        Args:
          samples: int64[n], the window.
          parts: what `measure` said of it, in pieces.
        """
        config, limits = self.config, self.config.limits
        tokens = np.concatenate([part.tokens for part in parts])
        counts = np.concatenate([np.diff(part.first) for part in parts])
        first = np.concatenate([[0], np.cumsum(counts)])
        numbers, patches, plane_counts = (
            np.concatenate([getattr(part, field) for part in parts]) for field in ("scans", "patches", "planes")
        )
        if config.share_scans and not self.released:
            _, where, ids = np.unique(numbers, return_index=True, return_inverse=True)
        else:  # a scan is another one for each sample: cropped, or brought to another depth
            where = ids = np.arange(len(numbers))
        of_sample = [tuple(ids[a:b].tolist()) for a, b in zip(first[:-1], first[1:], strict=True)]
        rows = packing.plan_rows(
            tokens.tolist(), of_sample, patches[where], plane_counts[where], limits, share_scans=config.share_scans
        )
        per_sample = np.zeros((len(samples), 3), np.int64)  # patches, planes, scans
        np.add.at(
            per_sample, np.repeat(np.arange(len(samples)), counts), np.stack([patches, plane_counts, patches**0]).T
        )
        least = per_sample.min(axis=0)
        room = np.array([limits.vision_rows * limits.patch_length, limits.planes, limits.scans])
        planned = []
        for row in rows:
            used = int(tokens[row.samples].sum())
            scan_ids = np.array(list(row.scans), np.int64)
            taken = np.array([patches[where][scan_ids].sum(), plane_counts[where][scan_ids].sum(), len(scan_ids)])
            if used == limits.text_length:
                padding = ""
            elif limits.text_length - used < tokens.min():
                padding = PADDING[0]
            else:
                padding = PADDING[1] if (room - taken < least).any() else PADDING[2]
            planned.append(Planned(samples[row.samples], tuple(row.scans.values()), used, padding))
        order = np.random.Generator(np.random.PCG64(key)).permutation(len(planned))
        return [planned[i] for i in order]

    # --- a row ---

    def load(self, planned: Planned, epoch: int, window: int, row: int) -> tuple[dict[str, np.ndarray], RowInfo]:
        """The arrays of a row and what stands in it.

        The arrays are those of `packing.assemble`, of `planes` only the ones in use; and tasks int32[T], 1 + the number
        in samples.TASKS of what a token belongs to, 0 for padding.

        Raises:
          RowError: a scan that cannot be read although the index says so, unless `data.allowed_loss` is set.
        """
        config, encoded, infos, scan_ids = self.config, [], [], []
        loaded: dict[int, packing.Planes] = {}
        tried: set[int] = set()
        ids: dict = {}
        left_out: list[str] = []
        share = config.share_scans and not self.released
        for number in planned.samples.tolist():
            name, sample, text = self.sample(number, epoch)
            encoded.append(text)
            cut = text.cut_context + text.cut_instruction + text.cut_response
            infos.append(
                SampleInRow(name, sample.row_id, sample.task, sample.study_id, len(text.ids), cut, text.dropped_scans)
            )
            keys = [scan_key(self.datasets[name].root, scan) for scan in text.scans]
            own = [ids.setdefault(key if share else (number, key), len(ids)) for key in keys]
            scan_ids.append(own)
            todo = [(i, scan) for i, scan in zip(own, text.scans, strict=True) if i not in tried]
            if not todo:
                continue
            tried.update(own)
            if self.released:
                self._load_released(loaded, left_out, name, sample, todo, epoch)
            else:
                for i, scan in todo:
                    self._load_paper(loaded, left_out, name, sample, i, scan, epoch)
        places = dict(zip(ids.values(), planned.places, strict=True))
        arrays = packing.assemble(
            packing.Row(list(range(len(encoded))), places),
            encoded,
            scan_ids,
            loaded,
            config.limits,
            num_latents=config.num_latents,
            plane_dtype=np.dtype(config.storage),
            channels=config.channels,
        )
        used = sum(len(value.planes) for value in loaded.values())
        arrays["planes"] = arrays["planes"][:used].copy()  # the rest is zeros: not sent between processes
        tasks = np.array([0, *(1 + TASKS.index(sample.task) for sample in infos)], np.int32)
        arrays["tasks"] = tasks[arrays["segments"]]
        info = RowInfo(epoch, window, row, tuple(infos), planned.tokens, planned.padding, len(loaded), tuple(left_out))
        return arrays, info

    def _load_paper(self, loaded, left_out, name: str, sample: Sample, i: int, scan: Scan, epoch: int) -> None:
        config, dataset, rng = self.config, self.datasets[name], None
        if self.training:
            owner = ("scan", scan.path) if config.share_scans else (name, f"{sample.row_id}\x1f{scan.path}")
            rng = sample_rng(config.seed, epoch, *owner)
        with self._blamed(left_out, name, sample, scan):
            if self.records is not None:
                volume = self.records[self._facts(dataset.root, scan).record]
                if rng is not None:
                    volume = augment(volume, rng, config.flips, config.crop)
            else:
                voxels, header = self.read(dataset.root, scan)
                volume = prepare_volume(
                    voxels,
                    window=scan.window,
                    storage=config.storage,
                    rng=rng,
                    crop=config.crop,
                    flips=config.flips,
                    sizes=config.sizes,
                    padding=header.padding,
                    value_range=header.value_range,
                )
            loaded[i] = _planes(volume)

    def _load_released(self, loaded, left_out, name: str, sample: Sample, todo, epoch: int) -> None:
        config, rng, voxels = self.config, None, []
        if self.training and config.crop < 1:
            rng = sample_rng(config.seed, epoch, "crop of " + name, sample.row_id)
        for _, scan in todo:
            with self._blamed(left_out, name, sample, scan):
                voxels.append(self.read(self.datasets[name].root, scan)[0])
        if len(voxels) < len(todo):
            return  # all scans of a sample get one depth: without one of them there is nothing to equalise
        alone = config.sources(self.split)[name]["family"] in SCALED_ALONE
        with self._blamed(left_out, name, sample, todo[0][1]):
            volumes = released_volumes(voxels, intensity="scan" if alone else "stack", rng=rng)
            loaded.update({i: _planes(volume) for (i, _), volume in zip(todo, volumes, strict=True)})

    @contextlib.contextmanager
    def _blamed(self, left_out: list[str], name: str, sample: Sample, scan: Scan) -> Iterator[None]:
        """A scan that fails: RowError with file, row and source; within `data.allowed_loss` a line in `left_out`."""
        try:
            yield
        except (ValueError, OSError, MemoryError) as error:
            reason = getattr(error, "reason", "") or str(error) or type(error).__name__
            remedy = getattr(error, "remedy", "") or "repair it"
            remedy += "; run prepare again, or allow for losses with data.allowed_loss"
            blame = RowError(scan.path, f"{sample.row_id} of {name}", reason, remedy)
            if not self.config.allowed_loss:
                raise blame from error
            left_out.append(str(blame))

    def _read(self, root, scan: Scan):
        workers.heartbeat(scan.path)
        path = scans.resolve(root, scan.path)
        size = sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size
        known = self._facts(root, scan).bytes
        if size != known:
            raise ValueError(f"it has {size:,} bytes, {known:,} when it was indexed: it has changed")
        voxels, header = scans.read(path, volume=scan.volume)
        return one_channel_if_gray(voxels), header


def _planes(volume: Volume) -> packing.Planes:
    cut, index = planes(volume)
    return packing.Planes(cut, index, patch_positions(patch_grid(volume.shape)), volume.scale, volume.offset)
