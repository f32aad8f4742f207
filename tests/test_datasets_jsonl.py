"""The user's own data as JSON Lines."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from dataset_tables import own

from input_pipeline.datasets import TableError, json_tables, open_dataset
from input_pipeline.samples import RowError, Scan, Text


def test_jsonl_keeps_the_order_of_marks(tmp_path):
    fields = own(
        tmp_path,
        {
            "id": "case-17",
            "task": "report",
            "scans": ["ct.nii.gz", {"path": "old.png", "window": [-160, 240]}],
            "context": "Was <image-2>.",
            "instruction": "<image-1> Compare with <image-2> . What are the findings?",
            "response": "Better.",
            "study": "S1",
        },
        {
            "id": "paper-3",
            "task": "interleaved",
            "scans": [{"path": "f.nii", "volume": 1, "window": "lung"}],
            "text": "... in <image-1> ...",
        },
        {"id": "plain", "task": "vqa", "scans": [], "instruction": "What is <image12>?", "response": "Text."},
    )
    dataset = open_dataset("jsonl", **fields)
    ct, old = Scan("ct.nii.gz"), Scan("old.png", None, (-160.0, 240.0))
    sample = dataset.sample(0, np.random.default_rng(0))
    assert (sample.row_id, sample.task, sample.study_id) == ("case-17", "report", "S1")
    assert sample.parts == (
        Text("Was", "context"),
        old,
        Text(".", "context"),
        ct,
        Text("Compare with", "instruction"),
        old,
        Text(". What are the findings?", "instruction"),
        Text("Better.", "response"),
    )
    assert dataset.scans(0) == (old, ct)
    paper = dataset.sample(1, np.random.default_rng(0))
    assert paper.parts == (Text("... in", "interleaved"), Scan("f.nii", 1, "lung"), Text("...", "interleaved"))
    assert dataset.sample(2, np.random.default_rng(0)).parts[0] == Text("What is <image12>?", "instruction")


GOOD = {"id": "a", "task": "vqa", "scans": ["a.png"], "instruction": "<image-1> Q?", "response": "A."}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"respnse": "x"}, "unknown keys: respnse (did you mean response?)"),
        ({"id": 3}, "id must be text"),
        ({"id": ""}, "id is blank"),
        ({"task": "vqua"}, "task 'vqua' is unknown"),
        ({"task": None}, "task is blank"),
        ({"scans": "a.png"}, "scans must be a list"),
        ({"scans": [3]}, "must be a path"),
        ({"scans": [{"path": "a", "wndow": "lung"}]}, "must be a path"),
        ({"scans": None}, "scans must"),
        ({"scans": [{"path": "a", "volume": True}]}, "volume True"),
        ({"scans": [{"path": "a", "volume": -1}]}, "volume -1"),
        ({"scans": [{"path": "a", "window": [2, 1]}]}, "window"),
        ({"scans": [{"path": "a", "window": 3}]}, "window 3"),
        ({"scans": ["../a.png"]}, "leaves its folder"),
        ({"scans": [""]}, "names no file"),
        ({"scans": ["a", "b"]}, "no mark <image-2>"),
        ({"instruction": "<image1> Q?"}, "not a valid mark: <image1>; write <image-1>"),
        ({"instruction": "Q?", "context": "<image> was"}, "not a valid mark: <image>"),
        ({"instruction": "<image-2> Q?"}, "no scan for <image-2>"),
        ({"instruction": "<image-1>"}, "image marks but no words"),
        ({"instruction": " "}, "instruction is blank"),
        ({"response": "nan"}, "response is blank"),
        ({"response": "see <image-1>"}, "response has an image mark"),
        ({"response": None}, "response is required"),
        ({"text": "x"}, "text is not allowed"),
        ({"task": "interleaved"}, "text is required"),
        ({"response": ["A"]}, "response must be text, got list"),
        ({"response": "\x00"}, "NUL"),
        ({"response": "\ud800"}, "lone surrogate"),
        ({"instruction": "<image-99999> <image-1> q"}, "no scan for <image-99999>"),
    ],
)
def test_jsonl_refuses(tmp_path, change, message):
    open_dataset("jsonl", **own(tmp_path, GOOD))
    with pytest.raises(RowError) as error:
        open_dataset("jsonl", **own(tmp_path, {**GOOD, "id": "first"}, {**GOOD, **change}))
    assert error.value.row == 2 and message in str(error.value)


def test_jsonl_lines_and_ids(tmp_path):
    nan = json.dumps(GOOD).replace('"A."', "NaN")
    twice = json.dumps(GOOD)[:-1] + ', "id": "b"}'
    fields = own(tmp_path, GOOD, "{", "", "[]", nan, twice, GOOD, "[" * 100000, {**GOOD, "id": "z"})
    with pytest.raises(TableError) as error:
        open_dataset("jsonl", **fields)
    assert [p.row for p in error.value.problems] == [2, 3, 4, 5, 6, 7, 8]
    for problem, reason in zip(
        error.value.problems,
        ("JSON", "blank", "object", "NaN", "key 'id' is repeated", "already used in row 1", "JSON"),
        strict=True,
    ):
        assert reason in problem.reason
    dataset = open_dataset("jsonl", **fields, quarantine=True)
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["a", "z"]


def test_the_default_study_is_that_of_the_first_scan(tmp_path):
    """The study is the patient that a public path names, else the path, so that leaks of patients are detected."""
    question = {"task": "vqa", "instruction": "<image-1> What?", "response": "None"}
    fields = own(
        tmp_path,
        {**question, "id": "a", "scans": ["files/p10000032/s1.png"]},
        {**question, "id": "b", "scans": ["mine/17.png"]},
        {**question, "id": "c", "scans": ["mine/17.png"]},
        {"task": "vqa", "id": "None", "scans": [], "instruction": "What?", "response": "none"},
    )
    dataset = open_dataset("jsonl", **fields)
    samples = [dataset.sample(i, np.random.default_rng(0)) for i in range(4)]
    assert [s.study_id for s in samples] == ["p10000032", "mine/17.png", "mine/17.png", None]
    # JSON has its own null, so "None" is a valid answer and a valid id.
    assert samples[0].parts[-1].text == "None" and samples[3].row_id == "None"
    assert dataset.duplicates == [(3, 2)]  # equal except for the id


def test_jsonl_of_some_tasks(tmp_path):
    fields = own(tmp_path, GOOD, {**GOOD, "id": "b", "task": "report"}, {**GOOD, "id": "c", "task": "modality"})
    dataset = open_dataset("jsonl", **fields, tasks=("report", "modality"))
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["b", "c"]
    assert dataset.skipped == {"another task": 1}
    with pytest.raises(ValueError, match=r"tasks \['reports'\] are unknown; known: .*report"):
        open_dataset("jsonl", **fields, tasks=("reports",))


def test_jsonl_of_some_ids(tmp_path):
    rows = [{**GOOD, "id": f"p{i}-{kind}"} for i in range(2) for kind in ("side", "level", "Side")]
    fields = own(tmp_path, *rows)
    dataset = open_dataset("jsonl", **fields, ids=("*-side", "p1-l*"))
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["p0-side", "p1-side", "p1-level"]
    assert dataset.skipped == {"another id": 3}


def test_a_table_of_several_sources_is_parsed_once(tmp_path, monkeypatch):
    fields = own(tmp_path, GOOD, {**GOOD, "id": "b", "task": "report"}, {"id": "bad"})
    read, parse = [], json_tables.parse_json
    monkeypatch.setattr(json_tables, "parse_json", lambda line: read.append(line) or parse(line))
    alone = [open_dataset("jsonl", **fields, quarantine=True, tasks=(task,)) for task in ("vqa", "report")]
    assert len(read) == 6
    with json_tables.json_lines_cache():
        shared = [open_dataset("jsonl", **fields, quarantine=True, tasks=(task,)) for task in ("vqa", "report")]
        assert len(read) == 9
    for one, other in zip(alone, shared, strict=True):
        assert [one.row_id(i) for i in range(len(one))] == [other.row_id(i) for i in range(len(other))]
        assert list(map(str, one.problems)) == list(map(str, other.problems))
    open_dataset("jsonl", **fields, quarantine=True)
    assert len(read) == 12


def test_the_cache_belongs_to_its_thread(tmp_path, monkeypatch):
    """Training and test data are opened in parallel: the end of one cache does not affect the other."""
    fields = own(tmp_path, GOOD)
    read, parse = [], json_tables.parse_json
    monkeypatch.setattr(json_tables, "parse_json", lambda line: read.append(line) or parse(line))

    def open_there():
        with json_tables.json_lines_cache():
            open_dataset("jsonl", **fields)

    with json_tables.json_lines_cache(), ThreadPoolExecutor(1) as other:
        other.submit(open_there).result()
        for _ in range(2):
            open_dataset("jsonl", **fields)
    assert len(read) == 2


def test_empty_optional_fields_are_absent_fields(tmp_path):
    """Writers of tables give every row every key."""
    blank = {"context": "", "text": "", "study": " ", "scans": [{"path": "a.png", "volume": None, "window": ""}]}
    paper = {"id": "p", "task": "interleaved", "text": "See <image-1>.", "scans": ["a.png"]}
    rows = [
        GOOD,
        GOOD | blank | {"id": "b"},
        paper,
        paper | {"id": "q"} | dict.fromkeys(("instruction", "response"), ""),
    ]
    dataset = open_dataset("jsonl", **own(tmp_path, *rows))
    one, same, text, same_text = (dataset.sample(i, np.random.default_rng(0)) for i in range(4))
    assert one.parts == same.parts and one.study_id == same.study_id == "a.png" and text.parts == same_text.parts


@pytest.mark.parametrize("scans", [["a.png"], ["a.png", "b.png", "c.nii"]])
@pytest.mark.parametrize("context", ["", "Chest pain."])
def test_scans_without_marks_come_first(tmp_path, scans, context):
    row = {"id": "a", "task": "vqa", "scans": scans, "context": context, "instruction": "Q?", "response": "A."}
    parts = open_dataset("jsonl", **own(tmp_path, row)).sample(0, np.random.default_rng(0)).parts
    assert parts[: len(scans)] == tuple(map(Scan, scans)) and parts[-2:] == (
        Text("Q?", "instruction"),
        Text("A.", "response"),
    )
    assert parts[len(scans) : -2] == ((Text(context, "context"),) if context else ())
    paper = {"id": "p", "task": "interleaved", "scans": scans, "text": "As shown."}
    parts = open_dataset("jsonl", **own(tmp_path, paper)).sample(0, np.random.default_rng(0)).parts
    assert parts == (*map(Scan, scans), Text("As shown.", "interleaved"))
