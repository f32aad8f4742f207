"""MPx-Single and MPx-Multi."""

from __future__ import annotations

import pytest
from dataset_tables import answer, draws, every_family, texts, write_csv

from input_pipeline.datasets import TableError, open_dataset


@pytest.fixture
def every(tmp_path):
    return every_family(tmp_path)


def test_mpx_multi_shows_what_it_chose(tmp_path):
    """A sample has ten of twelve images in their order; over the epochs every image is used."""
    names = [f"MPX1_{k}.png" for k in range(12)]
    rows = [
        (",".join(names), kind, f"The {kind}.", "A man of 50.")
        for kind in ("txFollowup", "ddx", "dxHow", "diagnosis", "findings", "exam", "discussion")
    ]
    write_csv(tmp_path / "t.csv", ("name", "type", "context", "history"), *rows)
    dataset = open_dataset("mpx_multi", table="t.csv", root=tmp_path)
    assert len(dataset.scans(0)) == 12
    seen = set()
    for sample in draws(dataset, 0):
        paths = [s.path for s in sample.scans]
        assert len(paths) == 10 and paths == sorted(paths, key=names.index)
        seen |= set(paths)
        assert (
            texts(sample, "context") == ["A man of 50."]
            and sample.study_id == "MPX1"
            and answer(sample) == "The txFollowup."
        )
    assert seen == set(names)
    assert len({texts(draws(dataset, i, 1)[0], "instruction")[0] for i in range(7)}) == 7
    write_csv(
        tmp_path / "t.csv",
        ("name", "type", "context", "history"),
        ("a.png,,b.png", "ddx", "x", ""),
        ("a.png", "DDX?", "x", ""),
    )
    with pytest.raises(TableError) as error:
        open_dataset("mpx_multi", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [1, 2]


def test_mpx_questions_join_the_explanation(every):
    assert answer(draws(open_dataset("mpx_questions", **every["mpx_questions"]), n=1)[0]) == "B. Because."
