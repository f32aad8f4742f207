"""Equal problems take one line, in which nothing is hidden."""

from __future__ import annotations

import json

import pytest

from input_pipeline.curate.jobs import Report, Result
from input_pipeline.reasons import Reasons
from radfm_jax.inference.batch_files import raise_problems


def test_the_first_reason_of_a_kind_is_shown_in_full():
    reasons = Reasons()
    for k in range(12):
        reasons.add(f"scan_{k:03d}.npy has float64 [{k}], expected volumes", f"row {k + 3} of own")
    reasons.add("label 'Edema' is unknown", "row 1 of x")
    for key in ("finding", "finding", "answer"):
        reasons.add(f"unknown keys: {key}", "row 2 of x")
    assert reasons.counts() == {
        "scan_000.npy has float64 [0], expected volumes (first: row 3 of own)": 12,
        "unknown keys: finding (first: row 2 of x)": 2,
        "label 'Edema' is unknown (row 1 of x)": 1,
        "unknown keys: answer (row 2 of x)": 1,
    }
    assert list(reasons.counts(1).values()) == [12]


def test_a_report_keeps_the_unknown_key(tmp_path):
    report, result = Report(tmp_path, "rad3d", {}), Result()
    for k in range(3):
        result.problem(tmp_path / str(k) / "case.json", 0, "unknown keys: finding (did you mean findings?)")
        result.problem(tmp_path / "a.csv", k, f"an image is missing in the package: F{k}.jpg")
    report.add(result)
    report.write()
    assert json.loads((tmp_path / "report.json").read_text())["reasons"] == {
        "unknown keys: finding (did you mean findings?) (first: 0/case.json, row 0)": 3,
        f"an image is missing in the package: F0.jpg (first: {tmp_path.name}/a.csv, row 0)": 3,
    }


def test_equal_problems_of_a_batch_file():
    with pytest.raises(ValueError) as error:
        raise_problems([f"line {k} has no `id`" for k in range(1, 13)] + ["line 20: duplicate id 'a'"], "f: ")
    assert str(error.value) == "f: line 1 has no `id` (and 11 more like it); line 20: duplicate id 'a'"
