"""PMC-Inline and PMC-CaseReport: papers with figures `figures/PMCID_imgref.jpg`."""

from __future__ import annotations

import dataclasses
import pathlib
import re

from input_pipeline.datasets.base import TableDataset, choose, instruction_parts, pick
from input_pipeline.datasets.json_tables import load_json
from input_pipeline.datasets.rows import MISSING_WORDS, NO_PROSE, bad_path, bad_text, present
from input_pipeline.samples import RowError, Scan, Text
from input_pipeline.text.sentences import shorten

_TAG = re.compile(r"^[QA]\s*:\s*", re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9._-]+")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclasses.dataclass(kw_only=True, eq=False)
class PMCCaseReport(TableDataset):
    """VQA with the patient's history as context, csv `PMC_id, img_ref, context, question, answer`."""

    name = "pmc_casereport"
    task = "vqa"
    required = ("PMC_id", "img_ref", "context", "question", "answer")

    figures: str = "figures"  # folder of the figures below the root

    def parse(self, row):
        paper = row.text("PMC_id")
        figures = row.names("img_ref")
        if not figures:
            raise row.error("img_ref is an empty list", "list at least one figure")
        for name in (paper, *figures):
            if not _ID.fullmatch(name) or name.strip(".") == "":
                raise row.error(f"{name[:60]!r} is not a paper or figure name", "use letters, digits, '.', '_', '-'")
        scans = tuple(Scan(row.path(f"{paper}_{name}.jpg", self.figures)) for name in figures)
        texts = []
        for column, cell in (("question", row.text("question")), ("answer", row.answer("answer"))):
            text = present(_TAG.sub("", cell, count=1), MISSING_WORDS)
            if not text:
                raise row.error(f"{column} has no text after its 'Q:' or 'A:'")
            texts.append(text)
        return scans, paper, row.optional("context", NO_PROSE), *texts

    def parts(self, value, rng):
        scans, paper, context, question, answer = value
        return self.task, paper, instruction_parts(rng, scans, question, answer, context and shorten(context))


@dataclasses.dataclass(kw_only=True, eq=False)
class PMCInline(TableDataset):
    """Windows of a paper's sentences, each figure before the first sentence of the window that refers to it.

    An epoch has as many windows of a paper as its figures need, or one window of a paper without figures. In the
    released code (`data.epoch="released"`) it has one window of every paper.

    The csv has the column `PMC_path`: one JSON per paper, a list of {text, img_ref: [..]}. Papers are read and checked
    when a sample is made; errors name the paper's file. All text is a target.
    """

    name = "pmc_inline"
    task = "interleaved"
    required = ("PMC_path",)
    has_windows = True
    reads_other_files = True

    figures: str = "figures"  # folder of the figures below the root
    window: int = 50  # maximum sentences in a sample
    max_scans: int = 3  # maximum figures in a sample; the sample's generator chooses among more
    around_figure: float = 0.5  # with one window per paper: share of the windows that contain a figure

    def parse(self, row):
        return row.path(row.text("PMC_path"))

    def read(self, path: str) -> list[tuple[str, tuple[str, ...]]]:
        """Return (text, figures) of each sentence of a paper. Raises RowError; its row is the sentence."""
        file = self.root / path
        paper = load_json(file)
        if not isinstance(paper, list):
            raise RowError(file, 0, "a paper must be a list of {text, img_ref}", "convert the paper again")
        sentences = []
        for number, item in enumerate(paper, 1):
            is_sentence = isinstance(item, dict) and isinstance(item.get("text"), str)
            reason = bad_text(item["text"]) if is_sentence else "a sentence needs the key text"
            figures = (item.get("img_ref") or []) if reason is None else []
            if isinstance(figures, str):
                figures = [figures]
            if not isinstance(figures, list) or not all(isinstance(f, str) and _NAME.fullmatch(f) for f in figures):
                reason = f"img_ref {str(figures)[:60]!r} is not a list of figure names"
            if reason:
                raise RowError(file, number, reason, "correct the paper")
            if item["text"].strip() or figures:
                sentences.append((item["text"].strip(), tuple(figures)))
        if not any(text for text, _ in sentences):
            raise RowError(file, 0, "the paper has no text", "remove it from the table")
        return sentences

    def window_count(self, i):
        """Return the number of groups of figures, at least 1."""
        return max(len(self._figure_groups(self.read(self._rows[i]))), 1)

    def _figure_groups(self, sentences) -> list[dict[str, int]]:
        """Divide the figures into groups that one window can show: figure -> the first sentence that refers to it.

        sentence  10 11 12 13 ... 60     window=50, max_scans=3
        figure     a  b  c  d      e ->  (a b c) (d e)
        """
        first: dict[str, int] = {}
        for k, (_, figures) in enumerate(sentences):
            for figure in figures:
                first.setdefault(figure, k)
        groups: list[dict[str, int]] = []
        for figure, k in first.items():
            group = groups[-1] if groups else {}
            if group and len(group) < self.max_scans and k - min(group.values()) < self.window:
                group[figure] = k
            else:
                groups.append({figure: k})
        return groups

    def parts(self, value, rng):
        """Return task, study and parts of a window at a random position."""
        return self.window_parts(value, rng, None)

    def window_parts(self, value, rng, window):
        """Return the parts of the window that shows group `window` of the figures, or of any window if it is None."""
        sentences = self.read(value)
        groups = self._figure_groups(sentences) if window is not None else []
        group = groups[window] if groups else {}
        low = self._low(sentences, group, rng) if group else self._window(sentences, rng)
        chosen = sentences[low : low + self.window]
        others = [f for f in dict.fromkeys(f for _, figures in chosen for f in figures) if f not in group]
        room = self.max_scans - len(group)
        remaining = set(group) | {others[k] for k in choose(rng, len(others), room)}
        parts, text = [], []
        for sentence, figures in chosen:
            for figure in dict.fromkeys(figures):
                if figure in remaining:
                    remaining.remove(figure)
                    if text:
                        parts.append(Text(" ".join(text), "interleaved"))
                        text = []
                    parts.append(self._scan(value, figure))
            if sentence:
                text.append(sentence)
        if text:
            parts.append(Text(" ".join(text), "interleaved"))
        if not any(isinstance(p, Text) for p in parts):
            raise RowError(self.root / value, low + 1, "no text in the chosen window", "remove sentences without text")
        return self.task, pathlib.PurePosixPath(value).stem, tuple(parts)

    def _low(self, sentences, group: dict[str, int], rng) -> int:
        """Return the first sentence of a window with the first references to all figures of a group."""
        low = max(max(group.values()) - self.window + 1, 0)
        high = min(min(group.values()), max(len(sentences) - self.window, 0))
        return low + int(rng.random() * (high - low + 1))

    def _window(self, sentences, rng) -> int:
        """Return the first sentence of the window. The window is inside the paper and may be placed around a figure."""
        last = max(len(sentences) - self.window, 0)
        around, position = rng.random() < self.around_figure, rng.random()
        with_figure = [k for k, (_, figures) in enumerate(sentences) if figures]
        if around and with_figure:
            k = pick(rng, with_figure)
            low, high = max(k - self.window + 1, 0), min(k, last)
            return low + int(position * (high - low + 1))
        return int(position * (last + 1))

    def scans_of(self, value):
        return tuple(self._scan(value, f) for f in dict.fromkeys(f for _, fs in self.read(value) for f in fs))

    def _scan(self, value: str, figure: str) -> Scan:
        path = f"{self.figures}/{pathlib.PurePosixPath(value).stem}_{figure}.jpg"
        if reason := bad_path(path):
            raise ValueError(reason)
        return Scan(path)
