"""Rad3D-VQA and Rad3D-Modality (csv), Rad3D-Caption and Rad3D-Rationale (one JSON).

The JSON is a list of {pre, pat, npy_path, finding, impression, title, articles, radiographic_features}. A row is a case
with one or more scans: `npy_path` (JSON) and `image_path` (csv) are one path or a list of paths, in csv as a list
literal. A .npy stack [S, 3, H, W, D] has S scans.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Literal

from input_pipeline.datasets import diseases, prompts
from input_pipeline.datasets.base import SkippedRow, TableDataset, instruction_parts, pick
from input_pipeline.datasets.modalities import ModalityDataset
from input_pipeline.datasets.vqa import VQA
from input_pipeline.text.measurements import without_sizes
from input_pipeline.text.sentences import closed, join

# A longer entry of `articles` is the text of an article, not its name.
MAX_NAME = 120


class Rad3DVQA(VQA):
    name = "rad3d_vqa"
    required = ("image_path", "question", "answer")

    def parse(self, row):
        return self.value(row.paths("image_path"), row.text("question"), row.answer("answer"))


class Rad3DModality(ModalityDataset):
    """Questions about the modality of a scan. Each scan of a case has its own row."""

    name = "rad3d_modality"
    task = "modality"
    released_fraction = 0.2
    required = ("image_path", "answer")

    def parse(self, row):
        label = row.text("answer")
        return row.paths("image_path"), label, self.names(row, label)

    def parts(self, value, rng):
        paths, label, names = value
        question, answer = self.ask(names, label, rng)
        return self.task, self.study_of(paths[0]), instruction_parts(rng, self.scans_of(value), question, answer)


@dataclasses.dataclass(kw_only=True, eq=False)
class Rad3DCaption(TableDataset):
    """The context is the patient's data and presentation; the answer is the findings, the impression, or both.

    `sizes="remove"` takes size phrases out of the answer, as RadMD does (paper, Table 2): a volume resized to 256x256
    does not show sizes. Rows without any other text are skipped and counted.
    """

    name = "rad3d_caption"
    task = "report"
    required = ("npy_path", "finding", "impression")
    layout = "json"

    sizes: Literal["keep", "remove"] = "keep"

    def __post_init__(self):
        if self.sizes not in ("keep", "remove"):
            raise ValueError(f"{self.name}: sizes {self.sizes!r} is unknown: use keep or remove")
        super().__post_init__()

    def parse(self, row):
        finding, impression = (" ".join(row.prose(column)) for column in ("finding", "impression"))
        if not finding and not impression:
            raise row.error("finding and impression are both blank")
        if self.sizes == "remove":
            finding, impression = without_sizes(finding), without_sizes(impression)
            if not finding and not impression:
                return SkippedRow("nothing but sizes")
        texts = {"Findings": finding, "Impression": impression}
        report = join(*(f"{title}: {closed(text)}" if text else "" for title, text in texts.items()))
        return row.paths("npy_path"), _patient(row), report

    def parts(self, value, rng):
        paths, context, report = value
        scans, question = self.scans_of(value), prompts.draw("report", rng)
        return self.task, self.study_of(paths[0]), instruction_parts(rng, scans, question, report, context)


@dataclasses.dataclass(kw_only=True, eq=False)
class Rad3DRationale(TableDataset):
    """Disease and radiographic features of a case; `title` is the disease.

    A yes/no question names the title, or a disease that the case does not have. Such a disease is the title or an
    article of another case. It must not be a kind or a synonym of this case's names, and no text of this case may
    mention it. Names are drawn by their frequency as titles, so that a name does not give the answer away. A normal
    case, and a case without a safe "no", always gets the open question.
    """

    name = "rad3d_rationale"
    required = ("npy_path", "title", "radiographic_features")
    layout = "json"

    judgement: float = 0.5  # share of yes/no questions

    def parse(self, row):
        paths, title = row.paths("npy_path"), row.text("title")
        if not diseases.words(title):
            raise row.error(f"title {title!r} is not the name of a disease")
        features = join(*(closed(text) for text in row.prose("radiographic_features")))
        if not features:
            raise row.error("radiographic_features is blank")
        articles = row.prose("articles")
        names = tuple(a for a in articles if len(a) <= MAX_NAME and "\n" not in a and diseases.words(a))
        other = (" ".join(row.prose(c)) for c in ("finding", "impression", "pat", "pre"))
        return paths, _patient(row), title, names, features, _plain(" ".join([*articles, features, *other]))

    def finish(self):
        # The weight of a title is its number of occurrences. An article that is never a title has the weight 1.
        self._pool = [sys.intern(title) for _, _, title, *_ in self._rows if not diseases.is_normal(title)]
        titles = {diseases.canonical(title) for title in self._pool}
        for _, _, _, names, *_ in self._rows:
            for name in names:
                if diseases.canonical(name) not in titles and not diseases.is_normal(name):
                    titles.add(diseases.canonical(name))
                    self._pool.append(name)
        return []

    def _absent(self, value, rng) -> str | None:
        """Return a name of the pool that the case does not have; None if the table has none."""
        _, _, title, names, _, text = value

        def is_safe(name: str) -> bool:
            if any(diseases.may_coexist(own, name) for own in (title, *names)):
                return False
            return f" {diseases.canonical(name)} " not in text and _plain(name) not in text

        if diseases.is_normal(title) or not self._pool:
            return None
        start = rng.random()
        for _ in range(32):
            name = pick(rng, self._pool)
            if is_safe(name):
                return name
        # Most names in the pool belong to this case, so search the whole pool from a random start.
        first = int(start * len(self._pool))
        return next(filter(is_safe, self._pool[first:] + self._pool[:first]), None)

    def parts(self, value, rng):
        paths, context, title, _, features, _ = value
        # Both draws are always made, so that the choices stay independent of each other.
        judged, side = rng.random() < self.judgement, rng.random() < 0.5
        # A case without a safe "no" would always be answered yes, so it gets the open question.
        if judged and (absent := self._absent(value, rng)) is not None:
            disease, answer = (title, "yes") if side else (absent, "no")
            task, question = "diagnosis", prompts.draw("diagnosis_judge_general", rng, disease=disease)
        else:
            task, question, answer = "rationale", prompts.draw("rationale", rng), join(closed(title), features)
        return task, self.study_of(paths[0]), instruction_parts(rng, self.scans_of(value), question, answer, context)


def _patient(row) -> str:
    """Return the patient's data (`pat`: age, sex), then the presentation (`pre`); "" if both are missing."""
    return join(*(closed(" ".join(row.prose(column))) for column in ("pat", "pre")))


def _plain(text: str) -> str:
    """Return the words in lower case, each between single spaces, for the search of names."""
    return f" {' '.join(re.sub(r'[^a-z0-9]+', ' ', text.lower()).split())} "
