"""The data group of a config, and `--config.a.b=value`."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from input_pipeline import command_line
from input_pipeline.config import DataConfig, open_fields, trained_intensities
from input_pipeline.datasets import open_dataset
from input_pipeline.files import fingerprint
from input_pipeline.images.intensity import parse_intensity

SOURCE = {"family": "vqa_rad", "table": "train.csv", "root": "/data"}


def test_defaults_are_the_sizes_of_the_paper():
    config = DataConfig()
    assert (config.sizes.flat, config.sizes.volume, config.sizes.depth) == (512, 256, 64)
    assert dataclasses.astuple(config.limits) == (2048, 14, 1024, 57344, 56)


def test_round_trip_through_a_config():
    config = DataConfig(
        train={"a": SOURCE | {"weight": 2.0}}, validation={"v": SOURCE}, test={"b": SOURCE}, flips=("height",), depth=32
    )
    group = ConfigDict({"data": config.to_dict()}, convert_dict=True).lock().data
    assert DataConfig.from_dict(group) == config
    group.text_length = 512
    assert DataConfig.from_dict(group).limits.text_length == 512
    assert config.sources("train") == {"a": SOURCE | {"weight": 2.0}}
    assert list(config.sources()) == ["a", "v", "b"]
    assert list(config.sources_with_rows("validation")) == ["v"] and config.validates
    shared = dataclasses.replace(config, validation={}, validation_share=0.1)
    assert list(shared.sources_with_rows("validation")) == ["a"] and shared.validates
    assert list(shared.sources_with_rows("train")) == ["a"] and list(shared.sources_with_rows("test")) == ["b"]


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as error:
        DataConfig(
            preprocess="papers",
            storage="uint4",
            mixture="both",
            flips=("height", "left"),
            window=0,
            max_scans=2.5,
            seed=-1,
            crop=0.0,
            worker_timeout=0,
            validation_share=0.7,
            epoch="some",
            train={"a": {"table": "x"}, "b": SOURCE},
            test={"b": SOURCE},
        )
    for message in (
        "data.preprocess must be one of paper, released (got 'papers') (did you mean paper?)",
        "data.storage must be one of uint8, int16, float32 (got 'uint4')",
        "data.mixture must be one of epoch, weights (got 'both')",
        "data.flips[1] must be one of height, width, depth (got 'left')",
        "data.window must be at least 1 (got 0)",
        "data.max_scans must be an integer (got 2.5)",
        "data.seed must be at least 0 (got -1)",
        "data.crop must be above 0 and at most 1 (got 0.0)",
        "data.worker_timeout must be above 0 (got 0)",
        "data.validation_share must be at most 0.5 (got 0.7)",
        "data.epoch must be one of all, released (got 'some')",
        "data.train.a has no `family`; known: pmc_inline",
        "data.train.b and data.test.b have the same name: rename one to b_test",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size_2d": 100}, "data.size_2d, data.size_3d, data.depth: .*not a multiple of 32"),
        ({"depth": 6}, "depth 6 is not a multiple of 4"),
        ({"preprocess": "released"}, "needs data.storage='float32'"),
        (
            {"preprocess": "released", "storage": "float32", "records": True},
            "cannot be combined with data.records, data.flips or",
        ),
        (
            {"mixture": "weights", "train": {"a": SOURCE | {"weight": 0.0}}},
            r"data.train.a.weight must be above 0 \(got 0.0\)",
        ),
        ({"workers": True}, r"data.workers must be an integer \(got True\)"),
    ],
)
def test_conflicting_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_weights_are_checked_only_where_they_are_used():
    DataConfig(train={"a": SOURCE | {"weight": 0.0}})
    DataConfig(mixture="weights", test={"a": SOURCE | {"weight": 0.0}})


def test_unknown_fields_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"data.text_lenght \(did you mean data.text_length\?\), data.qqq$"):
        DataConfig.from_dict({"text_lenght": 3, "qqq": 1})


def test_fields_of_a_family():
    source = SOURCE | {"weight": 2.0, "vocabulary": ["a", "b"]}
    assert open_fields(source) == {"table": "train.csv", "root": "/data", "vocabulary": ("a", "b")}


@pytest.mark.parametrize(
    "field, value",
    [("fraction", "x"), ("fraction", True), ("strip", None), ("table", 3), ("root", ["a"]), ("split", 1),
     ("study", "("), ("study", ["a"]), ("intensity", {}), ("intensity", [10**400, 1])],
)  # fmt: skip
def test_fields_of_a_family_have_types(tmp_path, field, value):
    row = {"id": "1", "task": "vqa", "scans": ["a.png"], "instruction": "q", "response": "a"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    fields = {"table": "t.jsonl", "root": str(tmp_path)}
    open_dataset("jsonl", **fields)
    with pytest.raises(ValueError, match=field):
        open_dataset("jsonl", **fields | {field: value})


def test_trained_intensities_have_all_digits():
    """Inference must scale with the window of training, also above six digits."""
    sources = {"a": SOURCE | {"intensity": [-0.1234567, 1234567]}, "b": SOURCE | {"intensity": None}}
    (window, minmax) = trained_intensities({"train": sources})
    assert parse_intensity(window).windows == ((-0.1234567, 1234567.0),) and minmax == "minmax"
    for damaged in ({"train": 3}, {"train": {"a": None}}, {"intensity": []}):
        with pytest.raises(ValueError):
            trained_intensities(damaged)


def test_fingerprint():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint([])) == 64


# --- command_line -----------------------------------------------------------------------------------------------------

CONFIG = """
from ml_collections import ConfigDict

from input_pipeline.config import DataConfig


def get_config():
    return ConfigDict({"data": DataConfig().to_dict(), "steps": 10}, convert_dict=True).lock()
"""


@pytest.fixture
def parser():
    made = argparse.ArgumentParser(prog="program", allow_abbrev=False)
    command_line.add_config(made)
    made.add_argument("--out", default="here")
    return made


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def test_arguments_and_overrides(parser, file):
    argv = ["--config.data.depth=32", f"--config={file}", "--out", "there", "--config.steps=7"]
    args, config = command_line.parse(parser, argv)
    assert (args.out, args.config) == ("there", str(file))
    assert (config.steps, config.data.depth, config.data.window) == (7, 32, 16384)
    args, config = command_line.parse(parser, [f"--config={file}"])  # earlier overrides are gone
    assert (args.out, config.steps, config.data.depth) == ("here", 10, 64)


def test_arguments_of_the_process_are_ignored(parser, file, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--config.steps=3", "--config.data.depth=4"])
    _, config = command_line.parse(parser, [f"--config={file}", "--config.steps=5"])
    assert (config.steps, config.data.depth) == (5, 64)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config={file}", "--config.data.dept=3"], ": 'dept' Did you mean"),
        (["--config={file}", "--config.data.zzzzz=3"], "unknown field 'zzzzz'"),
        (["--config={file}", "--config.steps=many"], "base 10: 'many'"),
        (["--config={file}", "--config.steps", "3"], "with an equals sign"),
        (["--config=none.py"], "none.py: no such file"),
        (["--config={file}", "--ouch=3"], "--ouch=3"),
        ([], "--config"),
    ],
)
def test_errors_are_one_line_and_exit_2(parser, file, capsys, argv, message):
    with pytest.raises(SystemExit) as ended:
        command_line.parse(parser, [argument.format(file=file) for argument in argv])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out and message in err.strip().splitlines()[-1]


def test_error_of_a_config_file_has_no_traceback(parser, tmp_path, capsys):
    path = tmp_path / "stages.py"
    path.write_text("def get_config(stage):\n    raise ValueError(f'stage {stage!r} is none of a, b')\n")
    with pytest.raises(SystemExit):
        command_line.parse(parser, [f"--config={path}:c"])
    err = capsys.readouterr().err
    assert err.endswith(f"error: {path}:c: ValueError: stage 'c' is none of a, b\n") and "Traceback" not in err


@pytest.mark.parametrize(
    "broken", ["def get_config(:\n", "import no_such_module\n", "x = 1\n", "raise ValueError('so')"]
)
def test_broken_config_file(parser, tmp_path, capsys, broken):
    path = tmp_path / "broken.py"
    path.write_text(broken)
    with pytest.raises(SystemExit) as ended:
        command_line.parse(parser, [f"--config={path}"])
    assert ended.value.code == 2 and f"error: {path}:" in capsys.readouterr().err
