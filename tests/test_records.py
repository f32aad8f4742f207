"""Records: equal to the volumes of `prepare_volume`; damaged, incomplete or mismatched records are errors."""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_prepare import config_of, facts, mine, no_figure, own, practice, row  # noqa: F401

from input_pipeline.images import scans
from input_pipeline.images.intensity import one_channel_if_gray
from input_pipeline.images.planes import Volume, planes
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index import records
from input_pipeline.index.prepare import prepare
from input_pipeline.index.records import Records, shard_name


def volume_of(line: dict, config) -> Volume:
    """Return the volume that training would make from the scan's file."""
    volume = None if line["volume"] < 0 else line["volume"]
    voxels, header = scans.read(Path(line["root"]) / line["path"], volume=volume)
    window = json.loads(line["window"]) if line["window"] else None
    return prepare_volume(
        one_channel_if_gray(voxels),
        window=window,
        storage=config.storage,
        sizes=config.sizes,
        padding=header.padding,
    )


def assert_same(volume: Volume, expected: Volume) -> None:
    assert volume.voxels.dtype == expected.voxels.dtype and volume.depth == expected.depth
    assert (volume.scale, volume.offset) == (expected.scale, expected.offset)
    np.testing.assert_array_equal(volume.voxels, expected.voxels)


def random_volume(rng, slices: int = 4, dtype=np.uint8) -> Volume:
    voxels = rng.integers(0, 255, (slices, 1, 64, 64)).astype(dtype)
    return Volume.from_slices(voxels, 1 / 255, 0.0, max(slices, 4))


@pytest.fixture
def written(tmp_path) -> tuple[Path, list[Volume]]:
    """Write three shards of 4, 4 and 2 volumes."""
    rng = np.random.default_rng(0)
    volumes = [random_volume(rng, slices) for slices in (1, 4, 8, 4, 4, 1, 12, 4, 4, 8)]
    writer = records.Writer(tmp_path / "records", [])
    for i, volume in enumerate(volumes):
        assert writer.add(records.serialize(volume, f"{i:064x}")) == i
        if i % 4 == 3 or i == 9:
            writer.commit()
    records.write_description(tmp_path / "records", writer.lengths, "for a test")
    return tmp_path / "records", volumes


# --- the format -------------------------------------------------------------------------------------------------------


def test_records_survive_a_round_trip(written):
    directory, volumes = written
    opened = Records(directory)
    assert opened.lengths == [4, 4, 2] and len(opened) == 10
    for i in (9, 0, 5, 4, 3, 9):
        assert_same(opened[i], volumes[i])
        assert opened.source(i) == f"{i:064x}"
        for actual, expected in zip(planes(opened[i]), planes(volumes[i]), strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_other_storage(tmp_path, dtype):
    volume = dataclasses.replace(
        random_volume(np.random.default_rng(0), dtype=dtype), scale=1 / 65535, offset=32768 / 65535
    )
    writer = records.Writer(tmp_path, [])
    writer.add(records.serialize(volume, "a"))
    writer.commit()
    records.write_description(tmp_path, writer.lengths, "")
    assert_same(Records(tmp_path)[0], volume)


def test_tfds_reads_it(written):
    directory, volumes = written
    source = tfds.builder_from_directory(directory).as_data_source("scans")
    assert len(source) == 10
    for i in (0, 6, 9):
        example = source[i]
        assert example["slices"] == volumes[i].slices.tobytes() and example["dtype"] == b"uint8"
        assert tuple(example["shape"]) == volumes[i].slices.shape and example["depth"] == volumes[i].depth
        assert (example["scale"], example["offset"]) == (1 / 255, 0.0) and example["sha256"] == f"{i:064x}".encode()


def test_the_number_of_open_shards_is_limited(written, monkeypatch):
    directory, volumes = written
    monkeypatch.setattr(records, "OPEN_SHARDS", 2)
    opened = Records(directory)
    for i in (0, 4, 8, 0, 9, 5, 1):
        assert_same(opened[i], volumes[i])
        assert len(opened._readers) <= 2


# JAX warns about every fork if an earlier test started it. The child process does not use JAX.
forks = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


@forks
def test_it_survives_a_fork(written):
    """A forked worker opens its own readers."""
    directory, volumes = written
    opened = Records(directory)
    opened[0]
    before = opened._readers[0]
    pid = os.fork()
    if pid == 0:
        equal = all((opened[i].voxels == volumes[i].voxels).all() for i in range(10))
        os._exit(0 if equal and opened._readers[0] is not before else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("number", [-1, 10])
def test_a_missing_record_number(written, number):
    with pytest.raises(ValueError, match="run prepare with --records again"):
        Records(written[0])[number]


def test_damage_is_an_error_with_the_file(written, tmp_path):
    """Flip a bit at 100 positions of a shard: the voxels are equal, or reading fails."""
    directory, volumes = written
    file = directory / shard_name(1)
    content = file.read_bytes()
    refused = 0
    for position in range(0, len(content), len(content) // 100):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        opened = Records(directory)
        for i in range(4, 8):
            try:
                assert_same(opened[i], volumes[i])
            except ValueError as error:
                refused += 1
                assert str(file) in str(error) and "--records" in str(error)
        assert_same(opened[0], volumes[0])
    share = sum(v.slices.nbytes for v in volumes[4:8]) / len(content)  # the remainder of the file is padding
    assert refused >= 95 * share
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file.name}: has no records instead of 4"):
        Records(directory)[5]
    shutil.copy(directory / shard_name(2), file)
    with pytest.raises(ValueError, match=f"{file.name}: has 2 records instead of 4"):
        Records(directory)[5]
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: is missing"):
        Records(directory)[5]
    (directory / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="contains no records"):
        Records(directory)


# --- prepare --records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["uint8", "int16"])
def test_records_are_the_volumes_of_training(practice, tmp_path, storage):
    out = tmp_path / "index"
    config = config_of(practice, storage=storage, depth=12)
    report = prepare(config, out, workers=0, records=True)
    opened, lines = Records(out / "records"), facts(out)
    assert sorted({line["record"] for line in lines.values()}) == list(range(len(opened)))
    for line in lines.values():
        assert_same(opened[line["record"]], volume_of(line, config))
        assert opened.source(line["record"]) == line["sha256"]
    assert {v.voxels.shape[2] for v in map(opened.__getitem__, range(len(opened)))} >= {1, 12}
    assert report["records"]["records"] == len(opened) and report["records"]["unused"] == 0
    description = json.loads((out / "index.json").read_text())["records"]
    assert description["storage"] == storage and description["records"] == len(opened)


def test_identical_scans_share_a_record(mine, tmp_path):
    shutil.copy(mine / "p0.png", mine / "again.png")
    windowed = {"path": "ct.nii.gz", "window": "lung"}
    config = own(mine, [row("a", "p0.png", "again.png"), row("b", "ct.nii.gz", windowed), row("c", "none.png")])
    prepare(config, tmp_path / "index", workers=0, records=True)
    lines = facts(tmp_path / "index")
    assert lines["p0.png"]["record"] == lines["again.png"]["record"]
    assert lines["ct.nii.gz"]["record"] != lines['ct.nii.gz"lung"']["record"]
    assert lines["none.png"]["record"] == -1 and len(Records(tmp_path / "index" / "records")) == 3
    for name in ("again.png", 'ct.nii.gz"lung"', "ct.nii.gz"):
        assert_same(Records(tmp_path / "index" / "records")[lines[name]["record"]], volume_of(lines[name], config))


KILLED = """
import os, pickle, signal, sys
from input_pipeline.index import records
from input_pipeline.index.prepare import prepare

config, out, adds = pickle.load(sys.stdin.buffer)
records.SHARD_BYTES = 40_000
add = records.Writer.add

def die_or_add(self, record):
    global adds
    adds -= 1
    if not adds:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(self, record)

records.Writer.add = die_or_add
prepare(config, out, workers=0, records=True)
"""


def test_a_run_killed_within_a_shard_resumes_after_the_last_complete_one(practice, tmp_path, monkeypatch):
    config, out, unbroken = config_of(practice), tmp_path / "index", tmp_path / "unbroken"
    monkeypatch.setattr(records, "SHARD_BYTES", 40_000)
    prepare(config, unbroken, workers=2, records=True)
    lengths = Records(unbroken / "records").lengths
    assert len(lengths) > 5
    root = Path(prepare.__code__.co_filename).parents[2]
    adds = sum(lengths[:3]) + 2  # the fourth shard has one record and is incomplete
    ended = subprocess.run(
        [sys.executable, "-c", KILLED], input=pickle.dumps((config, out, adds)), cwd=root, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL
    files = sorted(os.listdir(out / "records"))
    assert files == [shard_name(0), shard_name(1), shard_name(2), shard_name(3) + ".partial"]

    report = prepare(config, out, workers=0, records=True)
    assert report["reading"]["scans_unchanged"] == sum(lengths[:3])
    assert sorted(os.listdir(out / "records")) == sorted(os.listdir(unbroken / "records"))
    assert (out / "scans.parquet").read_bytes() == (unbroken / "scans.parquet").read_bytes()
    for i in range(len(lengths)):
        assert (out / "records" / shard_name(i)).read_bytes() == (unbroken / "records" / shard_name(i)).read_bytes()


@forks
def test_a_full_disk(mine, tmp_path):
    """The error names the file; with free space the run resumes."""
    config, out = own(mine, [row(str(i), f"p{i}.png") for i in range(6)]), tmp_path / "index"
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        try:
            prepare(config, out, workers=0, records=True)
        except OSError as error:
            (tmp_path / "message").write_text(str(error))
        os._exit(0)
    os.waitpid(pid, 0)
    assert "records/volumes-scans.array_record-00000.partial cannot be written" in (tmp_path / "message").read_text()
    prepare(config, out, workers=0, records=True)
    assert len(Records(out / "records")) == 6
    assert not [name for name in os.listdir(out / "records") if name.endswith(".partial")]


def test_an_edited_scan_gets_another_record(mine, tmp_path):
    config, out = own(mine, [row("a", "p0.png"), row("b", "p1.png")]), tmp_path / "index"
    prepare(config, out, workers=0, records=True)
    before = facts(out)
    shutil.copy(mine / "p2.png", mine / "p1.png")
    report = prepare(config, out, workers=0, records=True)
    after = facts(out)
    assert after["p0.png"] == before["p0.png"] and after["p1.png"]["record"] == 2
    assert_same(Records(out / "records")[2], volume_of(after["p1.png"], config))
    assert report["records"]["unused"] == 1 and report["reading"]["scans_read"] == 1
    report = prepare(config, out, workers=0, records=True, recheck=True)
    assert report["records"]["unused"] == 0 and len(Records(out / "records")) == 2


def test_records_with_other_settings_are_refused(mine, tmp_path):
    config, out = own(mine, [row("a", "p0.png")]), tmp_path / "index"
    prepare(config, out, workers=0, records=True)
    other = dataclasses.replace(config, storage="int16", depth=32)
    with pytest.raises(ValueError, match="data.storage is int16, was uint8; data.depth is 32, was 16"):
        prepare(other, out, workers=0, records=True)
    with pytest.raises(ValueError, match="add --records, or --recheck"):
        prepare(config, out, workers=0)
    assert_same(Records(out / "records")[0], volume_of(facts(out)["p0.png"], config))
    prepare(other, out, workers=0, records=True, recheck=True)
    assert_same(Records(out / "records")[0], volume_of(facts(out)["p0.png"], other))
    (out / "records" / shard_name(0)).unlink()
    with pytest.raises(ValueError, match="lacks volumes-scans.array_record-00000"):
        prepare(other, out, workers=0, records=True)
    prepare(config, out, workers=0, recheck=True)
    assert not (out / "records").exists() and facts(out)["p0.png"]["record"] == -1


def test_records_can_be_added_to_an_index(mine, tmp_path):
    config, out = own(mine, [row("a", "p0.png")]), tmp_path / "index"
    prepare(config, out, workers=0)
    report = prepare(config, out, workers=0, records=True)
    assert report["reading"]["scans_read"] == 1 and facts(out)["p0.png"]["record"] == 0


def test_records_of_released_volumes_are_refused(mine, tmp_path):
    config = own(mine, [row("a", "p0.png")], preprocess="released", storage="float32", patch_length=1024, planes=4096)
    with pytest.raises(ValueError, match="--records"):
        prepare(config, tmp_path / "index", workers=0, records=True)
    report = prepare(config, tmp_path / "index", workers=0)
    assert report["rows"] == {"good": 1, "bad": 0, "not_opened": 0}
