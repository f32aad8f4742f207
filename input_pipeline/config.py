"""The `data` group of a config: which tables to read, and how samples become rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from input_pipeline.batching.plan import RowLimits
from input_pipeline.datasets import FAMILIES
from input_pipeline.files import nearest
from input_pipeline.images.augment import FLIPS
from input_pipeline.images.planes import CHANNELS, MODES, STORAGE, Sizes
from input_pipeline.text.vocabularies import SEMANTIC_TYPES, bad_semantic_types

SPLITS = ("train", "test")
MIXTURES = ("epoch", "weights")


def unknown_fields(names: Iterable[str], cls: type, prefix: str = "") -> str:
    """Return the names that are not fields of a dataclass, each with the nearest field; "" if there are none."""
    known = [field.name for field in dataclasses.fields(cls)]
    return ", ".join(f"{prefix}{name}{nearest(name, known)}" for name in names if name not in known)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of an experiment."""

    # Source name -> its `family` (datasets.FAMILIES), the family's fields (`table`, `root`, `split`, `fraction`, ...)
    # and, for `mixture="weights"`, its `weight`. No study may be in both.
    train: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    test: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    index: str = ""  # the directory that `prepare` wrote
    tokenizer: str = ""  # a SentencePiece model file
    # The source of medical terms: `open` (HPO, ICD-10-CM and a radiology list), `umls:DIR` (a directory with
    # MRCONSO.RRF and, for umls_types, MRSTY.RRF), `scispacy:MODEL` or `none`.
    terms: str = "open"
    umls_types: tuple[str, ...] = SEMANTIC_TYPES  # semantic types of UMLS whose terms count; () for all
    preprocess: str = "paper"  # or `released`: the volumes and texts of the released code, for released weights
    storage: str = "uint8"  # dtype of the planes: uint8, int16 or float32
    # Final side of 2D scans and of volumes, and maximum slices, in `paper` mode: multiples of the patch (32, 32, 4).
    size_2d: int = 512
    size_3d: int = 256
    depth: int = 64
    channels: int = 3  # 1 if every scan is gray: the network then computes one channel instead of three equal ones
    records: bool = False  # read volumes from the records that `prepare --records` wrote, not from the scan files
    mixture: str = "epoch"  # `epoch`: `fraction` of the rows of each source; `weights`: shares of `epoch_samples`
    epoch_samples: int = 0  # samples of an epoch under `weights`; 0: the number of rows of all sources
    window: int = 16384  # samples that are packed together
    # Sizes of a row (batching.plan.RowLimits).
    text_length: int = 2048
    vision_rows: int = 14
    patch_length: int = 1024
    planes: int = 57344
    scans: int = 56
    share_scans: bool = True  # samples about the same scan share its slot; a crop is then drawn once per scan
    # A control experiment: each sample shows the scans of another row of its source, which measures the accuracy that
    # the text alone gives.
    shuffle_scans: bool = False
    max_scans: int = 12  # maximum distinct scans of a sample; its random generator chooses among more
    num_latents: int = 32  # visual tokens of a scan; must equal the model's
    crop: float = 0.8  # minimum share of a slice's area that a random crop keeps in training; 1 disables crops
    flips: tuple[str, ...] = ()  # axes to flip at random in training: height, width, depth
    # How many scans of a run may fail to load (each counts once per row that shows it). Their samples get no weight and
    # are logged. One more stops the run with the scan's name; 0 stops at the first.
    allowed_loss: int = 0
    seed: int = 0  # of order, prompts and crops
    workers: int = 2  # processes that load rows; 0 loads in the calling process
    worker_timeout: float = 30.0  # seconds for one scan or one chunk of texts before a worker counts as hung
    read_ahead: int = 8  # rows to load ahead of the training step

    def __post_init__(self):
        """Check every field. Raises ValueError with all problems."""
        problems = [*self._number_problems(), *self._choice_problems(), *self._source_problems()]
        if not problems:
            try:
                _ = self.sizes
            except ValueError as error:
                problems.append(f"data.size_2d, data.size_3d, data.depth: {error}")
        if problems:
            raise ValueError("; ".join(problems))

    def _choice_problems(self) -> Iterable[str]:
        for field, known in (("preprocess", MODES), ("storage", STORAGE), ("mixture", MIXTURES)):
            if getattr(self, field) not in known:
                yield f"data.{field} is {getattr(self, field)!r}; known: {', '.join(known)}"
        if bad := bad_semantic_types(self.umls_types):
            yield f"data.umls_types: {bad}"
        for axis in self.flips:
            if axis not in FLIPS:
                yield f"data.flips has {axis!r}; known: {', '.join(FLIPS)}"
        if self.channels not in (1, CHANNELS):
            yield f"data.channels must be 1 or {CHANNELS} (got {self.channels})"
        if self.preprocess == "released":
            if self.storage != "float32":
                yield "data.preprocess='released' needs data.storage='float32'"
            if self.records or self.flips:
                yield "data.preprocess='released' cannot be combined with data.records or data.flips"

    def _number_problems(self) -> Iterable[str]:
        minimum = {"epoch_samples": 0, "allowed_loss": 0, "workers": 0, "seed": 0}
        for field in dataclasses.fields(self):
            if field.type != "int":
                continue
            value, least = getattr(self, field.name), minimum.get(field.name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                yield f"data.{field.name} must be an integer of at least {least} (got {value!r})"
        if not 0 < self.crop <= 1:
            yield f"data.crop must be above 0 and at most 1 (got {self.crop})"
        if self.worker_timeout <= 0:
            yield f"data.worker_timeout must be above 0 seconds (got {self.worker_timeout})"

    def _source_problems(self) -> Iterable[str]:
        for split in SPLITS:
            for name, source in getattr(self, split).items():
                if "family" not in source:
                    yield f"data.{split}.{name} has no `family`; known: {', '.join(FAMILIES)}"
                if self.mixture == "weights" and split == "train" and not source.get("weight", 1.0) > 0:
                    yield f"data.{split}.{name}.weight must be above 0 (got {source['weight']})"
        for name in self.train.keys() & self.test.keys():
            yield f"data.train.{name} and data.test.{name} have the same name: rename one to {name}_test"

    @property
    def limits(self) -> RowLimits:
        """The sizes of a row."""
        return RowLimits(self.text_length, self.vision_rows, self.patch_length, self.planes, self.scans)

    @property
    def sizes(self) -> Sizes:
        """The final sizes of scans."""
        return Sizes(self.size_2d, self.size_3d, self.depth)

    def sources(self, split: str | None = None) -> dict[str, dict]:
        """Return source name -> fields, of one split or of both, sorted by name within a split like a ConfigDict."""
        splits = SPLITS if split is None else (split,)
        return {name: dict(fields) for s in splits for name, fields in sorted(getattr(self, s).items())}

    def to_dict(self) -> dict:
        """Return plain values, for a ConfigDict."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {s: {name: dict(fields) for name, fields in plain[s].items()} for s in SPLITS}

    @classmethod
    def from_dict(cls, fields: Mapping) -> DataConfig:
        """Invert `to_dict`, for a dict or a ConfigDict. Raises ValueError with all unknown fields."""
        fields = fields.to_dict() if hasattr(fields, "to_dict") else dict(fields)
        if unknown := unknown_fields(fields, cls, "data."):
            raise ValueError(f"unknown fields: {unknown}")
        return cls(**_tuples(fields))


def open_fields(source: Mapping) -> dict:
    """Return the fields of a source that its family takes: all but `family` and `weight`."""
    return _tuples({k: v for k, v in source.items() if k not in ("family", "weight")})


def _tuples(fields: Mapping) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
