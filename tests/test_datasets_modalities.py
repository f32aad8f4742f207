"""Modalities: labels, and questions whose answer no is true."""

from __future__ import annotations

from collections import Counter

import pytest
from dataset_tables import answer, draws, judged, texts, write_csv

from input_pipeline.datasets import TableError, modalities, open_dataset
from input_pipeline.samples import Scan


@pytest.mark.parametrize(
    "label, names",
    [
        ("CT", {"CT"}),
        ("CT - noncontrast", {"CT"}),
        ("MR - T2W FLAIR", {"MRI"}),
        ("PET-CT", {"PET-CT"}),
        ("Angiography (DSA)", {"angiography"}),
        ("CT angiography", {"CT angiography"}),
        ("CTA", {"CT angiography"}),
        ("XR - Plain Film", {"X-ray"}),
        ("US - Doppler", {"ultrasound"}),
        ("Magnetic Resonance Angiography", {"MR angiography"}),
        ("Mammography", {"mammography"}),
        ("An annotated banana", set()),
        ("", set()),
    ],
)
def test_modality_labels(label, names):
    assert modalities.modalities(label) == names


def test_no_modality_is_denied_that_may_hold():
    for name in modalities.WORDS:
        names = frozenset({name})
        denied = set(modalities.falsehoods(names))
        assert denied and not denied & set(modalities.truths(names))
        # The same holds for everything that the denied modality always is as well.
        assert not any(set(modalities.truths(frozenset({d}))) & set(modalities.truths(names)) for d in denied)
    assert "CT" in modalities.truths(frozenset({"CT angiography"}))
    assert not {"CT", "PET", "CT angiography"} & set(modalities.falsehoods(frozenset({"PET-CT"})))
    assert "X-ray" not in modalities.falsehoods(frozenset({"mammography"}))
    assert {"MRI", "ultrasound"} <= set(modalities.falsehoods(frozenset({"CT"})))


@pytest.mark.parametrize("name", ["rad3d_modality", "mpx_single"])
def test_modality_questions_are_true_and_balanced(tmp_path, name):
    labels = ["CT"] * 6 + ["MRI"] * 3 + ["PET-CT", "CT angiography", "X-ray", "Ultrasound"]
    if name == "mpx_single":
        write_csv(
            tmp_path / "t.csv",
            ("name", "type", "context"),
            *[(f"{k}.png", "modality", m) for k, m in enumerate(labels)],
        )
    else:
        write_csv(tmp_path / "t.csv", ("image_path", "answer"), *[(f"{k}.nii.gz", m) for k, m in enumerate(labels)])
    dataset = open_dataset(name, table="t.csv", root=tmp_path, fraction=0.2)
    assert dataset.fraction == 0.2
    counts, asked = Counter(), {"yes": Counter(), "no": Counter()}
    for i, label in enumerate(labels):
        truths = modalities.truths(modalities.modalities(label))
        for sample in draws(dataset, i, 600):
            assert sample.task == "modality"
            said = answer(sample)
            counts[said if judged(sample) else "open"] += 1
            if not judged(sample):
                assert said == label
                continue
            question = texts(sample, "instruction")[0]
            about = max((m for m in modalities.WORDS if m in question), key=len)
            asked[said][about] += 1
            assert (about in truths) == (said == "yes"), (label, question)
            assert said == "yes" or about in modalities.falsehoods(modalities.modalities(label))
    total = counts["yes"] + counts["no"]
    assert abs(counts["yes"] - total / 2) < 2 * total**0.5 and abs(total - 7800 / 2) < 2 * 7800**0.5
    # Wrong modalities follow their frequency in the table.
    assert asked["no"]["MRI"] > 2 * asked["no"]["endoscopy"] > 0


def test_unknown_modalities_and_types_are_errors(tmp_path):
    rows = [("a", "modality", "banana"), ("b", "Plane", "axial"), ("c", "smell", "x"), ("d", "Image caption", "A CT.")]
    write_csv(tmp_path / "t.csv", ("name", "type", "context"), *rows)
    with pytest.raises(TableError) as error:
        open_dataset("mpx_single", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [1, 3, 4] and "`modalities`" in str(error.value)
    own = dict(modalities={"banana": "MRI"}, types={"Image caption": "caption", "smell": "caption"})
    dataset = open_dataset("mpx_single", table="t.csv", root=tmp_path, images="pictures", **own)
    assert [draws(dataset, i, 1)[0].task for i in range(4)] == ["modality", "vqa", "report", "report"]
    assert dataset.scans(1) == (Scan("pictures/b"),)
