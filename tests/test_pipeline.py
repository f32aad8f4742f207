"""The order and contents of rows on any number of hosts and workers, and after any interruption."""

import dataclasses
import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from practice import practice

from input_pipeline.batching.collate import Batch
from input_pipeline.batching.load import RowLoader
from input_pipeline.batching.mixture import Mixture
from input_pipeline.batching.pipeline import Rows, batches, prefetch
from input_pipeline.batching.report import PackingReport, RowInfo, SampleInfo
from input_pipeline.datasets import sample_rng
from input_pipeline.images.intensity import one_channel_if_gray
from input_pipeline.images.planes import planes
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.scans import read
from input_pipeline.images.volumes import prepare_volume


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return practice(tmp_path_factory.mktemp("practice"), train=14, test=8, window=25)


def digest(batch: Batch) -> str:
    """Hash the arrays and the descriptions of the rows."""
    code = hashlib.sha256(repr(batch.rows).encode())
    for name in sorted(batch.arrays):
        code.update(
            f"{name}{batch.arrays[name].dtype}{batch.arrays[name].shape}".encode() + batch.arrays[name].tobytes()
        )
    return code.hexdigest()


def global_rows(config, *, batch, hosts, epochs=1, split="train"):
    """Return (RowInfo, digest of the arrays) of the rows of all hosts, in global order."""
    per_host = []
    for host in range(hosts):
        with Rows(config, split, batch=batch, host=host, hosts=hosts, epochs=epochs) as rows:
            per_host.append(list(batches(rows)))
    stream = []
    for of_hosts in zip(*per_host, strict=True):
        for part in of_hosts:
            for i, info in enumerate(part.rows):
                stream.append((info, digest(Batch({k: v[i] for k, v in part.arrays.items()}, ()))))
    return stream


def samples_of(stream):
    return [(s.source, s.row_id) for info, _ in stream if info is not None for s in info.samples]


# --- the order --------------------------------------------------------------------------------------------------------


def test_hosts_and_workers_do_not_change_a_bit(config):
    expected = global_rows(config, batch=4, hosts=1)
    for hosts, workers in ((4, 0), (2, 2)):
        assert global_rows(dataclasses.replace(config, workers=workers), batch=4, hosts=hosts) == expected
    with Rows(config, batch=4) as rows:
        assert len(rows.mixture) == len(samples_of(expected)) == len(set(samples_of(expected)))
        assert rows.windows > 1
    # The last batch of 4 is padded with empty rows; another batch size gives the same rows.
    real = [row for row in expected if row[0] is not None]
    assert [row for row in global_rows(config, batch=3, hosts=1) if row[0] is not None] == real
    assert len(expected) % 4 == 0 and len(expected) - len(real) < 4


def test_epochs_follow_without_empty_rows(config):
    """Two epochs have the same rows in another order, with other crops, and no empty row between them."""
    stream = global_rows(config, batch=2, hosts=1, epochs=2)
    first = [row for row in stream if row[0] is not None and row[0].epoch == 0]
    second = [row for row in stream if row[0] is not None and row[0].epoch == 1]
    # The rows of the larger side of a balanced source take turns.
    plain, again = ([s for s in samples_of(part) if s[0] != "yes_no"] for part in (first, second))
    assert sorted(plain) == sorted(again) and plain != again and len(first) and len(second)
    assert len(samples_of(first)) == len(samples_of(second))
    assert all(info is not None for info, _ in stream[:-1])
    with Rows(config, batch=1, epochs=None) as rows:
        endless = list(itertools.islice(batches(rows), len(first) + 3))
    assert [b.rows[0] for b in endless] == [info for info, _ in stream[: len(endless)]]


def test_seed_changes_the_order(config):
    assert samples_of(global_rows(config, batch=2, hosts=1)) != samples_of(
        global_rows(dataclasses.replace(config, seed=1), batch=2, hosts=1)
    )


def test_evaluation_has_no_random_crops(config):
    once, twice = (global_rows(config, batch=2, hosts=1, split="test", epochs=n) for n in (1, 2))
    assert [d for i, d in twice if i is not None and i.epoch == 0] == [d for i, d in once if i is not None]
    seen = [s for s in samples_of(once) if s[0] == "modality_test"]
    assert sorted(seen) == sorted(("modality_test", str(i)) for i in range(1, 9))


SOURCES = {
    "a": {"rows": 10, "fraction": 1.0, "weight": 3.0},
    "b": {"rows": 5, "fraction": 0.4, "weight": 1.0},
}


def test_fraction_shows_each_row_equally_often():
    """An epoch has two of the five rows of b, so five epochs show each twice; it has every row of a once."""
    mixture = Mixture(SOURCES, seed=0, weights=False)
    epochs = [mixture.epoch(e) for e in range(5)]
    assert [len(e) for e in epochs] == [12] * 5 == [len(mixture)] * 5
    for epoch in epochs:
        assert sorted(n for n in epoch if n < 10) == list(range(10))
    counts = np.bincount(np.concatenate(epochs), minlength=15)
    assert counts.tolist() == [5] * 10 + [2] * 5
    np.testing.assert_array_equal(mixture.epoch(3), epochs[3])
    assert any((epochs[0] != other).any() for other in epochs[1:])


def test_weights_are_shares_of_an_epoch():
    """3 : 1 of 18 samples is 13.5 and 4.5: one source gets the remainder. b has 5 rows and starts another pass."""
    mixture = Mixture(SOURCES, seed=0, weights=True, samples=18)
    assert mixture.counts.tolist() == [14, 4]
    epochs = [mixture.epoch(e) for e in range(10)]
    counts = np.bincount(np.concatenate(epochs), minlength=15)
    assert counts[:10].tolist() == [14] * 10 and counts[10:].tolist() == [8] * 5


def test_batch_that_hosts_cannot_share_is_refused(config):
    with pytest.raises(ValueError, match="5 rows a batch cannot be shared evenly by 2 hosts"):
        Rows(config, batch=5, hosts=2)


# --- the contents of a row --------------------------------------------------------------------------------------------


def test_row_contains_its_samples(config):
    """Compare every token and plane of a row with the parts of the pipeline called one by one."""
    with Rows(config, batch=1, epochs=1) as rows:
        batch = max(batches(rows), key=lambda b: len(b.rows[0].samples))
    loader = RowLoader(config, "train", training=True)
    numbers = {
        (name, loader.datasets[name].row_id(int(row))): int(loader.starts[k] + i)
        for k, name in enumerate(loader.names)
        for i, row in enumerate(loader.good[k])
    }
    arrays = {k: v[0] for k, v in batch.arrays.items()}
    info, shown = batch.rows[0], {}
    assert len(info.samples) > 3 and info.epoch == 0
    for segment, placed in enumerate(info.samples, 1):
        name, sample, encoded = loader.sample(numbers[placed.source, placed.row_id], 0)
        assert (name, sample.task, sample.study_id) == (placed.source, placed.task, placed.study)
        here = arrays["segments"] == segment
        np.testing.assert_array_equal(arrays["ids"][here], encoded.ids)
        np.testing.assert_array_equal(arrays["targets"][here], encoded.targets)
        np.testing.assert_array_equal(arrays["weights"][here], encoded.weights)
        np.testing.assert_array_equal(arrays["positions"][here], np.arange(placed.tokens))
        slots = arrays["visual_index"][here] // 32
        (slot,) = set(slots[slots >= 0].tolist())
        shown[slot] = loader.datasets[name].root, encoded.scans[0]
    assert info.scans == len(shown) and (arrays["scan_rows"] >= 0).sum() == len(shown)
    for slot, (root, scan) in shown.items():
        voxels, header = read(root / scan.path)
        rng = sample_rng(config.seed, 0, "scan", scan.path)
        volume = prepare_volume(
            one_channel_if_gray(voxels), rng=rng, sizes=config.sizes, crop=config.crop, padding=header.padding
        )
        wanted, index = planes(volume)
        patches = arrays["plane_index"][arrays["patch_segments"] == slot + 1]
        np.testing.assert_array_equal(arrays["planes"][patches], wanted[index])
        assert arrays["scan_scale"][slot] == np.float32(volume.scale)


def test_released_numbers(config):
    """In released mode the planes are those of `released_volumes`, float32, with one slot per sample."""
    released = dataclasses.replace(
        config, preprocess="released", storage="float32", patch_length=1024, planes=4096, crop=1.0
    )
    with Rows(released, batch=1, epochs=1) as rows:
        batch = next(iter(batches(rows)))
    info, arrays = batch.rows[0], {k: v[0] for k, v in batch.arrays.items()}
    assert info.scans == len(info.samples) > 1
    loader = RowLoader(released, "train", training=True)
    first = info.samples[0]
    dataset = loader.datasets[first.source]
    row = next(i for i in range(len(dataset)) if dataset.row_id(i) == first.row_id)
    scan = dataset.scans(row)[0]
    intensity = "scan" if first.source == "modality" else "stack"
    volume = released_volumes([one_channel_if_gray(read(dataset.root / scan.path)[0])], intensity=intensity)[0]
    wanted, index = planes(volume)
    slot = arrays["visual_index"][arrays["segments"] == 1].max() // 32
    np.testing.assert_array_equal(
        arrays["planes"][arrays["plane_index"][arrays["patch_segments"] == slot + 1]], wanted[index]
    )


def test_unshared_scans_have_one_slot_per_sample(config):
    alone = dataclasses.replace(config, share_scans=False)
    with Rows(alone, batch=1, epochs=1) as rows:
        assert all(b.rows[0].scans == len(b.rows[0].samples) for b in batches(rows))
    with Rows(config, batch=1, epochs=1) as rows:
        assert sum(b.rows[0].scans for b in batches(rows)) < len(rows.mixture)


def test_report_counts_every_position():
    sample = SampleInfo("vqa", "1", "vqa", None, 30, cut=3, dropped_scans=1)
    row = lambda tokens, padding: RowInfo(0, 0, 0, (sample, sample), tokens, padding, 2)  # noqa: E731
    report = PackingReport(100)
    report.add([row(100, ""), row(90, "no sample is that short"), None])
    assert report.as_dict() == {
        "real tokens": 190 / 300,
        "padding: no sample is that short": 10 / 300,
        "padding: no room for another scan": 0.0,
        "padding: end of the window": 0.0,
        "padding: empty row": 100 / 300,
        "samples per row": 4 / 3,
        "scans per row": 4 / 3,
        "cut tokens": 12,
        "dropped scans": 4,
        "skipped scans": 0,
    }


def test_padding_has_a_cause(config):
    """Rows with two slots run out of slots before they run out of text."""
    with Rows(dataclasses.replace(config, scans=2, share_scans=False), batch=1, epochs=1) as rows:
        report = PackingReport(config.text_length)
        for batch in batches(rows):
            report.add(batch.rows)
    shares = report.as_dict()
    assert shares["padding: no room for another scan"] > 0.4 and shares["scans per row"] > 1.9
    assert sum(v for k, v in shares.items() if k.startswith(("real", "padding"))) == pytest.approx(1)


# --- interruption -----------------------------------------------------------------------------------------------------


def after(config, state, count, *, batch=3, hosts=1, host=0, ahead=2):
    with Rows(config, batch=batch, host=host, hosts=hosts, epochs=None) as rows:
        iterator = iter(prefetch(batches(rows), buffer=ahead))
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        found = []
        for _ in range(count):
            found.append((digest(next(iterator)), iterator.get_state()))
        iterator.close()
        return found


def test_a_state_of_changed_tables_names_them(config):
    with Rows(config, batch=3) as rows:
        state = json.loads(json.dumps(iter(rows).get_state()))
        rows.check_state(state)
        state["tables"]["vqa"] = state["data"]["sources"] = "another checksum"
        sources = config.sources("train")
        path = re.escape(f"{sources['vqa']['root']}/{sources['vqa']['table']}")
        with pytest.raises(ValueError, match=f"These tables have changed: {path}. Restore them and run prepare again"):
            rows.check_state(state)
        del state["tables"]  # a state of version 0.1
        with pytest.raises(ValueError, match="the data differ.*sources is"):
            rows.check_state(state)


def test_resumed_run_is_bit_identical(config):
    """Resume inside a window, at its end and across the end of an epoch, with batches prefetched."""
    whole = after(config, None, 16)
    with Rows(config, batch=3, epochs=1) as rows:
        assert sum(1 for _ in batches(rows)) < 12  # so an epoch ends within these batches
    for stop in (0, 2, 5, 9, 12):
        assert after(config, whole[stop][1], 3) == whole[stop + 1 : stop + 4]
    assert after(dataclasses.replace(config, workers=2), whole[4][1], 3) == whole[5:8]


def test_resume_on_more_hosts(config):
    """A run of one host resumes on two, which load the halves of the same batches."""
    whole = after(config, None, 5, batch=4)
    halves = [after(config, whole[1][1], 3, batch=4, hosts=2, host=h) for h in (0, 1)]
    assert [state for _, state in halves[0]] == [state for _, state in halves[1]] == [state for _, state in whole[2:]]
    with Rows(config, batch=4, epochs=None) as rows:
        expected = list(itertools.islice(batches(rows), 5))[2:]
    parts = [Batch({k: v[:2] for k, v in b.arrays.items()}, b.rows[:2]) for b in expected]
    assert [digest(p) for p in parts] == [code for code, _ in halves[0]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_interrupted_anywhere(config, seed):
    """Resume at random positions with random seeds, windows, hosts and workers; 100 tries over all seeds."""
    rng = np.random.default_rng(seed)
    changed = dataclasses.replace(config, seed=seed, window=int(rng.integers(7, 90)))
    hosts = int(rng.choice([1, 2, 4, 8]))
    whole = after(changed, None, 20, batch=8)
    for _ in range(2):
        stop = int(rng.integers(0, 15))
        workers = int(rng.choice([0, 1, 2]))
        resumed = after(dataclasses.replace(changed, workers=workers), whole[stop][1], 4, batch=8)
        assert resumed == whole[stop + 1 : stop + 5]
        halves = [after(changed, whole[stop][1], 2, batch=8, hosts=hosts, host=h) for h in range(hosts)]
        assert all([s for _, s in half] == [s for _, s in whole[stop + 1 : stop + 3]] for half in halves)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_global_order_does_not_depend_on_hosts_and_workers(config, seed, hosts, workers):
    changed = dataclasses.replace(config, seed=seed, window=11 + seed)
    expected = global_rows(changed, batch=8, hosts=1)
    assert len(set(samples_of(expected))) == len(samples_of(expected))
    assert global_rows(dataclasses.replace(changed, workers=workers), batch=8, hosts=hosts) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 5}, "seed is 5, was 0"),
        ({"window": 50}, "window is 50, was 25"),
        ({"text_length": 300}, "text_length is 300, was 256"),
        ({"crop": 1.0}, "crop is 1.0, was 0.8"),
        ({"max_scans": 3, "scans": 5}, "scans is 5, was 6; max_scans is 3, was 12"),
    ],
)
def test_state_of_other_settings_is_refused(config, change, message):
    with Rows(config, batch=2) as rows:
        state = iter(rows).get_state()
    with Rows(dataclasses.replace(config, **change), batch=2) as rows, pytest.raises(ValueError, match=message):
        iter(rows).set_state(state)


def test_state_of_other_data_is_refused(config, tmp_path):
    with Rows(config, batch=2) as rows:
        state = iter(rows).get_state()
    fewer = {k: dict(v) for k, v in config.train.items() if k != "vqa"}
    with Rows(dataclasses.replace(config, train=fewer), batch=2) as rows:
        with pytest.raises(ValueError, match=r"sources is .*rows and share of vqa is None, was \[\d+, 1.0\]"):
            iter(rows).set_state(state)
        half = state | {"delivered": 2, "data": rows.identity}
        with pytest.raises(ValueError, match="saved state is after row 2 of a batch, but this host has only 2 rows"):
            iter(rows).set_state(half)
