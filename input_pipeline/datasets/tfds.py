"""A prepared TFDS data set (ArrayRecord files), mapped to the keys of jsonl.py. TensorFlow is not required."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from input_pipeline.datasets.jsonl import KEYS
from input_pipeline.datasets.mapped import Mapped
from input_pipeline.samples import RowError


@dataclasses.dataclass(kw_only=True, eq=False)
class TFDS(Mapped):
    """Rows of `tfds.builder_from_directory(root / table)`.

    `table` is the directory of the version, with dataset_info.json and features.json. `split` is required and may have
    slices as in TFDS, `train[:60%]`. A feature of scans has paths (Text), images (Image), an array (Tensor), or a
    sequence of paths or images. Only the mapped features are decoded.
    """

    name = "tfds"
    keys = KEYS  # TFDS chooses the split

    def __post_init__(self):
        if not self.split:
            raise ValueError("tfds: split is required, e.g. split='train'")
        super().__post_init__()

    def files(self):
        return sorted(file for file in self.file.iterdir() if file.is_file())

    def features(self):
        return dict(self._builder.info.features)

    def has_scans(self, feature):
        return _kind(feature) in ("Image", "Tensor")

    @functools.cached_property
    def _builder(self):
        # The import takes seconds, and no other family needs it.
        import tensorflow_datasets as tfds

        if not (self.file / "dataset_info.json").is_file():
            raise RowError(self.file, 0, "not a TFDS data set: dataset_info.json is missing", "use a version directory")
        return self._opened(tfds.builder_from_directory, self.file)

    def _opened(self, function, *args, **options):
        try:
            return function(*args, **options)
        except Exception as error:
            # TFDS raises various exceptions, from KeyError to bare Exception, for a wrong split or a missing shard.
            reason = f"the data set cannot be opened: {type(error).__name__}: {str(error)[:200]}"
            raise RowError(self.file, 0, reason, "prepare it again with file_format='array_record'") from error

    def records(self, names):
        import tensorflow_datasets as tfds

        # Data sources do not accept a PartialDecoding: read raw records and decode only these features. Images are
        # stored as the bytes of their files, so they are read as texts.
        kinds = {name: self._builder.info.features[name] for name in names}
        text = tfds.features.Text()
        as_bytes = {"Image": text, "Images": tfds.features.Sequence(text)}
        selected = tfds.features.FeaturesDict({n: as_bytes.get(_form(kind), kind) for n, kind in kinds.items()})
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = self._opened(self._builder.as_data_source, self.split, deserialize_method=raw)
        for number in range(1, len(source) + 1):
            try:
                record = selected.deserialize_example_np(source[number - 1])
            except Exception as error:
                reason = f"the record cannot be read: {type(error).__name__}: {str(error)[:200]}"
                yield RowError(self.file, number, reason, "prepare the data set again")
                continue
            yield number, {name: _plain(record[name], _kind(kinds[name])) for name in names}


def _form(feature: Any) -> str:
    """Return `Image`, `Images` for a sequence of them, or another name."""
    return _kind(feature) + ("s" if hasattr(feature, "feature") else "")


def _kind(feature: Any) -> str:
    """Return the name of the class of a feature, or of the items of a sequence; `Tensor` also for its subclasses."""
    import tensorflow_datasets as tfds

    feature = getattr(feature, "feature", feature)
    if isinstance(feature, tfds.features.Image):
        return "Image"
    # Text and Scalar are tensors without axes.
    return "Tensor" if isinstance(feature, tfds.features.Tensor) and feature.shape else type(feature).__name__


def _plain(value: Any, kind: str) -> Any:
    """Return a decoded feature: the bytes of images, arrays as they are, otherwise text, lists of texts or of dicts."""
    if isinstance(value, dict):  # TFDS decodes a sequence of dicts as a dict of columns
        columns = {key: _plain(column, kind) for key, column in value.items()}
        if all(isinstance(column, list) for column in columns.values()):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return columns
    if isinstance(value, bytes):
        return value if kind == "Image" else value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 0:
        return _plain(value.item(), kind)
    if kind == "Tensor":
        return value
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(v, kind) for v in value]
    return value
