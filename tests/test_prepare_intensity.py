"""`prepare`, `inspect` and training with intensity settings and notices."""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from generation_parts import tokenizer  # noqa: F401
from practice import reseal
from test_intensity import head_ct

from input_pipeline.batching.load import RowLoader
from input_pipeline.config import DataConfig
from input_pipeline.images import scans
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index import summary_figure
from input_pipeline.index.index import Index
from input_pipeline.index.prepare import prepare
from input_pipeline.inspect.page import page
from input_pipeline.inspect.sampling import first_rows


@pytest.fixture
def config(tmp_path, tokenizer, monkeypatch) -> DataConfig:
    """Return a config of one head CT of 64 x 64 x 20 and a 256 x 64 x 20 copy."""
    monkeypatch.setattr(summary_figure, "draw", lambda report, file: file.touch())
    voxels = head_ct((64, 64, 20))[..., 0]
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1, -1, 5, 1])), tmp_path / "ct.nii")
    nibabel.save(nibabel.Nifti1Image(np.repeat(voxels, 4, 0), np.diag([-1, -1, 5, 1])), tmp_path / "long.nii")
    rows = [
        {"id": name, "task": "vqa", "scans": [f"{name}.nii"], "instruction": "<image-1> Any lesion?", "response": "yes"}
        for name in ("ct", "long")
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"family": "jsonl", "table": "t.jsonl", "root": str(tmp_path)}
    return DataConfig(
        train={"own": source}, index=str(tmp_path / "index"), tokenizer=str(tokenizer), terms="none", size_2d=64,
        size_3d=32, depth=8, text_length=128, vision_rows=2, patch_length=16, planes=96, scans=4, workers=0, crop=1.0,
    )  # fmt: skip


def scan_lines(config) -> dict[str, dict]:
    return {line["path"]: line for line in pq.read_table(f"{config.index}/scans.parquet").to_pylist()}


def loaded_planes(config) -> np.ndarray:
    """Return the planes of the first row of an epoch."""
    loader = RowLoader(config, "train", training=False)
    samples = np.arange(2)
    (planned, *_) = loader.plan(samples, [loader.measure(0, samples)], (0, 2, 0, 0))
    return loader.load(planned, 0, 0, 0)[0]["planes"]


def test_notices_of_prepare(config):
    report = prepare(config, config.index, workers=0)
    kinds = {notice["example"]: notice["scans"] for notice in report["notices"]}
    assert kinds == {
        "soft tissue of this CT (0 to 80 HU) gets 5 of 256 gray levels: set an intensity such as soft_tissue, brain or "
        "lung/soft_tissue/bone": 2,
        "64 x 256 pixels are stretched 4.0:1 to a square: keep the shape with data.fit='pad'": 1,
    }
    with open(f"{config.index}/notices.jsonl") as lines:
        notices = [json.loads(line) for line in lines]
    assert sorted(notice["scan"] for notice in notices) == ["ct.nii", "long.nii", "long.nii"]
    with open(f"{config.index}/summary.txt") as text:
        assert "Doubtful scans" in text.read()
    again = prepare(config, config.index, workers=0)  # from the index, without reading the scans
    assert again["reading"]["scans_read"] == 0 and again["notices"] == report["notices"]


def test_another_intensity_reads_and_stores_scans_again(config):
    prepare(config, config.index, workers=0, records=True)
    stored = dataclasses.replace(config, records=True)
    plain = loaded_planes(stored)
    brain = dataclasses.replace(stored, intensity="brain")
    with pytest.raises(ValueError, match="source own: intensity is 'brain', was None"):
        RowLoader(brain, "train", training=False)
    report = prepare(brain, config.index, workers=0, records=True)
    assert report["reading"]["scans_read"] == 2 and report["records"]["unused"] == 2
    assert [line["window"] for line in scan_lines(brain).values()] == ['"brain"'] * 2
    windowed = loaded_planes(brain)
    np.testing.assert_array_equal(windowed, loaded_planes(dataclasses.replace(brain, records=False)))
    assert (windowed != plain).mean() > 0.3
    own = {"own": dict(config.train["own"]) | {"intensity": "minmax"}}
    with pytest.raises(ValueError, match="source own: intensity is 'minmax', was 'brain'"):
        RowLoader(dataclasses.replace(brain, train=own), "train", training=False)


def test_three_windows_are_planned_as_three_channels(config):
    three = dataclasses.replace(config, intensity="lung/soft_tissue/bone")
    prepare(three, three.index, workers=0)
    assert {line["channels"] for line in scan_lines(three).values()} == {3}
    planes = loaded_planes(three)
    voxels, header = scans.read(f"{three.train['own']['root']}/ct.nii")
    volume = prepare_volume(voxels, window="lung/soft_tissue/bone", sizes=three.sizes, **header.facts)
    assert any(np.array_equal(part, volume.slices.reshape(-1, 32, 32)) for part in np.split(planes, 2))


def test_records_of_another_fit_are_refused(config):
    prepare(config, config.index, workers=0, records=True)
    padded = dataclasses.replace(config, fit="pad", records=True)
    with pytest.raises(ValueError, match="data.fit is pad, was stretch"):
        prepare(padded, config.index, workers=0, records=True)
    with pytest.raises(ValueError, match="data.fit is pad, was stretch"):
        RowLoader(padded, "train", training=False)
    prepare(padded, config.index, workers=0, records=True, recheck=True)
    planes = loaded_planes(padded)
    np.testing.assert_array_equal(planes, loaded_planes(dataclasses.replace(padded, records=False)))
    empty_rows = [(plane.max(axis=1) == 0).sum() for plane in planes]
    assert max(empty_rows) >= 24  # the long scan occupies a quarter of its square


def test_indexes_and_records_of_earlier_versions_are_read(config):
    """An index without notices, and records without `fit`, as version 0.1 wrote them."""
    prepare(config, config.index, workers=0, records=True)
    file = f"{config.index}/scans.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["notices"]), file)
    description = Path(config.index) / "index.json"
    content = json.loads(description.read_text())
    del content["records"]["fit"]
    description.write_text(json.dumps(content))
    reseal(Path(config.index))
    index = Index(config.index)
    assert index.notices([1, 2]) == {}
    assert RowLoader(dataclasses.replace(config, records=True), "train", training=False).records is not None
    shutil.rmtree(f"{config.index}/records")


def test_the_page_shows_notices_and_numbers_slices_as_the_file_does(config):
    prepare(config, config.index, workers=0)
    head, rows = first_rows(config, "train", 1, 0, "my.py")
    assert head.settings["intensity"] == "minmax" and head.settings["fit"] == "stretch"
    assert [scan.source for scan in rows[0].scans] in ([(64, 64, 20), (64, 256, 20)], [(64, 256, 20), (64, 64, 20)])
    # 20 slices become 8: stored slice k has its center at slice (k + 0.5) * 20 / 8 of the file.
    assert [image.slice for image in rows[0].scans[0].images] == [2, 4, 7, 9, 12, 14, 17, 19]
    warnings = rows[0].warnings
    assert sum("soft tissue of this CT (0 to 80 HU) gets 5 of 256" in warning for warning in warnings) == 2
    assert sum("stretched 4.0:1" in warning for warning in warnings) == 1
    html = page(head, rows)
    assert "slice 19 of 20" in html and "from 64 × 256 × 20" in html
