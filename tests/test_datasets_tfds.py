"""The TFDS source."""

from __future__ import annotations

import numpy as np
import pytest
from dataset_tables import answer

from input_pipeline.datasets import TableError, open_dataset
from input_pipeline.samples import RowError, Scan


def test_tfds_source(tmp_path):
    import textwrap

    (tmp_path / "own_vqa_builder.py").write_text(
        textwrap.dedent('''
        import tensorflow_datasets as tfds

        class OwnVqa(tfds.core.GeneratorBasedBuilder):
            """A small set."""
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                text = tfds.features.Text()
                features = {"question": text, "answer": text, "scans": tfds.features.Sequence(text), "blob": text}
                features["messages"] = tfds.features.Sequence({"role": text, "content": text})
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                talk = [{"role": "user", "content": "Q <image-1>"}, {"role": "assistant", "content": "A6"}]
                for k in range(7):
                    texts = {"question": "<image-1> Q?", "answer": "" if k == 5 else f"A{k}"}
                    if k == 6:
                        texts = {"question": "", "answer": ""}
                    texts["messages"] = talk if k == 6 else []
                    yield k, {**texts, "scans": [f"s{k}.png"], "blob": b"\\xff\\x00"}
        ''')
    )
    import importlib
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        module = importlib.import_module("own_vqa_builder")
        builder = module.OwnVqa(data_dir=tmp_path / "data", file_format="array_record")
        builder.download_and_prepare()
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["own_vqa_builder"]
    columns = {"instruction": "question", "response": "answer"}
    fields = dict(table=builder.data_path, root=tmp_path, columns=columns, constants={"task": "vqa"})
    with pytest.raises(TableError, match="response is required"):
        open_dataset("tfds", **fields, split="train")
    dataset = open_dataset("tfds", **fields, split="train", quarantine=True)
    assert len(dataset) == 6 and len(dataset.problems) == 1
    got = {dataset.sample(i, np.random.default_rng(0)) for i in range(6)}
    assert {answer(s) for s in got} == {"A0", "A1", "A2", "A3", "A4", "A6"}  # the last one from its messages
    assert all(s.scans == (Scan(f"s{answer(s)[1:]}.png"),) and s.task == "vqa" and s.dataset == "tfds" for s in got)
    with pytest.raises(ValueError, match="split is required"):
        open_dataset("tfds", **fields)
    with pytest.raises(RowError, match="cannot be opened"):
        open_dataset("tfds", **fields, split="tarin")
    with pytest.raises(RowError, match="features nope are missing"):
        open_dataset("tfds", **{**fields, "columns": {"response": "nope"}}, split="train")
    with pytest.raises(RowError, match="dataset_info.json is missing"):
        open_dataset("tfds", table="data", root=tmp_path, split="train")
