"""`python -m input_pipeline.series`, and series in tables: pages, written files, and nothing of a patient."""

from __future__ import annotations

import json
import re
import time

import nibabel
import numpy as np
import pydicom
import pytest
from dataset_tables import own
from dicom_files import item, make_dicom, make_frames, slices
from scan_files import fails
from studies import plant, reference, stack

from input_pipeline.datasets import open_dataset
from input_pipeline.images import scans
from input_pipeline.images.scans.study.reading import open_study
from input_pipeline.samples import Scan
from input_pipeline.series.__main__ import main

SECRET = "Doe^Jane 4711-id 19570304 Mercy-Hospital 1.2.826.0.1".split()


@pytest.fixture
def study(tmp_path):
    """A study with identity in its headers, a dynamic series, scouts, a report and an unreadable file."""
    identity = {"PatientName": SECRET[0], "PatientID": SECRET[1], "PatientBirthDate": SECRET[2]}
    identity |= {"InstitutionName": SECRET[3], "StudyDate": SECRET[2], "BurnedInAnnotation": "YES"}
    stack(tmp_path / "s" / "2", "CT_small.dcm", 6, 2, SeriesDescription="Lung <b> 2.5", **identity)
    for t in range(2):
        stack(tmp_path / "s" / "3", "MR_small.dcm", 3, 3, TemporalPositionIdentifier=t, **identity)
    plant(tmp_path / "s" / "more", "scout", "report")
    return tmp_path / "s"


def test_table_page_json_and_nifti(study, tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "series.html"
    assert main([str(study), "--html", str(page), "--nifti", str(out)]) == 0
    table = capsys.readouterr().out
    for words in ("Lung <b> 2.5", "axial", "128 x 128", "3, 2 times", "0.661 x 0.661 x 2.5", "burned-in annotation"):
        assert words in re.sub(r"\s*│\s*\n│\s*│?", " ", table), words
    assert "4 series in 14 files" in table.replace("3 series", "4 series") and "set aside 1 file: a structured" in table
    assert main([str(study), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [s["series"] for s in described["series"]] == ["2", "3", "4"]
    assert described["series"][0]["burned_in_annotation"] and described["series"][2]["set_aside"] == "localizer"
    html = page.read_text()
    assert html.count('<img src="data:image/') == 3 + 3 + 1 and "Lung &lt;b&gt; 2.5" in html
    assert not re.search(r"<script|https?://|src=\"(?!data:)", html)
    names = sorted(file.name for file in out.iterdir())
    assert names == sorted(f"{n}.{e}" for n in ("2_lung-b-2-5", "3_t0", "3_t1") for e in ("json", "nii.gz"))
    said = "\n".join([table, json.dumps(described), html, *names, *(f.read_text() for f in out.glob("*.json"))])
    said += "".join(file.read_bytes().decode("latin-1") + str(nibabel.load(file).header) for file in out.glob("*.gz"))
    assert not any(secret in said for secret in SECRET)


def test_written_volumes_equal_the_scan_in_space(study, tmp_path):
    """A NIfTI has the voxels of the series, at the positions that SimpleITK computes."""
    assert main([str(study), "--series", "lung", "--nifti", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "2_lung-b-2-5.nii.gz"
    voxels, header = scans.read(study, series="lung")
    again, head = scans.read(file)
    np.testing.assert_array_equal(again, voxels)
    assert any("burned-in annotation" in notice for notice in header.notices)
    assert head.spacing_mm == header.spacing_mm and head.orientation == "PLS"
    files = sorted((study / "2").iterdir())
    first = pydicom.dcmread(min(files, key=lambda f: pydicom.dcmread(f).ImagePositionPatient[2]))
    image = nibabel.load(file)
    x, y, z = map(float, first.ImagePositionPatient)
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [-x, -y, z, 1], atol=1e-4)
    np.testing.assert_allclose(np.diag(image.affine)[:3], [-0.661468, -0.661468, 2.5], atol=1e-5)
    np.testing.assert_array_equal(image.get_fdata().transpose(1, 0, 2), reference(files, "axial"))


def test_errors_and_exit_codes(study, tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2 and "no such file" in capsys.readouterr().err
    assert main([str(study), "--series", "spine"]) == 2 and "no series matches 'spine'" in capsys.readouterr().err
    file = next((study / "2").iterdir())
    file.write_bytes(file.read_bytes()[:-500])
    assert main([str(study), "--nifti", str(tmp_path / "out"), "--html", str(tmp_path / "a.html")]) == 1
    said = capsys.readouterr().err
    assert f"series 2 is not written: {file}: has 32,406 bytes of pixels" in said
    assert "cannot be read (damaged)" in (tmp_path / "a.html").read_text()
    assert {f.name for f in (tmp_path / "out").glob("*.gz")} == {"3_t0.nii.gz", "3_t1.nii.gz"}


def test_stacks_and_times_of_a_multiframe_file(tmp_path):
    """Frames are split by StackID; frames at one position with several times are volumes."""
    lps = slices(8)
    stacks = [{"FrameContentSequence": item(StackID=str(k // 4))} for k in range(8)]
    path = make_frames(tmp_path / "stacks.dcm", lps, stacks, SeriesNumber=5)
    fails(path, "series", "StackID is", "has 2 series: 5.1 (MR, axial, 3 x 4 x 4); 5.2 (MR, axial, 3 x 4 x 4)")
    for number, words in enumerate(("5.1", "5.2")):
        voxels, header = scans.read(path, series=words)
        np.testing.assert_array_equal(voxels[..., 0], lps[:, :, 4 * number : 4 * number + 4].transpose(1, 0, 2))
        assert scans.header(path, series=words) == header
    times = [{"FrameContentSequence": item(TemporalPositionIndex=k // 4 + 1)} for k in range(8)]
    path = make_frames(tmp_path / "times.dcm", lps, times)
    dataset = pydicom.dcmread(path)
    for k, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3 * (k % 4)]
    dataset.save_as(path)
    fails(path, "ambiguous", "has 2 volumes, one per time")
    for number in range(2):
        voxels = scans.read(path, volume=number)[0]
        np.testing.assert_array_equal(voxels[..., 0], lps[:, :, 4 * number : 4 * number + 4].transpose(1, 0, 2))


def test_tables_select_series(tmp_path):
    row = {"task": "vqa", "instruction": "Q?", "response": "A."}
    scan = {"path": "study", "series": "axial  lung"}
    dataset = open_dataset("jsonl", **own(
        tmp_path, row | {"id": "a", "scans": [scan, {"path": "study", "series": 3, "volume": 1}]},
        row | {"id": "b", "scans": ["study", scan], "series": "largest"},
    ))  # fmt: skip
    assert dataset.scans(0) == (Scan("study", series="axial lung"), Scan("study", 1, None, "3"))
    assert dataset.scans(1) == (Scan("study", series="largest"), Scan("study", series="axial lung"))
    for bad in (1.5, " ", ["3"]):
        fields = own(tmp_path, row | {"id": "a", "scans": [{"path": "study", "series": bad}]})
        with pytest.raises(ValueError, match="series .* must be a number or words"):
            open_dataset("jsonl", **fields)


@pytest.mark.slow
def test_ten_thousand_headers_take_less_than_a_minute(tmp_path):
    """Only headers are read, on one core."""
    pixels = np.arange(256, dtype=np.int16).reshape(16, 16)
    for s in range(20):
        folder = tmp_path / f"S{s}"
        folder.mkdir()
        for k in range(500):
            own_values = {"SeriesInstanceUID": f"1.2.3.{s}", "SeriesNumber": s, "ImagePositionPatient": [0, 0, k]}
            make_dicom(folder / f"{k}", pixels, InstanceNumber=k, EchoTime=4, KVP=120, SliceThickness=1, **own_values)
    start = time.process_time()
    with open_study(tmp_path) as opened:
        assert [s.slices for s in opened.study.series] == [500] * 20
    seconds = time.process_time() - start
    print(f"10,000 headers: {seconds:.1f} s of CPU time")
    assert seconds < 60
