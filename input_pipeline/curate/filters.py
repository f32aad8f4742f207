"""The rules of Table 2, each by name: a row of a table -> kept, changed, or dropped with the reason.

A filter is a function (row, family, setting) -> Verdict. Rows are the cells of the published layouts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from input_pipeline.curate import radiology
from input_pipeline.text import measurements
from input_pipeline.text.sentences import sentences


class Captions:
    """Whether the captions of pictures say that they are radiologic; of the pictures that tables name, as the captions
    of all papers are many. In memory is a hash of each picture and the answer, not the text."""

    def __init__(self):
        self._verdicts: dict[int, bool | None] = {}

    def want(self, paper: str, picture: str) -> None:
        self._verdicts[self._hash(paper, picture)] = None

    def add(self, paper: str, picture: str, caption: str) -> None:
        """The last one counts."""
        key = self._hash(paper, picture)
        if key in self._verdicts:
            self._verdicts[key] = radiology.by_caption(caption)

    def judged(self, paper: str, picture: str) -> bool | None:
        """None: there is no caption, or its words do not say."""
        return self._verdicts.get(self._hash(paper, picture))

    @staticmethod
    def _hash(paper: str, picture: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{paper}\x1f{picture}".encode(), digest_size=8).digest(), "big")


@dataclasses.dataclass
class Settings:
    """What the filters may look at beside the row.

    Attributes:
      root: below which the images lie. captions: what the captions of figures say.
      classifier, threshold: asked about images whose words do not say whether they are radiologic.
      unknown: "keep" or "drop" what nobody can say it of; "" : as the family has it.
      cheating: "drop" the row whose context gives the answer away, or "cut" the sentences that do.
    """

    root: Path
    captions: Captions = dataclasses.field(default_factory=lambda: Captions())
    classifier: radiology.Classifier | None = None
    threshold: float = 0.5
    unknown: str = ""
    cheating: str = "drop"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Attributes: row: what goes on, None if dropped. reason: why it was dropped or changed, "" if neither."""

    row: dict | None
    reason: str = ""


Filter = Callable[[dict, str, Settings], Verdict]

# --- non-radiologic images --------------------------------------------------------------------------------------------

# Of a family's columns: modality labels, words about the image.
_LABELS = {"rad3d_modality": ("answer",), "rad3d_caption": ("modality",), "rad3d_rationale": ("modality",)}
_WORDS = {
    "pmc_casereport": ("question", "answer"),
    "rad3d_caption": ("finding", "impression"),
    "rad3d_rationale": ("finding", "impression", "radiographic_features"),
    "rad3d_vqa": ("question", "answer"),
}
# Radiopaedia shows radiology unless it says otherwise; figures of papers show anything.
_UNKNOWN = {"pmc_casereport": "drop"}


def _said(row: dict, columns) -> list[str]:
    out = []
    for column in columns:
        value = row.get(column)
        out += value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return [v for v in out if isinstance(v, str) and v.strip()]


def radiologic(row: dict, family: str, settings: Settings) -> Verdict:
    """Drops rows whose images are not radiologic: by label, then by the words of captions, then by the classifier."""
    labels = [radiology.by_label(part) for text in _said(row, _LABELS.get(family, ())) for part in text.split(",")]
    if any(labels):
        return Verdict(row)
    if labels and None not in labels:
        return Verdict(None, "the modality is not radiologic")
    judged = [settings.captions.judged(*key) for key in pictures(row, family)]
    if not any(verdict is not None for verdict in judged):
        judged = [radiology.by_caption(" ".join(_said(row, _WORDS.get(family, ()))))]
    if True in judged:
        return Verdict(row)
    if False in judged:
        return Verdict(None, "the words say another kind of image")
    if settings.classifier is not None:
        scores = [settings.classifier(str(settings.root / path)) for path in _paths(row, family)]
        if scores:
            kept = max(scores) >= settings.threshold
            return Verdict(row) if kept else Verdict(None, "the classifier says that it is not radiologic")
    keep = (settings.unknown or _UNKNOWN.get(family, "keep")) == "keep"
    return Verdict(row) if keep else Verdict(None, "nothing says that the image is radiologic")


def pictures(row: dict, family: str) -> list[tuple[str, str]]:
    if family != "pmc_casereport":
        return []
    return [(row["PMC_id"].strip(), name) for name in re.findall(r"[A-Za-z0-9._-]+", row["img_ref"])]


def _paths(row: dict, family: str) -> list[str]:
    if family == "pmc_casereport":
        return [f"figures/{paper}_{name}.jpg" for paper, name in pictures(row, family)]
    return [row[c] for c in ("image_path", "npy_path", "Figure_path", "name") if isinstance(row.get(c), str)][:1]


# --- sizes and ages ---------------------------------------------------------------------------------------------------

_SIZE_QUESTION = re.compile(
    r"\b(?:how\s+(?:big|large|small|long|wide|thick|tall|deep|high)(?!\s+(?:has|have|had|did|does|do|"
    r"was\s+the\s+(?:patient|"
    r"symptom|history|pain)|were\s+the\s+symptoms|after|ago|before|will|would|is\s+the\s+follow))|"
    r"(?:size|sizes|dimensions?|diameters?|length|width|thickness|measurements?|calib(?:er|re))\b|"
    r"how\s+(?:many|much)\s+(?:mm|cm|millimet\w+|centimet\w+)|how\s+(?:much|many)\s+\w+\s+(?:measure)|measur(?:e|es|"
    r"ed|ing)\b|"
    r"(?:what|which)\s+(?:is|was|are|were)\s+the\s+(?:approximate\s+|estimated\s+|total\s+)?volume\s+of)",
    re.IGNORECASE,
)
_AGE_QUESTION = re.compile(
    r"\bhow\s+(?:old|young)\b(?!\s+(?:is|was|are)\s+the\s+(?:fracture|infarct|h(?:a)?ematoma|bleed|lesion|injur))|"
    r"(?<!bone )(?<!skeletal )\bages?\b|\byears?[- ]old\b|\byears?\s+of\s+age\b|"
    r"\bin\s+which\s+year\s+was\s+\w+\s+born\b",
    re.IGNORECASE,
)
_SIZE_ANSWER = re.compile(
    r"(?:A:\s*)?(?:(?:it|they|the\s+\w+)\s+(?:is|was|are|were|measures?|measured)\s+)?(?:(?:about|approximately|"
    r"around|up\s+to|"
    r"less\s+than|more\s+than|over|nearly|at\s+least)\s+)?\d[\d.,]*(?:\s*(?:mm|cm))?(?:\s*(?:x|×|by|to|-|"
    r"–)\s*\d[\d.,]*(?:\s*"
    r"(?:mm|cm))?)*\s*(?:mm|cm|millimet\w+|centimet\w+)[²³]?(?:\s+in\s+(?:size|diameter|length|\w+\s+dimension))?",
    re.IGNORECASE,
)


def size_questions(row: dict, family: str, settings: Settings) -> Verdict:
    """Drops questions about how big something is: a resized volume does not show it."""
    question, answer = (_column(row, name) for name in ("question", "answer"))
    if _SIZE_QUESTION.search(question):
        return Verdict(None, "the question is about a size")
    if _SIZE_ANSWER.fullmatch(answer.strip().rstrip(".")):
        return Verdict(None, "the answer is a size")
    return Verdict(row)


def age_questions(row: dict, family: str, settings: Settings) -> Verdict:
    """Drops questions about the patient's age; how old a fracture is, or the bone age, a scan may well show."""
    if _AGE_QUESTION.search(_column(row, "question")):
        return Verdict(None, "the question is about an age")
    return Verdict(row)


def size_phrases(row: dict, family: str, settings: Settings) -> Verdict:
    """Takes phrases of size out of findings and impressions; drops what says nothing else."""
    changed = dict(row)
    for column in ("finding", "impression"):
        value = row.get(column)
        if isinstance(value, str) and measurements.has_size(value):
            changed[column] = measurements.without_sizes(value)
        elif isinstance(value, list):
            changed[column] = [
                t for t in (measurements.without_sizes(v) if measurements.has_size(v) else v for v in value) if t
            ]
    if changed == row:
        return Verdict(row)
    if not _said(changed, ("finding", "impression")):
        return Verdict(None, "it says nothing but sizes")
    return Verdict(changed, "sizes taken out")


def _column(row: dict, name: str) -> str:
    return str(row.get(name) or row.get(name.capitalize()) or "")


# --- contexts that give the answer away -------------------------------------------------------------------------------

_EMPTY = frozenset(
    "a an the of in on at to and or with for from by as is was are were be been being it its this that these those "
    "there "
    "no not yes which who whom whose he she his her they their has had have having shows showed show demonstrates "
    "demonstrated revealed reveals seen noted found image images scan scans finding findings patient consistent "
    "suggestive indicates indicated suggests suggested mri ct imaging examination".split()
)
_WORD = re.compile(r"[a-z0-9]+")


def _content(text: str) -> list[str]:
    words = _WORD.findall(re.sub(r"^[QA]:\s*", "", text.strip()).lower())
    # A plural, and nothing more: "cysts" gives "cyst" away.
    return [w[:-1] if len(w) > 4 and w.endswith("s") and not w.endswith("ss") else w for w in words if w not in _EMPTY]


def given_away(sentence: str, answer: str) -> bool:
    """Whether a sentence of the context says the answer: all that the answer says, in words of its own or not.

    A "yes" or a "no" cannot be given away by words alone, nor can an answer of one common word of up to four letters.
    """
    wanted = set(_content(answer))
    if not wanted or (len(wanted) == 1 and len(next(iter(wanted))) <= 4):
        return False
    said = set(_content(sentence))
    return len(wanted & said) >= (len(wanted) if len(wanted) < 5 else 0.8 * len(wanted))


def cheating_contexts(row: dict, family: str, settings: Settings) -> Verdict:
    """Drops rows, or cuts sentences, where the context says the answer."""
    answer, context = _column(row, "answer"), row.get("context") or ""
    parts = sentences(context)
    kept = [part for part in parts if not given_away(part, answer)]
    if len(kept) == len(parts):
        return Verdict(row)
    if settings.cheating == "cut":
        return Verdict(row | {"context": " ".join(kept)}, "sentences that say the answer were cut")
    return Verdict(None, "the context says the answer")


def dropped_family(row: dict, family: str, settings: Settings) -> Verdict:
    """PMC-OA and PMC-Inline are no part of RadMD."""
    return Verdict(None, f"{family} is no part of RadMD")


FILTERS: dict[str, Filter] = {
    "dropped_family": dropped_family,
    "radiologic": radiologic,
    "size_questions": size_questions,
    "age_questions": age_questions,
    "cheating_contexts": cheating_contexts,
    "size_phrases": size_phrases,
}
# Table 2. What is not named is kept without exclusions; diagnosis tables are balanced (radmd.py).
OF_FAMILY: dict[str, tuple[str, ...]] = {
    "pmc_oa": ("dropped_family",),
    "pmc_inline": ("dropped_family",),
    "pmc_casereport": ("radiologic", "size_questions", "age_questions", "cheating_contexts"),
    "rad3d_caption": ("radiologic", "size_phrases"),
    "rad3d_vqa": ("radiologic", "size_questions", "age_questions"),
    "rad3d_modality": ("radiologic",),
    "rad3d_rationale": ("radiologic",),
}
