"""All tools in the order of docs/medmd.md on small synthetic inputs: `prepare --strict` and training accept them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from input_pipeline import phantoms
from input_pipeline.curate.__main__ import main as curate
from input_pipeline.index.command import main as prepare
from radfm_jax.training import display
from radfm_jax.training.command import main as train
from radfm_jax.training.experiment import Experiment
from tests import jats_papers
from tests.chat_server import FailingServer
from tests.dataset_tables import write_csv
from tests.scan_files import nifti

CONFIG = """
from ml_collections import ConfigDict
from input_pipeline.config import DataConfig
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig
from tests.test_train import MODEL

DATA = {data!r}

def get_config():
    experiment = Experiment(
        MODEL, DataConfig(**DATA), TrainConfig(steps=3, batch=8, remat="none", log_every=1, eval_batches=1, chunk=64),
        OptimizerConfig(learning_rate=1e-3, warmup_steps=1), checkpoint=CheckpointConfig(save_every=3),
    )
    return ConfigDict(experiment.to_dict(), convert_dict=True).lock()
"""


def inputs(place: Path) -> None:
    """Write small published inputs: packages of papers, cases, the label file of an X-ray set."""
    jats_papers.packages(place / "oa")
    rng = np.random.default_rng(0)
    for k in range(24):
        case = place / "cases" / f"MPX{k:02d}"
        case.mkdir(parents=True)
        nifti(case / "ct.nii.gz", rng.integers(-900, 900, (24, 24, 8)).astype(np.int16), np.eye(4))
        Image.fromarray(rng.integers(0, 255, (24, 20), np.uint8)).save(case / "film.png")
        said = {
            "title": ("Meningioma", "Lung abscess", "Renal cyst")[k % 3], "findings": f"A mass of 3 cm, number {k}.",
            "impression": f"Lesion {k}.", "discussion": f"Benign, as often in case {k}.", "history": "Headache.",
            "articles": [("Meningioma", "Lung abscess", "Renal cyst")[k % 3]], "features": [f"CT: sign {k}."],
            "scans": [{"path": "ct.nii.gz", "modality": "CT", "plane": "Axial", "caption": f"CT of lesion {k}."}],
        }  # fmt: skip
        (case / "case.json").write_text(json.dumps(said))
    for k in range(24):
        film = place / "films" / f"MPX{k:02d}"
        film.mkdir(parents=True)
        (place / "cases" / f"MPX{k:02d}" / "film.png").rename(film / "film.png")
        shown = {"path": "film.png", "modality": "X-ray", "plane": "AP", "caption": f"Film {k}."}
        said = {"title": "Fracture", "findings": f"A line, number {k}.", "history": "A fall.", "scans": [shown]}
        (film / "case.json").write_text(json.dumps(said))
    nih, rows = place / "data" / "NIH", []
    nih.mkdir(parents=True)
    for k in range(60):
        name = f"{k // 2:08d}_{k % 2:03d}.png"
        Image.fromarray(rng.integers(0, 255, (24, 24), np.uint8)).save(nih / name)
        rows.append((name, ("Mass", "No Finding", "Effusion")[k % 3], k // 2))
    write_csv(nih / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "Patient ID"), *rows)


TABLES = (
    "pmc_inline=pmc_inline:inline.csv", "pmc_oa=pmc_oa:oa.csv", "pmc_casereport=pmc_inline:casereport.csv",
    "rad3d_caption=rad3d:caption.json", "rad3d_rationale=rad3d:rationale.json", "rad3d_modality=rad3d:modality.csv",
    "rad3d_vqa=rad3d:vqa.csv", "mpx_single=mpx:single.csv", "mpx_multi=mpx:multi.csv", "cxr_mix=cxr_mix/yes_no.csv",
)  # fmt: skip


def run_tools(place: Path) -> None:
    data = place / "data"
    local = ("--workers", "0")
    common = ("--root", data, "--strict")
    split = [t.replace(":", ":../split/") if ":" in t else t.replace("cxr_mix/", "split/") for t in TABLES]
    kept = [t.replace("split/", "radmd/") for t in split[2:]]
    with FailingServer() as server:
        model = ("--model", "m", "--base-url", server.url, "--key-variable", "", "--strict")
        for argv in (
            ("pmc-inline", place / "oa", "--out", data / "pmc_inline", "--cases", *local),
            ("pmc-oa", place / "oa", "--out", data / "pmc_oa", *local),
            ("pmc-casereport", data / "pmc_inline/cases.jsonl", "--out", data / "pmc_inline", *model),
            ("rad3d", place / "cases", "--out", data / "rad3d", "--strict", *local),
            ("vqa", data / "rad3d/caption.json", "--out", data / "rad3d", *model),
            ("mpx", place / "films", "--out", data / "mpx", "--strict", *local),
            ("diagnosis", "--out", data / "cxr_mix", "chestxray14=NIH", *common),
            ("splits", "--out", data / "split", "--near", "--test", "0.3", *TABLES, *common),
            ("radmd", "--out", data / "radmd", "--captions", data / "pmc_inline/captions.jsonl", *split, *common),
            ("statistics", "--out", data / "statistics", "--report", data / "radmd/report.json", *kept, *common),
        ):
            assert curate([str(a) for a in argv]) == 0, argv[0]


def rows(file: Path) -> list[dict]:
    if file.suffix == ".json":
        return json.loads(file.read_text())
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def config(place: Path) -> Path:
    """Return the sources: tables of RadMD and the two sets that it drops, for each split with rows."""
    data, sources = place / "data", {"train": {}, "test": {}}
    for table in TABLES:
        family, _, where = table.partition("=")
        folder, _, name = where.rpartition(":")
        name = Path(name).name
        file = data / ("split" if family in ("pmc_inline", "pmc_oa") else "radmd") / name
        for split in {row["split"] for row in rows(file)}:
            end = "_test" if split == "test" else ""
            fields = {"family": family, "table": str(file), "root": str(data / folder), "split": split}
            sources[split][family + end] = fields
    fields = sources | {
        "tokenizer": str(place / "practice" / "tokenizer.model"), "index": str(place / "index"), "terms": "none",
        "size_2d": 64, "size_3d": 32, "depth": 16, "text_length": 1024, "vision_rows": 2, "patch_length": 32,
        "planes": 200, "scans": 8, "num_latents": 4, "window": 40, "workers": 0,
    }  # fmt: skip
    file = place / "config.py"
    file.write_text(CONFIG.format(data=fields))
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    inputs(place)
    run_tools(place)
    phantoms.write(place / "practice", train=4, test=2, size=64, workers=1)
    return place


@pytest.fixture(scope="module")
def indexed(built) -> Path:
    """Return the config, after `prepare --strict` has accepted every row and scan."""
    file = config(built)
    assert prepare([f"--config={file}", "--out", str(built / "index"), "--strict", "--workers", "0"]) == 0
    return file


def test_prepare_accepts_the_output(built, indexed):
    summary = json.loads((built / "index" / "summary.json").read_text())
    assert summary["quarantine"] == 0 and summary["leaks"] == {"study": 0, "scan": 0}
    assert set(summary["splits"]["train"]["tasks"]) == {
        "modality", "diagnosis", "vqa", "report", "rationale", "interleaved"
    }  # fmt: skip
    assert len(summary["sources"]) == 20, "every table, in train and in test"


def test_the_config_of_the_docs_names_the_output(built, monkeypatch):
    """docs/medmd.md, the config of the tables."""
    text = (Path(__file__).parents[1] / "docs" / "medmd.md").read_text()
    found: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    monkeypatch.chdir(built)
    for made, dropped in (("split", 0), ("radmd", 2)):
        data = Experiment.from_dict(found["get_config"](made).to_dict()).data
        tables = [Path(f["root"]) / f["table"] for f in (*data.train.values(), *data.test.values())]
        assert len(tables) == 2 * (len(TABLES) - dropped) and all(file.is_file() for file in tables)
        assert {Path(data.train[k]["root"]).resolve() for k in ("cxr_mix", "mpx_multi")} == {
            built / "data", built / "data" / "mpx"
        }  # fmt: skip


@pytest.mark.slow
def test_training_accepts_the_output(built, indexed):
    assert train([f"--config={indexed}", "--workdir", str(built / "run")]) == 0
    shown = [line for line in display.read_metrics(built / "run") if "train/loss" in line]
    assert [line["step"] for line in shown] == [1, 2, 3] and all(np.isfinite(line["train/loss"]) for line in shown)


def test_rules_have_done_their_work(built):
    data = built / "data"
    assert not (data / "radmd" / "oa.csv").exists() and not (data / "radmd" / "inline.csv").exists()
    captions = rows(data / "radmd" / "caption.json")
    assert len(captions) == 24 and all("3 cm" not in row["finding"] for row in captions)
    by_split = {}
    for row in rows(data / "radmd" / "yes_no.csv"):
        sides = by_split.setdefault((row["split"], row["disease"]), [0, 0])
        sides[int(row["label"])] += 1
    assert by_split and all(no == yes for no, yes in by_split.values())
    counts = json.loads((data / "radmd" / "report.json").read_text())["counts"]
    assert counts["oa.csv: dropped by dropped_family"] == counts["oa.csv: rows"] > 10
