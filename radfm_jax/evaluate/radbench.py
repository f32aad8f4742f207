"""RadBench: five tasks, thirteen data sets (paper, sections 5.2 and 5.3, Table 3), as questions with fixed wording.

    benchmark = Benchmark(sets={"vqa_rad": {"family": "vqa_rad", "root": "data/vqa_rad", "table": "test.csv"}})
    bench = build(benchmark)            # bench.questions, bench.missing, bench.left_out

A question's wording, and where its scans stand, are drawn once, by the generator that (seed, data set, row) seeds, and
recorded: questions.jsonl is the benchmark that every model answers.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from pyarrow import parquet

from input_pipeline.config import unknown_fields
from input_pipeline.datasets import FAMILIES, open_dataset, sample_rng
from input_pipeline.datasets.json_tables import text_lines
from input_pipeline.datasets.modalities import modalities
from input_pipeline.files import nearest
from input_pipeline.images import scans
from input_pipeline.index.categories import MODALITIES, reason_pattern
from input_pipeline.index.index import Index
from input_pipeline.index.scan_checks import scan_sha256
from input_pipeline.samples import RowError, Sample, Scan, Text

TASKS = {
    "modality": "Modality recognition",
    "diagnosis": "Disease diagnosis",
    "vqa": "Medical VQA",
    "report": "Report generation",
    "rationale": "Rationale diagnosis",
}
CLOSED = {"modality": ("CT", "MRI", "Ultrasound", "PET", "X-ray", "angiography"), "diagnosis": ("yes", "no")}
# What an answer may call them (metrics.named).
NAMES = {
    "yes": ("yes",), "no": ("no",),
    "CT": ("CT", "CTA", "computed tomography", "computed tomographic", "computerized tomography"),
    # Not MR alone: case does not count, and Mr. and Mrs. are none.
    "MRI": ("MRI", "MRA", "magnetic resonance", "MR imaging", "MR image", "MR scan", "MR angiogram", "MR angiography"),
    "PET": ("PET", "positron emission"),
    "Ultrasound": ("ultrasound", "ultrasonography", "ultrasonographic", "sonography", "sonographic", "sonogram"),
    "X-ray": ("X-ray", "xray", "x ray", "radiograph", "radiography", "radiographic"),
    "angiography": ("angiography", "angiographic", "angiogram"),
}  # fmt: skip
# What a label means, in the words of the paper's list. Modalities that are none of these six are not asked about.
SIX = {
    "CT": "CT", "CT angiography": "CT", "MRI": "MRI", "MR angiography": "MRI", "ultrasound": "Ultrasound", "PET": "PET",
    "PET-CT": "PET", "X-ray": "X-ray", "mammography": "X-ray", "fluoroscopy": "X-ray", "angiography": "angiography",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A line of the paper's Table 3, and what is known of all its scans."""

    title: str
    task: str
    split: str
    modality: str = ""
    anatomy: str = ""


DATASETS = {
    "rad3d_modality": DataSet("Rad3D-Modality", "modality", "random"),
    "vindr_mammo": DataSet("VinDr-Mammo", "diagnosis", "official", "mammography", "breast"),
    "vindr_spinexr": DataSet("VinDr-SpineXR", "diagnosis", "official", "X-ray", "spine"),
    "vindr_pcxr": DataSet("VinDr-PCXR", "diagnosis", "official", "X-ray", "chest"),
    "cxr_mix": DataSet("CXR-Mix", "diagnosis", "official", "X-ray", "chest"),
    "pmc_vqa": DataSet("PMC-VQA", "vqa", "official"),
    "pmc_casereport": DataSet("PMC-CaseReport", "vqa", "random"),
    "vqa_rad": DataSet("VQA-RAD", "vqa", "official"),
    "slake": DataSet("SLAKE", "vqa", "official"),
    "rad3d_vqa": DataSet("Rad3D-VQA", "vqa", "random"),
    "mimic_cxr": DataSet("MIMIC-CXR", "report", "random", "X-ray", "chest"),
    "rad3d_caption": DataSet("Rad3D-Caption", "report", "random"),
    "rad3d_rationale": DataSet("Rad3D-Rationale", "rationale", "random"),
}
OWN = ("task", "modality", "anatomy", "facts", "limit", "title")  # fields of a set that are not its family's


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Where the data sets lie, and how they are asked and scored: a config fills it.

    Attributes:
      sets: name -> `family`, the family's fields (`table`, `root`, ...), and
        task: one of TASKS; known of the thirteen.
        title, modality, anatomy: what the report calls it, and what all its scans are.
        facts: a JSON Lines file below the root, {"path", "modality", "anatomy"} a line, where scans differ.
        limit: most questions, drawn by the seed; 0: all.
      seed: of the wording of questions, of `limit`, of the resamples.
      limit: of every set that has none of its own.
      index: what `prepare` wrote of the training data, to look for test studies in; "": not looked.
      terms: where medical words come from (DataConfig.terms). UMLS, as in the paper, needs its licence.
      resamples: of the confidence intervals.
      by_study: draw studies instead of samples for them.
    """

    sets: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    seed: int = 0
    limit: int = 0
    index: str = ""
    terms: str = "open"
    resamples: int = 1000
    by_study: bool = False

    def __post_init__(self):
        problems = []
        for name, fields in self.sets.items():
            known = DATASETS.get(name)
            if "family" not in fields or fields["family"] not in FAMILIES:
                problems.append(f"sets.{name}.family is {fields.get('family')!r}; known: {', '.join(FAMILIES)}")
            else:
                named = (*OWN, "family", *(f.name for f in dataclasses.fields(FAMILIES[fields["family"]])))
                wrong = [key for key in fields if key not in named]
                problems += [f"sets.{name} has no field {key!r}{nearest(key, named)}" for key in wrong]
            problems += [f"sets.{name} has no `{key}`" for key in ("root", "table") if not fields.get(key)]
            task = fields.get("task", known and known.task)
            if task not in TASKS:
                problems.append(f"sets.{name}.task is {task!r}; known: {', '.join(TASKS)}")
            elif known and task != known.task:
                problems.append(f"sets.{name}.task is {task!r}, in RadBench it is {known.task!r}: give it another name")
            if "/" in name or not name.strip():
                problems.append(f"sets has the name {name!r}: letters, digits, _ and - make a name")
        if self.resamples < 1 or self.limit < 0:
            problems.append(f"resamples is {self.resamples}, limit {self.limit}: at least 1, and at least 0")
        if not self.sets:
            problems.append("sets names no data set")
        if problems:
            raise ValueError("; ".join(problems))

    def task(self, name: str) -> str:
        return self.sets[name].get("task") or DATASETS[name].task

    def title(self, name: str) -> str:
        return self.sets.get(name, {}).get("title") or (DATASETS[name].title if name in DATASETS else name)

    def to_dict(self) -> dict:
        """Plain values, for a ConfigDict."""
        return dataclasses.asdict(self) | {"sets": {name: dict(fields) for name, fields in self.sets.items()}}

    @classmethod
    def from_dict(cls, fields: Mapping) -> Benchmark:
        """The inverse, from a dict or a ConfigDict. ValueError names unknown fields."""
        fields = fields.to_dict() if hasattr(fields, "to_dict") else dict(fields)
        if unknown := unknown_fields(fields, cls):
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            raise ValueError(f"unknown fields: {unknown}; a benchmark has {known}")
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Question:
    """What every model is asked, and what is right.

    Attributes:
      row_id: `data set/row`, unique.
      study: what was one case; None if the source does not say.
      modality, anatomy: of its scans; "" where not known.
      prompt: `<image-1>` marks say where scans stand; `context` stands before it.
      scans: with absolute paths.
      closed: the list that the answer is matched to; () for open answers.
    """

    row_id: str
    task: str
    dataset: str
    prompt: str
    references: tuple[str, ...]
    context: str = ""
    scans: tuple[Scan, ...] = ()
    study: str | None = None
    modality: str = ""
    anatomy: str = ""
    closed: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """A line of questions.jsonl."""
        plain = dataclasses.asdict(self)
        plain = {"id": plain.pop("row_id"), **plain}
        plain["scans"] = [{k: v for k, v in scan.items() if v is not None} for scan in plain["scans"]]
        return {key: value for key, value in plain.items() if value not in ("", None)}

    @classmethod
    def from_dict(cls, line: Mapping) -> Question:
        fields = {f.name: line[f.name] for f in dataclasses.fields(cls) if f.name in line}
        window = lambda w: tuple(w) if isinstance(w, list) else w  # noqa: E731
        given = (Scan(s["path"], s.get("volume"), window(s.get("window"))) for s in line["scans"])
        fields |= {"scans": tuple(given), "references": tuple(line["references"]), "closed": tuple(line["closed"])}
        return cls(row_id=line["id"], **fields)


@dataclasses.dataclass
class Bench:
    """The questions, and what is not asked.

    Attributes:
      missing: data set -> why it has no questions.
      left_out: data set -> reason -> how many rows.
    """

    questions: list[Question]
    missing: dict[str, str]
    left_out: dict[str, dict[str, int]]


# --- questions --------------------------------------------------------------------------------------------------------


def build(benchmark: Benchmark) -> Bench:
    """Every question of every data set that is there; of the thirteen, those that the config does not name are missing
    as well."""
    bench = Bench([], {}, {})
    order = list(DATASETS)  # as the paper has them, whatever the order of the config
    place = lambda name: (order.index(name) if name in order else len(order), name)  # noqa: E731
    for name in sorted(benchmark.sets, key=place):
        fields = benchmark.sets[name]
        try:
            questions, left_out = of_set(benchmark, name)
        except (ValueError, OSError) as error:
            root = Path(fields["root"])
            where = root if not root.exists() else root / fields["table"]
            bench.missing[name] = f"{where} is missing" if not where.exists() else str(error)
            continue
        bench.questions += questions
        bench.left_out[name] = left_out
        if not questions:
            bench.missing[name] = f"none of its rows can be asked: {', '.join(left_out)}"
    bench.missing |= {name: "the config does not name it" for name in DATASETS if name not in benchmark.sets}
    return bench


def of_set(benchmark: Benchmark, name: str) -> tuple[list[Question], dict[str, int]]:
    """The questions of one data set, in the order of its rows, and why rows were left out.

    Raises ValueError, RowError: a table or a file of facts that cannot be read.
    """
    fields, task, known = dict(benchmark.sets[name]), benchmark.task(name), DATASETS.get(name)

    own = {key: fields.pop(key) for key in OWN if key in fields}
    family = fields.pop("family")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "fraction"}
    dataset = open_dataset(family, **plain | {"quarantine": True})
    dataset.defer_stack_errors()  # asked about as any other scan that cannot be read, and failed by every model
    root = Path(dataset.root)
    facts = _facts(root / own["facts"]) if own.get("facts") else {}
    of_all = {key: own.get(key) or (getattr(known, key) if known else "") for key in ("modality", "anatomy")}
    left_out = collections.Counter({f"row left out by its reader: {why}": n for why, n in dataset.skipped.items()})
    left_out.update(f"bad row: {reason_pattern(problem.reason)}" for problem in dataset.problems)
    questions = []
    for i in range(len(dataset)):
        row_id = dataset.row_id(i)
        try:
            sample = dataset.sample(i, sample_rng(benchmark.seed, 0, name, row_id))
            question = question_of(sample, name, task, f"{name}/{row_id}", root)
        except RowError as error:
            left_out[f"bad row: {reason_pattern(error.reason)}"] += 1
        except NotAsked as reason:
            left_out[str(reason)] += 1
        else:
            of_scan = next((facts[s.path] for s in sample.scans if s.path in facts), {})
            said = {key: of_scan.get(key) or value for key, value in of_all.items()}
            if task == "modality":
                said["modality"] = said["modality"] or question.references[0]
            questions.append(dataclasses.replace(question, **said))
    limit = own.get("limit") or benchmark.limit
    if limit and len(questions) > limit:
        chosen = sample_rng(benchmark.seed, 0, name, "limit").permutation(len(questions))[:limit]
        left_out[f"more than limit={limit}"] = len(questions) - limit
        questions = [questions[i] for i in np.sort(chosen)]
    return questions, {reason: n for reason, n in left_out.items() if n}


class NotAsked(ValueError):
    """Why a good row is no question of this benchmark."""


def question_of(sample: Sample, dataset: str, task: str, row_id: str, root: Path) -> Question:
    """The wording of a sample: its contexts, then scans and instruction, a scan as its mark; the response is the
    reference.

    Raises:
      NotAsked: another task, an answer outside the closed list, text that a mark could be taken for, a scan whose path
        leads out of the root.
    """
    if sample.task != task:
        raise NotAsked(f"asks for {sample.task}")
    texts = [p.text for p in sample.parts if isinstance(p, Text) and p.role != "response"]
    if any("<image-" in text for text in texts):
        raise NotAsked("its text holds what would be read as the mark of a scan")
    reference = " ".join(p.text.strip() for p in sample.parts if isinstance(p, Text) and p.role == "response")
    if task == "modality":
        named = {SIX[name] for name in modalities(reference) if name in SIX}
        if len(named) != 1:
            raise NotAsked("its modality is none of the six" if not named else "it has several modalities")
        reference = named.pop()
    elif task in CLOSED and reference not in CLOSED[task]:
        raise NotAsked("asked openly, not for yes or no")
    numbers = {scan: i for i, scan in enumerate(dict.fromkeys(sample.scans), 1)}
    asked = [p for p in sample.parts if isinstance(p, Scan) or p.role != "response"]
    last = max((k for k, p in enumerate(asked) if isinstance(p, Text) and p.role == "context"), default=-1)
    said = lambda parts: " ".join(  # noqa: E731
        f"<image-{numbers[p]}>" if isinstance(p, Scan) else p.text.strip() for p in parts
    )
    return Question(
        row_id, task, dataset, said(asked[last + 1 :]), (reference,), said(asked[: last + 1]),
        tuple(dataclasses.replace(scan, path=_found(root, scan)) for scan in numbers),
        sample.study_id, closed=CLOSED.get(task, ()),
    )  # fmt: skip


def _found(root: Path, scan: Scan) -> str:
    """The absolute path. A file that is missing is asked about all the same, and fails for every model."""
    try:
        return str(scans.resolve(root, scan.path))
    except scans.ScanError as error:
        if error.fault == "missing":
            return str(root / scan.path)
        raise NotAsked(f"a scan cannot be used: {error}") from None


def _facts(file: Path) -> dict[str, dict[str, str]]:
    """path -> modality and anatomy, codes of DICOM spelled out."""
    found = {}
    for number, line in enumerate(text_lines(file), 1):
        try:
            cells = json.loads(line)
            said = {key: str(cells[key]) for key in ("modality", "anatomy") if cells.get(key)}
            found[cells["path"]] = said | {k: MODALITIES.get(v, v) for k, v in said.items() if k == "modality"}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {error!r}; an object with `path` is expected") from None
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def write_questions(questions: Iterable[Question], file: Path) -> None:
    write_lines(file, (question.to_dict() for question in questions))


def read_questions(file: Path) -> list[Question]:
    """What `write_questions` or `--export` wrote. ValueError: lines that are none, ids that stand twice."""
    found: dict[str, Question] = {}
    for number, line in enumerate(text_lines(file), 1):
        try:
            question = Question.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is no question of a benchmark: {error!r}") from None
        if question.row_id in found:
            raise ValueError(f"{file}, line {number}: id {question.row_id!r} stands twice")
        found[question.row_id] = question
    return list(found.values())


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    """JSON Lines, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "w") as opened:
            opened.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


# --- leakage ----------------------------------------------------------------------------------------------------------


def leaks(questions: Iterable[Question], directory: Path | str) -> list[dict]:
    """Questions whose study, or the very file of whose scan, the training data have.

    Studies are compared by name, files by SHA-256, so renamed copies are found; pictures that were changed are not.

    Args:
      directory: the index that `prepare` wrote. Its training sources count, rows that it left out as well.
    Raises ValueError: no index.
    """
    index, questions = Index(directory), list(questions)
    trained = {name for name, source in index.tables.items() if source["split"] == "train"}
    asked = {question.study for question in questions if question.study}
    studies: dict[str, dict[str, str]] = {}  # study -> root -> source
    for row in _lines(index.directory / "rows.parquet", "source", "study"):
        if row["source"] in trained and row["study"] in asked:
            studies.setdefault(row["study"], {})[index.tables[row["source"]]["root"]] = row["source"]
    hashes: dict[str, str] = {}
    for scan in {scan.path for question in questions for scan in question.scans}:
        with contextlib.suppress(OSError, ValueError):  # it cannot be asked about either, which scoring will say
            hashes[scan] = scan_sha256(Path(scan))
    shown = set(hashes.values())
    files = {
        scan["sha256"]: f"{scan['source']}: {scan['path']}"
        for scan in _lines(index.directory / "scans.parquet", "source", "path", "sha256")
        if scan["source"] in trained and scan["sha256"] in shown
    }
    found = []
    for question in questions:
        if where := _trained_on(question, studies):
            found.append({"id": question.row_id, "kind": "study", "what": question.study, "in": where})
        for scan in question.scans:
            if where := files.get(hashes.get(scan.path)):
                found.append({"id": question.row_id, "kind": "scan", "what": scan.path, "in": where})
    return found


def _lines(file: Path, *columns: str) -> Iterator[dict]:
    """Of a table that may be larger than memory."""
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(columns=list(columns), use_threads=False):
            yield from batch.to_pylist()


def _trained_on(question: Question, studies: dict[str, dict[str, str]]) -> str:
    """The training source that has the study; "" if none has. A study that is only its scan's path is the same study
    below the same root alone: every data set may have an `images/1.png`."""
    roots = studies.get(question.study or "", {})
    own = [s.path.removesuffix(f"/{question.study}") for s in question.scans if s.path.endswith(f"/{question.study}")]
    if own:
        return next((roots[root] for root in own if root in roots), "")
    return next(iter(roots.values()), "")
