"""Records: volumes at their final size, written by `prepare --records` as a TFDS data set in ArrayRecord files.

    records/dataset_info.json, features.json        tfds.builder_from_directory("records").as_data_source("scans")
    records/volumes-scans.array_record-00000 ...    shards of about 256 MB, uncompressed, with a checksum per record

A record has the slices that `prepare_volume` returned for a scan, and the SHA-256 of the scan's file. Records are
numbered across all shards. The index has a digest of each record, because the checksums of ArrayRecord detect changed
bytes, but not an exchanged shard.

`Records` replaces Grain's ArrayRecordDataSource and TFDS's data source, which keep every shard open, share open
readers with forked workers, and do not name a damaged shard; TFDS also copies every volume.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming, splits
from tensorflow_datasets.proto import tf_example_pb2

from input_pipeline.files import PARTIAL, fsync, read_json
from input_pipeline.images.planes import RADFM_PATCHES, Patches, Volume

NAME, SPLIT, VERSION = "volumes", "scans", "1.0.0"
SHARD_BYTES = 256 << 20
OPEN_SHARDS = 128  # limits file descriptors; reopening a shard takes a millisecond
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # reads are random, and threads do not survive a fork


def features() -> tfds.features.FeaturesDict:
    """Return the TFDS features: slices [K, C, H, W] as raw bytes; voxel * scale + offset is in [0, 1]."""
    float64 = tfds.features.Tensor(shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict(
        {
            "slices": tfds.features.Text(),
            "shape": tfds.features.Tensor(shape=(4,), dtype=np.int64),
            "dtype": tfds.features.Text(),
            "scale": float64,  # the default encoding would store float32
            "offset": float64,
            "depth": np.int64,
            "sha256": tfds.features.Text(),
        }
    )


def serialize(volume: Volume, sha256: str) -> bytes:
    """Return a record's bytes. `sha256` is that of the scan's file, hexadecimal."""
    slices, feature_types = volume.slices, features()
    example = feature_types.encode_example(
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
    serializer = example_serializer.ExampleSerializer(feature_types.get_serialized_info())
    # `FeaturesDict.serialize_example` orders the features differently in each process.
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def digest(record: bytes) -> int:
    """Return 64 bits of the SHA-256 of a record's bytes, as a signed integer; never 0."""
    return int.from_bytes(hashlib.sha256(record).digest()[:8], "little", signed=True) or 1


def shard_name(number: int) -> str:
    return f"{NAME}-{SPLIT}.array_record-{number:05d}"


class Records:
    """The records of a directory: `Records(directory)[number]` is a Volume. Each process opens shards on first use.

    Args:
      lengths: number of records in each shard; None: as in the description of the data set.
      patches: how the volumes are cut.
    Raises:
      ValueError: the directory has no records. On access: the number does not exist, or the shard is missing,
        truncated, damaged or has another record. The message names the file.
    """

    def __init__(self, directory: Path | str, lengths: Sequence[int] | None = None, patches: Patches = RADFM_PATCHES):
        self.directory, self.patches = Path(directory), patches
        self.lengths: list[int] = self._described_lengths() if lengths is None else list(lengths)
        self._ends = list(itertools.accumulate(self.lengths))
        self._readers: collections.OrderedDict[int, array_record_module.ArrayRecordReader] = collections.OrderedDict()
        self._owner = os.getpid()

    def _described_lengths(self) -> list[int]:
        try:
            description = read_json(self.directory / "dataset_info.json", kind=dict)
            return [int(n) for n in description["splits"][0]["shardLengths"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.directory} contains no records ({type(error).__name__}: {error}); create them with "
                "`python -m input_pipeline.prepare ... --records`"
            ) from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Volume:
        """Return a volume, without comparing its digest."""
        return self.read(number)

    def read(self, number: int, expected: int = 0) -> Volume:
        """Return a volume. Its voxels are a read-only view of the record.

        Args:
          expected: the record's digest in the index; 0 if unknown.
        """
        values = self._record(number, expected)
        as_bytes = lambda name: values[name].bytes_list.value[0]  # noqa: E731
        as_float = lambda name: float(np.frombuffer(as_bytes(name), np.float64)[0])  # noqa: E731
        slices = np.frombuffer(as_bytes("slices"), as_bytes("dtype").decode())
        shape = list(values["shape"].int64_list.value)
        depth = values["depth"].int64_list.value[0]
        scale, offset = as_float("scale"), as_float("offset")
        return Volume.from_slices(slices.reshape(shape), scale, offset, depth, self.patches)

    def source(self, number: int) -> str:
        """Return the SHA-256 of the file from which the record was made."""
        return self._record(number)["sha256"].bytes_list.value[0].decode()

    def digest(self, number: int) -> int:
        """Return the digest of a record."""
        return digest(self._bytes(number)[2])

    def _record(self, number: int, expected: int = 0):
        """Return the features of a record."""
        shard, position, record = self._bytes(number)
        if expected and digest(record) != expected:
            raise self._damaged(shard, f"record {position} is not the one in the index: its digest differs")
        try:
            return tf_example_pb2.Example.FromString(record).features.feature
        except Exception as error:  # protobuf defines its own exception classes
            raise self._unreadable(shard, position, error) from error

    def _bytes(self, number: int) -> tuple[int, int, bytes]:
        """Return the shard of a record, its position in it, and its bytes."""
        if not 0 <= number < len(self):
            raise ValueError(
                f"{self.directory} has {len(self)} records, but record {number} was requested: "
                "run prepare with --records again"
            )
        shard = bisect.bisect_right(self._ends, number)
        position = number - (self._ends[shard - 1] if shard else 0)
        reader = self._reader(shard)
        try:
            return shard, position, reader.read([position])[0]
        except Exception as error:  # ArrayRecord defines its own exception classes
            raise self._unreadable(shard, position, error) from error

    def _unreadable(self, shard: int, position: int, error: Exception) -> ValueError:
        return self._damaged(shard, f"record {position} cannot be read: {type(error).__name__}: {error}")

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
                count = reader.num_records() if reader.ok() else "no"
                raise self._damaged(shard, f"has {count} records instead of {self.lengths[shard]}")
            if len(self._readers) >= OPEN_SHARDS:
                self._readers.popitem(last=False)[1].close()
        self._readers[shard] = reader
        return reader

    def _damaged(self, shard: int, problem: str) -> ValueError:
        remedy = "copy the shard again, or run prepare with --records --recheck"
        return ValueError(f"{self.directory / shard_name(shard)}: {' '.join(problem.split())[:300]} ({remedy})")


class Writer:
    """Appends records in new shards to those of `lengths` records. Committed shards are never modified."""

    def __init__(self, directory: Path, lengths: Sequence[int]):
        self.directory, self.lengths = directory, list(lengths)
        directory.mkdir(parents=True, exist_ok=True)
        for file in directory.glob("*" + PARTIAL):  # left by a killed run
            file.unlink()
        self._writer = None
        self._count = 0
        self.size = 0  # bytes in the open shard
        self.next = sum(self.lengths)

    def add(self, record: bytes) -> int:
        """Append a record to the open shard. Returns its number."""
        if self._writer is None:
            self._file = self.directory / (shard_name(len(self.lengths)) + PARTIAL)
            self._writer = array_record_module.ArrayRecordWriter(os.fspath(self._file), "group_size:1,uncompressed")
        try:
            self._writer.write(record)
        except RuntimeError as error:  # raised, for example, when the disk is full
            raise self._write_error(error) from error
        self._count += 1
        self.size += len(record)
        self.next += 1
        return self.next - 1

    def commit(self) -> None:
        """Close the open shard, rename it to its final name, and add it to `lengths`."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._write_error(error) from error
        fsync(self._file)
        reader = array_record_module.ArrayRecordReader(os.fspath(self._file), options=_OPTIONS)
        if not reader.ok() or reader.num_records() != self._count:
            raise OSError(f"{self._file} is incomplete: check the free disk space")
        reader.close()
        os.replace(self._file, self._file.with_name(self._file.name.removesuffix(PARTIAL)))
        self.lengths.append(self._count)
        self._writer, self._count, self.size = None, 0, 0

    def _write_error(self, error: RuntimeError) -> OSError:
        return OSError(f"{self._file} cannot be written: {' '.join(str(error).split())[:200]}")


def write_description(directory: Path, lengths: Sequence[int], description: str) -> None:
    """Write the data set description that TFDS and `Records` read. Each file is replaced atomically."""
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
    new_files = directory / ("description" + PARTIAL)
    shutil.rmtree(new_files, ignore_errors=True)
    new_files.mkdir()
    info.write_to_directory(new_files)
    for file in sorted(new_files.iterdir(), reverse=True):  # sorts features.json before dataset_info.json
        os.replace(file, directory / file.name)
    new_files.rmdir()
