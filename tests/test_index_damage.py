"""Damage to any file of an index is detected, or changes nothing that training reads.

Every case is a pure function of (file, seed). Kinds of damage, as in test_scans_fuzz.py: flip, cut, splice, header,
zeros, grow; and `swap` (another file of the index in its place) and `missing`.
"""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import facts, mine, no_figure, own, practice, row  # noqa: F401

from input_pipeline.config import DataConfig
from input_pipeline.index import index, records
from input_pipeline.index.index import Index
from input_pipeline.index.prepare import prepare
from input_pipeline.index.records import Records, shard_name

QUICK, SLOW = 16, 200  # cases of each file
DAMAGES = ("flip", "cut", "splice", "header", "zeros", "grow", "swap", "missing")
FILES = ("index.json", "scans.parquet", "rows.parquet", "records/dataset_info.json", f"records/{shard_name(1)}")


@pytest.fixture
def prepared(mine, tmp_path, monkeypatch) -> tuple[DataConfig, Path]:
    """Write an index with eight records in four shards, and with a bad row."""
    monkeypatch.setattr(records, "SHARD_BYTES", 1)  # a shard holds one chunk: four scans, or fewer
    windows = [{"path": "ct.nii.gz", "window": window} for window in ("lung", "bone")]
    rows = [row(str(i), f"p{i}.png") for i in range(6)] + [row("ct", *windows), row("bad", "none.png")]
    config = own(mine, rows, index=str(tmp_path / "index"), records=True)
    prepare(config, tmp_path / "index", workers=0, records=True)
    return config, tmp_path / "index"


def everything(config: DataConfig) -> list:
    """Return all that training reads from an index."""
    index._cached_sha256.cache_clear()  # files are rewritten within the resolution of their times
    sources, opened = config.sources(), Index(config.index)
    opened.check(sources)
    opened.check_records({name: getattr(config, name) for name in ("storage", "size_2d", "size_3d", "depth")})
    scans, stored = opened.scans(sources), Records(opened.directory / "records")
    volumes = [stored.read(int(n), int(d)) for n, d in zip(scans.records, scans.digests, strict=True)]
    columns = [scans.keys, scans.first, scans.sizes, scans.records, scans.digests, scans.shapes]
    arrays = [x.tobytes() for x in columns] + [v.voxels.tobytes() for v in volumes]
    levels = [(v.scale, v.offset, v.depth, v.voxels.shape, str(v.voxels.dtype)) for v in volumes]
    bad = [opened.bad_rows(name).tolist() for name in sources]
    colour = opened.first_colour_scan(0, {opened.tables[name]["root"] for name in sources})
    return [opened.identity, opened.tables, arrays, levels, bad, colour]


def damaged(directory: Path, name: str, case: int) -> tuple[str, bytes | None]:
    """Return (kind of damage, damaged content, or None for a missing file)."""
    rng, how = np.random.default_rng([FILES.index(name), case]), DAMAGES[case % len(DAMAGES)]
    data = (directory / name).read_bytes()
    out, size = bytearray(data), len(data)
    if how == "flip":
        for bit in rng.integers(8 * size, size=rng.integers(1, 4)):
            out[bit // 8] ^= 1 << int(bit % 8)
    elif how == "cut":
        out = out[: rng.integers(size)]
    elif how == "splice":
        source, target, run = rng.integers(size), rng.integers(size), rng.integers(1, 1 + min(2000, size // 4))
        chunk = data[source : source + run]
        out[target : target + len(chunk)] = chunk
    elif how == "header":
        out[int(rng.integers(-64, min(64, size)))] = int(rng.integers(256))
    elif how == "zeros":
        at, run = rng.integers(size), rng.integers(1, 513)
        out[at : at + run] = bytes(len(out[at : at + run]))
    elif how == "grow":
        at, more = int(rng.integers(size)), rng.bytes(int(rng.integers(1, 100)))
        out[at:at] = more
    elif how == "swap":
        others = [f"records/{shard_name(n)}" for n in (0, 2, 3)] if name == FILES[-1] else FILES[:-1]
        other = str(rng.choice([file for file in others if file != name and (directory / file).exists()]))
        return how, (directory / other).read_bytes()
    else:
        return how, None
    return how, bytes(out)


def run(config: DataConfig, directory: Path, name: str, cases) -> Counter:
    """Count the outcomes: `refused`, `exact`, `silent KIND`. Fails on other exceptions and unnamed files."""
    expected, file, counts = everything(config), directory / name, Counter()
    content = file.read_bytes()
    for case in cases:
        how, data = damaged(directory, name, case)
        file.unlink() if data is None else file.write_bytes(data)
        try:
            same = everything(config) == expected
            counts["exact" if same else f"silent {how}"] += 1
        except ValueError as error:
            named = str(file) in str(error) or (name == "index.json" and str(directory) in str(error))
            assert named, (name, case, how, error)
            counts["refused"] += 1
        file.write_bytes(content)
    return counts


@pytest.mark.parametrize("name", FILES)
def test_damage_is_never_silent(prepared, name):
    counts = run(*prepared, name, range(QUICK))
    assert not [outcome for outcome in counts if outcome.startswith("silent")], counts
    assert counts["refused"] > QUICK / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_damage_is_never_silent_extended(prepared, name):
    counts = run(*prepared, name, range(QUICK, QUICK + SLOW))
    print(f"\n{name}: {dict(sorted(counts.items()))} of {SLOW}")
    assert not [outcome for outcome in counts if outcome.startswith("silent")], counts


def test_a_changed_record_number_is_refused(prepared):
    """The fault that made training read another scan's voxels."""
    config, directory = prepared
    table = pq.read_table(directory / "scans.parquet").to_pylist()
    good = [line for line in table if line["record"] >= 0]
    good[0]["record"], good[1]["record"] = good[1]["record"], good[0]["record"]
    pq.write_table(pa.Table.from_pylist(table, index.SCANS), directory / "scans.parquet")
    with pytest.raises(ValueError, match="scans.parquet is damaged; restore it from a copy, or run prepare again"):
        everything(config)
    with pytest.raises(ValueError, match="scans.parquet is damaged.*add --recheck"):
        prepare(config, directory, workers=0, records=True)
    description = json.loads((directory / "index.json").read_text())
    del description["sha256"], description["files"]
    (directory / "index.json").write_text(json.dumps(index.sealed(directory, description)))
    with pytest.raises(ValueError, match=r"array_record-0000\d: record \d is not the one in the index"):
        everything(config)


def as_version_2(directory: Path) -> None:
    """Rewrite an index as the version before wrote it: without digests and series."""
    description = json.loads((directory / "index.json").read_text())
    del description["sha256"], description["files"], description["inputs"]
    (directory / "index.json").write_text(json.dumps(description | {"version": index.UNVERIFIED}))
    table = pq.read_table(directory / "scans.parquet")
    pq.write_table(table.drop_columns(["record_digest", "series"]), directory / "scans.parquet")


def test_an_index_without_digests_opens_with_a_warning(prepared):
    config, directory = prepared
    before, lines = everything(config), facts(directory)
    as_version_2(directory)
    with pytest.warns(UserWarning, match="older version without digests.*run prepare again"):
        old = everything(config)
    zeros = bytes(len(old[2][4]))
    assert old[2][4] == zeros and old[2][5:] == before[2][5:] and old[3:] == before[3:]
    report = prepare(config, directory, workers=0, records=True)
    assert report["reading"]["scans_read"] == 1  # the bad scan
    assert {k: v["record_digest"] for k, v in facts(directory).items()} == {
        k: v["record_digest"] for k, v in lines.items()
    }
    assert everything(config)[2:] == before[2:]


def test_a_damaged_version_does_not_look_like_an_old_index(prepared):
    config, directory = prepared
    text = (directory / "index.json").read_text()
    assert f'"version": {index.VERSION}' in text
    (directory / "index.json").write_text(text.replace(f'"version": {index.VERSION}', f'"version": {index.UNVERIFIED}'))
    with pytest.raises(ValueError, match="index.json is damaged: its content does not match its digest"):
        everything(config)


def test_an_old_index_without_its_content_is_refused(prepared):
    """A damaged version 2 has no digest that would show it."""
    config, directory = prepared
    as_version_2(directory)
    whole = json.loads((directory / "index.json").read_text())
    name = next(iter(whole["sources"]))
    for content, missing in (
        ({"version": 2}, "identity, sources"),
        (whole | {"identity": 1}, "identity"),
        (whole | {"sources": []}, "sources"),
        (whole | {"sources": {"own": []}}, "sources.own.fields, .*sources.own.rows"),
        (whole | {"sources": {name: whole["sources"][name] | {"root": None}}}, f"sources.{name}.root"),
    ):
        (directory / "index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"index.json is damaged: {missing} missing or of another type; restore"):
            everything(config)
