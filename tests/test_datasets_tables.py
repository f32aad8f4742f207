"""Tables: bad rows are all reported, quarantined and counted; splits, studies, paths."""

from __future__ import annotations

import csv

import pytest
from dataset_tables import VQA_HEADER, answer, draws, texts, write_csv

from input_pipeline.datasets import TableError, open_dataset
from input_pipeline.samples import RowError, Scan


def test_bad_rows_are_all_reported_and_quarantine_counts_them(tmp_path):
    """Every bad row is a problem, and the good rows remain.

    row   Figure_path   Question   Answer
    1     a.png         q          a           good
    2     a.png         (blank)    a           blank
    3     a.png         q          nan         nan
    4     three cells                          wrong number
    5     ../x.png      q          a           leaves its folder
    6     a.png         q<NUL>     a           NUL
    7     a.png         q          a<bad>      not UTF-8
    8     (blank line)
    9     /etc/x.png    q          a           absolute
    10    b.png         "Is \n ok"  "a,b"       good, over two lines
    """
    file = tmp_path / "t.csv"
    file.write_bytes(
        b"\xef\xbb\xbfimg_root_dir,Figure_path,Question,Answer\r\n"
        b",a.png,q,a\r\n,a.png, ,a\r\n,a.png,q,nan\r\n,a.png,q\r\n,../x.png,q,a\r\n,a.png,q\x00,a\r\n"
        b',a.png,q,a\xff\r\n\r\n,/etc/x.png,q,a\r\n,b.png,"Is \nok","a,b"\r\n'
    )
    with pytest.raises(TableError) as error:
        open_dataset("vqa_rad", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [2, 3, 4, 5, 6, 7, 8, 9]
    reasons = (
        "Question is blank",
        "Answer is blank: 'nan'",
        "3 cells, but the header has 4",
        "leaves its folder",
        "NUL",
        "UTF-8",
        "is blank",
        "root",
    )
    for problem, reason in zip(error.value.problems, reasons, strict=True):
        assert reason in problem.reason and problem.file == str(file) and problem.remedy
    assert all(f"row {r}: " in str(error.value) for r in range(2, 10)) and "8 bad rows, 2 good" in str(error.value)
    dataset = open_dataset("vqa_rad", table="t.csv", root=tmp_path, quarantine=True)
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["1", "10"]
    assert [p.row for p in dataset.problems] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert texts(draws(dataset, 1, 1)[0], "instruction") == ["Is \nok"] and answer(draws(dataset, 1, 1)[0]) == "a,b"


@pytest.mark.parametrize(
    "data, row, message",
    [
        (b"", 0, "empty"),
        (b"a,b\n1,2\n", 0, "column img_root_dir is missing"),
        (b"img_root_dir,Figure_path,Question,Answer\n", 0, "no rows"),
        (b"img_root_dir,Figure_path,Question,Answer,Answer\n,a,b,c,d\n", 0, "column Answer is repeated"),
        (b"\xff\xfei\x00", 0, "UTF-16"),
        (b'img_root_dir,Figure_path,Question,Answer\n,a,b,c\n,a,"b,c\n,a,b,c\n', 2, "never closed"),
        (b"img_root_dir,Figure_path,Question,Answer\n,a,b," + b"x" * 1_000_001 + b"\n", 1, "more than 1000000"),
        (b'img_root_dir,Figure_path,Question,Answer\n,a,"b"c,d\n', 1, "expected after"),
    ],
)
@pytest.mark.parametrize("quarantine", [False, True])
def test_a_table_without_meaning_raises_even_in_quarantine(tmp_path, data, row, message, quarantine):
    (tmp_path / "t.csv").write_bytes(data)
    limit = csv.field_size_limit()
    with pytest.raises(RowError) as error:
        open_dataset("pmc_vqa", table="t.csv", root=tmp_path, quarantine=quarantine)
    assert error.value.row == row and message in str(error.value) and csv.field_size_limit() == limit


def test_split_language_strip_duplicates_and_study(tmp_path):
    rows = [
        ("/far/img", "a.jpg", "What?", "Left", "en", "train"),
        ("/far/img", "b.jpg", "什么?", "左", "zh", "train"),
        ("/far/img", "c.jpg", "What?", "Left", "en", "test"),
        ("/far/img", "a.jpg", "What?", "Left", "en", "train"),
    ]
    write_csv(tmp_path / "t.csv", (*VQA_HEADER, "q_lang", "split"), *rows)
    dataset = open_dataset("slake", table="t.csv", root=tmp_path, split="train", strip="/far")
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["1", "4"] and dataset.duplicates == [(4, 1)]
    assert dataset.skipped == {"q_lang 'zh'": 1, "split 'test'": 1}
    assert dataset.scans(0) == (Scan("img/a.jpg"),) and draws(dataset)[0].study_id == "img/a.jpg"
    write_csv(tmp_path / "u.csv", VQA_HEADER, *[r[:4] for r in rows])
    dataset = open_dataset("slake", table="u.csv", root=tmp_path, strip="/far", study=r"img/(\w)")
    assert dataset.skipped == {"not English": 1} and draws(dataset, 1)[0].study_id == "c"
    with pytest.raises(RowError, match="every row is skipped"):
        open_dataset("slake", table="t.csv", root=tmp_path, split="val", strip="/far")


def test_the_error_names_the_prefix_to_strip(tmp_path):
    """Paths of another machine: the error states the prefix, and with it the table is read."""
    (tmp_path / "imgs" / "ct").mkdir(parents=True)
    (tmp_path / "top.png").touch()
    table = write_csv(tmp_path / "t.csv", ("image_path", "label"), ("/data0/them/imgs/ct/a.png", "Clear."))
    with pytest.raises(RowError, match=r"set strip='/data0/them/'"):
        open_dataset("mimic_cxr", table=table, root=tmp_path)
    dataset = open_dataset("mimic_cxr", table=table, root=tmp_path, strip="/data0/them/")
    assert dataset.scans(0) == (Scan("imgs/ct/a.png"),)
    for path, remedy in (("/x/y/top.png", "set strip='/x/y/'"), ("/x/no.png", "set `root`, or `strip`")):
        write_csv(table, ("image_path", "label"), (path, "Clear."))
        with pytest.raises(RowError) as error:
            open_dataset("mimic_cxr", table=table, root=tmp_path)
        assert error.value.remedy == remedy


@pytest.mark.parametrize(
    "path, study",
    [
        ("x/PMC123_F1.jpg", "PMC123"),
        ("files/p10/p10000032/s50414267/a.jpg", "p10000032"),
        ("train/patient00001/study1/v.jpg", "patient00001"),
        ("images/00000013_005.png", "00000013"),
        ("MPX1009_synpic1.png", "MPX1009"),
        ("other/x.png", "other/x.png"),
    ],
)
def test_studies_of_the_public_sets(tmp_path, path, study):
    write_csv(tmp_path / "t.csv", ("image_path", "label"), (path, "Report."))
    assert draws(open_dataset("mimic_cxr", table="t.csv", root=tmp_path), n=1)[0].study_id == study


@pytest.mark.parametrize(
    "bad", ["../a.png", "x/../../a.png", "/etc/passwd", "a\x00b", "..\\a.png", "C:/a.png", ".", "a\x1bb"]
)
def test_paths_that_leave_the_root_are_refused(tmp_path, bad):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_path", "label"), (bad, "Report.")])
    with pytest.raises(RowError) as error:
        open_dataset("mimic_cxr", table="t.csv", root=tmp_path)
    assert error.value.row == 1 and (str(tmp_path) in str(error.value) or "NUL" in str(error.value))


ANSWERS = {
    "vqa_rad": (VQA_HEADER, lambda text: ("", "a.png", "How many lesions?", text)),
    "rad3d_vqa": (("image_path", "question", "answer"), lambda text: ("a.png", "How many?", text)),
    "mpx_questions": (("name", "question", "answer", "explanation"), lambda text: ("a.png", "How many?", text, "None")),
    "pmc_casereport": (
        ("PMC_id", "img_ref", "context", "question", "answer"),
        lambda text: ("PMC5", "F1", "none", "Q: How many?", f"A: {text}"),
    ),
}


@pytest.mark.parametrize("family", ANSWERS)
def test_none_is_an_answer_and_no_context(tmp_path, family):
    """An answer is text unless a program wrote it for a missing value; other fields may be "None"."""
    header, row = ANSWERS[family]
    good, missing = ["None", "none", "N/A", "NA", "-", "No", "0"], ["nan", "NaN", "null", "<NA>", "", " "]
    write_csv(tmp_path / "t.csv", header, *map(row, good + missing))
    dataset = open_dataset(family, table="t.csv", root=tmp_path, quarantine=True)
    samples = [draws(dataset, i, 1)[0] for i in range(len(dataset))]
    assert [answer(sample) for sample in samples] == good
    assert [problem.row for problem in dataset.problems] == list(range(8, 14))
    assert not any(texts(sample, "context") for sample in samples)
    write_csv(tmp_path / "r.csv", ("image_path", "label"), ("a.png", "None"), ("b.png", "A report."))
    assert len(open_dataset("mimic_cxr", table="r.csv", root=tmp_path, quarantine=True)) == 1, "no report is None"


def test_equal_row_errors_take_one_line(tmp_path):
    rows = [(f"{k}.png", "nan" if k % 2 else "A report.") for k in range(24)] + [("../x.png", "A report.")]
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows)
    with pytest.raises(TableError) as error:
        open_dataset("mimic_cxr", table="t.csv", root=tmp_path)
    first, equal, other = str(error.value).splitlines()
    assert "13 bad rows, 12 good ones" in first and "row 25: path '../x.png' leaves" in other
    assert "t.csv, 12 rows (first: 2, 4, 6): label is blank: 'nan' (correct" in equal
    assert len(error.value.problems) == 13
