"""Tables read row by row give the same rows and problems as the whole file; folders and incomplete files."""

from __future__ import annotations

import json

import pytest

from input_pipeline.curate import cases, layouts, radmd, splits
from input_pipeline.curate.__main__ import main
from input_pipeline.datasets import csv_tables, json_tables, table_text
from input_pipeline.samples import RowError
from tests.dataset_tables import CASE, write_csv
from tests.test_curate_cases import case


def split_up(rows):
    """Return (good rows, problems by row) of a stream."""
    found = list(rows)
    faults = [(r.row, r.reason) for r in found if isinstance(r, RowError)]
    return [r for r in found if not isinstance(r, RowError)], faults


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_json_by_rows_is_json_whole(tmp_path, indent, monkeypatch):
    """A block may end inside an escape, a number or a multi-byte character."""
    items = [CASE | {"finding": f'Größe \\u00fc " {k}', "n": k * 1.5} for k in range(50)] + [7, 123456, "x", None]
    file = tmp_path / "a.json"
    file.write_text(" " + json.dumps(items, indent=indent, ensure_ascii=False) + " \n", encoding="utf-8")
    for size in (1, 7, 1000):
        real = table_text.open_text
        monkeypatch.setattr(json_tables, "_blocks", lambda f, size=size: iter(lambda: opened.read(size), ""))
        with real(file) as opened:
            good, bad = split_up(json_tables.stream_json(file, ("npy_path",)))
        assert good == list(enumerate(items[:50], 1)) and [row for row, _ in bad] == [51, 52, 53, 54]


@pytest.mark.parametrize(("text", "row", "words"), [
    ("", 0, "got nothing"), ('{"a": 1}', 0, "got dict"), ('[{"a": 1}', 1, "is missing"),
    ('[{"a": 1} {"a": 2}]', 1, "is missing"),
    ('[{"a": 1}, {"a": ]', 2, "not valid JSON"), ('[{"a": 1}] x', 1, "text after the list"), ('[{"a": NaN}]', 1, "NaN"),
    ('[{"a": 1, "a": 2}]', 1, "key 'a' is repeated"), ("[1,]", 2, "not valid JSON"),
])  # fmt: skip
def test_invalid_json(tmp_path, text, row, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RowError, match=words) as caught:
        list(json_tables.stream_json(tmp_path / "a.json", ("a",)))
    assert caught.value.row == row


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_lines_of_json_are_reported(tmp_path, size, monkeypatch):
    """Line numbers are those of an editor, wherever blocks end."""
    monkeypatch.setattr(json_tables, "_blocks", lambda f: iter(lambda: opened.read(size), ""))
    file, data = tmp_path / "a.json", b'[\n{"a": 1},\n{"a":\n "x\xffy"},\n{"a": 2}\n, {"a": 3,\n}]'
    file.write_bytes(data)
    with table_text.open_text(file) as opened:
        rows, found = json_tables.stream_json(file, ("a",)), []
        with pytest.raises(RowError, match=rf"not valid JSON: .*: line 7 \(char {len(data) - 2}\)") as caught:
            found.extend(rows)
    good, bad = split_up(found)
    assert caught.value.row == 4 and good == [(1, {"a": 1}), (3, {"a": 2})]
    assert bad == [(2, "line 4 is not UTF-8 (byte 0xff)")]


def test_csv_by_rows(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbfb,a,more,more\r\n1,2,3,4\r\n1,\xff,3,4\r\n1,2\r\n"x\ny",2,3,4\r\n')
    header, rows = csv_tables.stream_csv(file, ("a",), None)
    good, bad = split_up(rows)
    assert header == ["b", "a"] and good == [(1, {"b": "1", "a": "2"}), (4, {"b": "x\ny", "a": "2"})]
    assert [row for row, _ in bad] == [2, 3] and "not valid UTF-8" in bad[0][1]
    good, _ = split_up(csv_tables.stream_csv(file, ("a",))[1])
    assert [row for row, _ in good] == [1, 2, 4], "readers look at the text of a cell when they use it"


def test_tables_are_whole_or_not_there(tmp_path):
    (tmp_path / "old.csv").write_text("of an earlier run")
    with layouts.Tables(tmp_path, {"a.json": None, "old.csv": ["x"]}) as out:
        for k in range(3):
            out.write("a.json", {"x": k})
    assert json.loads((tmp_path / "a.json").read_text()) == [{"x": k} for k in range(3)]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.json"]
    with pytest.raises(KeyError), layouts.Tables(tmp_path, {"a.json": None, "b.csv": ["x"]}) as out:
        out.write("b.csv", {"x": 1})
        raise KeyError
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.json"]
    assert len(json.loads((tmp_path / "a.json").read_text())) == 3


def test_folders(tmp_path):
    (tmp_path / "rad3d").mkdir()
    write_csv(tmp_path / "rad3d" / "t.csv", ("a",))
    found = layouts.named_table("rad3d_vqa=rad3d:t.csv", tmp_path)
    assert found.root == tmp_path / "rad3d" and found.below("x.png") == "rad3d/x.png" and found.name == "t.csv"
    assert layouts.named_table("rad3d_vqa=rad3d/t.csv", tmp_path).below("x.png") == "x.png"
    for wrong, words in (
        ("rad3d_vqa=../x:t.csv", "leaves its folder"), ("rad3d_vqa=t.csv", "table not found"),
        ("jsonl=rad3d:t.csv", "one of the families"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            layouts.named_table(wrong, tmp_path)


def test_equal_names_in_two_folders_are_two_scans(tmp_path):
    """Both tables have their own scans/1.png; a paper that is in both is one study."""
    rows = [("scans/1.png", "What?", "A"), ("scans/2.png", "What?", "B"), ("PMC77_F1.png", "What?", "C")]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_csv(tmp_path / folder / f"{folder}.csv", ("image_path", "question", "answer"), *rows)
    options = {"test": 0.5, "seed": 0, "near": False, "anew": False, "check": False}
    report = splits.curate(["rad3d_vqa=a:a.csv", "rad3d_vqa=b:b.csv"], tmp_path, tmp_path / "out", options)
    assert report["counts"]["groups"] == 5


def test_a_group_keeps_its_side_when_rows_are_added_before_it(tmp_path):
    options = {"test": 0.5, "seed": 0, "near": False, "anew": False, "check": False}
    rows = [(f"{k}.png", "What?", "A") for k in range(40)]
    sides = []
    for added in (0, 3):
        place = tmp_path / str(added)
        place.mkdir()
        more = [(f"9{k}.png", "What?", "A") for k in range(added)] + [("5.png", "Again?", "B")] * (added > 0)
        write_csv(place / "t.csv", ("image_path", "question", "answer"), *more, *rows)
        splits.curate(["rad3d_vqa=t.csv"], place, place / "out", options)
        _, lines = csv_tables.stream_csv(place / "out" / "t.csv", ("image_path", "question", "split"))
        sides.append({r["image_path"]: r["split"] for _, r in lines if r["question"] == "What?"})
    assert sides[0].items() <= sides[1].items() and set(sides[0].values()) == {"train", "test"}


def test_balance_in_each_split(tmp_path):
    """A disease that would only be absent in the test split has no rows there."""
    rows = [(f"{k}.png", "Edema", str(k % 2), "train") for k in range(10)]
    rows += [(f"t{k}.png", "Edema", "0", "test") for k in range(4)]
    write_csv(tmp_path / "t.csv", ("image_path", "disease", "label", "split"), *rows)
    report = radmd.curate(["diagnosis=t.csv"], tmp_path, tmp_path / "out", {})
    _, left = csv_tables.stream_csv(tmp_path / "out" / "t.csv", ("label", "split"))
    assert [r["split"] for _, r in left] == ["train"] * 10 and report["counts"]["t.csv: dropped by balance"] == 4


def test_bytes_that_are_no_text_cost_their_row(tmp_path):
    (tmp_path / "v.csv").write_bytes(b"image_path,question,answer\n1.png,What?,A mass.\n2.png,What?,\xff\xfe\n")
    assert main(["radmd", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "rad3d_vqa=v.csv"]) == 0
    assert '"row": "2"' in (tmp_path / "out" / "problems.jsonl").read_text()


def test_cases_whose_files_would_have_one_name(tmp_path):
    for name in ("a b", "a_b", "c"):
        case(tmp_path / "cases", name, {"findings": name, "scans": [{"path": "x.png", "modality": "CT"}]}, "x.png")
    report = cases.curate("rad3d", tmp_path / "cases", tmp_path / "out", {"first": False}, workers=0)
    assert report["problems"] == 1 and report["counts"]["caption.json: rows"] == 2
    header = ("case", "findings", "scans")
    write_csv(tmp_path / "cases" / "cases.csv", header, ("c", "A.", "x.png"), ("c", "B.", "x.png"), ("c",))
    report = cases.curate("rad3d", tmp_path / "cases", tmp_path / "csv", {"first": False}, workers=0)
    written = json.loads((tmp_path / "csv" / "caption.json").read_text())
    assert report["problems"] == 2 and [r["finding"] for r in written] == ["A."]


def test_bad_lines_of_captions_are_reported(tmp_path):
    header = ("PMC_id", "img_ref", "context", "question", "answer")
    write_csv(tmp_path / "c.csv", header, ("PMC1", "['F1']", "", "Q: What?", "A: B"))
    good = {"paper": "PMC1", "pictures": ["F1"], "caption": "Axial CT."}
    (tmp_path / "captions.jsonl").write_text(json.dumps(good) + '\n{"paper": 1}\n[]\n')
    options = {"captions": [str(tmp_path / "captions.jsonl")]}
    report = radmd.curate(["pmc_casereport=c.csv"], tmp_path, tmp_path / "out", options)
    assert report["problems"] == 2 and report["counts"]["c.csv: kept"] == 1


@pytest.mark.parametrize(("argv", "words"), [
    ("vqa c.json --model m --budget 5", "--budget needs --price-in"),
    ("vqa c.json --model m --base-url https://me:secret@host/v1", "has a user or a password"),
    ("vqa c.json --model m --limit 0", "--limit: must be at least 1 (got 0)"),
    ("radmd --root . rad3d_vqa=v.csv --examples -1", "--examples: must be at least 0 (got -1)"),
    ("diagnosis --root . rsna=R --per-disease 0", "--per-disease: must be at least 1 (got 0)"),
    ("splits --root . rad3d_vqa=v.csv --test 1", "--test: must be between 0 and 1 (got 1)"),
])  # fmt: skip
def test_invalid_options(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit, match="2"):
        main([*argv.split(), "--out", str(tmp_path)])
    assert words in capsys.readouterr().err


def test_a_set_outside_the_root(tmp_path, capsys):
    assert main(["diagnosis", "--root", str(tmp_path), "--out", str(tmp_path / "o"), "rsna=../R"]) == 2
    assert "must be below --root" in " ".join(capsys.readouterr().err.split())
