"""Row errors survive pickling, which carries them between processes."""

import pickle

from input_pipeline.datasets.rows import TableError
from input_pipeline.samples import RowError


def test_row_errors_survive_a_worker():
    error = RowError("train.csv", 7, "no question", "fill it in")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "train.csv, row 7: no question (fill it in)"
    assert (again.file, again.row, again.reason, again.remedy) == ("train.csv", 7, "no question", "fill it in")


def test_table_errors_survive_a_worker():
    error = TableError([RowError("train.csv", 7, "no question"), RowError("train.csv", 9, "no answer")], "2 of 10 rows")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and [str(p) for p in again.problems] == [str(p) for p in error.problems]
