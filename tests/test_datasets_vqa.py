"""Questions on a scan: PMC-VQA, PMC-CaseReport."""

from __future__ import annotations

from collections import Counter

import pytest
from dataset_tables import answer, draws, every_family, shape, texts, write_csv

from input_pipeline.datasets import open_dataset
from input_pipeline.samples import RowError, Scan


@pytest.fixture
def every(tmp_path):
    return every_family(tmp_path)


def test_vqa_puts_the_scan_first_or_last_equally_often(every):
    shapes = Counter(shape(s) for s in draws(open_dataset("vqa_rad", **every["vqa_rad"]), n=1000))
    assert shapes.keys() == {"sir", "isr"} and 440 < shapes["sir"] < 560  # 3.8 standard deviations


def test_casereport_shortens_the_context_and_names_its_figures(tmp_path):
    context = "S1. S2. S3. S4. S5. S6 is 2.5 cm (Fig. 1). S7."
    header = ("PMC_id", "img_ref", "context", "question", "answer")
    write_csv(
        tmp_path / "t.csv",
        header,
        ("PMC5", "['F1', 'F2']", context, "Q: What?", "A: It."),
        ("PMC5", "['F1']", "", "Q:W", "A:I"),
    )
    dataset = open_dataset("pmc_casereport", table="t.csv", root=tmp_path)
    samples = draws(dataset)
    assert {shape(s) for s in samples} == {"cssir", "cissr"} and {shape(s) for s in draws(dataset, 1)} == {"sir", "isr"}
    assert texts(samples[0], "context") == ["S1. S4. S5. S6 is 2.5 cm (Fig. 1). S7."]
    assert (
        texts(samples[0], "instruction") == ["What?"] and answer(samples[0]) == "It." and samples[0].study_id == "PMC5"
    )
    assert samples[0].scans == (Scan("figures/PMC5_F1.jpg"), Scan("figures/PMC5_F2.jpg"))
    for bad in ("['F1'", "[]", "['../F1']", "[1]", "__import__('os')", "[['a']]", "[" * 5000):
        write_csv(tmp_path / "t.csv", header, ("PMC5", bad, context, "Q: What?", "A: It."))
        with pytest.raises(RowError, match="row 1: "):
            open_dataset("pmc_casereport", table="t.csv", root=tmp_path)
    write_csv(tmp_path / "t.csv", header, ("PMC5", "['F1']", context, "Q: ", "A: It."))
    with pytest.raises(RowError, match="question has no text"):
        open_dataset("pmc_casereport", table="t.csv", root=tmp_path)
