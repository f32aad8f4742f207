"""`prepare`: the index it writes, bad input, leaks, and the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_series import two_kernels

from input_pipeline import phantoms
from input_pipeline.batching.load import RowLoader
from input_pipeline.config import DataConfig
from input_pipeline.images import scans
from input_pipeline.index import prepare as prepare_module
from input_pipeline.index import scan_checks, summary_figure
from input_pipeline.index.index import Index, scan_key
from input_pipeline.index.prepare import Refused, prepare
from input_pipeline.samples import Scan
from input_pipeline.sources import open_sources

FAMILIES = {
    "modality": ("rad3d_modality", "modality.csv"),
    "rationale": ("rad3d_rationale", "rationale.json"),
    "vqa": ("vqa_rad", "vqa.csv"),
    "yes_no": ("diagnosis", "diagnosis_yes_no.csv"),
}


@pytest.fixture(scope="module")
def practice(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepare") / "practice"
    phantoms.write(out, train=40, test=16, size=64, workers=1)
    return out


def config_of(root: Path, tables: dict | None = None, **changes) -> DataConfig:
    """Return a config of the practice data, or of tables {split: {source: fields}}."""
    if tables is None:
        tables = {
            split: {
                name + end: {"family": family, "table": f"{split}/{table}", "root": str(root), "split": split}
                for name, (family, table) in FAMILIES.items()
            }
            for split, end in (("train", ""), ("test", "_test"))
        }
    fields = {
        "tokenizer": str(root / "tokenizer.model"), "terms": "none", "size_2d": 64, "size_3d": 64, "depth": 16,
        "text_length": 256, "vision_rows": 2, "patch_length": 32, "planes": 200, "scans": 4,
    }  # fmt: skip
    return DataConfig(**tables, **(fields | changes))


@pytest.fixture(autouse=True)
def no_figure(request, monkeypatch):
    """Skip the slow figure, except in `test_the_command`."""
    if request.node.name != "test_the_command":
        monkeypatch.setattr(summary_figure, "draw", lambda report, file: file.touch())


@pytest.fixture
def mine(tmp_path, practice) -> Path:
    """Return a directory with the images p0.png to p5.png and the volume ct.nii.gz."""
    root = tmp_path / "mine"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(root / f"p{i}.png")
    voxels = rng.integers(-1000, 1000, (40, 40, 12)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), root / "ct.nii.gz")
    shutil.copy(practice / "tokenizer.model", root)
    return root


def row(name: str, *paths, **changes) -> dict:
    question = " ".join(f"<image-{i + 1}>" for i in range(len(paths))) + " Any effusion?"
    return {"id": name, "task": "vqa", "scans": list(paths), "instruction": question, "response": "yes"} | changes


def own(root: Path, train: list, test: list = (), **changes) -> DataConfig:
    """Return a config of JSON Lines tables. A row that is a string is written unchanged."""
    tables = {}
    for split, rows in (("train", train), ("test", test)):
        if rows:
            lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
            (root / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
            tables[split] = {f"own_{split}": {"family": "jsonl", "table": f"{split}.jsonl", "root": str(root)}}
    return config_of(root, tables, **changes)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def facts(directory: Path) -> dict[str, dict]:
    """Return path, volume and window -> line of scans.parquet."""
    table = pq.read_table(directory / "scans.parquet").to_pylist()
    return {line["path"] + ("" if line["volume"] < 0 else str(line["volume"])) + line["window"]: line for line in table}


def states(directory: Path) -> dict[tuple[str, str], str]:
    table = pq.read_table(directory / "rows.parquet").to_pylist()
    return {(line["source"], line["row_id"]): line["state"] for line in table}


# --- a complete run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexed(practice, tmp_path_factory) -> tuple[DataConfig, Path, dict]:
    out = tmp_path_factory.mktemp("indexed") / "index"
    config = config_of(practice, index=str(out))
    return config, out, prepare(config, out, workers=0)


def test_the_index_is_what_training_opens(indexed):
    config, out, report = indexed
    index, opened = Index(out), open_sources(config)
    index.check(config.sources())
    for name, dataset in opened.items():
        assert index.tables[name]["rows"] == len(dataset) == index.tables[name]["good_rows"] > 0
        assert index.tables[name]["split"] == ("test" if name.endswith("_test") else "train")
        assert not index.bad_rows(name).any()
        known = index.scans({name: config.sources()[name]})
        for i in range(len(dataset)):
            for scan in dataset.scans(i):
                voxels, _ = scans.read(dataset.root / scan.path)
                assert known[known.number(scan_key(dataset.root, scan))].shape[:3] == voxels.shape[:3]
    assert report["rows"]["good"] == sum(len(dataset) for dataset in opened.values())
    assert report["scans"] == {"good": 56, "bad": 0}
    assert set(os.listdir(out)) == {
        "index.json", "scans.parquet", "rows.parquet", "quarantine.jsonl", "notices.jsonl", "cut.jsonl",
        "duplicates.jsonl", "leaks.jsonl", "summary.txt", "summary.json", "summary.png", ".lock",
    }  # fmt: skip


def test_rows_and_scans_are_those_of_the_first_epoch(indexed):
    """`prepare` and training count the same tokens, and the same patches and planes."""
    config, out, _ = indexed
    loader = RowLoader(config, "train", training=False)
    measured = loader.measure(0, np.arange(loader.starts[-1]))
    rows = pq.read_table(out / "rows.parquet").to_pylist()
    counted = {(line["source"], line["row"]): line["tokens"] for line in rows if line["source"] in config.train}
    samples = zip(np.repeat(loader.names, np.diff(loader.starts)), np.concatenate(loader.good), strict=True)
    assert list(zip(samples, measured.tokens, strict=True)) == [
        (key, counted[key])
        for key in zip(np.repeat(loader.names, np.diff(loader.starts)), np.concatenate(loader.good), strict=True)
    ] and len(counted) == len(measured.tokens)
    number = lambda line: loader.scans.number(tuple(line[k] for k in ("root", "path", "volume", "window")))  # noqa: E731
    sizes = {number(line): (line["patches"], line["planes"]) for line in facts(out).values()}
    assert [sizes[k] for k in measured.scans] == list(zip(measured.patches, measured.planes, strict=True))


def test_facts_of_a_scan(mine, tmp_path):
    """A volume with and without a window, and a gray image saved in colour."""
    gray = np.random.default_rng(1).integers(0, 255, (33, 50), np.uint8)
    Image.fromarray(np.stack([gray] * 3, -1)).save(mine / "colour.png")
    window = {"path": "ct.nii.gz", "window": [-100, 300]}
    config = own(mine, [row("a", "ct.nii.gz", window), row("b", "colour.png")])
    prepare(config, tmp_path / "index", workers=0)
    scan_facts = facts(tmp_path / "index")
    whole, windowed, image = (scan_facts[name] for name in ("ct.nii.gz", "ct.nii.gz[-100.0, 300.0]", "colour.png"))
    assert (whole["height"], whole["width"], whole["depth"], whole["channels"]) == (40, 40, 12, 1)
    assert whole["format"] == "nifti" and whole["dtype"] == "int16" and whole["spacing"] == [1, 1, 1]
    assert (whole["low"], whole["high"]) == (-1000, 999)
    assert whole["bytes"] == (mine / "ct.nii.gz").stat().st_size
    assert whole["sha256"] == windowed["sha256"] == scan_checks.scan_sha256(mine / "ct.nii.gz")
    assert (whole["patches"], whole["planes"]) == (2 * 2 * 3, 2 * 2 * 12)
    assert (image["height"], image["width"], image["depth"], image["channels"]) == (33, 50, 1, 1)
    assert (image["patches"], image["planes"], image["spacing"]) == (4, 4, [])
    assert all(line["record"] == -1 and line["fault"] == "" for line in scan_facts.values())


def test_series_of_a_study(mine, tmp_path):
    """A study is a scan with `series`; a run on unchanged files reads nothing."""
    two_kernels(mine / "study")
    rows = [row(words, "study") | {"series": words} for words in ("soft", "lung", "spine")]
    config = own(mine, rows)
    prepare(config, tmp_path / "index", workers=0)
    (bad,) = (line for line in lines(tmp_path / "index" / "quarantine.jsonl") if "series" in line)
    assert bad["series"] == "spine" and "no series matches 'spine': 3 \"Chest soft\"" in bad["reason"]
    table = {line["series"]: line for line in pq.read_table(tmp_path / "index" / "scans.parquet").to_pylist()}
    assert {words: table[words]["depth"] for words in table} == {"soft": 6, "lung": 8, "spine": 0}
    assert table["soft"]["sha256"] == table["lung"]["sha256"] and table["soft"]["key"] != table["lung"]["key"]
    known = Index(tmp_path / "index").scans(config.sources("train"))
    assert known[known.number(scan_key(mine, Scan("study", series="lung")))].shape == (128, 128, 8, 1)
    assert known.number(scan_key(mine, Scan("study"))) is None
    assert prepare(config, tmp_path / "index", workers=0)["reading"]["scans_read"] == 0
    os.utime(next((mine / "study" / "b").iterdir()), ns=(0, 0))
    assert prepare(config, tmp_path / "index", workers=0)["reading"]["scans_read"] == 3


def test_facts_of_a_row(mine, tmp_path):
    config = own(mine, [row("a", "p0.png", "p1.png", study="s"), row("b", "p0.png", response="yes " * 400)])
    report = prepare(config, tmp_path / "index", workers=0)
    first, second = pq.read_table(tmp_path / "index" / "rows.parquet").to_pylist()
    assert (first["row_id"], first["task"], first["study"], first["scans"]) == ("a", "vqa", "s", 2)
    assert first["tokens"] > 2 * 34 and 0 < first["trained"] < 10
    assert second["tokens"] == config.text_length and second["state"] == "good"
    assert report["splits"]["train"]["cut"]["response"] > 100 and report["splits"]["train"]["cut_rows"] == 1
    (cut,) = lines(tmp_path / "index" / "cut.jsonl")
    assert (cut["id"], cut["row"], cut["source"]) == ("b", "2", "own_train")
    assert cut["tokens_cut"]["response"] == report["splits"]["train"]["cut"]["response"] and not cut["scans_left_out"]


@pytest.mark.parametrize("channels, warned", [(1, True), (3, False)])
def test_colour_that_training_would_refuse_is_reported(mine, tmp_path, channels, warned):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(mine / "red.png")
    messages = []
    config = own(mine, [row("a", "p0.png"), row("b", "red.png")], channels=channels)
    prepare(config, tmp_path / "index", workers=0, log=messages.append)
    assert any("but 1 scans are in colour" in line for line in messages) == warned


def test_the_result_does_not_depend_on_workers(indexed, tmp_path):
    """Two workers and none; the killed run in test_prepare_interrupted.py has one."""
    config, out, _ = indexed
    prepare(config, tmp_path / "index", workers=2)
    for name in ("scans.parquet", "rows.parquet", "quarantine.jsonl", "leaks.jsonl"):
        assert (tmp_path / "index" / name).read_bytes() == (out / name).read_bytes(), name
    assert Index(tmp_path / "index").identity == Index(out).identity


def test_identity_covers_what_training_reads(mine, tmp_path):
    """A moved root keeps the identity; another byte in a scan, or another row, changes it."""

    def identity(root, config, name):
        prepare(config, tmp_path / name, workers=0)
        return Index(tmp_path / name).identity

    rows = [row("a", "p0.png"), row("b", "p1.png")]
    first = identity(mine, own(mine, rows), "first")
    moved = tmp_path / "moved"
    shutil.copytree(mine, moved)
    assert identity(moved, own(moved, rows), "second") == first
    assert identity(mine, own(mine, rows[:1]), "third") != first
    shutil.copy(mine / "p2.png", mine / "p1.png")
    assert identity(mine, own(mine, rows), "fourth") != first


# --- bad input --------------------------------------------------------------------------------------------------------


def test_every_kind_of_bad_input_is_in_quarantine_and_all_else_is_good(mine, tmp_path):
    packed = (mine / "ct.nii.gz").read_bytes()
    (mine / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(mine / "constant.png")
    shutil.copy(mine / "p0.png", tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", mine / "link.png")
    expected = {  # row -> fault of its scan ("" if the row is bad), part of the reason, part of the remedy
        "missing": ("missing", "no such file", "below the root"),
        "cut": ("damaged", "gzip", "copy it again"),
        "constant": ("constant", "every voxel is 7", "leave it out"),
        "link": ("refused", "points outside the root", "below the root"),
        "window": ("unsupported", "all outside the window", "window"),
        "no window": ("unsupported", "is not one of lung", "window"),
        "no volume": ("ambiguous", "no volume 3", "only volume is 0"),
        "one of two": ("missing", "no such file", "below the root"),
        "many": ("", "5 scans, a row has 4", "data.scans"),
        "nothing fits": ("", "do not fit into", "data.text_length"),
        "climbing": ("", "leaves its folder with '..'", "below the root"),
        "blank": ("", "response is blank", "remove the row"),
        "no mark": ("", "no mark <image-2>", "mark"),
        "not JSON": ("", "not valid JSON", "JSON"),
    }
    bad = [
        row("missing", "none.png"),
        row("cut", "cut.nii.gz"),
        row("constant", "constant.png"),
        row("link", "link.png"),
        row("window", {"path": "ct.nii.gz", "window": [4000, 5000]}),
        row("no window", {"path": "ct.nii.gz", "window": "lungs"}),
        row("no volume", {"path": "p0.png", "volume": 3}),
        row("one of two", "p0.png", "none.png"),
        row("many", *[f"p{i}.png" for i in range(5)]),
        row(
            "nothing fits", *[f"p{i}.png" for i in range(6)], *[{"path": "ct.nii.gz", "window": [0, i]} for i in (1, 2)]
        ),
        row("climbing", "../outside.png"),
        row("blank", "p0.png", response=" "),
        row("no mark", "p0.png", "p1.png", instruction="<image-1> What?"),
        "{not JSON",
    ]
    good = [row(f"good {i}", f"p{i}.png") for i in range(6)] + [
        row("windowed", {"path": "ct.nii.gz", "window": "lung"})
    ]
    config = own(mine, good[:3] + bad + good[3:])
    report = prepare(config, tmp_path / "index", workers=0)

    row_states = states(tmp_path / "index")
    assert {name for (_, name), state in row_states.items() if state == "good"} == {r["id"] for r in good}
    quarantined = lines(tmp_path / "index" / "quarantine.jsonl")
    opened = {name for name in expected if ("own_train", name) in row_states}
    assert opened == set(list(expected)[:10])
    unopened = [line for line in quarantined if line["kind"] == "row" and "id" not in line]
    assert [line["row"] for line in unopened] == ["14", "15", "16", "17"]
    for name, (fault, reason, remedy) in expected.items():
        row_lines = [line for line in quarantined if line.get("id") == name]
        assert name not in opened or row_lines[0]["row"] == str(list(expected).index(name) + 4), (
            "three good rows come first"
        )
        if name not in opened:
            row_lines = [unopened[list(expected).index(name) - 10]]
        assert len(row_lines) == 1 and reason in row_lines[0]["reason"], (name, row_lines)
        assert row_lines[0]["file"] == str(mine / "train.jsonl") and row_lines[0]["source"] == "own_train"
        if fault:
            scan_lines = [line for line in quarantined if line["kind"] == "scan" and reason in line["reason"]]
            assert len(scan_lines) == 1 and scan_lines[0]["fault"] == fault and remedy in scan_lines[0]["remedy"], (
                name,
                scan_lines,
            )
        else:
            assert remedy in row_lines[0]["remedy"], row_lines
    assert len(quarantined) == 7 + len(expected) == report["quarantine"]
    assert report["rows"] == {"good": len(good), "bad": 10, "not_opened": 4}
    assert sum(report["reasons"]["rows"].values()) == 14 and sum(report["reasons"]["scans"].values()) == 7
    index = Index(tmp_path / "index")
    assert index.bad_rows("own_train").sum() == 10 and len(index.bad_rows("own_train")) == len(good) + 10


def test_leaks_and_duplicates(mine, tmp_path, capsys):
    shutil.copy(mine / "p0.png", mine / "again.png")
    train = [row("a", "p0.png"), row("b", "p1.png", study="s"), row("c", "p4.png")]
    test = [row("d", "again.png"), row("e", "p2.png", study="s"), row("f", "p3.png", study="t")]
    config = own(mine, train, test)
    with pytest.raises(Refused, match="studies: 1, scans: 1") as refused:
        prepare(config, tmp_path / "index", workers=0)
    assert refused.value.report["leaks"] == {"study": 1, "scan": 1}
    assert not (tmp_path / "index" / "index.json").exists() and (tmp_path / "index" / "summary.txt").exists()
    study, scan = lines(tmp_path / "index" / "leaks.jsonl")
    assert study["study"] == "s" and study["train"] == [{"source": "own_train", "row": "b"}]
    assert study["test"] == [{"source": "own_test", "row": "e"}]
    assert (scan["train"], scan["test"]) == ([str(mine / "p0.png")], [str(mine / "again.png")])
    (duplicate,) = lines(tmp_path / "index" / "duplicates.jsonl")
    assert duplicate["paths"] == [str(mine / "p0.png"), str(mine / "again.png")]

    report = prepare(config, tmp_path / "index", workers=0, allow_leaks=True)
    assert report["reading"]["scans_read"] == 0 and Index(tmp_path / "index")
    prepare(own(mine, train), tmp_path / "alone", workers=0)  # without a test split there are no leaks


def test_a_study_below_two_roots_is_a_leak(practice, mine, tmp_path):
    """A paper is the same in every data set. A path or another name is not: many data sets have an `images/1.png`."""
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (mine / "images").mkdir()
    for k, folder in enumerate((mine, other)):
        for i, name in enumerate(("images/1.png", "images/PMC77_f1.png", "images/9.png")):
            pixels = np.random.default_rng(10 * k + i).integers(0, 255, (40, 40), np.uint8)
            Image.fromarray(pixels).save(folder / name)
    (other / "images" / "PMC77_f1.png").rename(other / "images" / "pmc77_f2.png")
    for folder, name, last in ((mine, "train", "PMC5"), (other, "test", "pmc5")):
        figure = next(path for path in (folder / "images").iterdir() if path.name.lower().startswith("pmc"))
        rows = [row("a", "images/1.png"), row("b", f"images/{figure.name}"), row("c", "images/9.png", study=last)]
        rows.append(row("d", "images/9.png", study="case-1"))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    source = lambda folder, name: {"family": "jsonl", "table": f"{name}.jsonl", "root": str(folder)}  # noqa: E731
    config = config_of(mine, {"train": {"own": source(mine, "train")}, "test": {"theirs": source(other, "test")}})
    with pytest.raises(Refused, match="studies: 2, scans: 0"):
        prepare(config, tmp_path / "index", workers=0)
    paper, case = lines(tmp_path / "index" / "leaks.jsonl")
    assert (paper["study"], case["study"]) == ("PMC77", "PMC5") and paper["roots"] == [str(mine), str(other)]
    assert (paper["train"], paper["test"]) == ([{"source": "own", "row": "b"}], [{"source": "theirs", "row": "b"}])


def test_a_leak_in_another_epoch(practice, mine, tmp_path):
    """An epoch of a balanced table has only some of its rows. The studies of all of them count."""
    for name in ("train", "test"):
        (mine / name).mkdir()
        for i, patient in enumerate((f"{name}1", "9", f"{name}2")):
            pixels = np.random.default_rng(hash_of(name, i)).integers(0, 255, (40, 40), np.uint8)
            Image.fromarray(pixels).save(
                mine / name / f"patient{patient if patient == '9' else 10 * i + len(name)}.png"
            )
    paths = {name: sorted(f"{name}/{f}" for f in os.listdir(mine / name)) for name in ("train", "test")}
    shared = [p for p in paths["train"] if "patient9." in p]
    assert shared
    for name, files in paths.items():
        others = [p for p in files if "patient9." not in p]
        cells = [(others[0], 0), *((p, 0) for p in files if "patient9." in p), (others[1], 1)]
        text = "image_path,disease,label\n" + "".join(f"{p},edema,{label}\n" for p, label in cells)
        (mine / f"{name}.csv").write_text(text)
    source = lambda name: {"family": "diagnosis", "table": f"{name}.csv", "root": str(mine)}  # noqa: E731
    config = config_of(mine, {"train": {"a": source("train")}, "test": {"b": source("test")}})
    for seed in range(4):  # different images at epoch 0
        with pytest.raises(Refused):
            prepare(dataclasses.replace(config, seed=seed), tmp_path / "index", workers=0)
        assert "patient9" in {line.get("study") for line in lines(tmp_path / "index" / "leaks.jsonl")}


def hash_of(name: str, i: int) -> int:
    return sum(name.encode()) * 10 + i


def test_strict(mine, tmp_path):
    """A refused run deletes the previous index, because the files have changed."""
    prepare(own(mine, [row("a", "p0.png")]), tmp_path / "index", workers=0, strict=True)
    assert Index(tmp_path / "index")
    config = own(mine, [row("a", "p0.png"), row("b", "none.png")])
    with pytest.raises(Refused, match="quarantine.jsonl"):
        prepare(config, tmp_path / "index", workers=0, strict=True)
    assert not (tmp_path / "index" / "index.json").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer": "none.model"}, "none.model cannot be read"),
        ({"train": {}}, "have no sources"),
        ({"train": {"x": {"family": "jsonl", "table": "none.jsonl", "root": "."}}}, "source x: .*none.jsonl"),
        ({"train": {"x": {"family": "jsonl", "root": "."}}}, "source x needs table"),
        ({"terms": "closed"}, "data.terms is 'closed'"),
    ],
)
def test_unreadable_sources_are_errors(mine, tmp_path, change, message):
    config = dataclasses.replace(own(mine, [row("a", "p0.png")]), **change)
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "index", workers=0)


def test_a_table_that_changes_during_the_run(mine, tmp_path, monkeypatch):
    config = own(mine, [row("a", "p0.png"), row("b", "p1.png")])
    encode = prepare_module._encode_rows

    def encode_and_edit(*args):
        encode(*args)
        own(mine, [row("a", "p0.png")])

    monkeypatch.setattr(prepare_module, "_encode_rows", encode_and_edit)
    with pytest.raises(ValueError, match="changed while it was read"):
        prepare(config, tmp_path / "index", workers=0)
    assert not (tmp_path / "index" / "index.json").exists()


def test_a_directory_with_unrelated_files_is_refused(mine):
    with pytest.raises(ValueError, match="has unrelated files"):
        prepare(own(mine, [row("a", "p0.png")]), mine, workers=0)


def test_one_writer(mine, tmp_path):
    config = own(mine, [row("a", "p0.png")])
    with prepare_module.locked_index(tmp_path / "index"), pytest.raises(ValueError, match="another prepare is writing"):
        prepare(config, tmp_path / "index", workers=0)
