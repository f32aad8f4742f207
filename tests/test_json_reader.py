"""One strict JSON reader for all files: depth, size, keys, numbers and characters, each error with its file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import input_pipeline
import radfm_jax
from input_pipeline import files
from input_pipeline.curate.llm import Answers
from input_pipeline.datasets.json_tables import load_json, stream_json, stream_jsonl
from input_pipeline.files import LoneSurrogate, parse_json, read_json, read_json_lines
from input_pipeline.samples import RowError
from radfm_jax.checkpoints import checkpoint, run_directory, train_state
from radfm_jax.convert import model_config
from radfm_jax.convert.hf_folder import CODE
from radfm_jax.evaluate.model_answers import read_answers
from radfm_jax.evaluate.radbench_build import read_questions
from radfm_jax.evaluate.ratings import read_ratings
from radfm_jax.inference.batch_files import read_batch_file

DEEP = "[" * 100_000
HOSTILE = {
    DEEP: "more than 64 nested",
    '{"a":' * 900 + "1" + "}" * 900: "more than 64 nested",
    '"\\ud800"': "lone surrogate",
    '{"\\udc80": 1}': "lone surrogate",
    "1e999": "too large",
    "NaN": "NaN is not JSON",
    "-Infinity": "-Infinity is not JSON",
    '{"a": 1, "b": 2, "a": 3}': "key 'a' is repeated",
    "1" * 5000: "integer string conversion",
    "{": "Expecting property name",
    "": "Expecting value",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_a_value_error(text, tmp_path):
    with pytest.raises(ValueError, match=HOSTILE[text]):
        parse_json(text)
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file} is not valid JSON: .*{HOSTILE[text]}"):
        read_json(file)


def test_valid_text():
    deepest = "[" * files.MAX_DEPTH + "]" * files.MAX_DEPTH
    assert parse_json(deepest) == json.loads(deepest)
    assert parse_json('["' + "[" * 1000 + '"]') == ["[" * 1000]  # brackets in a string are not nested
    assert parse_json('"\\ud83d\\ude00 \\\\ud800"') == "\U0001f600 \\ud800"
    assert parse_json(b"\xef\xbb\xbf[1, 2.5, null]") == [1, 2.5, None]
    assert parse_json("[NaN, -Infinity]", nan=True)[1] == float("-inf")
    assert len(parse_json("{" + ", ".join(f'"{i}": 1' for i in range(1000)) + "}")) == 1000


def test_many_repeated_keys_take_linear_time():
    pairs = ", ".join(f'"{i}": 1' for i in range(200_000))
    with pytest.raises(ValueError, match="key '0' is repeated"):
        parse_json("{" + pairs + ', "0": 2}')


def test_a_surrogate_is_replaced_in_the_value_of_the_error():
    with pytest.raises(LoneSurrogate) as error:
        parse_json('{"id": "a\\ud800b"}')
    assert error.value.value == {"id": "a?b"}


def test_files(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{\n"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin.json is not valid JSON: line 2 is not UTF-8 \(byte 0xe9\)"):
        read_json(tmp_path / "latin.json")
    (tmp_path / "big.json").write_text("[" + "1, " * 100 + "1]")
    with pytest.raises(ValueError, match="big.json has more than 100 bytes"):
        read_json(tmp_path / "big.json", limit=100)
    with pytest.raises(ValueError, match="big.json has JSON of type list where an object is expected"):
        read_json(tmp_path / "big.json", kind=dict)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="pipe.json"):  # without waiting for a writer
        read_json(tmp_path / "pipe.json")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match="a.jsonl, line 3 has list where an object is expected"):
        read_json_lines(tmp_path / "a.jsonl")
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "a.jsonl").write_bytes('{"a": "é"}\n'.encode(encoding))
        with pytest.raises(ValueError, match="a.jsonl, line 1 is not valid JSON"):
            read_json_lines(tmp_path / "a.jsonl")


def readers(folder: Path, text: str) -> dict:
    """Return name -> a call that reads this text from a file of the right name."""
    step, config = folder / "step", folder / "config.json"
    for path in (step / "data", folder / "run" / "checkpoints", folder / "parameters" / "params"):
        path.mkdir(parents=True)
    for name in ("radfm.json", "manifest.json", "run.json"):
        (step / name).write_text(text)
    for path in (folder / "run" / "checkpoints" / "best.json", config,
                 folder / "parameters" / "params" / "_METADATA"):  # fmt: skip
        path.write_text(text)
    line = folder / "a.jsonl"
    line.write_text(text + "\n")
    return {
        "radfm.json": lambda: checkpoint.read_description(step),
        "manifest.json": lambda: checkpoint.read_manifest(step),
        "run.json": lambda: train_state.data_state(step),
        "best.json": lambda: run_directory.best(folder / "run"),
        "_METADATA": lambda: checkpoint.StoredParams(folder / "parameters"),
        "config.json": lambda: model_config.read_config(config),
        "a.jsonl, line 1": lambda: read_questions(line),
        "line 1": lambda: read_batch_file(line, folder),
        "a.jsonl: line 1": lambda: read_answers(line, []),
        "a.jsonl:": lambda: Answers(line),
        "config.json is": lambda: read_ratings(config, []),
        "config.json,": lambda: load_json(config),
        "config.json, row": lambda: list(stream_json(config, ())),
    }


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 900 + "1" + "}" * 900], ids=["open", "closed"])
def test_deep_files_are_named_by_every_reader(text, tmp_path):
    for number, name in enumerate(readers(tmp_path / "names", text)):
        call = readers(tmp_path / str(number), text)[name]
        with pytest.raises(ValueError) as error:
            call()
        assert name.split(",")[0].split(":")[0] in str(error.value), (name, error.value)
        assert not isinstance(error.value, RecursionError)


def test_a_deep_row_does_not_end_a_table(tmp_path):
    deep = '{"a":' * 70 + "1" + "}" * 70
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n{deep}\n{{"a": 2}}\n')
    (tmp_path / "a.json").write_text(f'[{{"a": 1}}, {deep}, {{"a": 2}}]')
    for rows in (list(stream_jsonl(tmp_path / "a.jsonl")), list(stream_json(tmp_path / "a.json", ()))):
        assert rows[0][1] == {"a": 1} and rows[2][1] == {"a": 2}
        assert isinstance(rows[1], RowError) and rows[1].row == 2 and "nested" in rows[1].reason


def test_a_surrogate_in_an_id_fails_one_line(tmp_path):
    lines = [
        '{"id": "a", "prompt": "Is it?"}',
        '{"id": "b\\ud800", "prompt": "Is it?"}',
        '{"id": "c", "prompt": "Is it?"}',
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    first, second, third = read_batch_file(tmp_path / "q.jsonl", tmp_path)
    assert not first.error and not third.error
    assert second.row_id == "b?" and second.error.startswith("line 2: a string has a lone surrogate")


# Values that never were in a file: messages between our own processes, and copies as plain values.
OWN = {
    "input_pipeline/files.py", "input_pipeline/images/scans/isolated.py", "radfm_jax/runtime/peers.py",
    "radfm_jax/runtime/barrier.py", "radfm_jax/runtime/rendezvous.py", "radfm_jax/checkpoints/train_state.py",
    "radfm_jax/checkpoints/saver.py", "radfm_jax/inference/batch_run.py", "radfm_jax/inference/stored.py",
    "radfm_jax/evaluate/radbench_command.py", "input_pipeline/text/hugging_face.py",
}  # fmt: skip


def test_no_file_is_read_without_the_reader():
    """The code that exports get runs without this package, so it has a reader of its own."""
    root, found = Path(input_pipeline.__file__).parents[1], set()
    for package in (input_pipeline, radfm_jax):
        for file in Path(package.__file__).parent.rglob("*.py"):
            if file.parent != CODE and re.search(r"\bjson\.loads?\b", file.read_text()):
                found.add(str(file.relative_to(root)))
    assert found <= OWN, found - OWN
