"""The `data` group of a config: which tables to read, and how samples become rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from input_pipeline.batching.plan import RowLimits
from input_pipeline.datasets import FAMILIES
from input_pipeline.field_rules import (
    Count,
    Size,
    above,
    as_tuple,
    at_least,
    at_most,
    field_problems,
    from_mapping,
    one_of,
    plain_mapping,
    problems_of,
    raise_problems,
    share,
    shown,
)
from input_pipeline.files import nearest
from input_pipeline.images.augment import FLIPS
from input_pipeline.images.intensity import parse_intensity, setting_text
from input_pipeline.images.planes import CHANNELS, FITS, MODES, STORAGE, Sizes
from input_pipeline.text.tokens import TEMPLATES
from input_pipeline.text.vocabularies import SEMANTIC_TYPES, bad_semantic_types

SPLITS = ("train", "validation", "test")
MIXTURES = ("epoch", "weights")
EPOCHS = ("all", "released")
Weight = Annotated[float, above(0)]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of an experiment."""

    # Source name -> its `family` (datasets.FAMILIES), the family's fields (`table`, `root`, `split`, `fraction`,
    # `intensity`, ...) and, for `mixture="weights"`, its `weight`. No study may be in two splits. `validation` is
    # evaluated during training and selects the best step; only `python -m radfm_jax.evaluate` reads `test`.
    train: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    validation: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    test: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # Share of the training studies that is held out for validation, with all their rows and scans (batching/splits.py).
    # `validation_seed` chooses the studies: keep it in all stages, so that all hold out the same ones.
    validation_share: Annotated[float, at_least(0), at_most(0.5)] = 0.0
    validation_seed: Count = 0
    index: str = ""  # the directory that `prepare` wrote
    # A SentencePiece model file, a tokenizer.json of Hugging Face, or a folder with one.
    tokenizer: str = ""
    # Number of ids of the model (`model.llama.vocab_size`), if it has more than the tokenizer; 0: as many.
    vocab_size: Count = 0
    # Form of a conversation: `radfm` joins the texts; `chat` is the tokenizer's chat template (docs/tokenizers.md).
    template: Annotated[str, one_of(TEMPLATES)] = "radfm"
    # The source of medical terms: `open` (HPO, ICD-10-CM and a radiology list), `umls:DIR` (a directory with
    # MRCONSO.RRF and, for umls_types, MRSTY.RRF), `scispacy:MODEL` or `none`.
    terms: str = "open"
    umls_types: tuple[str, ...] = SEMANTIC_TYPES  # semantic types of UMLS whose terms count; () for all
    # `paper`, or `released`: the volumes and texts of the released code, for released weights.
    preprocess: Annotated[str, one_of(MODES)] = "paper"
    # Intensities that become 0 and 1, for sources without a field `intensity`: `minmax` (the paper), `percentile`,
    # `header`, a CT window, or three windows as channels (listed in images/intensity.py and docs/data.md).
    intensity: str = "minmax"
    # How a slice becomes a square: `stretch`, or `pad` to keep the ratio of its sides.
    fit: Annotated[str, one_of(FITS)] = "stretch"
    storage: Annotated[str, one_of(STORAGE)] = "uint8"  # dtype of the planes: uint8, int16 or float32
    # Final side of 2D scans and of volumes, and maximum slices, in `paper` mode: multiples of the patch (32, 32, 4).
    size_2d: Size = 512
    size_3d: Size = 256
    depth: Size = 64
    # 1 if every scan is gray: the network then computes one channel instead of three equal ones.
    channels: Annotated[int, one_of((1, CHANNELS))] = 3
    records: bool = False  # read volumes from the records that `prepare --records` wrote, not from the scan files
    # `epoch`: `fraction` of the rows of each source; `weights`: shares of `epoch_samples`.
    mixture: Annotated[str, one_of(MIXTURES)] = "epoch"
    # What `fraction` 1.0 means: `all` is every row, and every figure of PMC-Inline; `released` is the epoch of the
    # released code: a fifth of MPx-Single and Rad3D-Modality, and one window of each paper of PMC-Inline.
    epoch: Annotated[str, one_of(EPOCHS)] = "all"
    epoch_samples: Count = 0  # samples of an epoch under `weights`; 0: the number of rows of all sources
    window: Size = 16384  # samples that are packed together
    # Sizes of a row (batching.plan.RowLimits).
    text_length: Size = 2048
    vision_rows: Size = 14
    patch_length: Size = 1024
    planes: Size = 57344
    scans: Size = 56
    share_scans: bool = True  # samples about the same scan share its slot; a crop is then drawn once per scan
    # A control experiment: each sample shows the scans of another row of its source, which measures the accuracy that
    # the text alone gives.
    shuffle_scans: bool = False
    max_scans: Size = 12  # maximum distinct scans of a sample; its random generator chooses among more
    num_latents: Size = 32  # visual tokens of a scan; must equal the model's
    # Minimum share of a slice's area that a random crop keeps in training; 1 disables crops.
    crop: Annotated[float, share(zero=False, one=True)] = 0.8
    flips: tuple[Annotated[str, one_of(FLIPS)], ...] = ()  # axes to flip at random in training: height, width, depth
    # How many scans of a run may fail to load (each counts once per row that shows it). Their samples get no weight and
    # are logged. One more stops the run with the scan's name; 0 stops at the first.
    allowed_loss: Count = 0
    seed: Count = 0  # seed of order, prompts and crops
    workers: Count = 2  # processes that load rows; 0 loads in the calling process
    # Seconds for one scan or one chunk of texts before a worker counts as hung.
    worker_timeout: Annotated[float, above(0)] = 30.0
    read_ahead: Size = 8  # rows to load ahead of the training step

    def __post_init__(self):
        """Check every field. Raises ValueError with all problems."""
        raise_problems([*problems_of(self, "data"), *self._source_problems()] or self._conflicts())

    def _conflicts(self) -> Iterable[str]:
        try:
            _ = self.sizes
        except ValueError as error:
            yield f"data.size_2d, data.size_3d, data.depth: {error}"
        yield from self._intensity_problems()
        if bad := bad_semantic_types(self.umls_types):
            yield f"data.umls_types: {bad}"
        if self.preprocess == "released":
            if self.template != "radfm":
                yield "data.preprocess='released' needs data.template='radfm'"
            if self.storage != "float32":
                yield "data.preprocess='released' needs data.storage='float32'"
            if self.records or self.flips or self.fit != "stretch":
                yield "data.preprocess='released' cannot be combined with data.records, data.flips or data.fit='pad'"

    def _intensity_problems(self) -> Iterable[str]:
        settings = {"data.intensity": self.intensity}
        for split in SPLITS:
            sources = getattr(self, split).items()
            settings |= {f"data.{split}.{name}.intensity": s["intensity"] for name, s in sources if "intensity" in s}
        for field, setting in settings.items():
            try:
                intensity = parse_intensity(setting)
            except ValueError as error:
                yield f"{field}: {error}"
                continue
            if self.preprocess == "released" and intensity.kind != "minmax":
                yield f"{field} is {setting!r}, but data.preprocess='released' supports only minmax"
            if len(intensity.windows) > self.channels:
                yield f"{field} has {len(intensity.windows)} windows, but data.channels is {self.channels}"

    def _source_problems(self) -> Iterable[str]:
        splits = {split: getattr(self, split) for split in SPLITS if isinstance(getattr(self, split), Mapping)}
        for split, sources in splits.items():
            for name, source in sources.items():
                if not isinstance(source, Mapping):
                    continue  # `problems_of` reports it
                family = source.get("family")
                if not isinstance(family, str) or family not in FAMILIES:
                    what = f"the family {shown(family)}{nearest(shown(family), FAMILIES)}"
                    what = "no `family`" if family is None else what
                    yield f"data.{split}.{name} has {what}; known: {', '.join(FAMILIES)}"
                if self.mixture == "weights" and split == "train":
                    yield from field_problems(source.get("weight", 1.0), Weight, f"data.{split}.{name}.weight")
        for (one, first), (other, second) in itertools.combinations(splits.items(), 2):
            for name in first.keys() & second.keys():
                same = f"data.{one}.{name} and data.{other}.{name} have the same name"
                yield f"{same}: rename one to {name}_{other}"

    @property
    def limits(self) -> RowLimits:
        """The sizes of a row."""
        return RowLimits(self.text_length, self.vision_rows, self.patch_length, self.planes, self.scans)

    @property
    def sizes(self) -> Sizes:
        """The final sizes of scans."""
        return Sizes(self.size_2d, self.size_3d, self.depth)

    def sources(self, split: str | None = None) -> dict[str, dict]:
        """Return {source name: fields} of one split or of all, sorted by name within a split as in a ConfigDict.

        A source without a field `intensity` gets `data.intensity`, unless that is the default.
        """
        splits = SPLITS if split is None else (split,)
        common = {} if self.intensity == "minmax" else {"intensity": self.intensity}
        return {name: common | dict(fields) for s in splits for name, fields in sorted(getattr(self, s).items())}

    @property
    def validates(self) -> bool:
        """Whether there are rows for validation."""
        return bool(self.validation or self.validation_share)

    def sources_with_rows(self, split: str) -> dict[str, dict]:
        """Return `sources(split)`. With a held-out share, `validation` also has the sources of `train`."""
        shared = self.sources("train") if split == "validation" and self.validation_share else {}
        return self.sources(split) | shared

    def to_dict(self) -> dict:
        """Return plain values, for a ConfigDict."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {s: {name: dict(fields) for name, fields in plain[s].items()} for s in SPLITS}

    @classmethod
    def from_dict(cls, fields: Mapping) -> DataConfig:
        """Invert `to_dict`, for a dict or a ConfigDict. Raises ValueError with all unknown fields."""
        return from_mapping(cls, fields, "data")


def trained_intensities(data: Mapping) -> tuple[str, ...]:
    """Return the distinct intensity settings of the training sources, for `data` as in DataConfig.to_dict."""
    common = data.get("intensity", "minmax")
    train = plain_mapping(data.get("train", {}), "data.train")
    sources = [plain_mapping(fields, f"data.train.{name}") for name, fields in train.items()]
    return tuple(sorted({setting_text(source.get("intensity", common)) for source in sources or [{}]}))


def open_fields(source: Mapping) -> dict:
    """Return the fields of a source that its family takes: all but `family` and `weight`."""
    return {k: as_tuple(v) for k, v in source.items() if k not in ("family", "weight")}
