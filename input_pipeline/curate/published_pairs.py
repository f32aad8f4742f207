"""Published sets with one sample per row of a table: questions and captions.

The column names are those of the owners' pages, which docs/data_layouts.md cites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from input_pipeline.curate.labels import reject
from input_pipeline.curate.source_files import Case, SourceFiles, text
from input_pipeline.samples import Task

Cells = dict[str, Any]
CHOICES = tuple(f"Choice {letter}" for letter in "ABCD")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How rows become samples. Templates such as `imgs/{img_name}` are filled with the cells of a row."""

    files: dict[str, str]  # split -> pattern of its table; "": of all splits
    scan: tuple[str, ...]  # templates of paths relative to the folder of the set; the first that exists is used
    answer: str  # column
    question: str = ""  # column; "": a sentence of the group `prompts`
    prompts: str = ""
    columns: tuple[str, ...] = ()  # other required columns
    id: str = ""  # column; "": the row number
    split: Callable[[Cells], str] = lambda cells: ""  # of a row of a table of all splits
    skipped: Callable[[Cells], str] = lambda cells: ""  # why a good row is not used
    choices: tuple[str, ...] = ()  # columns of the choices
    letter: str = ""  # column with the letter of the right choice

    @property
    def task(self) -> Task:
        return "vqa" if self.question else "report"

    def cases(self, files: SourceFiles, with_choices: bool = False) -> Iterator[Case]:
        """Yield the samples. `with_choices` adds the choices to the question, and the letter to the answer."""
        required = tuple(filter(None, (self.answer, self.question, self.id, *self.columns)))
        for split, pattern in self.files.items():
            file = files.find(pattern)
            for number, cells in files.rows(file, required):
                if reason := self.skipped(cells):
                    files.result.count(f"{files.folder}: rows skipped: {reason}")
                    continue
                case = self._case(files, split, number, cells)
                if not case.answer or (self.question and not case.question):
                    reject(files.result, file, number, f"{self.answer} or {self.question or 'the scan'} is blank")
                    continue
                if with_choices and self.choices:
                    case.question, case.answer = _with_choices(case, self, cells)
                yield case

    def _case(self, files: SourceFiles, split: str, number: int, cells: Cells) -> Case:
        path = files.scan(*(template.format_map(cells) for template in self.scan))
        row_id = text(cells, self.id) if self.id else str(number)
        answer = cells.get(self.answer)  # "None" is an answer
        return Case(
            id=f"{split}-{row_id}" if split else row_id,
            task=self.task,
            scans=(path,),
            question=text(cells, self.question) if self.question else "",
            prompts=self.prompts,
            answer="" if answer is None else str(answer).strip(),
            split=split or self.split(cells),
        )


def _with_choices(case: Case, pairs: Pairs, cells: Cells) -> tuple[str, str]:
    choices = {name[-1]: _choice(text(cells, name)) for name in pairs.choices}
    letter = text(cells, pairs.letter)
    question = f"{case.question} " + " ".join(f"{name}: {choice}" for name, choice in choices.items() if choice)
    return question, f"{letter}: {choices[letter]}" if letter in choices else case.answer


def _choice(value: str) -> str:
    """Return a choice without the letter that PMC-VQA writes in front of it ("A:Focal uptake")."""
    return value[2:].strip() if value[1:2] == ":" else value


def _pmc_vqa(version: str) -> Pairs:
    return Pairs(
        {"train": f"train{version}.csv", "test": f"test{version}.csv"},
        scan=("figures/{Figure_path}", "images/{Figure_path}", "{Figure_path}"),
        columns=("Figure_path",), question="Question", answer="Answer", choices=CHOICES, letter="Answer_label",
    )  # fmt: skip


def _pmc_oa(name: str) -> Pairs:
    folder = "caption_T060_filtered_top4_sep_v0_subfigures"
    return Pairs(
        {"": f"{name}.jsonl"}, scan=(f"{folder}/{{image}}", f"images/{folder}/{{image}}"), columns=("image",),
        answer="caption", prompts="caption_figure",
    )  # fmt: skip


PAIRS: dict[str, Pairs] = {
    "vqa_rad": Pairs(
        {"": "VQA_RAD*Public*.json"}, scan=("VQA_RAD Image Folder/{image_name}",), question="question",
        answer="answer", id="qid", columns=("image_name", "phrase_type"),
        # The owners mark test questions: test_freeform and test_para.
        split=lambda cells: "test" if str(cells["phrase_type"]).startswith("test") else "train",
    ),
    "slake": Pairs(
        {"train": "train.json", "validation": "validate.json", "test": "test.json"}, scan=("imgs/{img_name}",),
        question="question", answer="answer", id="qid", columns=("img_name", "q_lang"),
        skipped=lambda cells: "" if cells["q_lang"] == "en" else "not English",
    ),
    "pmc_vqa": _pmc_vqa(""),
    "pmc_vqa_2": _pmc_vqa("_2"),
    "pmc_oa": _pmc_oa("pmc_oa"),
    "pmc_oa_beta": _pmc_oa("pmc_oa_beta"),
    "rocov2": Pairs(
        {"train": "train_captions.csv", "validation": "valid_captions.csv", "test": "test_captions.csv"},
        scan=("train/{ID}.jpg", "valid/{ID}.jpg", "test/{ID}.jpg"), columns=("ID",), answer="Caption",
        prompts="caption_figure",
    ),
}  # fmt: skip
