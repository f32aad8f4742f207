"""Tables of other schemas: Parquet of Hugging Face, LLaVA conversations, TFDS with voxels; and a mixture of all."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import sys
import textwrap
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_tables import answer, shape, texts
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline.batching.pipeline import Rows, batches
from input_pipeline.config import DataConfig
from input_pipeline.datasets import TableError, open_dataset, sample_rng, unpacked
from input_pipeline.images import scans
from input_pipeline.index import summary_figure
from input_pipeline.index.index import table_checksum
from input_pipeline.index.prepare import prepare
from input_pipeline.samples import RowError, Scan

TOKENIZER = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"
FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how `datasets` stores Image and Nifti


def png(gray: int, side: int = 24) -> bytes:
    out = io.BytesIO()
    pixels = np.full((side, side), gray, np.uint8)
    pixels[:4] = np.arange(side, dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-900, 900, (24, 20, 6)).astype(np.int16)


def nifti(seed: int = 0) -> bytes:
    return nibabel.Nifti1Image(volume(seed), np.eye(4)).to_bytes()


def write_parquet(file, metadata=None, **columns) -> None:
    """Write columns given as (type, values)."""
    table = pa.table({name: pa.array(values, kind) for name, (kind, values) in columns.items()})
    pq.write_table(table.replace_schema_metadata(metadata), file)


def samples(dataset) -> list:
    return [dataset.sample(i, sample_rng(0, 0, "d", dataset.row_id(i))) for i in range(len(dataset))]


VQA = {"scans": "image", "instruction": "question", "response": "answer"}


@pytest.fixture
def vqa(tmp_path):
    """Two shards in the layout of VQA-RAD on Hugging Face; the first two rows have the same image."""
    image = [{"bytes": png(90), "path": None}, {"bytes": png(90), "path": "x.jpg"}, {"bytes": None, "path": "c.png"}]
    text = pa.string()
    (tmp_path / "c.png").write_bytes(png(7))
    for shard, rows in enumerate((slice(0, 2), slice(2, 3))):
        write_parquet(
            tmp_path / f"train-0000{shard}-of-00002.parquet",
            image=(FILE, image[rows]),
            question=(text, ["<image> Effusion?", "Side?", "Plane?"][rows]),
            answer=(text, ["yes", "left", "axial"][rows]),
        )
    return {"table": "train-*.parquet", "root": tmp_path, "columns": VQA, "constants": {"task": "vqa"}}


def test_images_in_parquet(vqa, tmp_path):
    dataset = open_dataset("hf", **vqa)
    first, second, third = samples(dataset)
    assert [dataset.row_id(i) for i in range(3)] == ["1", "2", "3"] and shape(first) == "sir"
    assert texts(first, "instruction") == ["Effusion?"] and answer(third) == "axial"
    assert first.scans == second.scans and first.study_id == second.study_id, "equal images are one scan"
    assert third.scans == (Scan("c.png"),)
    path = tmp_path / first.scans[0].path
    assert path.suffix == ".png" and path.read_bytes() == png(90)
    assert scans.read(path)[0].shape == (24, 24, 1, 1)


def test_the_second_opening_reads_no_image(vqa, tmp_path, monkeypatch):
    expected = samples(open_dataset("hf", **vqa))
    written = [path.stat().st_mtime_ns for path in sorted((tmp_path / "unpacked").rglob("*"))]
    with monkeypatch.context() as patch:
        patch.setattr(unpacked.ScanFolder, "add", lambda *_: pytest.fail("a scan was unpacked again"))
        assert samples(open_dataset("hf", **vqa)) == expected
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "unpacked").rglob("*"))] == written
    before = table_checksum(tmp_path / vqa["table"])
    shard = tmp_path / "train-00001-of-00002.parquet"
    write_parquet(shard, image=(FILE, [{"bytes": png(3), "path": None}]), question=(pa.string(), ["Q?"]),
                  answer=(pa.string(), ["A"]))  # fmt: skip
    assert answer(samples(open_dataset("hf", **vqa))[2]) == "A", "a changed file is read again"
    assert table_checksum(tmp_path / vqa["table"]) != before


def test_other_columns_of_parquet(tmp_path):
    array = volume()
    info = {"info": {"features": {"label": {"names": ["normal", "edema"], "_type": "ClassLabel"}}}}
    talk = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    parts = [{"from": "human", "value": "<image>\nAnd <image>?"}, {"from": "gpt", "value": "Worse."}]
    write_parquet(
        tmp_path / "all.parquet",
        {"huggingface": json.dumps(info)},
        key=(pa.int64(), [11, 12]),
        nii=(FILE, [{"bytes": nifti(), "path": "a.nii"}, {"bytes": nifti(1), "path": None}]),
        several=(pa.list_(FILE), [[{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}]] * 2),
        voxels=(pa.list_(pa.list_(pa.list_(pa.int16()))), [array.transpose(2, 0, 1).tolist()] * 2),
        label=(pa.int64(), [1, 0]),
        talk=(talk, [parts, parts]),
        fold=(pa.string(), ["train", "test"]),
    )
    common = {"table": "all.parquet", "root": tmp_path, "axes": "DHW"}
    constants = {"task": "diagnosis", "instruction": "What is seen?"}
    columns = {"id": "key", "scans": "nii, voxels", "response": "label", "split": "fold"}
    dataset = open_dataset("hf", **common, columns=columns, constants=constants, split="train")
    (sample,) = samples(dataset)
    assert (sample.row_id, answer(sample)) == ("11", "edema") and dataset.skipped == {"split 'test'": 1}
    first, second = (tmp_path / scan.path for scan in sample.scans)
    assert first.name.endswith(".nii") and second.suffix == ".npy"
    np.testing.assert_array_equal(scans.read(second)[0][..., 0], array)
    columns = {"scans": "several", "messages": "talk"}
    first = samples(open_dataset("hf", **common, columns=columns, constants={"task": "report"}))[0]
    assert shape(first) == "sisir" and texts(first, "instruction") == ["And", "?"] and len(set(first.scans)) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": "nope-*.parquet"}, "there is no such file"),
        ({"columns": {"scans": "picture"}}, "features picture are missing; it has answer, image, question"),
        ({"columns": VQA | {"answer": "answer"}}, r"unknown keys answer \(did you mean"),
        ({"axes": "HWX"}, "axes must have H and W"),
        ({"table": "broken.parquet"}, "not readable as Parquet"),
    ],
)
def test_wrong_fields_of_parquet(vqa, tmp_path, change, message):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match=message):
        open_dataset("hf", **vqa | change)


def test_a_root_that_cannot_be_written(vqa, tmp_path):
    (tmp_path / "unpacked").touch()
    with pytest.raises(RowError, match="cannot be unpacked to .*set `unpacked` to another folder"):
        open_dataset("hf", **vqa)


def test_values_that_are_not_text(tmp_path):
    image = [{"bytes": png(1), "path": None}] * 3
    arrays = (pa.list_(pa.list_(pa.int16())), [[[1, 2], [3, 4]]] * 3)
    write_parquet(tmp_path / "t.parquet", image=(FILE, image), number=(pa.float64(), [1.5, float("nan"), None]),
                  array=arrays, note=(pa.string(), ["", None, "Cough."]))  # fmt: skip
    fields = {"table": "t.parquet", "root": tmp_path, "constants": {"task": "vqa", "instruction": "Q?"}}
    for column, reason in (("number", "response must be text, got float"), ("array", "a value is not text: .*ndarray")):
        columns = {"scans": "image", "response": column, "context": "note"}
        with pytest.raises(TableError, match=reason) as error:
            open_dataset("hf", **fields, columns=columns)
        assert len(error.value.problems) == 3
    columns = {"scans": "image", "response": "note"}
    dataset = open_dataset("hf", **fields, columns=columns, quarantine=True)
    assert [answer(s) for s in samples(dataset)] == ["Cough."] and len(dataset.problems) == 2


@pytest.mark.parametrize("key, more", [("image_id", {"cui": (pa.list_(pa.string()), [["C1"]] * 3)}), ("id", {})])
def test_captions_in_parquet(tmp_path, key, more):
    """The layouts of ROCOv2-radiology and MedTrinity-25M."""
    captions = [f"CT {i}." for i in range(3)]
    images = [{"bytes": png(i), "path": f"{i}.jpg"} for i in range(3)]
    columns = {"image": (FILE, images), key: (pa.string(), list("abc")), "caption": (pa.string(), captions)}
    write_parquet(tmp_path / "train-00000-of-00001.parquet", **columns, **more)
    maps = {"scans": "image", "response": "caption", "id": key}
    fields = {"table": "train-*.parquet", "root": tmp_path, "columns": maps}
    dataset = open_dataset("hf", **fields, constants={"task": "report", "instruction": "Describe it."})
    assert [answer(s) for s in samples(dataset)] == captions and dataset.row_id(2) == "c"


def human(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


ROWS = [
    {"id": 5, "image": "a.png", "conversations": human("<image>\nSide?", "Left.", "Sure?", "Yes.")},
    {"id": 5, "image": ["a.png", "b.png"], "conversations": human("Old <image>, new <image>.", "Worse.")},
    {"id": "t", "conversations": human("What is HU?", "A unit.")},
    {"id": "u", "image": "a.png", "conversations": human("No mark.", "Fine.")},
    {"id": "v", "image": "a.png", "conversations": human("<image> <image>", "Two marks.")},
    {"id": "w", "image": "a.png", "conversations": human("No answer?")},
]


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_llava(tmp_path, name):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(ROWS))
    dataset = open_dataset("llava", table=name, root=tmp_path, images="img", quarantine=True)
    first, second, third, fourth = samples(dataset)
    assert shape(first) == "sirir" and first.task == "vqa" and first.scans == (Scan("img/a.png"),)
    assert texts(first, "response") == ["Left.", "Yes."] and [dataset.row_id(i) for i in range(4)] == list("1234")
    assert [getattr(p, "path", None) or p.text for p in second.parts] == [
        "Old", "img/a.png", ", new", "img/b.png", ".", "Worse."
    ]  # fmt: skip
    assert third.scans == () and shape(fourth) == "sir"
    assert [(p.row, p.reason[:25]) for p in dataset.problems] == [
        (5, "2 marks <image>, but 1 im"), (6, "the last message is of us")
    ]  # fmt: skip


def test_messages_with_parts(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "Any nodule?"}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "No."}]}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"images": ["a.png"], "messages": talk, "kind": "report"}))
    columns = {"scans": "images", "messages": "messages", "task": "kind"}
    (sample,) = samples(open_dataset("llava", table="m.jsonl", root=tmp_path, columns=columns))
    assert shape(sample) == "sir" and answer(sample) == "No." and sample.task == "report"
    (tmp_path / "m.jsonl").write_text(json.dumps({"images": ["a.png"], "messages": [{"role": "user", "content": [3]}]}))
    with pytest.raises(TableError, match="must be an image or a text"):
        open_dataset("llava", table="m.jsonl", root=tmp_path, columns=columns)


BUILDER = '''
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class OwnVoxels(tfds.core.GeneratorBasedBuilder):
    """A small set with voxels."""
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text, image = tfds.features.Text(), tfds.features.Image(shape=(24, 24, 1), encoding_format="png")
        features = {"question": text, "answer": text, "films": tfds.features.Sequence(image), "film": image}
        features["ct"] = tfds.features.Tensor(shape=(None, None, None), dtype=np.int16, encoding="zlib")
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(3):
            out = io.BytesIO()
            Image.fromarray(np.arange(576, dtype=np.uint8).reshape(24, 24) // (k + 1)).save(out, "PNG")
            film = io.BytesIO(out.getvalue())
            ct = np.random.default_rng(k).integers(-900, 900, (6, 24, 20)).astype(np.int16)
            files = [io.BytesIO(out.getvalue()), io.BytesIO(out.getvalue())]
            yield k, {"question": "Q?", "answer": f"A{k}", "film": film, "films": files, "ct": ct}
'''


@pytest.fixture(scope="module")
def tfds_table(tmp_path_factory):
    """Return the version directory of a TFDS data set whose records have images and volumes."""
    root = tmp_path_factory.mktemp("tfds")
    (root / "own_voxels_builder.py").write_text(textwrap.dedent(BUILDER))
    sys.path.insert(0, str(root))
    try:
        module = importlib.import_module("own_voxels_builder")
        builder = module.OwnVoxels(data_dir=root / "data", file_format="array_record")
        builder.download_and_prepare()
    finally:
        sys.path.remove(str(root))
        del sys.modules["own_voxels_builder"]
    return builder.data_path


def test_voxels_in_tfds(tfds_table, tmp_path):
    columns = {"scans": "film, films, ct", "instruction": "question", "response": "answer"}
    fields = dict(table=str(tfds_table), root=tmp_path, split="train", columns=columns, constants={"task": "vqa"})
    by_answer = {answer(s): s for s in samples(open_dataset("tfds", **fields, axes="DHW"))}
    assert by_answer.keys() == {"A0", "A1", "A2"}
    film, ct = (tmp_path / scan.path for scan in dict.fromkeys(by_answer["A1"].scans))
    expected = np.arange(576, dtype=np.uint8).reshape(24, 24) // 2
    np.testing.assert_array_equal(scans.read(film)[0][..., 0, 0], expected)
    stored = np.random.default_rng(1).integers(-900, 900, (6, 24, 20)).astype(np.int16)
    np.testing.assert_array_equal(scans.read(ct)[0][..., 0], stored.transpose(1, 2, 0))


def test_a_mixture_of_all(vqa, tfds_table, tmp_path, monkeypatch):
    """Scans of JSON Lines, LLaVA, Parquet and TFDS are prepared together, and packed from records."""
    monkeypatch.setattr(summary_figure, "draw", lambda report, file: file.touch())
    (tmp_path / "ct.nii").write_bytes(nifti(5))
    own = {"id": "o", "task": "report", "scans": ["ct.nii"], "instruction": "Findings?", "response": "A nodule."}
    (tmp_path / "own.jsonl").write_text(json.dumps(own))
    (tmp_path / "chat.json").write_text(json.dumps([{"image": "c.png", "conversations": human("<image> Why?", "So.")}]))
    root, columns = str(tmp_path), {"scans": "ct, film", "instruction": "question", "response": "answer"}
    train = {
        "own": {"family": "jsonl", "root": root, "table": "own.jsonl", "intensity": "lung"},
        "chat": {"family": "llava", "root": root, "table": "chat.json"},
        "parquet": vqa | {"family": "hf", "root": root},
        "records": {"family": "tfds", "root": root, "table": str(tfds_table), "split": "train", "axes": "DHW",
                    "columns": columns, "constants": {"task": "vqa"}},
    }  # fmt: skip
    fields = {
        "tokenizer": str(TOKENIZER), "terms": "none", "size_2d": 64, "size_3d": 64, "depth": 16, "text_length": 256,
        "vision_rows": 2, "patch_length": 32, "planes": 200, "scans": 8, "workers": 0, "records": True,
        "index": str(tmp_path / "index"),
    }  # fmt: skip
    config = DataConfig.from_dict(ConfigDict(fields | {"train": train}).to_dict())
    report = prepare(config, config.index, records=True, workers=0)
    assert report["quarantine"] == 0 and report["scans"]["good"] == 9, "equal images are one scan"
    monkeypatch.setattr(unpacked.ScanFolder, "add", lambda *_: pytest.fail("a scan was unpacked again"))
    assert prepare(config, config.index, records=True, workers=0)["reading"]["scans_read"] == 0
    packed: list[str] = []
    with Rows(config, "train", batch=1, host=0, hosts=1) as rows:
        stream = iter(batches(rows))
        while len(packed) < 8:  # an epoch
            packed += [sample.source for row in next(stream).rows for sample in row.samples]
    assert sorted(packed) == ["chat", "own", *["parquet"] * 3, *["records"] * 3]
