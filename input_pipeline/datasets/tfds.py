"""A prepared TFDS data set (ArrayRecord files) with the features of jsonl.py. TensorFlow is not required."""

from __future__ import annotations

import dataclasses

import numpy as np

from input_pipeline.datasets.jsonl import JSONL, KEYS
from input_pipeline.samples import RowError


@dataclasses.dataclass(kw_only=True, eq=False)
class TFDS(JSONL):
    """Rows of `tfds.builder_from_directory(root / table)`; scans are paths below the root.

    `table` is the directory of the version, with dataset_info.json and features.json. `split` is required and may have
    slices as in TFDS, `train[:60%]`. Only the features of the schema are decoded; voxels in the records are not.
    """

    name = "tfds"

    # key of the schema -> feature of the data set, e.g. {"instruction": "question"}
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    # key of the schema -> a value for every row, e.g. {"task": "vqa"}; the default id is the row number
    constants: dict[str, str] = dataclasses.field(default_factory=dict)

    def _stream(self):
        if not self.split:
            raise ValueError("tfds: split is required, e.g. split='train'")
        if unknown := sorted((self.columns.keys() | self.constants.keys()) - set(KEYS)):
            raise ValueError(f"tfds: unknown keys {', '.join(unknown)}; known: {', '.join(KEYS)}")
        # The import takes seconds, and no other family needs it.
        import tensorflow_datasets as tfds

        if not (self.file / "dataset_info.json").is_file():
            raise RowError(self.file, 0, "not a TFDS data set: dataset_info.json is missing", "use a version directory")
        try:
            builder = tfds.builder_from_directory(self.file)
            features = set(builder.info.features)
            names = {key: self.columns.get(key, key) for key in KEYS if key not in self.constants}
            missing = sorted(names[key] for key in self.columns.keys() & names.keys() if names[key] not in features)
            names = {key: feature for key, feature in names.items() if feature in features}
            if missing or "scans" not in names:
                reason = f"features {', '.join(missing or ['scans'])} are missing; it has {', '.join(sorted(features))}"
                raise RowError(self.file, 0, reason, "map them with `columns`")
            # Data sources do not accept a PartialDecoding: read raw records and decode only these features.
            selected = tfds.features.FeaturesDict({name: builder.info.features[name] for name in names.values()})
            source = builder.as_data_source(self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except RowError:
            raise
        except Exception as error:
            # TFDS raises various exceptions, from KeyError to bare Exception, for a wrong split or a missing shard.
            reason = f"the data set cannot be opened: {type(error).__name__}: {str(error)[:200]}"
            raise RowError(self.file, 0, reason, "prepare it again with file_format='array_record'") from error
        for number in range(1, len(source) + 1):
            try:
                record = selected.deserialize_example_np(source[number - 1])
            except Exception as error:
                reason = f"the record cannot be read: {type(error).__name__}: {str(error)[:200]}"
                yield RowError(self.file, number, reason, "prepare the data set again")
                continue
            cells = {"id": str(number), **self.constants}
            cells |= {key: _plain(record[feature]) for key, feature in names.items()}
            # A feature is always present, so an empty text means that the key is absent.
            # The same is true of a list of messages.
            empty = {key for key, value in cells.items() if value == "" or (key == "messages" and not value)}
            yield number, {key: cells[key] for key in cells if key in ("id", "task") or key not in empty}

    def _parse(self, row):
        # TFDS has chosen the split; a feature named split is not part of the schema.
        return self.parse(row)


def _plain(value):
    """Return a decoded feature as str, list of str, or list of dicts. The schema rejects other values."""
    if isinstance(value, dict):  # TFDS decodes a sequence of dicts as a dict of columns
        columns = {key: _plain(column) for key, column in value.items()}
        if all(isinstance(column, list) for column in columns.values()):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return columns
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 0:
        return _plain(value.item())
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(v) for v in value]
    return value
