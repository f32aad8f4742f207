"""Rad3D-Rationale: the JSON of Rad3D-Caption; the disease with its features, or a yes/no question about it."""

from __future__ import annotations

import dataclasses
import re
import sys

from input_pipeline.datasets import diseases, prompts
from input_pipeline.datasets.base import TableDataset, instruction_parts
from input_pipeline.datasets.rad3d_caption import patient
from input_pipeline.text.sentences import closed, join

# A longer entry of `articles` is the text of an article, not its name.
MAX_NAME = 120


@dataclasses.dataclass(kw_only=True, eq=False)
class Rad3DRationale(TableDataset):
    """Disease and radiographic features of a case; `title` is the disease.

    A yes/no question names the title, or a disease that the case does not have: the title or an article of another
    case that is neither a kind nor a synonym of this case's names and that none of its texts mentions. Names are drawn
    by their frequency as titles, so that a name does not give the answer away. A normal case, and a case without a
    safe "no", always gets the open question.

    Attributes:
      judgement: share of yes/no questions.
    """

    name = "rad3d_rationale"
    required = ("npy_path", "title", "radiographic_features")
    layout = "json"

    judgement: float = 0.5

    def parse(self, row):
        path, title = row.path(row.text("npy_path")), row.text("title")
        if not diseases.words(title):
            raise row.error(f"title {title!r} names no disease")
        features = join(*(closed(text) for text in row.texts("radiographic_features", literal=False)))
        if not features:
            raise row.error("radiographic_features is blank")
        articles = row.texts("articles", literal=False)
        names = tuple(a for a in articles if len(a) <= MAX_NAME and "\n" not in a and diseases.words(a))
        other = (" ".join(row.texts(c, literal=False)) for c in ("finding", "impression", "pat", "pre"))
        return path, patient(row), title, names, features, _plain(" ".join([*articles, features, *other]))

    def finish(self):
        # A title counts as often as it occurs; the name of an article that is never a title counts once.
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
            return f" {diseases.canonical(name)} " not in text and f" {_plain(name).strip()} " not in text

        if diseases.is_normal(title) or not self._pool:
            return None
        count, start = len(self._pool), rng.random()
        for _ in range(32):
            name = self._pool[int(rng.random() * count)]
            if is_safe(name):
                return name
        # Nearly all names are this case's own: search the whole pool from a random start.
        first = int(start * count)
        return next((name for name in self._pool[first:] + self._pool[:first] if is_safe(name)), None)

    def parts(self, value, rng):
        path, context, title, _, features, _ = value
        scans = self.scans_of(value)
        # Both draws are always made, so that the choices stay independent of each other.
        judged, side = rng.random() < self.judgement, rng.random() < 0.5
        if judged:
            absent = self._absent(value, rng)
            # A case without a safe "no" would always be answered yes, so it gets the open question.
            if absent is not None:
                disease, answer = (title, "yes") if side else (absent, "no")
                question = prompts.draw("diagnosis_judge_general", rng, disease=disease)
                return "diagnosis", self.study_of(path), instruction_parts(rng, scans, question, answer, context)
        answer, question = join(closed(title), features), prompts.draw("rationale", rng)
        return "rationale", self.study_of(path), instruction_parts(rng, scans, question, answer, context)

    def scans_of(self, value):
        return self.npy_scans(value[0])


def _plain(text: str) -> str:
    """Return the words in lower case, each between single spaces, for the search of names."""
    return f" {' '.join(re.sub(r'[^a-z0-9]+', ' ', text.lower()).split())} "
