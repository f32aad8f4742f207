"""Diagnosis sets: CXR-Mix (nine chest X-ray sets in one table), VinDr-PCXR, VinDr-Mammo and VinDr-SpineXR.

    open table      csv `image_path, label`            label: one disease or several, "Edema, Pneumothorax"
    yes/no table    csv `image_path, disease, label`   label: 1 or 0

`image_path` is one path, or a list literal if the label is about several images.

A "no" is always true. It comes from an explicit 0 or, with `form="both"` on an open table, from a disease of the table
that is not among the image's labels and cannot be implied by one of them (diseases.py).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from array import array
from typing import ClassVar, Literal

import numpy as np

from input_pipeline.datasets import diseases, prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts, pick, pick_weighted
from input_pipeline.datasets.store import digest, first_equal
from input_pipeline.samples import RowError

# Labels of a yes/no table.
FLAGS = {"1": True, "1.0": True, "0": False, "0.0": False}


@dataclasses.dataclass(kw_only=True, eq=False)
class Diagnosis(TableDataset):
    """Open or yes/no questions about one region of the body.

    A balanced epoch (batching/mixture.py) has equally many rows of both sides: "yes" and "no" of each disease of a
    yes/no table, normal and abnormal images of an open table (paper, Table 2). Successive epochs use different rows of
    the larger side, so all are used over time.

        5 images without edema: a b c d e, 2 with: x y    ->    epoch 0: x y d a    epoch 1: y x e c    epoch 2: ...
    """

    region: ClassVar[str]
    task = "diagnosis"
    required = ("image_path", "label")
    extra = ("disease",)

    # `open` and `yes_no` name the kind of table (default: whether it has a column `disease`). `both` reads an open
    # table and makes every second question a yes/no question. It requires that every label of the table was looked for
    # in every image, as in the VinDr sets.
    form: Literal["open", "yes_no", "both"] | None = None
    # Balance each epoch. Default: yes/no tables are balanced, open tables are not. False uses every row in an epoch.
    balance: bool | None = None
    vocabulary: tuple[str, ...] | None = None  # the labels that may occur; others are errors. Default: any

    def __post_init__(self):
        if self.form not in (None, "open", "yes_no", "both"):
            raise ValueError(f"{self.name}: form {self.form!r} is unknown: use open, yes_no or both")
        self._known = self.vocabulary and {diseases.canonical(d) for d in self.vocabulary}
        self._sides: np.ndarray | None = None
        super().__post_init__()

    def _read(self):
        super()._read()
        yes_no = "disease" in self.header
        if self.form is not None and (self.form == "yes_no") != yes_no:
            need = "needs a column disease" if self.form == "yes_no" else "is for tables without a column disease"
            raise RowError(self.file, 0, f"form={self.form!r} {need}", "choose the form that fits the table")

    def parse(self, row):
        scans = row.scans("image_path")
        if "disease" in row.cells:
            disease = self._label(row, row.text("disease"))
            flag = row.text("label")
            if flag not in FLAGS:
                raise row.error(f"label {flag!r} is unknown", "use 1 (present) or 0 (absent)")
            return scans, disease, FLAGS[flag]
        labels = row.names("label")
        if len(labels) == 1:
            labels = [part for part in re.split(r"(?:(?<!\s)\s+)?[,;|]\s*", labels[0]) if part]
        labels = tuple(dict.fromkeys(self._label(row, label) for label in labels))
        if not labels:
            raise row.error("label is blank", "write a disease, or 'No finding'")
        if len(labels) > 1 and any(diseases.is_normal(label) for label in labels):
            raise row.error(f"label has both {' and '.join(map(repr, labels))}", "write normal, or diseases")
        return scans, labels

    def _label(self, row, label: str) -> str:
        label = label.strip().rstrip(".").strip()
        if not diseases.canonical(label):
            raise row.error(f"label {label!r} does not name a disease")
        if self._known and diseases.canonical(label) not in self._known:
            raise row.error(f"label {label!r} is unknown", f"use one of {', '.join(self.vocabulary)}")
        return label

    def finish(self):
        if not self._rows:
            return []
        if "disease" in self.header:
            problems = self._remove_contradictions()
            return problems + (self._balance_diseases() if self.balance is not False else [])
        if self.balance:
            self._sides = np.array([not self._is_normal(labels) for _, labels in self._rows], np.int32)
            if len(set(self._sides.tolist())) == 1:
                side = "abnormal" if self._sides[0] else "normal"
                raise RowError(self.file, 0, f"balance=True, but all images are {side}", "open with balance=False")
        if self.form == "both":
            self._set_rates()
        return []

    def _remove_contradictions(self) -> list[RowError]:
        digests, present = bytearray(), bytearray()
        for scans, disease, flag in self._rows:
            digests += digest(repr((scans, diseases.canonical(disease))))
            present.append(flag)
        first, flags = first_equal(digests), np.frombuffer(present, bool)
        denies = flags != flags[first]
        # Neither row of a contradiction can be trusted, so both are removed.
        bad = np.isin(first, first[denies])
        problems = []
        for k in np.flatnonzero(bad).tolist():
            scans, disease, flag = self._rows[k]
            shown = ", ".join(scan.path for scan in scans)
            other = f"{int(flags[first[k]])} in row {self._numbers[first[k]]}" if denies[k] else "not in a later row"
            reason = f"{disease!r} is {int(flag)} for {shown}, but {other}"
            problems.append(RowError(self.file, self._numbers[k], reason, "keep one of the two rows"))
        self._select(~bad)
        return problems

    def _balance_diseases(self) -> list[RowError]:
        """Set the sides of each disease, and remove the rows of diseases that have one side only."""
        number: dict[str, int] = {}
        sides = array("i")
        for _, disease, present in self._rows:
            sides.append(2 * number.setdefault(diseases.canonical(disease), len(number)) + present)
        codes = np.frombuffer(sides, np.int32)
        counts = np.bincount(codes, minlength=2 * len(number)).reshape(-1, 2)
        one_sided = (counts == 0).any(axis=1)[codes // 2]
        problems, names = [], list(number)
        for k in np.flatnonzero(one_sided).tolist():
            disease, side = names[codes[k] // 2], "present" if codes[k] % 2 else "absent"
            count = counts[codes[k] // 2].sum()
            reason = f"{disease!r} is {side} in all its {count} rows: its name gives the answer away"
            remedy = "add rows of the other kind, remove these, or open with balance=False"
            # One problem per row, so that the numbers of good and bad rows add up to those of the table.
            problems.append(RowError(self.file, self._numbers[k], reason, remedy))
        self._sides = codes[~one_sided]
        self._select(~one_sided)
        return problems

    def sides(self):
        """Return 2 k + 1 for "yes" and 2 k for "no" about disease k; in an open table 1 for abnormal, 0 for normal."""
        return self._sides

    def side_names(self):
        if self._sides is None:
            return None
        return ("no", "yes") if "disease" in self.header else ("normal", "abnormal")

    @staticmethod
    def _is_normal(labels: tuple[str, ...]) -> bool:
        return len(labels) == 1 and diseases.is_normal(labels[0])

    def _set_rates(self):
        """Set the question probabilities, so that yes and no are equally frequent over an epoch.

        An image with diseases gets a yes/no question half of the time. For an image without diseases, the answer to a
        yes/no question is always no. To compensate, images with diseases get more questions with the answer yes, up to
        2 of 3, and images without diseases get fewer yes/no questions. So at least half of the answers "no" are about
        images with diseases: whether an image is abnormal does not decide the answer.
        """
        counts, names = collections.Counter(), {}
        for _, labels in self._rows:
            for label in self._positives(labels):
                counts[diseases.canonical(label)] += 1
                names.setdefault(diseases.canonical(label), label)
        self._names, self._counts = list(names.values()), np.array(list(counts.values()), float)
        self._pools: dict[tuple[str, ...], tuple[tuple[str, ...], np.ndarray]] = {}
        # Images that allow both answers, only yes (the table has no safe "no"), or only no, per epoch.
        both = yes = no = 0.0
        sizes = np.ones(2) if self._sides is None else np.bincount(self._sides)
        for _, labels in self._rows:
            has, lacks = bool(self._positives(labels)), bool(len(self._negatives(labels)[0]))
            weight = sizes.min() / sizes[int(not self._is_normal(labels))]
            both += weight * (has and lacks)
            yes += weight * (has and not lacks)
            no += weight * (lacks and not has)
        # Solves both * (2y - 1) + asked_yes - asked_no = 0 with 1/3 <= y <= 2/3. y is the share of yes among the images
        # that allow both answers; the others get a yes/no question with half the probability of asked_yes / yes or
        # asked_no / no.
        asked_yes, asked_no = min(yes, both / 3 + no), min(no, both / 3 + yes)
        self._yes = 0.5 if both == 0 else 0.5 + (asked_no - asked_yes) / (2 * both)
        self._ask_yes, self._ask_no = asked_yes / (yes or 1), asked_no / (no or 1)

    def _positives(self, labels) -> tuple[str, ...]:
        return tuple(d for d in labels if not diseases.is_normal(d) and not diseases.is_vague(d))

    def _negatives(self, labels) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the diseases of the table that an image with these labels lacks, and their cumulative frequency."""
        if labels not in self._pools:
            # A vague label ("Other lesion") may be any disease: nothing is safe to deny.
            normal = self._is_normal(labels)
            safe = [] if any(map(diseases.is_vague, labels)) and not normal else [
                k for k, d in enumerate(self._names)
                if normal or not any(diseases.may_coexist(present, d) for present in labels)
            ]  # fmt: skip
            self._pools[labels] = tuple(self._names[k] for k in safe), np.cumsum(self._counts[safe])
        return self._pools[labels]

    def _judge(self, labels, rng) -> tuple[str, bool] | None:
        """Return (disease, present) for a yes/no question about the image, or None for the open question."""
        positives, (negatives, edges) = self._positives(labels), self._negatives(labels)
        form, side = rng.random(), rng.random()
        if positives and negatives:
            if form >= 0.5:
                return None
            present = side < self._yes
        elif positives or negatives:
            present = bool(positives)
            if form >= 0.5 * (self._ask_yes if present else self._ask_no):
                return None
        else:
            return None
        return (pick(rng, positives) if present else pick_weighted(rng, negatives, edges)), present

    def parts(self, value, rng):
        scans, labels, *flag = value
        judged = (labels, flag[0]) if flag else self._judge(labels, rng) if self.form == "both" else None
        if judged is None:
            question = prompts.draw(f"diagnosis_open_{self.region}", rng)
            answer = ", ".join(labels) + "."
            answer = answer[0].upper() + answer[1:]
        else:
            disease, present = judged
            if diseases.is_normal(disease):
                # "No finding: 1" becomes the answer no to "is anything abnormal?".
                disease, present = diseases.ANYTHING, not present
            question = prompts.draw(f"diagnosis_judge_{self.region}", rng, disease=diseases.spoken(disease))
            answer = "yes" if present else "no"
        return self.task, self.study_of(scans[0].path), instruction_parts(rng, scans, question, answer)


class CXRMix(Diagnosis):
    """VinDr-CXR, ChestXray14, CheXpert, Covid-CXR2, NLM-TB, Object-CXR, OpenI, RSNA and SIIM-ACR in one table."""

    name = "cxr_mix"
    region = "cxr"


class VinDrPCXR(Diagnosis):
    name = "vindr_pcxr"
    region = "pcxr"


class VinDrMammo(Diagnosis):
    name = "vindr_mammo"
    region = "mammo"


class VinDrSpineXR(Diagnosis):
    name = "vindr_spinexr"
    region = "spine"


class AnyDiagnosis(Diagnosis):
    """The user's own open or yes/no tables, for any modality and body region."""

    name = "diagnosis"
    region = "general"
