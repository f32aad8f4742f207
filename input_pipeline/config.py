"""The `data` group of a config: which tables, how samples become rows. One ConfigDict fills one frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping

from input_pipeline.batching.packing import RowLimits
from input_pipeline.datasets import FAMILIES
from input_pipeline.images.augment import FLIPS
from input_pipeline.images.planes import CHANNELS, MODES, STORAGE, Sizes

SPLITS = ("train", "test")
MIXTURES = ("epoch", "weights")


def unknown_fields(given: Iterable[str], cls: type, prefix: str = "") -> str:
    """The names that a dataclass does not have, each with the nearest that it has; "" if there are none."""
    known = [f.name for f in dataclasses.fields(cls)]
    said = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.4)
            said.append(f"{prefix}{key}" + (f" (did you mean {near[0]}?)" if near else ""))
    return ", ".join(said)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model is fed.

    Attributes:
      train, test: name of a source -> its `family` (datasets.FAMILIES), the family's fields (`table`, `root`, `split`,
        `fraction`, ...) and, for `mixture="weights"`, its `weight`. A study of one must not be in the other.
      index: the directory that `prepare` wrote.
      tokenizer: a SentencePiece model file.
      terms: where medical terms come from: `open` (HPO, ICD-10-CM and a radiology list), `umls:DIR` (a directory with
        MRCONSO.RRF and MRSTY.RRF), `scispacy:MODEL`, `none`.
      preprocess: `paper`, or `released`: the volumes and texts of the released code, for released weights.
      storage: uint8, int16 or float32 planes.
      size_2d, size_3d, depth: sides in pixels that 2D scans and volumes are brought to in `paper` mode, and the most
        slices of a volume: multiples of the patch (32, 32, 4).
      channels: 3; or 1 where every scan is gray: what is made of three equal channels is then computed from one.
      records: read volumes from the records that `prepare --records` wrote, not from the scans' files.
      mixture: `epoch`: every source gives `fraction` of its rows an epoch; `weights`: shares of `epoch_samples`.
      epoch_samples: samples of an epoch under `weights`; 0: as many as all the sources have rows.
      window: samples that are packed together.
      text_length, vision_rows, patch_length, planes, scans: the sizes of a row (packing.RowLimits).
      share_scans: samples of one row about one scan share its slot; training crops are then drawn once a scan.
      shuffle_scans: a control: each sample shows the scans of another row of its source, so that whatever accuracy is
        left does not come from looking.
      max_scans: most distinct scans of a sample; of more, the sample's own generator chooses.
      num_latents: visual tokens of a scan, as the model has them.
      crop: least share of a slice's area that a random crop keeps in training; 1: none.
      flips: of height, width, depth, in training.
      allowed_loss: how often a scan may fail to load in a run (once a row that shows it), its samples then left without
        weight and named; beyond it, and at 0 for the first, the run stops with the scan's name.
      seed: of all choices: order, prompts, crops.
      workers: processes that load rows; 0 loads in the calling process.
      worker_timeout: seconds that a worker may spend on one scan or one stretch of texts before it counts as hung.
      read_ahead: rows that are loaded ahead of the training step.
    """

    train: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    test: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    index: str = ""
    tokenizer: str = ""
    terms: str = "open"
    preprocess: str = "paper"
    storage: str = "uint8"
    size_2d: int = 512
    size_3d: int = 256
    depth: int = 64
    channels: int = 3
    records: bool = False
    mixture: str = "epoch"
    epoch_samples: int = 0
    window: int = 16384
    text_length: int = 2048
    vision_rows: int = 14
    patch_length: int = 1024
    planes: int = 57344
    scans: int = 56
    share_scans: bool = True
    shuffle_scans: bool = False
    max_scans: int = 12
    num_latents: int = 32
    crop: float = 0.8
    flips: tuple[str, ...] = ()
    allowed_loss: int = 0
    seed: int = 0
    workers: int = 2
    worker_timeout: float = 30.0
    read_ahead: int = 8

    def __post_init__(self):
        problems = []
        for field, known in (("preprocess", MODES), ("storage", STORAGE), ("mixture", MIXTURES)):
            if getattr(self, field) not in known:
                problems.append(f"data.{field} is {getattr(self, field)!r}; known: {', '.join(known)}")
        problems += [f"data.flips has {f!r}; known: {', '.join(FLIPS)}" for f in self.flips if f not in FLIPS]
        if self.preprocess == "released":
            if self.storage != "float32":
                problems.append("data.preprocess='released' needs data.storage='float32': its numbers are float32")
            if self.records or self.flips:
                problems.append("data.preprocess='released' has neither records nor flips")
        least = {"epoch_samples": 0, "allowed_loss": 0, "workers": 0, "seed": 0}
        whole = [f.name for f in dataclasses.fields(self) if f.type == "int"]
        for name in whole:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least.get(name, 1):
                problems.append(f"data.{name} is {value!r}: a whole number of at least {least.get(name, 1)} is needed")
        if not 0 < self.crop <= 1:
            problems.append(f"data.crop is {self.crop}: a share above 0 and not above 1 is needed")
        if self.channels not in (1, CHANNELS):
            problems.append(f"data.channels is {self.channels}: 1 or {CHANNELS}")
        if self.worker_timeout <= 0:
            problems.append(f"data.worker_timeout is {self.worker_timeout}: seconds above 0 are needed")
        for split in SPLITS:
            for name, source in getattr(self, split).items():
                where = f"data.{split}.{name}"
                if "family" not in source:
                    problems.append(f"{where} has no `family`; known: {', '.join(FAMILIES)}")
                if self.mixture == "weights" and split == "train" and not source.get("weight", 1.0) > 0:
                    problems.append(f"{where}.weight is {source['weight']}: a share above 0 is needed")
        if not problems:
            try:
                _ = self.sizes
            except ValueError as error:
                problems.append(f"data.size_2d, data.size_3d, data.depth: {error}")
        for name in self.train.keys() & self.test.keys():
            problems.append(f"data.train.{name} and data.test.{name} share a name; call one {name}_test")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def limits(self) -> RowLimits:
        """The sizes of a row."""
        return RowLimits(self.text_length, self.vision_rows, self.patch_length, self.planes, self.scans)

    @property
    def sizes(self) -> Sizes:
        """What scans are brought to."""
        return Sizes(self.size_2d, self.size_3d, self.depth)

    def sources(self, split: str | None = None) -> dict[str, dict]:
        """name -> fields, of one split or of both; by name within a split, as a ConfigDict has them."""
        splits = SPLITS if split is None else (split,)
        return {name: dict(fields) for s in splits for name, fields in sorted(getattr(self, s).items())}

    def to_dict(self) -> dict:
        """Plain values, for a ConfigDict."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {s: {name: dict(fields) for name, fields in plain[s].items()} for s in SPLITS}

    @classmethod
    def from_dict(cls, fields: Mapping) -> DataConfig:
        """The inverse of `to_dict`, from a dict or a ConfigDict. ValueError names unknown fields."""
        fields = fields.to_dict() if hasattr(fields, "to_dict") else dict(fields)
        if unknown := unknown_fields(fields, cls, "data."):
            raise ValueError(f"unknown fields: {unknown}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def open_fields(source: Mapping) -> dict:
    """The fields of a source that its family takes: all but `family` and `weight`."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in source.items() if k not in ("family", "weight")}


def fingerprint(value) -> str:
    """SHA-256 of plain values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()
