"""`python -m input_pipeline.prepare`: its output and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_prepare import mine, no_figure, own, practice, row  # noqa: F401

from input_pipeline.config import DataConfig
from input_pipeline.index.command import main


def command(tmp_path: Path, config: DataConfig) -> str:
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({{'data': {config.to_dict()!r}}}, convert_dict=True).lock()\n"
    )
    return f"--config={file}"


def test_the_command(mine, tmp_path, capsys):
    config = command(tmp_path, own(mine, [row("a", "p0.png"), row("b", "none.png")], [row("c", "p1.png")]))
    out = tmp_path / "index"
    assert main([config, "--out", str(out), "--workers=0", "--config.data.depth=32"]) == 0
    output = capsys.readouterr().out
    assert "own_train" in output and "2 rows are good, 1 are skipped" in output
    assert (
        f"--config.data.index={out}" in output
        and "input_pipeline.inspect" in output
        and "--config.data.depth=32" in output
    )
    assert json.loads((out / "index.json").read_text())["data"]["depth"] == 32
    printed = {line.rstrip() for line in output.splitlines()}
    assert not set((out / "summary.txt").read_text().splitlines()) - printed
    with Image.open(out / "summary.png") as figure:
        assert figure.size[0] >= 1000 and len(set(figure.convert("L").resize((64, 64)).get_flattened_data())) > 10
    assert main([config, "--out", str(out), "--workers=0", "--strict"]) == 1
    assert "quarantine.jsonl" in capsys.readouterr().err
    leaking = command(tmp_path, own(mine, [row("a", "p0.png")], [row("c", "p0.png")]))
    assert main([leaking, "--out", str(out), "--workers=0"]) == 1
    assert "leaks.jsonl" in capsys.readouterr().err
    assert main([leaking, "--out", str(out), "--workers=0", "--allow-leaks"]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers=-1"], "must be 0 or more"),
        (["--config.data.dept=3"], "dept"),
        (["--config.data.tokenizer=none.model"], "none.model"),
        (["--config.data.train.own_train.table=none.jsonl"], "none.jsonl"),
    ],
)
def test_errors_are_one_line_and_exit_2(mine, tmp_path, capsys, arguments, message):
    config = command(tmp_path, own(mine, [row("a", "p0.png")]))
    try:
        code = main([config, "--out", str(tmp_path / "index"), "--workers=0", *arguments])
    except SystemExit as exit_error:
        code = exit_error.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and "error:" in last


def test_no_output_directory(mine, tmp_path, capsys):
    assert main([command(tmp_path, own(mine, [row("a", "p0.png")])), "--workers=0"]) == 2
    assert "--out DIR" in capsys.readouterr().err
