"""PMC-VQA, VQA-RAD and SLAKE: csv `img_root_dir, Figure_path, Question, Answer`; the scan is first or last."""

from __future__ import annotations

import unicodedata

from input_pipeline.datasets.base import SkippedRow, TableDataset, scan_files
from input_pipeline.samples import Text


class VQA(TableDataset):
    task = "vqa"
    required = ("img_root_dir", "Figure_path", "Question", "Answer")

    def parse(self, row):
        folder = row.optional("img_root_dir")
        name = row.text("Figure_path")
        # Join the two columns first: the prefix to strip may end inside the folder or be the folder itself.
        path = row.path(f"{folder.rstrip('/')}/{name}" if folder else name)
        return self.value((path,), row.text("Question"), row.answer("Answer"))

    def value(self, paths, question, answer):
        """Return the value of a row. Constant parts are built only once: samples are drawn millions of times."""
        study = self.study_of(paths[0])
        return scan_files(paths), study, Text(question, "instruction"), Text(answer, "response")

    def parts(self, value, rng):
        _, study, question, answer = value
        scans = self.scans_of(value)
        parts = (*scans, question, answer) if rng.random() < 0.5 else (question, *scans, answer)
        return self.task, study, parts


class PMCVQA(VQA):
    name = "pmc_vqa"


class VQARAD(VQA):
    name = "vqa_rad"


class Slake(VQA):
    """The English part of SLAKE. Rows whose `q_lang` is not `en` are skipped and counted.

    Without that column, rows with Chinese characters in the question or the answer are skipped.
    """

    name = "slake"
    extra = ("q_lang",)

    def parse(self, row):
        language = row.optional("q_lang")
        if language:
            if row.choice("q_lang", ("en", "zh")) != "en":
                return SkippedRow("q_lang 'zh'")
        elif any(unicodedata.name(c, "").startswith("CJK") for c in row.text("Question") + row.answer("Answer")):
            return SkippedRow("not English")
        return super().parse(row)
