"""Missing, changed and unreadable scans, and dead workers, stop a run by name."""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from practice import reseal
from test_pipeline import config, digest  # noqa: F401

from input_pipeline.batching.collate import Batch
from input_pipeline.batching.load import RowLoader
from input_pipeline.batching.pipeline import Rows, batches
from input_pipeline.index.index import SCANS
from input_pipeline.parallel.workers import WorkerError
from input_pipeline.samples import RowError


@pytest.fixture
def damaged(config, tmp_path):
    """Return (config, path) of the same data without one indexed scan."""
    shutil.copytree(Path(config.index).parent, tmp_path, dirs_exist_ok=True)
    moved = lambda sources: {  # noqa: E731
        name: dict(fields) | {"root": str(tmp_path / "data")} for name, fields in sources.items()
    }
    scan = next(p for p in sorted((tmp_path / "data/scans/train").iterdir()) if p.is_file())
    path = str(scan.relative_to(tmp_path / "data"))
    scan.unlink()
    return (
        dataclasses.replace(
            config, train=moved(config.train), test=moved(config.test), index=str(tmp_path / "index"), crop=1.0
        ),
        path,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_scan_stops_the_run_by_name(damaged, workers):
    config, path = damaged
    with Rows(dataclasses.replace(config, workers=workers), batch=2, epochs=1) as rows:
        with pytest.raises(RowError, match=f"{path}, row .* there is no such file .*data.allowed_loss") as caught:
            list(batches(rows))
    assert caught.value.file == path and " of " in caught.value.row


def test_changed_scan_stops_the_run(damaged):
    config, path = damaged
    other = next(p for p in sorted((Path(config.index).parent / "data/scans/train").iterdir()) if p.suffix == ".png")
    (Path(config.index).parent / "data" / path).write_bytes(other.read_bytes())
    with Rows(config, batch=2, epochs=1) as rows:
        with pytest.raises(RowError, match=f"{path}, row .* bytes, but [0-9,]+ when it was indexed: it has changed"):
            list(batches(rows))


def test_records_of_other_sizes_are_refused(config):
    with pytest.raises(ValueError, match="has no records: run prepare with --records"):
        Rows(dataclasses.replace(config, records=True), batch=2)
    loader = RowLoader(config, "train", training=True)
    loader.index.description["records"] = {"storage": "uint8", "size_2d": 64}
    with pytest.raises(ValueError, match="data.size_2d is 32, was 64; run prepare"):
        loader.index.check_records({"storage": "uint8", "size_2d": 32})


def test_one_channel_for_gray_scans(config, tmp_path):
    """One channel indexes each plane once instead of three times; a scan with colour is refused by name."""
    three, one = RowLoader(config, "train", True), RowLoader(dataclasses.replace(config, channels=1), "train", True)
    samples = np.arange(6)
    (planned, *_) = three.plan(samples, [three.measure(0, samples)], (0,))
    whole, gray = (loader.load(planned, 0, 0, 0)[0] for loader in (three, one))
    np.testing.assert_array_equal(whole["plane_index"], np.repeat(gray["plane_index"], 3, axis=-1))
    assert all((whole[name] == gray[name]).all() for name in whole if name != "plane_index")
    in_colour = shutil.copytree(config.index, tmp_path / "index")
    lines = pq.read_table(in_colour / "scans.parquet").to_pylist()
    path, lines[0]["channels"] = lines[0]["path"], 3
    pq.write_table(pa.Table.from_pylist(lines, SCANS), in_colour / "scans.parquet")
    reseal(in_colour)
    with pytest.raises(ValueError, match=f"data.channels is 1, but 1 scans have colour, such as {path}: make it 3"):
        RowLoader(dataclasses.replace(config, channels=1, index=str(in_colour)), "train", True)


def test_order_of_sources_in_a_config_does_not_matter(config):
    reordered = dataclasses.replace(config, train=dict(reversed(config.train.items())))
    assert list(reordered.train) != list(config.train)
    with Rows(reordered, batch=2) as rows, Rows(config, batch=2) as others:
        assert rows.identity == others.identity
        assert next(iter(batches(rows))).rows == next(iter(batches(others))).rows


def test_allowed_loss_is_reported_and_affects_no_other_sample(config, damaged):
    changed, path = damaged
    whole = {info.row: (info, batch) for info, batch in rows_of(dataclasses.replace(config, crop=1.0))}
    lost = dataclasses.replace(changed, allowed_loss=50)
    left_out = 0
    for info, batch in rows_of(lost):
        expected_info, expected = whole[info.row]
        assert info.samples == expected_info.samples
        if not info.left_out:
            assert digest(Batch(batch.arrays, ())) == digest(Batch(expected.arrays, ()))
            continue
        left_out += len(info.left_out)
        assert len(info.left_out) == 1  # once per row, even if several samples show it
        assert all(line.startswith(f"{path}, row ") for line in info.left_out)
        blind = batch.arrays["weights"][0] != expected.arrays["weights"][0]
        segments = set(batch.arrays["segments"][0][blind].tolist())
        assert segments and not batch.arrays["weights"][0][np.isin(batch.arrays["segments"][0], list(segments))].any()
        rest = ~np.isin(batch.arrays["segments"][0], list(segments))
        np.testing.assert_array_equal(batch.arrays["weights"][0][rest], expected.arrays["weights"][0][rest])
    assert left_out
    with Rows(dataclasses.replace(lost, allowed_loss=left_out - 1 or 1), batch=1, epochs=2) as rows:
        with pytest.raises(ValueError, match=f"scans could not be loaded, data.allowed_loss is .*{path}"):
            list(batches(rows))


def rows_of(config):
    with Rows(dataclasses.replace(config, window=10**6), batch=1, epochs=1) as rows:
        return [(batch.rows[0], batch) for batch in batches(rows)]


def test_killed_worker_stops_the_run_and_names_its_row(config):
    with Rows(dataclasses.replace(config, workers=2, read_ahead=2), batch=1, epochs=None) as rows:
        iterator = iter(batches(rows))
        next(iterator)
        pids = list(rows.pool._pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=r"(epoch 0, window \d+, row \d+|epoch 0, window 1).*worker died"):
            for _ in range(50):
                next(iterator)
        assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
