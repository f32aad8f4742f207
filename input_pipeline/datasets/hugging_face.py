"""Parquet files of Hugging Face `datasets`: images, NIfTI files and arrays in columns.

pyarrow reads them. The package `datasets` is not used: it would copy the files to its own cache and decode every image,
while only the bytes are needed. From its metadata in the schema only the names of class labels are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from input_pipeline.datasets.mapped import Mapped
from input_pipeline.files import parse_json
from input_pipeline.samples import RowError

BATCH = 32  # rows in memory: a row may have a volume


@dataclasses.dataclass(kw_only=True, eq=False)
class HuggingFace(Mapped):
    """Rows of Parquet files. `table` is a file, a directory or a pattern: `data/train-*.parquet`.

    A column of scans has Image or Nifti features (bytes or paths), bytes, paths, numeric arrays, or lists of these.
    """

    name = "hf"

    def files(self):
        pattern = str(self.file / "*.parquet" if self.file.is_dir() else self.file)
        files = [self.file] if self.file.is_file() else [pathlib.Path(f) for f in sorted(glob.glob(pattern))]
        if not files:
            raise RowError(self.file, 0, "there is no such file", "name a Parquet file, or a pattern: train-*.parquet")
        return files

    def features(self):
        with self._errors():
            return {field.name: field.type for field in pq.read_schema(self.files()[0])}

    def has_scans(self, feature):
        return not _is_path(feature)

    def records(self, names):
        number = 0
        for file in self.files():
            with self._errors(file), pq.ParquetFile(file) as table:
                labels = _class_labels(table.schema_arrow)
                missing = sorted(set(names) - set(table.schema_arrow.names))
                if missing:
                    reason = f"{file.name} has no column {', '.join(missing)}, unlike the first file"
                    raise RowError(self.file, number, reason, "use a pattern of files with the same columns")
                for batch in table.iter_batches(BATCH, columns=names):
                    columns = {name: _values(batch.column(name), labels.get(name)) for name in batch.schema.names}
                    for i in range(batch.num_rows):
                        number += 1
                        yield number, {name: values[i] for name, values in columns.items()}

    @contextlib.contextmanager
    def _errors(self, file: pathlib.Path | None = None) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            reason = f"{file.name if file else 'the file'} is not readable as Parquet: {str(error)[:200]}"
            raise RowError(self.file, 0, reason, "download it again") from error


def _storage(kind: pa.DataType) -> pa.DataType:
    return _storage(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_path(kind: pa.DataType) -> bool:
    kind = _storage(kind)
    kind = kind.value_type if _is_list(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_array(kind: pa.DataType) -> bool:
    """Return whether a column has numeric arrays of two or more axes, as nested lists."""
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth > 1 and (pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Return column -> names of its class labels, from the metadata that `datasets` writes."""
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: f["names"] for name, f in features.items() if isinstance(f, dict) and "names" in f}
    except (ValueError, KeyError, TypeError):
        return {}  # the metadata are optional


def _values(column: pa.Array, labels: list[str] | None) -> list:
    kind = _storage(column.type)
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    values = column.to_pylist()
    if labels is not None:
        return [labels[v] if isinstance(v, int) and 0 <= v < len(labels) else v for v in values]
    if _is_array(kind):
        return [None if value is None else np.array(value, _dtype(kind)) for value in values]
    return values


def _dtype(kind: pa.DataType) -> np.dtype:
    while _is_list(kind):
        kind = kind.value_type
    return np.dtype(kind.to_pandas_dtype())
