"""RadBench: five tasks, thirteen data sets (paper, sections 5.2 and 5.3, Table 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from input_pipeline.datasets import FAMILIES
from input_pipeline.field_rules import Count, Size, as_tuple, check_fields, plain_mapping, unknown_fields
from input_pipeline.files import nearest
from input_pipeline.samples import Scan
from input_pipeline.text.vocabularies import SEMANTIC_TYPES

TASKS = {
    "modality": "Modality recognition",
    "diagnosis": "Disease diagnosis",
    "vqa": "Medical VQA",
    "report": "Report generation",
    "rationale": "Rationale diagnosis",
}
CLOSED = {"modality": ("CT", "MRI", "Ultrasound", "PET", "X-ray", "angiography"), "diagnosis": ("yes", "no")}
# Names of a choice in answers (metrics.named_choice).
NAMES = {
    "yes": ("yes",), "no": ("no",),
    "CT": ("CT", "CTA", "computed tomography", "computed tomographic", "computerized tomography"),
    # Not "MR" alone: matching ignores case, and "Mr." is common in reports.
    "MRI": ("MRI", "MRA", "magnetic resonance", "MR imaging", "MR image", "MR scan", "MR angiogram", "MR angiography"),
    "PET": ("PET", "positron emission"),
    "Ultrasound": ("ultrasound", "ultrasonography", "ultrasonographic", "sonography", "sonographic", "sonogram"),
    "X-ray": ("X-ray", "xray", "x ray", "radiograph", "radiography", "radiographic"),
    "angiography": ("angiography", "angiographic", "angiogram"),
}  # fmt: skip
# Modality label -> choice of the paper's list. Rows with another modality are skipped.
MODALITY_CHOICES = {
    "CT": "CT", "CT angiography": "CT", "MRI": "MRI", "MR angiography": "MRI", "ultrasound": "Ultrasound", "PET": "PET",
    "PET-CT": "PET", "X-ray": "X-ray", "mammography": "X-ray", "fluoroscopy": "X-ray", "angiography": "angiography",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A row of the paper's Table 3, with the modality and anatomy that all its scans share."""

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
SET_FIELDS = ("task", "modality", "anatomy", "facts", "limit", "title")  # fields of a set in addition to its family's


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Configuration of a benchmark: its data sets, questions and scoring.

    An entry of `sets` has the `family`, the fields of the family (`table`, `root`, ...), and
      task: one of TASKS; optional for the thirteen data sets.
      title, modality, anatomy: name in the report, and what all scans share.
      facts: a JSON Lines file below the root, {"path", "modality", "anatomy"} per line, for scans that differ.
      limit: maximum number of questions, sampled by the seed; 0: no limit.
    """

    sets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seed: Count = 0  # seeds the wording, the limits and the bootstrap
    limit: Count = 0  # default for sets without a `limit`
    index: str = ""  # index of the training data (from `prepare`), to search for test studies; "": no search
    terms: str = "open"  # source of medical terms (DataConfig.terms). UMLS, as in the paper, needs a licence.
    umls_types: tuple[str, ...] = SEMANTIC_TYPES  # semantic types of UMLS (DataConfig.umls_types)
    resamples: Size = 1000  # number of bootstrap resamples
    by_study: bool = False  # resample studies instead of samples

    def __post_init__(self):
        check_fields(self, "")
        problems = []
        for name, fields in self.sets.items():
            known = DATASETS.get(name)
            if not isinstance(fields.get("family"), str) or fields["family"] not in FAMILIES:
                problems.append(f"sets.{name}.family is {fields.get('family')!r}; known: {', '.join(FAMILIES)}")
            else:
                allowed = (*SET_FIELDS, "family", *(f.name for f in dataclasses.fields(FAMILIES[fields["family"]])))
                unknown = [key for key in fields if key not in allowed]
                problems += [f"sets.{name} has no field {key!r}{nearest(key, allowed)}" for key in unknown]
            problems += [f"sets.{name} needs `{key}`" for key in ("root", "table") if not fields.get(key)]
            task = fields.get("task", known and known.task)
            if task not in TASKS:
                problems.append(f"sets.{name}.task is {task!r}; known: {', '.join(TASKS)}")
            elif known and task != known.task:
                problems.append(f"sets.{name}.task is {task!r}, but {known.task!r} in RadBench: rename the set")
            if "/" in name or not name.strip():
                problems.append(f"invalid name {name!r} in sets: use letters, digits, _ and -")
        if not self.sets:
            problems.append("sets is empty: add a data set")
        if problems:
            raise ValueError("; ".join(problems))

    def task(self, name: str) -> str:
        return self.sets[name].get("task") or DATASETS[name].task

    def title(self, name: str) -> str:
        return self.sets.get(name, {}).get("title") or (DATASETS[name].title if name in DATASETS else name)

    def to_dict(self) -> dict:
        """Return plain values, for a ConfigDict."""
        return dataclasses.asdict(self) | {"sets": {name: dict(fields) for name, fields in self.sets.items()}}

    @classmethod
    def from_dict(cls, fields: Mapping) -> Benchmark:
        """Build from a dict or a ConfigDict. Raises ValueError that names unknown fields."""
        fields = plain_mapping(fields, "the config")
        if unknown := unknown_fields(fields, cls):
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            raise ValueError(f"unknown fields: {unknown}; known: {known}")
        return cls(**{name: as_tuple(value) for name, value in fields.items()})


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its reference answers."""

    row_id: str  # `data set/row`, unique
    task: str
    dataset: str
    prompt: str  # `<image-1>` marks set the positions of scans
    references: tuple[str, ...]
    context: str = ""  # comes before the prompt
    scans: tuple[Scan, ...] = ()  # paths are absolute
    root: str = ""  # directory that the paths in files are relative to; "" if they are absolute
    study: str | None = None  # None if the source does not record it
    modality: str = ""  # modality of its scans; "" if unknown
    anatomy: str = ""
    closed: tuple[str, ...] = ()  # choices that the answer is matched to; () for open questions

    def to_dict(self) -> dict:
        """Return a line of questions.jsonl."""
        plain = dataclasses.asdict(self)
        plain = {"id": plain.pop("row_id"), **plain}
        del plain["root"]
        plain["scans"] = [
            {k: v for k, v in dataclasses.asdict(scan).items() if v is not None} for scan in self.relative_scans()
        ]
        return {key: value for key, value in plain.items() if value not in ("", None)}

    def relative_scans(self) -> list[Scan]:
        """Return the scans with paths relative to `root`, for files: with relative paths, data and answers can move."""
        if not self.root:
            return list(self.scans)
        inside = lambda path: Path(path).is_relative_to(self.root)  # noqa: E731
        relative = lambda path: str(Path(path).relative_to(self.root)) if inside(path) else path  # noqa: E731
        return [dataclasses.replace(scan, path=relative(scan.path)) for scan in self.scans]

    @classmethod
    def from_dict(cls, line: Mapping, roots: Mapping[str, str | Path]) -> Question:
        """Build from a line of questions.jsonl. roots: data set -> directory of its relative paths."""
        fields = {f.name: line[f.name] for f in dataclasses.fields(cls) if f.name in line}
        window = lambda w: tuple(w) if isinstance(w, list) else w  # noqa: E731
        fields["root"] = str(roots.get(line.get("dataset", ""), ""))
        absolute = lambda path: str(Path(fields["root"], path))  # noqa: E731
        scans = (
            Scan(absolute(s["path"]), s.get("volume"), window(s.get("window")), s.get("series")) for s in line["scans"]
        )
        fields |= {"scans": tuple(scans), "references": tuple(line["references"]), "closed": tuple(line["closed"])}
        return cls(row_id=line["id"], **fields)
