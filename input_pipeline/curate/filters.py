"""The rules of Table 2 as filters: a row of a table is kept, changed, or dropped with a reason.

A filter is a function (row, family, settings) -> Verdict. A row is the cells of a published layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from input_pipeline.curate import radiology
from input_pipeline.datasets import FAMILIES
from input_pipeline.datasets.rows import Row
from input_pipeline.text import measurements
from input_pipeline.text.sentences import sentences


class Captions:
    """Whether the figures of tables are radiologic. It stores a hash and the verdict of each, not the captions."""

    def __init__(self):
        self._verdicts: dict[int, bool | None] = {}

    def register(self, paper: str, figure: str) -> None:
        """Register a figure of a table. Captions of unregistered figures are ignored."""
        self._verdicts[self._hash(paper, figure)] = None

    def add(self, paper: str, figure: str, caption: str) -> None:
        """Store the verdict of a caption. The last caption of a figure counts."""
        key = self._hash(paper, figure)
        if key in self._verdicts:
            self._verdicts[key] = radiology.by_caption(caption)

    def verdict(self, paper: str, figure: str) -> bool | None:
        """Return whether a figure is radiologic; None if its caption is missing or undecided."""
        return self._verdicts.get(self._hash(paper, figure))

    @staticmethod
    def _hash(paper: str, figure: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{paper}\x1f{figure}".encode(), digest_size=8).digest(), "big")


@dataclasses.dataclass
class Settings:
    """Settings of the filters."""

    root: Path  # directory of the images
    captions: Captions = dataclasses.field(default_factory=Captions)
    classifier: radiology.Classifier | None = None  # decides for images whose texts are inconclusive
    threshold: float = 0.5  # minimum probability of the classifier for a radiologic image
    unknown: str = ""  # "keep" or "drop" images that remain undecided; "" uses the default of the family
    cheating: str = "drop"  # "drop" a row whose context contains the answer, or "cut" the sentences that do


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a filter."""

    row: dict | None  # the row, possibly changed; None if it is dropped
    reason: str = ""  # why the row is dropped or changed, else ""


# Columns of a family with modality labels, and with text about the image.
_LABELS = {"rad3d_modality": ("answer",), "rad3d_caption": ("modality",), "rad3d_rationale": ("modality",)}
_TEXTS = {
    "pmc_casereport": ("question", "answer"),
    "rad3d_caption": ("finding", "impression"),
    "rad3d_rationale": ("finding", "impression", "radiographic_features"),
    "rad3d_vqa": ("question", "answer"),
}
# Cases of Radiopaedia are radiologic by default; figures of papers are not.
_UNKNOWN = {"pmc_casereport": "drop"}


def _texts(row: dict, columns) -> list[str]:
    """Return the texts of some columns that are not blank."""
    out = []
    for column in columns:
        value = row.get(column)
        out += value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return [v for v in out if isinstance(v, str) and v.strip()]


def radiologic(row: dict, family: str, settings: Settings) -> Verdict:
    """Drop rows whose images are not radiologic, by label, then by caption or text, then by the classifier.

    A case with scans of both kinds keeps all scans except those labelled as not radiologic.
    """
    kept = _without_other_scans(row)
    if reason := _not_radiologic(kept, family, settings):
        return Verdict(None, reason)
    return Verdict(kept, "" if kept is row else "scans that are not radiologic removed")


def _label_verdict(label: str) -> bool | None:
    """Return whether a label with one or several modalities, separated by commas, is radiologic; None if unknown."""
    verdicts = [radiology.by_label(part) for part in label.split(",")]
    return True if any(verdicts) else None if None in verdicts else False


def _without_other_scans(row: dict) -> dict:
    """Remove the scans whose labels are not radiologic, if others remain (rows of curate/cases.py)."""
    paths, labels = row.get("npy_path"), row.get("modality")
    if not isinstance(paths, list) or not isinstance(labels, list) or len(paths) != len(labels):
        return row
    kept = [k for k, label in enumerate(labels) if _label_verdict(label) is not False]
    if not kept or len(kept) == len(paths):
        return row
    return row | {"npy_path": [paths[k] for k in kept], "modality": [labels[k] for k in kept]}


def _not_radiologic(row: dict, family: str, settings: Settings) -> str:
    """Return why the images of a row are not radiologic, or ""."""
    labels = [_label_verdict(text) for text in _texts(row, _LABELS.get(family, ()))]
    if any(labels):
        return ""
    if labels and None not in labels:
        return "the modality is not radiologic"
    verdicts = [settings.captions.verdict(*key) for key in figures(row, family)]
    if all(verdict is None for verdict in verdicts):
        verdicts = [radiology.by_caption(" ".join(_texts(row, _TEXTS.get(family, ()))))]
    if True in verdicts:
        return ""
    if False in verdicts:
        return "the text describes another kind of image"
    if settings.classifier is not None:
        scores = [settings.classifier(str(settings.root / path)) for path in _paths(row, family)]
        if scores:
            return "" if max(scores) >= settings.threshold else "not radiologic according to the classifier"
    keep = (settings.unknown or _UNKNOWN.get(family, "keep")) == "keep"
    return "" if keep else "no evidence that the image is radiologic"


def figures(row: dict, family: str) -> list[tuple[str, str]]:
    """Return (paper, figure) of the figures of a row; empty for families without papers."""
    if family != "pmc_casereport":
        return []
    return [(row["PMC_id"].strip(), name) for name in re.findall(r"[A-Za-z0-9._-]+", row["img_ref"])]


def _paths(row: dict, family: str) -> list[str]:
    if family == "pmc_casereport":
        return [f"figures/{paper}_{name}.jpg" for paper, name in figures(row, family)]
    column = next((name for name in FAMILIES[family].required if name in ("image_path", "npy_path")), "")
    return Row(Path(family), 0, row, Path()).names(column) if column else []


_SIZE_QUESTION = re.compile(
    r"\b(?:how\s+(?:big|large|small|long|wide|thick|tall|deep|high)(?!\s+(?:has|have|had|did|does|do|"
    r"was\s+the\s+(?:patient|symptom|history|pain)|were\s+the\s+symptoms|after|ago|before|will|would|is\s+the\s+follow))|"
    r"(?:size|sizes|dimensions?|diameters?|length|width|thickness|measurements?|calib(?:er|re))\b|"
    r"how\s+(?:many|much)\s+(?:mm|cm|millimet\w+|centimet\w+)|how\s+(?:much|many)\s+\w+\s+(?:measure)|"
    r"measur(?:e|es|ed|ing)\b|"
    r"(?:what|which)\s+(?:is|was|are|were)\s+the\s+(?:approximate\s+|estimated\s+|total\s+)?volume\s+of)",
    re.IGNORECASE,
)
_AGE_QUESTION = re.compile(
    r"\bhow\s+(?:old|young)\b(?!\s+(?:is|was|are)\s+the\s+(?:fracture|infarct|h(?:a)?ematoma|bleed|lesion|injur))|"
    r"(?<!bone )(?<!skeletal )\bages?\b|\byears?[- ]old\b|\byears?\s+of\s+age\b|"
    r"\bin\s+which\s+year\s+was\s+\w+\s+born\b",
    re.IGNORECASE,
)
_AGE = re.compile(
    r"\b\d{1,3}[- ](?:year|month|week|day)s?[- ]olds?\b|\baged\s+\d|\b\d{1,3}\s*y/?o\b|\bage\s+of\s+\d|"
    r"\byears?\s+of\s+age\b",
    re.I,
)
_SIZE_ANSWER = re.compile(
    r"(?:A:\s*)?(?:(?:it|they|the\s+\w+)\s+(?:is|was|are|were|measures?|measured)\s+)?(?:(?:about|approximately|"
    r"around|up\s+to|less\s+than|more\s+than|over|nearly|at\s+least)\s+)?\d[\d.,]*(?:\s*(?:mm|cm))?"
    r"(?:\s*(?:x|×|by|to|-|–)\s*\d[\d.,]*(?:\s*(?:mm|cm))?)*\s*(?:mm|cm|millimet\w+|centimet\w+)[²³]?(?:\s+in\s+(?:size|diameter|length|\w+\s+dimension))?",
    re.IGNORECASE,
)


def size_questions(row: dict, family: str, settings: Settings) -> Verdict:
    """Drop questions about sizes, and remove size phrases from other pairs. A resized volume does not show sizes."""
    question, answer = (_column(row, name) for name in ("question", "answer"))
    if _SIZE_QUESTION.search(question):
        return Verdict(None, "the question is about a size")
    if _SIZE_ANSWER.fullmatch(answer.strip().rstrip(".")):
        return Verdict(None, "the answer is a size")
    changed = _without_sizes(row, ("question", "answer", "Question", "Answer"))
    if changed == row:
        return Verdict(row)
    if not all(_TAG.sub("", _column(changed, name)).strip() for name in ("question", "answer")):
        return Verdict(None, "the question or the answer has only sizes")
    return Verdict(changed, "sizes removed")


_TAG = re.compile(r"^[QA]:\s*")


def _without_sizes(row: dict, columns) -> dict:
    """Return the row without the size phrases in some columns, texts or lists of texts."""
    changed = dict(row)
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and measurements.has_size(value):
            changed[column] = measurements.without_sizes(value)
        elif isinstance(value, list):
            texts = [measurements.without_sizes(v) if measurements.has_size(v) else v for v in value]
            changed[column] = [text for text in texts if text]
    return changed


def age_questions(row: dict, family: str, settings: Settings) -> Verdict:
    """Drop pairs that ask for the patient's age or state it.

    The age of a fracture and the bone age may be visible, so they stay.
    """
    question, answer = (_column(row, name) for name in ("question", "answer"))
    if _AGE_QUESTION.search(question):
        return Verdict(None, "the question is about an age")
    if _AGE.search(f"{question} {answer}"):
        return Verdict(None, "the question or the answer states an age")
    return Verdict(row)


def size_phrases(row: dict, family: str, settings: Settings) -> Verdict:
    """Remove size phrases from findings and impressions; drop rows without other text."""
    changed = _without_sizes(row, ("finding", "impression"))
    if changed == row:
        return Verdict(row)
    if not _texts(changed, ("finding", "impression")):
        return Verdict(None, "the text has only sizes")
    return Verdict(changed, "sizes removed")


def _column(row: dict, name: str) -> str:
    return str(row.get(name) or row.get(name.capitalize()) or "")


_STOP_WORDS = frozenset(
    "a an the of in on at to and or with for from by as is was are were be been being it its this that these those "
    "there no not yes which who whom whose he she his her they their has had have having shows showed show "
    "demonstrates demonstrated revealed reveals seen noted found image images scan scans finding findings patient "
    "consistent suggestive indicates indicated suggests suggested mri ct imaging examination".split()
)
_WORD = re.compile(r"[a-z0-9]+")


def _content(text: str) -> list[str]:
    words = _WORD.findall(_TAG.sub("", text.strip()).lower())
    words = [w for w in words if w not in _STOP_WORDS]
    # Fold plurals: "cysts" gives "cyst" away.
    return [w[:-1] if len(w) > 4 and w.endswith("s") and not w.endswith("ss") else w for w in words]


def given_away(sentence: str, answer: str) -> bool:
    """Return whether a sentence of the context has (nearly) all content words of the answer.

    Return False for "yes", "no", and answers of one word with up to four letters.
    """
    words = set(_content(answer))
    if not words or (len(words) == 1 and len(next(iter(words))) <= 4):
        return False
    common = words & set(_content(sentence))
    return len(common) >= (len(words) if len(words) < 5 else 0.8 * len(words))


def cheating_contexts(row: dict, family: str, settings: Settings) -> Verdict:
    """Drop rows whose context contains the answer, or cut those sentences."""
    answer, context = _column(row, "answer"), row.get("context") or ""
    all_sentences = sentences(context)
    kept = [sentence for sentence in all_sentences if not given_away(sentence, answer)]
    if len(kept) == len(all_sentences):
        return Verdict(row)
    if settings.cheating == "cut":
        return Verdict(row | {"context": " ".join(kept)}, "sentences with the answer were cut")
    return Verdict(None, "the context contains the answer")


def dropped_family(row: dict, family: str, settings: Settings) -> Verdict:
    """Drop all rows: PMC-OA and PMC-Inline are not part of RadMD."""
    return Verdict(None, f"{family} is not part of RadMD")


_FILTERS = (dropped_family, radiologic, size_questions, age_questions, cheating_contexts, size_phrases)
FILTERS: dict[str, Callable[[dict, str, Settings], Verdict]] = {function.__name__: function for function in _FILTERS}
# Table 2. All rows of other families are kept; diagnosis tables are balanced (radmd.py).
RULES: dict[str, tuple[str, ...]] = {
    "pmc_oa": ("dropped_family",),
    "pmc_inline": ("dropped_family",),
    "pmc_casereport": ("radiologic", "size_questions", "age_questions", "cheating_contexts"),
    "rad3d_caption": ("radiologic", "size_phrases"),
    "rad3d_vqa": ("radiologic", "size_questions", "age_questions"),
    "rad3d_modality": ("radiologic",),
    "rad3d_rationale": ("radiologic",),
}
