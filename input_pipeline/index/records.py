"""Volumes at their final size, as a TFDS data set in ArrayRecord files: what `prepare --records` writes.

    records/dataset_info.json, features.json        tfds.builder_from_directory("records").as_data_source("scans")
    records/volumes-scans.array_record-00000 ...    shards of some 256 MB, uncompressed, checksummed record by record

A record is a scan with a window: its slices as `prepare_volume` left them, and the SHA-256 of the file it came from.
Its number counts through all shards.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming, splits
from tensorflow_datasets.proto import tf_example_pb2

from input_pipeline.images.planes import Volume

NAME, SPLIT, VERSION = "volumes", "scans", "1.0.0"
SHARD_BYTES = 256 << 20
OPEN_SHARDS = 128  # file descriptors are few, and opening a shard again takes a millisecond
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # records are read one by one, and threads do not survive a fork
_PARTIAL = ".partial"


def features() -> tfds.features.FeaturesDict:
    """slices [K, C, H, W] as raw bytes; voxel * scale + offset lies in [0, 1]; depth as in `Volume`."""
    exact = tfds.features.Tensor(shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict(
        {
            "slices": tfds.features.Text(),
            "shape": tfds.features.Tensor(shape=(4,), dtype=np.int64),
            "dtype": tfds.features.Text(),
            "scale": exact,  # TFDS would store float32
            "offset": exact,
            "depth": np.int64,
            "sha256": tfds.features.Text(),
        }
    )


def serialize(volume: Volume, sha256: str) -> bytes:
    """A record of the data set.

    Args:
      sha256: of the scan's file, hexadecimal.
    """
    slices, kinds = volume.slices, features()
    example = kinds.encode_example(
        {
            "slices": slices.tobytes(),
            "shape": np.array(slices.shape, np.int64),
            "dtype": slices.dtype.name,
            "scale": np.float64(volume.scale),
            "offset": np.float64(volume.offset),
            "depth": volume.depth,
            "sha256": sha256,
        }
    )
    serializer = example_serializer.ExampleSerializer(kinds.get_serialized_info())
    # `FeaturesDict.serialize_example` would do, but for the order of the features, another one in each process.
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def shard_name(number: int) -> str:
    return f"{NAME}-{SPLIT}.array_record-{number:05d}"


class Records:
    """`Records(directory)[number]` -> Volume. Shards are opened when they are first needed, in each process anew.

    Raises:
      ValueError: no such data set; on access a number that is not there, and a shard that is missing, cut or damaged,
        with its file.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        try:
            described = json.loads((self.directory / "dataset_info.json").read_text())
            lengths = [int(n) for n in described["splits"][0]["shardLengths"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.directory} holds no records ({type(error).__name__}: {error}); make them with "
                "`python -m input_pipeline.prepare ... --records`"
            ) from error
        self.lengths: list[int] = lengths
        self._ends = list(itertools.accumulate(lengths))
        self._readers: collections.OrderedDict[int, array_record_module.ArrayRecordReader] = collections.OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Volume:
        """The volume; its voxels are read-only and the record's own memory."""
        values = self._record(number)
        bytes_of = lambda name: values[name].bytes_list.value[0]  # noqa: E731
        number_of = lambda name: float(np.frombuffer(bytes_of(name), np.float64)[0])  # noqa: E731
        slices = np.frombuffer(bytes_of("slices"), bytes_of("dtype").decode())
        shape = list(values["shape"].int64_list.value)
        depth = values["depth"].int64_list.value[0]
        return Volume.from_slices(slices.reshape(shape), number_of("scale"), number_of("offset"), depth)

    def source(self, number: int) -> str:
        """SHA-256 of the file that the record was made of."""
        return self._record(number)["sha256"].bytes_list.value[0].decode()

    def _record(self, number: int):
        if not 0 <= number < len(self):
            what = "is not among the records" if number < 0 else f"is beyond the {len(self)} records"
            raise ValueError(f"scan {number} {what} of {self.directory}: run prepare with --records again")
        shard = bisect.bisect_right(self._ends, number)
        position = number - (self._ends[shard - 1] if shard else 0)
        try:
            record = self._reader(shard).read([position])[0]
            return tf_example_pb2.Example.FromString(record).features.feature
        except ValueError as error:
            if str(self.directory) in str(error):
                raise
            raise self._damaged(shard, f"record {position} cannot be read: {error}") from error
        except Exception as error:  # ArrayRecord and protobuf have exception classes of their own
            raise self._damaged(shard, f"record {position} cannot be read: {type(error).__name__}: {error}") from error

    def _reader(self, shard: int):
        if self._owner != os.getpid():
            self._readers, self._owner = collections.OrderedDict(), os.getpid()
        reader = self._readers.pop(shard, None)
        if reader is None:
            file = self.directory / shard_name(shard)
            if not file.is_file():
                raise self._damaged(shard, "is missing")
            reader = array_record_module.ArrayRecordReader(os.fspath(file), options=_OPTIONS)
            if not reader.ok() or reader.num_records() != self.lengths[shard]:
                found = reader.num_records() if reader.ok() else "no"
                raise self._damaged(shard, f"has {found} records instead of {self.lengths[shard]}")
            if len(self._readers) >= OPEN_SHARDS:
                self._readers.popitem(last=False)[1].close()
        self._readers[shard] = reader
        return reader

    def _damaged(self, shard: int, what: str) -> ValueError:
        said = " ".join(what.split())[:300]
        remedy = "copy the shard again, or run prepare with --records --recheck"
        return ValueError(f"{self.directory / shard_name(shard)}: {said} ({remedy})")


class Writer:
    """Appends records; what has been committed is never touched again.

    Args:
      lengths: of the shards that are there already.
    """

    def __init__(self, directory: Path, lengths: Sequence[int]):
        self.directory, self.lengths = directory, list(lengths)
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("*" + _PARTIAL):  # of a run that was killed
            left.unlink()
        self._writer = None
        self._count = 0
        self.size = 0  # bytes of the shard that is open
        self.next = sum(self.lengths)

    def add(self, record: bytes) -> int:
        """Appends to the open shard; returns the number of the record."""
        if self._writer is None:
            self._file = self.directory / (shard_name(len(self.lengths)) + _PARTIAL)
            self._writer = array_record_module.ArrayRecordWriter(os.fspath(self._file), "group_size:1,uncompressed")
        try:
            self._writer.write(record)
        except RuntimeError as error:  # the writer's own words for a full disk
            raise OSError(f"{self._file} cannot be written: {' '.join(str(error).split())[:200]}") from error
        self._count += 1
        self.size += len(record)
        self.next += 1
        return self.next - 1

    def commit(self) -> None:
        """Closes the open shard and gives it its name; from then on it is one of `lengths`."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(f"{self._file} cannot be written: {' '.join(str(error).split())[:200]}") from error
        with open(self._file, "rb") as written:
            os.fsync(written.fileno())
        reader = array_record_module.ArrayRecordReader(os.fspath(self._file), options=_OPTIONS)
        if not reader.ok() or reader.num_records() != self._count:
            raise OSError(f"{self._file} was not written whole: is the disk full?")
        reader.close()
        os.replace(self._file, self._file.with_name(self._file.name.removesuffix(_PARTIAL)))
        self.lengths.append(self._count)
        self._writer, self._count, self.size = None, 0, 0


def describe(directory: Path, lengths: Sequence[int], description: str) -> None:
    """Writes the description that TFDS and `Records` open, over an older one in one step a file."""
    template = naming.ShardedFileTemplate(
        data_dir=os.fspath(directory),
        dataset_name=NAME,
        split=SPLIT,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )
    size = sum((directory / shard_name(i)).stat().st_size for i in range(len(lengths)))
    split = splits.SplitInfo(name=SPLIT, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
    identity = dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version(VERSION), data_dir=os.fspath(directory), module_name=__name__
    )
    info = dataset_info.DatasetInfo(builder=identity, description=description, features=features())
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    info.set_splits(splits.SplitDict([split]))
    aside = directory / ("description" + _PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    info.write_to_directory(aside)
    for file in sorted(aside.iterdir(), reverse=True):  # dataset_info.json last
        os.replace(file, directory / file.name)
    aside.rmdir()
