"""The validation split: whole studies with all their scans, the same on every host, and never test data."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_tables import write_csv, write_json
from practice import practice, reseal, write_index

from input_pipeline.batching.load import RowLoader
from input_pipeline.batching.pipeline import Rows, batches
from input_pipeline.config import DataConfig
from input_pipeline.datasets.base import study_pattern
from input_pipeline.index.index import Index
from input_pipeline.index.study_groups import held_out, names_of_row, study_groups
from radfm_jax.training.data import check_validation
from radfm_jax.training.eval_answers import select_questions
from radfm_jax.training.experiment import Experiment, TrainConfig

SHARE = 0.25


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four sources about the same 24 scans: their rows of a scan must be on one side."""
    return practice(tmp_path_factory.mktemp("splits"), train=24, test=4, validation_share=SHARE)


def scans_by_source(config: DataConfig, split: str) -> dict[str, set[str]]:
    """Return source -> the scans of its samples in a split."""
    loader, scans = RowLoader(config, split, training=False), defaultdict(set)
    for name, rows in zip(loader.names, loader.good, strict=True):
        for row in rows.tolist():
            scans[name] |= {scan.path for scan in loader.datasets[name].scans(row)}
    return dict(scans)


def union(scans: dict[str, set[str]]) -> set[str]:
    return set().union(*scans.values())


def test_groups_are_connected_by_any_common_name():
    assert len(set(study_groups([[7, 100], [7, 101], [101], [9, 102]]).tolist())) == 2
    rows = [[7, 100], [7, 101], [101], [9, 102], [103], [102, 103], [104]]
    groups = study_groups(rows)
    assert groups.tolist() == [7, 7, 7, 9, 9, 9, 104]
    order = np.random.default_rng(0).permutation(len(rows))
    assert study_groups([rows[k] for k in order]).tolist() == groups[order].tolist()
    assert study_groups([]).tolist() == []


def test_names_of_a_row():
    """A study that is only the path of a scan belongs to its root; other names are the same everywhere."""
    pattern = study_pattern(None)
    names = lambda root, study, *paths: set(  # noqa: E731
        names_of_row("a", "1", study, [(root, path, "") for path in paths], pattern)
    )
    assert not names("/x", "1.png", "1.png") & names("/y", "1.png", "1.png")
    assert names("/x", "case-1", "1.png") & names("/y", "case-1", "2.png")
    assert names("/x", "PMC12", "PMC12_f.jpg") & names("/y", "", "figures/PMC12_g.jpg")
    assert names("/x", "a.png", "a.png", "p10/p10000032/b.png") & names("/y", "p10000032", "c.png")
    content = [names_of_row("a", "1", "", [(root, "1.png", "5f")], pattern) for root in ("/x", "/y")]
    assert content[0] == content[1], "files with equal bytes are one scan"
    assert names("/x", "") and names("/x", "") != set(names_of_row("a", "2", "", [], pattern))


def test_the_share_is_that_of_the_studies():
    groups = np.arange(200_000)
    for share in (0.002, 0.05, 0.5):
        assert held_out(groups, share, seed=0).mean() == pytest.approx(share, rel=0.15)
    first, other = held_out(groups, 0.1, seed=0), held_out(groups, 0.1, seed=1)
    assert (first & other).mean() == pytest.approx(0.01, rel=0.2)
    assert not (held_out(groups, 0.05, seed=0) & ~first).any(), "a larger share keeps the studies of a smaller one"
    assert not held_out(groups, 0.0, seed=0).any()


def test_rows_are_divided_by_scan_over_all_sources(config):
    train, validation = (scans_by_source(config, split) for split in ("train", "validation"))
    assert not union(train) & union(validation) and len(union(train) | union(validation)) == 24
    assert 2 <= len(union(validation)) <= 12
    for name in ("modality", "vqa", "rationale"):  # tables of every scan
        assert train[name] == union(train) and validation[name] == union(validation)
    everything = scans_by_source(dataclasses.replace(config, validation_share=0.0), "train")
    assert {name: train[name] | validation.get(name, set()) for name in train} == everything
    other = scans_by_source(dataclasses.replace(config, validation_seed=3), "validation")
    assert union(other) != union(validation)
    stage = dataclasses.replace(config, seed=2, train={"vqa": config.train["vqa"]})
    assert scans_by_source(stage, "validation") == {"vqa": validation["vqa"]}, "another stage holds out the same"


def test_the_order_of_rows_does_not_matter(config, tmp_path):
    """A table in reverse order, without its last quarter, indexed again: the same scans are held out."""
    root = Path(config.train["vqa"]["root"])
    with open(root / "train/vqa.csv", newline="") as file:
        header, *rows = csv.reader(file)
    write_csv(tmp_path / "vqa.csv", header, *rows[::-1][: len(rows) * 3 // 4])
    source = dict(config.train["vqa"], table=str(tmp_path / "vqa.csv"))
    reversed_ = dataclasses.replace(config, train={"vqa": source}, test={}, index=str(tmp_path / "index"))
    write_index(reversed_)
    held = union(scans_by_source(config, "validation"))
    seen = union(scans_by_source(dataclasses.replace(reversed_, validation_share=0.0), "train"))
    assert union(scans_by_source(reversed_, "validation")) == held & seen != set()


def test_an_index_of_an_earlier_version(config, tmp_path):
    """Without the columns of study groups and windows, the same rows are held out."""
    expected = [scans_by_source(config, split) for split in ("train", "validation")]
    old = tmp_path / "index"
    old.mkdir()
    for file in ("index.json", "scans.parquet"):
        (old / file).write_bytes((Path(config.index) / file).read_bytes())
    table = pq.read_table(Path(config.index) / "rows.parquet")
    pq.write_table(table.drop_columns(["study_group", "windows"]), old / "rows.parquet")
    reseal(old)
    assert Index(old).study_groups("vqa") is None and Index(old).windows("vqa") is None
    moved = dataclasses.replace(config, index=str(old))
    assert [scans_by_source(moved, split) for split in ("train", "validation")] == expected


def test_counts_states_and_questions_leave_out_the_held_rows(config):
    with Rows(config, "train", batch=2, epochs=1) as rows, Rows(config, "validation", batch=2, epochs=1) as held:
        sources = rows.description["sources"]
        assert {n: s["elsewhere"] for n, s in sources.items() if s["elsewhere"]} == {
            n: s["rows"] for n, s in held.description["sources"].items()
        }
        assert len(rows.mixture) == sum(s["rows"] for s in sources.values() if s["sides"] is None) + int(
            rows.mixture.counts[list(sources).index("yes_no")]
        )
        state = iter(batches(rows)).get_state()
        ids = {(s.source, s.row_id) for batch in batches(held) for info in batch.rows if info for s in info.samples}
    questions, _ = select_questions(config, 99)
    # The held-out loss of the balanced source uses only some of its rows.
    asked = {(q.dataset, q.row_id.split("/", 1)[1]) for q in questions if q.dataset != "yes_no"}
    assert asked and asked <= ids
    with Rows(dataclasses.replace(config, validation_share=0.2), "train", batch=2) as other:
        with pytest.raises(ValueError, match=r"validation share and seed is \[0.2, 0\], was \[0.25, 0\]"):
            iter(batches(other)).set_state(state)
    with Rows(dataclasses.replace(config, validation_share=0.0), "train", batch=2) as plain:
        assert "validation share and seed" not in plain.identity, "states of earlier versions have no such key"


def test_shares_that_leave_a_side_empty_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="validation_share 1e-09 holds out none of 24 studies: increase it"):
        RowLoader(dataclasses.replace(config, validation_share=1e-9), "validation", training=False)
    single = dict(config.train["modality"], table="one.csv")
    root = Path(single["root"])
    header, row, *_ = (root / "train/modality.csv").read_text().splitlines()
    (root / "one.csv").write_text(f"{header}\n{row}\n")
    one = dataclasses.replace(config, train={"one": single}, test={}, index=str(tmp_path / "index"))
    write_index(one)
    seed = next(k for k in range(99) if held_out(Index(one.index).study_groups("one"), 0.5, k).all())
    with pytest.raises(ValueError, match="validation_share 0.5 holds out every row of one: decrease it"):
        RowLoader(dataclasses.replace(one, validation_share=0.5, validation_seed=seed), "train", training=True)


def test_the_summary_counts_the_held_rows_as_validation(config):
    report = json.loads((Path(config.index) / "summary.json").read_text())
    train, validation = (RowLoader(config, split, training=False) for split in ("train", "validation"))
    for split, loader in (("train", train), ("validation", validation)):
        assert report["splits"][split]["rows"] == loader.starts[-1]
    held = {name: len(rows) for name, rows in zip(validation.names, validation.good, strict=True)}
    assert {n: s["held_out"] for n, s in report["sources"].items() if s["held_out"]} == held
    answers = report["sources"]["yes_no"]["answers"]
    with Rows(config, "train", batch=2) as rows:
        drawn = int(rows.mixture.counts[list(rows.description["sources"]).index("yes_no")])
    assert answers["yes"]["epoch"] == answers["no"]["epoch"] == drawn / 2 and answers["yes"]["rows"] >= drawn / 2
    text = (Path(config.index) / "summary.txt").read_text()
    assert "Balanced sources" in text and "held out" in text


# --- an epoch is all available data -----------------------------------------------------------------------------------


def test_every_figure_of_a_paper_is_in_an_epoch(config, tmp_path):
    """Two papers with five distant figures each; `released` has one window a paper, and a fifth of the modalities."""
    root = Path(config.train["vqa"]["root"])
    images = sorted((root / "scans/train").glob("*.png"))[:5]
    (tmp_path / "figures").mkdir()
    for paper in ("PMC1", "PMC2"):
        sentences = [{"text": "It is large.", "img_ref": [f"f{k // 60}"] if k % 60 == 0 else []} for k in range(300)]
        write_json(tmp_path / f"{paper}.json", sentences)
        for k, image in enumerate(images):
            (tmp_path / "figures" / f"{paper}_f{k}.jpg").symlink_to(image)
            (tmp_path / "figures" / f"{paper}_f{k}.jpg").unlink()
            (tmp_path / "figures" / f"{paper}_f{k}.jpg").write_bytes(image.read_bytes())
    write_csv(tmp_path / "t.csv", ("PMC_path",), ("PMC1.json",), ("PMC2.json",))
    inline = {"family": "pmc_inline", "root": str(tmp_path), "table": "t.csv"}
    train = {"inline": inline, "modality": dict(config.train["modality"])}
    changes = {"test": {}, "validation_share": 0.0, "text_length": 900, "index": str(tmp_path / "index")}
    papers = dataclasses.replace(config, train=train, **changes)
    write_index(papers)
    with Rows(papers, "train", batch=1, epochs=1) as rows:
        samples = [s for batch in batches(rows) for s in batch.rows[0].samples]
        assert rows.mixture.counts.tolist() == [10, 24]
    ids = sorted(s.row_id for s in samples if s.source == "inline")
    assert ids == sorted(f"{paper}.{window}" for paper in (1, 2) for window in range(1, 6))
    loader = RowLoader(papers, "train", training=True)
    shown = {scan.path for k in range(10) for scan in loader.sample(k, 0)[1].scans}
    assert shown == {f"figures/PMC{paper}_f{k}.jpg" for paper in (1, 2) for k in range(5)}
    with Rows(dataclasses.replace(papers, epoch="released"), "train", batch=1, epochs=1) as rows:
        assert rows.mixture.counts.tolist() == [2, 5] and not rows.description["notes"]
    file = tmp_path / "index" / "rows.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["windows"]), file)  # as an earlier version wrote it
    reseal(tmp_path / "index")
    with Rows(papers, "train", batch=1, epochs=1) as rows:
        assert rows.mixture.counts.tolist() == [2, 24]
        assert "inline: the index is of an earlier version" in rows.description["notes"][0]


# --- training never selects on test data ------------------------------------------------------------------------------


SOURCE = {"family": "vqa_rad", "root": "/data/vqa_rad", "table": "train.csv"}


@pytest.mark.parametrize(
    "validation, message",
    [
        ({"table": "test.csv"}, r"data.validation.v reads test.csv, a test table of RadBench \(VQA-RAD\)"),
        ({"table": "all.csv", "split": "test"}, "a test table of RadBench"),
        ({"table": "held_out.csv"}, "data.validation.v reads held_out.csv, which data.test reads too"),
        ({"table": "latest.csv"}, ""),
        ({"table": "all.csv", "split": "validation"}, ""),
        ({"table": "test.jsonl", "family": "jsonl"}, ""),  # not a benchmark
    ],
)
def test_validation_on_a_test_table_is_refused_unless_told(validation, message):
    from radfm_jax.models import radfm

    data = DataConfig(
        train={"a": SOURCE}, validation={"v": SOURCE | validation}, test={"t": SOURCE | {"table": "held_out.csv"}}
    )
    check_validation(Experiment(radfm.tiny(), data, TrainConfig(validate_on_test=True)))
    if not message:
        check_validation(Experiment(radfm.tiny(), data))
        return
    with pytest.raises(ValueError, match=f"{message}.*Use data.validation_share"):
        check_validation(Experiment(radfm.tiny(), data))
