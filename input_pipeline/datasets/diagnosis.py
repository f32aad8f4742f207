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
from typing import ClassVar, Literal

import numpy as np

from input_pipeline.datasets import diseases, prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts, pick, pick_weighted
from input_pipeline.datasets.store import digest, first_equal
from input_pipeline.samples import RowError, Sample

# Labels of a yes/no table.
FLAGS = {"1": True, "1.0": True, "0": False, "0.0": False}


@dataclasses.dataclass(kw_only=True, eq=False)
class Diagnosis(TableDataset):
    """Open or yes/no questions about one region of the body.

    A yes/no table is balanced disease by disease. With P positive and N negative images there are min(P, N) pairs of
    one "yes" row and one "no" row. The larger side is distributed over the pairs, and a row draws from its own share.
    So every image is used, none is used twice in an epoch, and neither the disease nor the epoch predicts the answer.

        5 images without edema: a b c d e, 2 with: x y    ->    (x | a c e)  (y | b d)
    """

    region: ClassVar[str]
    task = "diagnosis"
    required = ("image_path", "label")
    extra = ("disease",)

    # `open` and `yes_no` name the kind of table (default: whether it has a column `disease`). `both` reads an open
    # table and makes every second question a yes/no question. It requires that every label of the table was looked for
    # in every image, as in the VinDr sets.
    form: Literal["open", "yes_no", "both"] | None = None
    balance: bool = True  # False keeps every row of a yes/no table (for test tables)
    vocabulary: tuple[str, ...] | None = None  # the labels that may occur; others are errors. Default: any

    def __post_init__(self):
        if self.form not in (None, "open", "yes_no", "both"):
            raise ValueError(f"{self.name}: form {self.form!r} is unknown: use open, yes_no or both")
        self._known = self.vocabulary and {diseases.canonical(d) for d in self.vocabulary}
        self._pairs: list[tuple[str, int, bool, tuple[int, ...]]] | None = None
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
            labels = [part for part in re.split(r"\s*[,;|]\s*", labels[0]) if part]
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
            return problems + (self._pair() if self.balance else [])
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

    def _pair(self) -> list[RowError]:
        sides: dict[str, tuple[list[int], list[int]]] = {}
        for k, (_, disease, present) in enumerate(self._rows):
            sides.setdefault(diseases.canonical(disease), ([], []))[not present].append(k)
        problems, self._pairs = [], []
        for disease, (yes, no) in sides.items():
            if not yes or not no:
                side = "present" if yes else "absent"
                reason = f"{disease!r} is {side} in all its {len(yes or no)} rows: its name gives the answer away"
                remedy = "add rows of the other kind, remove these, or open with balance=False"
                # One problem per row, so that good rows and bad rows add up to the table.
                problems += [RowError(self.file, self._numbers[row], reason, remedy) for row in yes or no]
                continue
            count = min(len(yes), len(no))
            for pair in range(count):
                self._pairs.append((disease, pair, True, tuple(yes[pair::count])))
                self._pairs.append((disease, pair, False, tuple(no[pair::count])))
        return problems

    def __len__(self):
        return len(self._rows if self._pairs is None else self._pairs)

    def row_id(self, i):
        """Return the row number, or "disease/pair/present" or "disease/pair/absent" if yes/no answers are balanced."""
        if self._pairs is None:
            return super().row_id(i)
        disease, pair, present, _ = self._pairs[i]
        return f"{disease}/{pair}/{'present' if present else 'absent'}"

    def number(self, i):
        return super().number(i) if self._pairs is None else None

    def sample(self, i, rng):
        if self._pairs is None:
            return super().sample(i, rng)
        share = self._pairs[i][3]
        return Sample(self.row_id(i), self.name, *self.parts(self._rows[pick(rng, share)], rng))

    def scans(self, i):
        if self._pairs is None:
            return super().scans(i)
        return tuple(dict.fromkeys(scan for k in self._pairs[i][3] for scan in self._rows[k][0]))

    def _set_rates(self):
        """Set the question probabilities, so that yes and no are equally frequent over the table.

        An image with diseases gets a yes/no question half of the time. An image without any can only be asked a
        question whose answer is no. To compensate, images with diseases are answered yes more often, or the others
        are asked yes/no questions less often.
        """
        counts, names = collections.Counter(), {}
        for _, labels in self._rows:
            for label in self._positives(labels):
                counts[diseases.canonical(label)] += 1
                names.setdefault(diseases.canonical(label), label)
        self._names, self._counts = list(names.values()), np.array(list(counts.values()), float)
        self._pools: dict[tuple[str, ...], tuple[tuple[str, ...], np.ndarray]] = {}
        # Images that allow both answers, only yes (the table has no safe "no"), or only no.
        both = yes = no = 0
        for _, labels in self._rows:
            has, lacks = bool(self._positives(labels)), bool(len(self._negatives(labels)[0]))
            both, yes, no = both + (has and lacks), yes + (has and not lacks), no + (lacks and not has)
        # Solves both * (2y - 1) + asked_yes - asked_no = 0. y is the share of yes among the images that allow both
        # answers; the others get a yes/no question with half the probability of asked_yes / yes or asked_no / no.
        asked_yes, asked_no = min(yes, both + no), min(no, both + yes)
        self._yes = 0.5 if both == 0 else 0.5 + (asked_no - asked_yes) / (2 * both)
        self._ask_yes, self._ask_no = asked_yes / max(yes, 1), asked_no / max(no, 1)

    def _positives(self, labels) -> tuple[str, ...]:
        return tuple(d for d in labels if not diseases.is_normal(d) and not diseases.is_vague(d))

    def _negatives(self, labels) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the diseases of the table that an image with these labels lacks, and their cumulative frequency."""
        if labels not in self._pools:
            # A vague label ("Other lesion") may be any disease: nothing is safe to deny.
            normal = len(labels) == 1 and diseases.is_normal(labels[0])
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
    """The user's own tables of either kind, for any modality and region."""

    name = "diagnosis"
    region = "general"
