"""`prepare` on an unchanged directory reads no row and no scan, and any change is noticed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from input_pipeline.config import DataConfig
from input_pipeline.index import row_checks, summary_figure, unchanged
from input_pipeline.index.prepare import Refused, prepare

TOKENIZER = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"


@pytest.fixture
def config(tmp_path, monkeypatch) -> DataConfig:
    """Return a config of three rows with a scan each; one scan is missing, one is in colour."""
    monkeypatch.setattr(summary_figure, "draw", lambda report, file: file.touch())
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "0.png")
    Image.fromarray(pixels).save(tmp_path / "1.png")
    rows = [{"id": str(i), "task": "report", "scans": [f"{i}.png"], "instruction": "Report.", "response": f"Clear {i}."}
            for i in range(3)]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"own": {"family": "jsonl", "root": str(tmp_path), "table": "own.jsonl"}}
    return DataConfig(
        train=train,
        tokenizer=str(TOKENIZER),
        terms="none",
        size_2d=64,
        size_3d=64,
        depth=16,
        text_length=128,
        channels=1,
    )


def test_an_unchanged_directory_is_not_read(config, tmp_path, monkeypatch):
    directory, warnings = tmp_path / "index", []
    first = prepare(config, directory, workers=0, log=warnings.append)
    assert first["reading"]["scans_read"] == 3 and first["quarantine"] == 2
    written = {file.name: file.read_bytes() for file in directory.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(row_checks, "check_sources", lambda tables: pytest.fail("the tables were opened"))
        second = prepare(config, directory, workers=0, log=warnings.append)
    assert (second["reading"]["scans_read"], second["reading"]["scans_unchanged"]) == (0, 3)
    assert {k: v for k, v in second.items() if k != "reading"} == {k: v for k, v in first.items() if k != "reading"}
    assert written == {file.name: file.read_bytes() for file in directory.iterdir()}
    assert len(warnings) == 2 and "1 scans are in colour" in warnings[0] == warnings[1], "the warning is repeated"

    expected = json.loads((directory / "index.json").read_text())["inputs"]
    is_unchanged = lambda: unchanged.unchanged_report(directory, expected) is not None  # noqa: E731
    time = os.stat(tmp_path / "0.png").st_mtime_ns
    os.utime(tmp_path / "0.png", ns=(1, 1))
    assert not is_unchanged(), "a scan was rewritten"
    os.utime(tmp_path / "0.png", ns=(time, time))
    assert is_unchanged()
    (tmp_path / "2.png").touch()
    assert not is_unchanged(), "a scan that was missing is there"
    (tmp_path / "2.png").unlink()
    (tmp_path / "1.png").rename(tmp_path / "3.png")
    assert not is_unchanged(), "a scan is missing"
    (tmp_path / "3.png").rename(tmp_path / "1.png")
    assert is_unchanged() and unchanged.unchanged_report(directory, "") is None
    (directory / "rows.parquet").write_bytes(b"PAR1")
    assert not is_unchanged(), "the index is damaged"
    with pytest.raises(Refused, match="--strict"):
        prepare(config, directory, workers=0, strict=True)
    assert not is_unchanged(), "there is no index"


def test_inputs(config, tmp_path):
    """The digest changes with the config, the tables, the tokenizer, the options and the medical terms."""
    sources = config.train["own"]
    umls = dataclasses.replace(config, terms=f"umls:{tmp_path}")
    (tmp_path / "MRCONSO.RRF").write_text("C1")
    digests = [unchanged.inputs(config, {"own": "1"}, "t", strict=False)]
    digests += [unchanged.inputs(dataclasses.replace(config, text_length=64), {"own": "1"}, "t", strict=False)]
    digests += [unchanged.inputs(config, {"own": "2"}, "t", strict=False)]
    digests += [unchanged.inputs(config, {"own": "1"}, "u", strict=False)]
    digests += [unchanged.inputs(config, {"own": "1"}, "t", strict=True), unchanged.inputs(umls, {"own": "1"}, "t")]
    (tmp_path / "MRCONSO.RRF").write_text("C1 C2")
    digests += [unchanged.inputs(umls, {"own": "1"}, "t")]
    assert len(set(digests)) == 7 and digests[0] == unchanged.inputs(config, {"own": "1"}, "t", strict=False)
    papers = dataclasses.replace(config, train={"own": sources | {"family": "pmc_inline"}})
    assert unchanged.inputs(papers, {"own": "1"}, "t", strict=False) == "", (
        "papers are not in the checksum of the table"
    )
