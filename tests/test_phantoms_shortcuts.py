"""Phantoms have no shortcuts: classifiers cannot predict the answers from file properties and image statistics."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import balanced_accuracy_score

from input_pipeline import phantoms
from input_pipeline.phantoms import drawing, formats


def studies(split="train", count=1000, seed=5, size=64, volumes=0.3):
    return [phantoms.describe(seed, split, i, size, volumes) for i in range(count)]


TARGETS = {
    "lesion": lambda labels: labels.count > 0,
    "count": lambda labels: labels.count,
    "side": lambda labels: labels.side,
    "level": lambda labels: labels.level,
    "size": lambda labels: labels.size,
    "modality": lambda labels: labels.modality,
}
FILE = ("png8", "png16", "jpeg", "dicom", "nifti", "rows", "slices", "spacing", "slice distance")
BYTES = ("bytes", "bytes a voxel")
STORED = ("mean", "deviation", "least", "most")
SCALED = ("scaled mean", "scaled deviation")
GROUPS = {"file": FILE, "bytes": BYTES, "stored": STORED, "scaled": SCALED, "all": FILE + BYTES + STORED + SCALED}


def file_features(study) -> dict[str, float]:
    voxels = drawing.to_stored(study, phantoms.paint(study))
    size = sum(map(len, formats.encode(study, voxels).values()))
    voxels = voxels.astype(np.float64)
    low, high = voxels.min(), voxels.max()
    has_spacing = study.file_format in ("dicom", "nifti")
    return {f: float(study.file_format == f) for f in ("png8", "png16", "jpeg", "dicom", "nifti")} | {
        "rows": study.size,
        "slices": study.depth,
        "spacing": study.spacing[0] if has_spacing else 0.0,
        "slice distance": study.spacing[2] if has_spacing and study.depth > 1 else 0.0,
        "bytes": size,
        "bytes a voxel": size / voxels.size,
        "mean": voxels.mean(),
        "deviation": voxels.std(),
        "least": low,
        "most": high,
        "scaled mean": (voxels.mean() - low) / (high - low),
        "scaled deviation": voxels.std() / (high - low),
    }


def guess(train, test, targets=TARGETS, groups=GROUPS, boosting=True):
    """Yield (target, group, classifier, balanced accuracy, chance, standard error of chance, test items)."""
    features = [[file_features(study) for study in split] for split in (train, test)]
    for target, group in itertools.product(targets, groups):
        data = []
        for split, split_features in zip((train, test), features, strict=True):
            pairs = [(f, targets[target](s.labels)) for f, s in zip(split_features, split, strict=True)]
            pairs = [(f, label) for f, label in pairs if label is not None]
            data += [np.array([[f[name] for name in groups[group]] for f, _ in pairs]), [str(y) for _, y in pairs]]
        x, y, x_test, y_test = data
        classes, counts = np.unique(y_test, return_counts=True)
        chance = 1 / len(classes)
        # Standard error of a balanced accuracy: each class contributes its binomial error.
        error = np.sqrt(np.sum(chance * (1 - chance) / counts)) / len(classes)
        classifiers = {"forest": RandomForestClassifier(200, min_samples_leaf=5, random_state=0)}
        if boosting:
            classifiers["boosting"] = HistGradientBoostingClassifier(
                max_iter=100, learning_rate=0.05, max_leaf_nodes=8, random_state=0
            )
        for name, classifier in classifiers.items():
            accuracy = balanced_accuracy_score(y_test, classifier.fit(x, y).predict(x_test))
            yield target, group, name, accuracy, chance, error, len(y_test)


@pytest.mark.slow
def test_answers_cannot_be_predicted_without_the_image():
    train, test = (studies(split, n, volumes=0.02) for split, n in (("train", 1200), ("test", 700)))
    targets = {name: target for name, target in TARGETS.items() if name != "modality"}
    groups = {"all": GROUPS["all"]}
    for target, group, name, accuracy, chance, error, items in guess(train, test, targets, groups, boosting=False):
        assert accuracy < chance + 4 * error, f"{target} from {group} by {name}: {accuracy:.3f} of {items}"


def test_formats_reveal_the_modality_no_more_than_planned():
    """The best guess from the format and the number of dimensions is right in 1/4 + volumes/2 of all cases.

    X-ray and ultrasound are 1/4 each, always 2D; CT and MRI are 1/4 each, partly 3D. This holds for volumes up to 1/3.
    """
    sample = studies(count=3000, volumes=0.12)
    by_format = collections.defaultdict(collections.Counter)
    for study in sample:
        by_format[study.file_format, study.depth > 1][study.labels.modality] += 1
    best = sum(max(counter.values()) for counter in by_format.values()) / len(sample)
    # Picking the largest of four counts in six cells of 3,000 adds about 0.015.
    assert best < 0.25 + 0.12 / 2 + 0.03, best


@pytest.mark.slow
def test_the_table_of_the_documentation(capsys):
    """Print the table of docs/phantoms.md: 6,000 training phantoms, 3,000 test phantoms, 128 pixels."""
    train, test = (studies(split, n, seed=7, size=128, volumes=0.12) for split, n in (("train", 6000), ("test", 3000)))
    lines = collections.defaultdict(dict)
    for target, group, _, accuracy, chance, error, items in guess(train, test):
        key = f"| {target} | {items} | {100 * chance:.1f} ± {100 * error:.1f} "
        lines[key][group] = max(accuracy, lines[key].get(group, 0))
        if target != "modality":
            assert accuracy < chance + 4 * error, (target, group, accuracy)
    with capsys.disabled():
        print("\n| answer | test items | chance |", " | ".join(GROUPS), "|")
        for key, accuracies in lines.items():
            print(key + "".join(f"| {100 * a:.1f} " for a in accuracies.values()) + "|")
