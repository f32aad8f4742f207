"""PMC-Inline: figures in the text of papers."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from dataset_tables import draws, texts, write_csv, write_json

from input_pipeline.datasets import open_dataset
from input_pipeline.samples import RowError, Scan, Text


def test_inline_window_figures_and_order(tmp_path):
    """120 sentences, f0..f5 at sentences 10, 11, 12, 13, 60, 60: at most 50 sentences and 3 figures, in order."""
    refs = {10: ["f0"], 11: ["f1"], 12: ["f2"], 13: ["f3", "f0"], 60: ["f4", "f5"]}
    write_json(tmp_path / "PMC9.json", [{"text": f"S{k}.", "img_ref": refs.get(k, [])} for k in range(120)])
    write_csv(tmp_path / "t.csv", ("PMC_path",), ("PMC9.json",))
    dataset = open_dataset("pmc_inline", table="t.csv", root=tmp_path)
    assert [s.path for s in dataset.scans(0)] == [f"figures/PMC9_f{k}.jpg" for k in range(6)]
    home = {f"figures/PMC9_f{f}.jpg": k for k, fs in reversed(refs.items()) for f in (x[1:] for x in fs)}
    starts = []
    for sample in draws(dataset, n=300):
        said = [int(w[1:-1]) for t in texts(sample, "interleaved") for w in t.split()]
        starts.append(said[0])
        assert said == list(range(said[0], said[0] + 50)) and len(sample.scans) == len(set(sample.scans)) <= 3
        for k, part in enumerate(sample.parts):
            if isinstance(part, Scan):
                following = next(p.text for p in sample.parts[k:] if isinstance(p, Text))
                # f0 is referred to again in sentence 13, which is its position if the window starts at 11 or later.
                assert int(following.split()[0][1:-1]) in (
                    {home[part.path], 13} if "f0" in part.path else {home[part.path]}
                )
    assert min(starts) < 5 and max(starts) > 65
    always = draws(open_dataset("pmc_inline", table="t.csv", root=tmp_path, around_figure=1.0), n=200)
    never = draws(open_dataset("pmc_inline", table="t.csv", root=tmp_path, around_figure=0.0), n=200)
    assert all(s.scans for s in always) and not all(s.scans for s in never)
    chosen = Counter(s.path for sample in always for s in sample.scans)
    assert len(chosen) == 6


def test_windows_show_every_figure(tmp_path):
    """Seven figures over 300 sentences: an epoch has as many windows as needed, and shows every figure."""
    refs = {10: ["f0", "f1", "f2", "f3"], 59: ["f4"], 150: ["f5"], 299: ["f6", "f0"]}
    papers = {"PMC9": refs, "PMC8": {}, "PMC7": {0: ["f0"]}}
    for name, figures in papers.items():
        sentences = [{"text": f"S{k}.", "img_ref": figures.get(k, [])} for k in range(300)]
        write_json(tmp_path / f"{name}.json", sentences)
    write_csv(tmp_path / "t.csv", ("PMC_path",), *((f"{name}.json",) for name in papers))
    dataset = open_dataset("pmc_inline", table="t.csv", root=tmp_path)
    # (f0 f1 f2) (f3 f4) (f5) (f6): at most three figures, and first references within 50 sentences.
    assert [dataset.window_count(i) for i in range(3)] == [4, 1, 1]
    assert [dataset.sample_id(0, w) for w in (None, 0, 3)] == ["1", "1.1", "1.4"]
    for epoch in range(20):
        samples = [dataset.sample(0, np.random.default_rng((epoch, w)), w) for w in range(4)]
        assert {s.path for sample in samples for s in sample.scans} == {f"figures/PMC9_f{k}.jpg" for k in range(7)}
        assert all(len(sample.scans) <= 3 for sample in samples) and [s.row_id for s in samples][3] == "1.4"
        for sample in samples:
            said = [int(w[1:-1]) for t in texts(sample, "interleaved") for w in t.split()]
            assert said == list(range(said[0], said[0] + 50))
    assert not dataset.sample(1, np.random.default_rng(0), 0).scans
    assert [s.path for s in dataset.sample(2, np.random.default_rng(0), 0).scans] == ["figures/PMC7_f0.jpg"]


def test_inline_papers_are_checked(tmp_path):
    write_csv(tmp_path / "t.csv", ("PMC_path",), ("PMC1.json",))
    dataset = open_dataset("pmc_inline", table="t.csv", root=tmp_path)
    good = {"text": "a", "img_ref": []}
    cases = [
        (None, 0),
        ("{}", 0),
        ("[", 0),
        ("[NaN]", 0),
        (json.dumps([good, {"txt": 1}]), 2),
        ("[]", 0),
        ("[" * 100000, 0),
        (json.dumps([{"text": "a", "img_ref": ["../../etc/x"]}]), 1),
        ('[{"text": "\\ud800"}]', 0),
        ("[\xff]", 0),
    ]
    for content, row in cases:
        if content is not None:
            (tmp_path / "PMC1.json").write_bytes(content.encode("latin-1"))
        for call in (dataset.scans, lambda i: dataset.sample(i, np.random.default_rng(0))):
            with pytest.raises(RowError, match="PMC1.json") as error:
                call(0)
            assert error.value.row == row, content
