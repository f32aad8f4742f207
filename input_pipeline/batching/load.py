"""Load the data of a split: measure samples for the plan, and build the arrays of planned rows.

A sample is encoded twice: to measure it, and to load it. Sending its tokens with the plan would keep every window
(65 MB for samples of 150 tokens) in the training process of every host. Encoding again costs a worker 0.3 ms, next to
tens of milliseconds per scan, and nothing if the sample is still in the worker's bounded cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_row
from input_pipeline.batching.mixture import by_side
from input_pipeline.batching.plan import PlannedRow, SampleSizes, plan_window
from input_pipeline.batching.report import RowInfo, SampleInfo, ScanInfo
from input_pipeline.batching.splits import SplitRows, rows_of_split
from input_pipeline.config import DataConfig
from input_pipeline.datasets import Dataset, sample_rng
from input_pipeline.files import fingerprint
from input_pipeline.images import scans
from input_pipeline.images.augment import augment
from input_pipeline.images.intensity import one_channel_if_gray, parse_intensity
from input_pipeline.images.planes import Volume, patch_count, plane_count, released_shape
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index.index import Index, IndexedScan, key_hash, record_settings, scan_key
from input_pipeline.parallel import workers
from input_pipeline.samples import TASKS, RowError, Sample, Scan
from input_pipeline.sources import encode_row, open_sources, rows_shown, terms_of, tokenizer_of
from input_pipeline.text.alternatives import Form, Group, Pair
from input_pipeline.text.tokens import Encoded

# The original code of Rad3D-Modality scales each scan by itself; the others scale all scans of a sample together.
SCALED_ALONE = ("rad3d_modality",)
CACHED_SAMPLES = 1024  # about 5 MB for samples of 150 tokens, at most about 60 MB for samples of 2,048


class RowLoader:
    """The opened data of one split: measures samples, plans windows and loads rows.

    Each method is a pure function of the config, the epoch and the samples, so any worker of any host can run it.
    """

    def __init__(self, config: DataConfig, split: str, training: bool, form: Form | None = None):
        """Open the tables, the index, the tokenizer and the medical terms. With `training`, crops and flips are random.

        Args:
          form: the segments of a sample; None: one, with its response.
        Raises:
          ValueError: the split has no source or no row, the index does not match the tables or the records, `form` is
            a pair and a row has none, or data.channels is 1 and the scans have colour.
        """
        self.config, self.split, self.training, self.form = config, split, training, form
        sources = config.sources_with_rows(split)
        if not sources:
            raise ValueError(f"data.{split} has no sources")
        self.index = Index(config.index)
        self.index.check(sources)
        opened = open_sources(config, split)
        self.rows = rows_of_split(config, split, self.index, opened)
        self.datasets = {name: opened[name] for name in self.rows}
        if isinstance(form, Pair):
            check_pairs(self.datasets, self.rows)
        self.names = list(self.datasets)  # in the order of the mixture
        sources = {name: sources[name] for name in self.names}
        self.notes: list[str] = []  # messages for the log
        samples = [self._samples_of(name) for name in self.names]
        # For each source: the row of each sample, its window in that row or None, and the sizes of the sides or None.
        self.good, self.windows, self.sides = zip(*samples, strict=True)
        # The number of each source's first sample in the mixture.
        self.starts = np.concatenate([[0], np.cumsum([len(good) for good in self.good])])
        self.shown = {}
        if config.shuffle_scans:
            for name in self.names:
                self.shown[name] = rows_shown(name, self.datasets[name], self.rows[name].rows, config.seed)
        self.scans = self.index.scans(sources)
        self._check_channels()
        self.tokenizer = tokenizer_of(config)
        self.terms = terms_of(config.terms, config.umls_types)
        self.sample = functools.lru_cache(maxsize=CACHED_SAMPLES)(self._sample)
        self._scan_sizes = functools.lru_cache(maxsize=4096)(self._compute_scan_sizes)
        self._read = functools.lru_cache(maxsize=2)(self._read_scan)  # neighbouring questions often share a scan
        self.records = None
        if config.records:
            from input_pipeline.index.records import Records

            self.index.check_records(record_settings(config))
            self.records = Records(self.index.directory / "records", patches=config.sizes.patches)

    def _check_channels(self) -> None:
        if colour := int((self.scans.shapes[:, -1] > self.config.channels).sum()):
            roots = {self.index.tables[name]["root"] for name in self.names}
            path = self.index.first_colour_scan(self.config.channels, roots)
            raise ValueError(
                f"data.channels is {self.config.channels}, but {colour:,} scans have colour, such as {path}: make it 3"
            )

    def _samples_of(self, name: str) -> tuple[np.ndarray, np.ndarray | None, list[int] | None]:
        """Return the row of each sample, its window or None, and the sizes of consecutive sides or None."""
        dataset, rows = self.datasets[name], self.rows[name].rows
        if dataset.has_windows and self.config.epoch == "all":
            windows = self.index.windows(name)
            if windows is None:
                reason = "the index is of an earlier version, so each row has one window and not all figures are used"
                self.notes.append(f"source {name}: {reason}; run prepare again")
                return rows, None, None
            counts = windows[rows]
            first = np.cumsum(counts) - counts
            return np.repeat(rows, counts), np.arange(counts.sum()) - np.repeat(first, counts), None
        if (sides := dataset.sides()) is None:
            return rows, None, None
        order, sizes = by_side(sides[rows])
        return rows[order], None, sizes

    def describe(self) -> dict:
        """Return the vocabulary size, notes, samples and shares of each source, and the fingerprints of the data."""
        sources = self.config.sources_with_rows(self.split)
        released = self.config.epoch == "released"
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "notes": self.notes,
            "sources": {
                name: {
                    "rows": len(good),
                    "left_out": self.rows[name].quarantined,
                    "elsewhere": self.rows[name].elsewhere,
                    "fraction": dataset.fraction * (dataset.released_fraction if released else 1.0),
                    "weight": float(sources[name].get("weight", 1.0)),
                    "sides": sides,
                }
                for (name, dataset), good, sides in zip(self.datasets.items(), self.good, self.sides, strict=True)
            },
            "tables": {name: self.index.tables[name]["sha256"] for name in self.names},
            "identity": {
                "index": self.index.identity,
                "tokenizer": self.tokenizer.fingerprint,
                "sources": fingerprint([[name, self.index.tables[name]["sha256"]] for name in self.names]),
            }
            | self._held_out(),
        }

    def _held_out(self) -> dict:
        """Return the fingerprint of the division into training and validation rows; {} without a held-out share."""
        config = self.config
        if not config.validation_share or self.split == "test":
            return {}  # equal to the states of earlier versions
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(self.rows[name].rows.astype("<i8").tobytes())
        share = [config.validation_share, config.validation_seed]
        return {"validation share and seed": share, "rows of the split": digest.hexdigest()}

    def _sample(self, number: int, epoch: int) -> tuple[str, Sample, Encoded]:
        """Return source, sample and tokens of the sample with this number in the mixture. Raises RowError."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        name = self.names[source]
        dataset, position, windows = self.datasets[name], number - self.starts[source], self.windows[source]
        row = int(self.good[source][position])
        window = None if windows is None else int(windows[position])
        shown = self.shown[name][row] if self.shown else None
        return name, *encode_row(
            self.config, name, dataset, row, epoch, self.tokenizer, self.terms, shown=shown, window=window,
            form=self.form,
        )  # fmt: skip

    def measure(self, epoch: int, samples: np.ndarray) -> SampleSizes:
        """Return the sizes of samples, which are named by their numbers in the mixture. Raises RowError."""
        tokens, counts, sizes = [], [], []
        for number in samples.tolist():
            name, sample, encoded = self.sample(number, epoch)
            tokens.append(len(encoded.ids))
            counts.append(len(encoded.scans))
            sizes += self._sizes_of_scans(name, sample, encoded)
        scan_numbers, patches, planes = np.array(sizes, np.int64).reshape(-1, 3).T
        tokens, counts, patches, planes = (np.array(numbers, np.int32) for numbers in (tokens, counts, patches, planes))
        return SampleSizes(tokens, counts, scan_numbers, patches, planes)

    def _sizes_of_scans(self, name: str, sample: Sample, encoded: Encoded) -> list[tuple[int, int, int]]:
        """Return (number, patches, planes) of each scan of a sample."""
        numbers = []
        for scan in encoded.scans:
            number = self.scans.number(scan_key(self.datasets[name].root, scan))
            if number is None:
                row = f"{sample.row_id} of {name}"
                raise RowError(scan.path, row, "it is not in the index", "run prepare again")
            numbers.append(number)
        shapes = [self.scans[number].shape for number in numbers]
        shape = None
        if self.config.preprocess == "released" and shapes:  # all scans of a sample get the depth of the deepest
            shape = released_shape([shape[2] for shape in shapes])
        return [(number, *self._scan_sizes(own, shape)) for number, own in zip(numbers, shapes, strict=True)]

    def _compute_scan_sizes(self, shape, released: tuple[int, int, int] | None) -> tuple[int, int]:
        """Return patches and planes of a scan."""
        config, (*shape, channels) = self.config, shape
        return (
            patch_count(shape, config.preprocess, released, config.sizes),
            plane_count(shape, channels, config.preprocess, released, config.sizes),
        )

    def plan(self, samples: np.ndarray, parts: Sequence[SampleSizes], rng_key: tuple[int, ...]) -> list[PlannedRow]:
        """Join the parts of a window's sizes, and plan the window (see plan_window)."""
        config, sizes = self.config, SampleSizes.concatenate(parts)
        return plan_window(
            samples, sizes, config.limits, rng_key, share_scans=config.share_scans, mode=config.preprocess
        )

    def load(self, planned: PlannedRow, epoch: int, window: int, row: int) -> tuple[dict[str, np.ndarray], RowInfo]:
        """Load and collate a row.

        Returns:
          The arrays of `collate_row`, with tasks int32[T], 1 + the task's number in samples.TASKS and 0 for padding;
          and a description of the row.
        Raises:
          RowError: a scan cannot be read and `data.allowed_loss` is 0.
        """
        config, encoded, infos = self.config, [], []
        loaded: dict[int, ScanPlanes] = {}
        tried: set[int] = set()
        errors: list[str] = []
        scan_infos: list[ScanInfo] = []
        for number, slots in zip(planned.samples, planned.slots, strict=True):
            name, sample, text = self.sample(number, epoch)
            encoded.append(text)
            cut = text.cut_context + text.cut_instruction + text.cut_response
            reference = self.form.reference(sample) if isinstance(self.form, Group) else ""
            infos.append(
                SampleInfo(
                    name, sample.row_id, sample.task, sample.study_id, len(text.ids), cut, text.dropped_scans, reference
                )
            )
            todo = {slot: scan for slot, scan in zip(slots, text.scans, strict=True) if slot not in tried}
            tried.update(todo)
            scan_infos += [self._scan_info(name, slot, scan) for slot, scan in todo.items()]
            if config.preprocess == "released":
                self._load_released(loaded, errors, name, sample, todo, epoch)
            else:
                for slot, scan in todo.items():
                    self._load_paper(loaded, errors, name, sample, slot, scan, epoch)
        arrays = collate_row(
            LoadedRow(encoded, planned.slots, dict(enumerate(planned.vision_rows)), loaded),
            config.limits,
            num_latents=config.num_latents,
            plane_dtype=np.dtype(config.storage),
            channels=config.channels,
            patch=config.patch,
        )
        tasks = [1 + TASKS.index(info.task) for info, text in zip(infos, encoded, strict=True) for _ in text.starts]
        arrays["tasks"] = np.array([0, *tasks], np.int32)[arrays["segments"]]
        info = RowInfo(
            epoch, window, row, tuple(infos), planned.tokens, planned.padding, len(loaded), tuple(errors),
            tuple(scan_infos),
        )  # fmt: skip
        return arrays, info

    def _scan_info(self, name: str, slot: int, scan: Scan) -> ScanInfo:
        root = self.datasets[name].root
        return ScanInfo(slot, key_hash(*scan_key(root, scan)[1:]), self._indexed(root, scan).shape[:3])

    def _load_paper(self, loaded, errors, name: str, sample: Sample, slot: int, scan: Scan, epoch: int) -> None:
        """Load one scan into its slot, in `paper` mode."""
        config, root, rng = self.config, self.datasets[name].root, None
        if self.training:
            owner = ("scan", scan.path) if config.share_scans else (name, f"{sample.row_id}\x1f{scan.path}")
            rng = sample_rng(config.seed, epoch, *owner)
        with self._row_errors(errors, name, sample, scan):
            if self.records is not None:
                indexed = self._indexed(root, scan)
                volume = self.records.read(indexed.record, indexed.record_digest)
                if rng is not None:
                    volume = augment(volume, rng, config.flips, config.crop)
            else:
                voxels, header = self._read(root, scan)
                volume = prepare_volume(
                    voxels,
                    window=scan.window,
                    storage=config.storage,
                    rng=rng,
                    crop=config.crop,
                    flips=() if rng is None else config.flips,
                    sizes=config.sizes,
                    fit=config.fit,
                    **header.facts,
                )
            loaded[slot] = ScanPlanes.of(volume)

    def _load_released(self, loaded, errors, name: str, sample: Sample, todo: dict[int, Scan], epoch: int) -> None:
        """Load the scans of one sample into their slots, in `released` mode."""
        if not todo:
            return
        config, rng, voxels = self.config, None, []
        if self.training and config.crop < 1:
            rng = sample_rng(config.seed, epoch, "crop of " + name, sample.row_id)
        for scan in todo.values():
            with self._row_errors(errors, name, sample, scan):
                if parse_intensity(scan.window).kind != "minmax":
                    raise ValueError(f"data.preprocess='released' has no intensity {scan.window!r}: remove the window")
                voxels.append(self._read(self.datasets[name].root, scan)[0])
        if len(voxels) < len(todo):
            return  # all scans of a sample get one depth, so a missing scan makes it unknown
        alone = self.datasets[name].name in SCALED_ALONE
        with self._row_errors(errors, name, sample, next(iter(todo.values()))):
            volumes: list[Volume] = released_volumes(voxels, intensity="scan" if alone else "stack", rng=rng)
            loaded.update(zip(todo, map(ScanPlanes.of, volumes), strict=True))

    @contextlib.contextmanager
    def _row_errors(self, errors: list[str], name: str, sample: Sample, scan: Scan) -> Iterator[None]:
        """Raise scan errors as RowError. With `data.allowed_loss`, append them to `errors` instead."""
        try:
            yield
        except (ValueError, OSError, MemoryError) as error:
            reason = getattr(error, "reason", "") or str(error) or type(error).__name__
            remedy = getattr(error, "remedy", "") or "repair it"
            remedy += "; run prepare again, or allow losses with data.allowed_loss"
            row_error = RowError(scan.path, f"{sample.row_id} of {name}", reason, remedy)
            if not self.config.allowed_loss:
                raise row_error from error
            errors.append(str(row_error))

    def _indexed(self, root, scan: Scan) -> IndexedScan:
        number = self.scans.number(scan_key(root, scan))
        assert number is not None, "a planned scan is in the index"
        return self.scans[number]

    def _read_scan(self, root, scan: Scan):
        workers.heartbeat(scan.path)
        path = scans.resolve(root, scan.path)
        size = sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size
        indexed = self._indexed(root, scan).bytes
        if size != indexed:
            raise ValueError(f"it has {size:,} bytes, but {indexed:,} when it was indexed: it has changed")
        voxels, header = scans.read(path, **scan.selection)
        return one_channel_if_gray(voxels), header


def check_pairs(datasets: Mapping[str, Dataset], rows: Mapping[str, SplitRows]) -> None:
    """Raise ValueError if a row has no rejected answer. The message names each source and its first such row."""
    problems = []
    for name, dataset in datasets.items():
        if unpaired := [row for row in rows[name].rows.tolist() if not dataset.has_pair(row)]:
            row_id = dataset.row_id(unpaired[0])
            problems.append(f"{name} ({len(unpaired):,} of {len(rows[name].rows):,} rows, first: {row_id})")
    if problems:
        raise ValueError(
            f"no `rejected` answer in rows of {'; '.join(problems)}: pairs need `chosen` and `rejected` in each row"
        )
