"""pmc-inline and pmc-oa: packages -> layouts that the readers accept; hostile packages; resuming; Beam."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.curate import captions, packages, pmc
from input_pipeline.curate.__main__ import main
from input_pipeline.datasets import open_dataset, sample_rng
from input_pipeline.images import scans
from input_pipeline.parallel import chunk_files
from input_pipeline.samples import Scan
from tests import jats_papers

INLINE = {"any_language": False, "pictures": True, "cases": True, "keep_unillustrated": False}
OA = {"any_language": False, "pictures": True}


def curate(source, out, tool="pmc-inline", workers=0, **changes):
    out.mkdir(parents=True, exist_ok=True)
    options = (INLINE if tool == "pmc-inline" else OA) | changes
    return pmc.curate(tool, source, out, options, workers=workers)


def tree(folder: Path, skipped=("report.json",)) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in skipped
    }  # fmt: skip


def jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def problems(out: Path) -> str:
    return (out / "problems.jsonl").read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("oa")
    jats_papers.packages(root / "00" / "archives", tuple(jats_papers.EXPECTED)[:7])
    return jats_papers.packages(root / "01", tuple(jats_papers.EXPECTED)[7:], archives=False, left_out=("IJO-1-g004",))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "pmc"
    return out, curate(source.parent, out)


def test_the_reader_takes_it(built):
    out, report = built
    dataset = open_dataset("pmc_inline", table="inline.csv", root=out)
    assert len(dataset) == report["counts"]["papers written"] == len(jats_papers.EXPECTED)
    shown = set()
    for i in range(len(dataset)):
        shown |= set(dataset.scans(i))
        sample = dataset.sample(i, sample_rng(0, 0, "pmc_inline", dataset.row_id(i)))
        assert any(isinstance(p, Scan) for p in sample.parts) and sample.study_id.startswith("PMC90000")
    for scan in shown:
        assert scans.read(scans.resolve(out, scan.path))[1].format == "image"
    assert len(shown) == report["counts"]["pictures"] == len(list((out / "figures").iterdir()))


def test_missing_picture_ties_nothing(built):
    out, report = built
    paper = json.loads((out / "papers" / "PMC9000008.json").read_text())
    assert next(s for s in paper if s["text"].startswith("MRI T2"))["img_ref"] == ["F3", "F5"]
    assert "IJO-1-g004" in problems(out) and report["counts"]["references to figures without an image"] == 1


def test_figure_of_two_pictures(built):
    paper = json.loads((built[0] / "papers" / "PMC9000009.json").read_text())
    assert paper[1]["img_ref"] == ["F2.1", "F2.2"]


def test_captions_apart_and_case_reports(built):
    out, report = built
    texts = "".join(f.read_text() for f in (out / "papers").iterdir())
    lines = jsonl(out / "captions.jsonl")
    assert {"paper": "PMC9000003", "figure": "fig0002", "label": "Fig. 2", "caption": "Sagittal CT.",
            "pictures": ["fig0002"]} in lines  # fmt: skip
    assert "Sagittal CT." not in texts
    cases = jsonl(out / "cases.jsonl")
    assert len(cases) == report["counts"]["case reports"] == 6
    assert cases[0]["captions"]["fig0001"] == "Axial CT." and cases[0]["sentences"][1]["section"] == "Case report"


def test_pmc_oa(source, tmp_path):
    report = curate(source.parent, tmp_path, "pmc-oa")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "oa.csv").read_text())))
    assert len(rows) == report["counts"]["pairs"] == len(open_dataset("pmc_oa", table="oa.csv", root=tmp_path))
    row = next(r for r in rows if r["figure"] == "fig1" and r["PMC_id"] == "PMC9000004")
    assert row["Caption"].startswith("First mass. (a)") and row["panels"] == "a b" and row["label"] == "Figure 1"
    (both,) = [r["Figure_path"] for r in rows if r["figure"] == "F2" and r["Figure_path"].startswith("[")]
    assert [path.rsplit("_", 1)[1] for path in ast.literal_eval(both)] == ["F2.1.jpg", "F2.2.jpg"], "one caption"
    dataset = open_dataset("pmc_oa", table="oa.csv", root=tmp_path)
    assert all((tmp_path / s.path).is_file() for i in range(len(dataset)) for s in dataset.scans(i))
    assert "a reference " not in problems(tmp_path) and "no figure has" not in problems(tmp_path)


@pytest.mark.parametrize(
    ("caption", "marks"),
    [
        ("(A–C) One. (D) Two.", "abcd"),
        ("Axial (a) and coronal (b) CT.", "ab"),
        ("A, axial CT. B, coronal CT.", "ab"),
        ("Survival (p < 0.05) of (n) mice.", ""),
        ("(B) only.", ""),
    ],
)
def test_panels_of_captions(caption, marks):
    assert "".join(captions.panels(caption)) == marks


def test_workers_and_resume_change_nothing(source, built, tmp_path, monkeypatch):
    """An interrupted run resumes without reading anything twice, and the result is the same."""
    monkeypatch.setattr(chunk_files, "CHUNK", 2)
    real, read = pmc.inline_paper, []

    def ending(options, path):
        read.append(path)
        if len(read) == 6:
            raise KeyboardInterrupt
        return real(options, path)

    monkeypatch.setattr(pmc, "inline_paper", ending)
    with pytest.raises(KeyboardInterrupt):
        curate(source.parent, tmp_path / "ended")
    assert len(list((tmp_path / "ended" / "parts").glob("*.jsonl"))) == 2
    with pytest.raises(ValueError, match="--restart"):
        curate(source.parent, tmp_path / "ended", any_language=True)
    first = set(read[:4])
    (tmp_path / "ended" / "papers" / "PMC9000001.json.0.partial").touch()  # of a worker that was killed
    curate(source.parent, tmp_path / "ended")
    assert not first & set(read[6:]) and len(read) == 6 + len(jats_papers.EXPECTED) - 4
    monkeypatch.undo()
    curate(source.parent, tmp_path / "two", workers=2)
    assert tree(tmp_path / "ended") == tree(tmp_path / "two") == tree(built[0])


def test_hostile_packages(tmp_path):
    source = tmp_path / "in"
    jats_papers.packages(source, ("PMC9000001",))
    good = jats_papers.xml("PMC9000002")

    def archive(name, members, kinds=()):
        with tarfile.open(source / name, "w:gz") as out:
            for path, data in members.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
            for path, kind, target in kinds:
                info = tarfile.TarInfo(path)
                info.type, info.linkname = kind, target
                out.addfile(info)

    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jats_papers.picture(0))
    own = good.replace(b">9000002<", b">9000020<")
    leading_out = own.replace(b'"pone.0099999.g002"', f'"../../{secret.name}"'.encode())
    archive(
        "PMC9000020.tar.gz",
        {
            "x/a.nxml": leading_out,
            "../M\udcfcller.jpg": b"x",
            "../pone.0099999.g001.jpg": jats_papers.picture(1),
            "/abs.g003.jpg": b"x",
        },
        [("x/pone.0099999.g003.jpg", tarfile.SYMTYPE, str(secret))],
    )
    archive("PMC9000021.tar.gz", {"a.nxml": good})
    archive("PMC9000022.tar.gz", {"a.nxml": good, "b.nxml": good})
    (source / "PMC9000023.tar.gz").write_bytes((source / "PMC9000020.tar.gz").read_bytes()[:300])
    german = own.replace(b"9000020", b"9000024").replace(b'xml:lang="en"', b'xml:lang="de"')
    archive("PMC9000024.tar.gz", {"a.nxml": german})
    jats_papers.packages(source / "again", ("PMC9000001",))
    shutil.copytree(jats_papers.packages(source / "f", ("PMC9000003",), archives=False) / "PMC9000003", source / "PMC1")
    report = curate(source, tmp_path / "out")
    said = problems(tmp_path / "out")
    for words in (
        "is not a plain file name", "its path leaves the package", "not a regular file",
        "the article belongs to another paper: PMC9000002", "has 2 articles", "cannot be read", "is not in English",
        "is repeated: PMC9000001",
        "another paper: PMC9000003",
    ):  # fmt: skip
        assert words in said, words
    assert all(json.loads(line)["file"] for line in said.splitlines())
    assert report["counts"]["papers written"] == 2
    assert not list((tmp_path / "out" / "figures").glob("PMC9000020*"))
    assert {f.name for f in tmp_path.iterdir()} == {"in", "out", "secret.jpg"}


def test_budget(tmp_path, monkeypatch):
    jats_papers.packages(tmp_path, ("PMC9000001",))
    monkeypatch.setattr(packages, "MAX_PACKAGE", 1000)
    with pytest.raises(packages.PackageError, match="1,000 bytes"):
        packages.open_package(str(tmp_path / "PMC9000001.tar.gz"))


def package_of(tmp_path, *headers: tuple[bytes, bytes, int]) -> str:
    """Write a package whose article comes after tar headers of (type, content, size)."""
    blocks = io.BytesIO()
    for kind, data, size in headers:
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, size
        blocks.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
    article = jats_papers.xml("PMC9000001")
    info = tarfile.TarInfo("x/a.nxml")
    info.size = len(article)
    blocks.write(info.tobuf() + article + bytes(-len(article) % 512) + bytes(1024))
    path = tmp_path / "PMC9000001.tar.gz"
    path.write_bytes(gzip.compress(blocks.getvalue(), 1))
    return str(path)


LONG_FIELD = b"%d comment=%s\n" % (3 << 20, b"a" * ((3 << 20) - 17))


@pytest.mark.parametrize(
    "headers",
    [
        [(tarfile.XHDTYPE, LONG_FIELD, len(LONG_FIELD))],
        [(tarfile.XGLTYPE, LONG_FIELD, len(LONG_FIELD))],
        [(tarfile.GNUTYPE_LONGNAME, bytes(2 << 20), 2 << 20)],
        [(tarfile.GNUTYPE_LONGLINK, bytes(2 << 20), 2 << 20)],
        [(tarfile.GNUTYPE_LONGNAME, b"a" * 1000, 1000)] * 2_000,
        [(tarfile.XGLTYPE, b"20 comment=%s\n" % (b"a" * 8), 20)] * 3_000,
        [(tarfile.XHDTYPE, b"20 comment=%s\n" % (b"a" * 8), 20)] * 3_000,
    ],
    ids=["pax", "global pax", "long name", "long link", "many names", "many global", "many pax"],
)
def test_headers_are_within_the_limits(tmp_path, monkeypatch, headers):
    """Headers of tar files are read into memory before any member is seen."""
    monkeypatch.setattr(packages, "MAX_HEADERS", 2 << 20)
    path = package_of(tmp_path, *headers)
    tracemalloc.start()
    try:
        packages.open_package(path)  # many small headers of all members are harmless
        assert headers[0][0] == tarfile.XGLTYPE
    except packages.PackageError as error:
        assert "header" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 12 << 20, peak


def test_pax_headers_of_normal_size(tmp_path):
    field = b"20 path=x/other.xml\n"
    package = packages.open_package(package_of(tmp_path, (tarfile.XHDTYPE, field, len(field))))
    assert package.xml_name == "other.xml" and package.xml == jats_papers.xml("PMC9000001")


def test_other_formats_become_png(tmp_path):
    package = packages.Package("p", b"", "", {"a.gif": io.BytesIO()}, [])
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(out, "GIF")
    package.images["a.gif"] = out.getvalue()
    assert package.find_image("a") == "a.gif" and package.find_image("A.tif") == "a.gif"
    assert pmc._write_image(package, "a.gif", tmp_path / "a.jpg") is None
    assert scans.read(tmp_path / "a.jpg")[0][..., 0, 0].tolist() == np.arange(64).reshape(8, 8).tolist()
    package.images["b.gif"] = b"GIF89a"
    assert "cannot be read" in pmc._write_image(package, "b.gif", tmp_path / "b.jpg")


def test_items_are_read_by_slices(tmp_path):
    items = chunk_files.Items.write(tmp_path, (f"item {k}" for k in range(1000)))
    assert len(items) == 1000 and items[0] == "item 0" and items[999:1001] == ["item 999"]
    assert items.chunks == 16 and items.chunk(15) == [f"item {k}" for k in range(960, 1000)]
    assert items[130:133] == ["item 130", "item 131", "item 132"]


def test_a_dead_worker_costs_one_paper(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pmc, "inline_paper", _dies)
    report = curate(source.parent, tmp_path, workers=1)
    assert "was ended" in problems(tmp_path) and report["counts"]["papers written"] == len(jats_papers.EXPECTED) - 1


def _dies(options, path):
    if path.endswith("PMC9000009"):
        os._exit(9)
    return _INLINE(options, path)


_INLINE = pmc.inline_paper


def test_the_command(source, tmp_path, capsys):
    assert main(["pmc-inline", str(source), "--out", str(tmp_path), "--workers", "0"]) == 0
    assert "papers written" in capsys.readouterr().out
    assert not (tmp_path / "parts").exists() and not (tmp_path / "cases.jsonl").exists()
    assert main(["pmc-inline", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert main(["pmc-inlin"]) == 2 and main(["--help"]) == 0
    assert "pmc-oa" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["pmc-oa", "--help"])
    assert "exit codes" in capsys.readouterr().out


def test_without_beam(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    tmp_path.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="pip install apache-beam"):
        pmc.curate("pmc-inline", source, tmp_path, INLINE, runner="direct")
