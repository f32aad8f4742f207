"""Imaging modalities: the meaning of labels, and which modalities exclude each other.

A "no" must be true. A CT angiography is both CT and angiography; a plain "PET" may have been fused with CT. So the
answer is "no" only if two modalities cannot apply at the same time.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from input_pipeline.datasets import prompts
from input_pipeline.datasets.base import TableDataset, pick, pick_weighted
from input_pipeline.datasets.rows import Row

# Name in questions -> words that mean it in labels (whole words, lower case).
WORDS: dict[str, tuple[str, ...]] = {
    "CT angiography": ("cta", "ctpa", "ct angiography", "ct angiogram", "ct venography"),
    "MR angiography": ("mra", "mrv", "mr angiography", "mri angiography", "mr angiogram", "mr venography"),
    "PET-CT": ("pet ct", "pet and ct", "petct"),
    "mammography": ("mammography", "mammogram", "mammograms", "mg", "tomosynthesis", "galactography", "mammo"),
    "fluoroscopy": (
        "fluoroscopy", "fluoroscopic", "fluoro", "barium", "barium swallow", "barium enema", "bas", "be", "bae", "ugi",
        "upper gi", "esophagram", "hysterosalpingogram", "hysterosalpingography", "myelogram", "cystogram", "vcug",
        "ercp",
    ),
    "angiography": (
        "angiography", "angiogram", "angio", "an", "dsa", "angiography dsa", "dsa angiography", "arteriogram",
        "arteriography", "venogram", "venography", "digital subtraction angiography",
    ),
    "SPECT": ("spect", "spect ct"),
    "PET": ("pet", "positron emission tomography"),
    "nuclear medicine": (
        "nuclear medicine", "nm", "scintigraphy", "scintigram", "bone scan", "nuclear", "hida", "vq scan", "v q scan",
    ),
    "CT": ("ct", "cat", "computed tomography", "hrct", "cect", "ncct", "cbct"),
    "MRI": (
        "mri", "mr", "magnetic resonance", "magnetic resonance imaging", "mrcp", "fmri", "t1", "t2", "flair", "dwi",
        "adc",
    ),
    "ultrasound": (
        "ultrasound", "ultrasonography", "us", "sonography", "sonogram", "doppler", "echo", "echocardiography",
        "echocardiogram", "ultrasonogram",
    ),
    "X-ray": (
        "x ray", "xray", "xr", "x rays", "radiograph", "radiographs", "radiography", "plain film", "plain radiograph",
        "plain radiography", "cr", "dr", "dx", "cxr", "dexa", "ivp", "ivu", "urogram", "urography",
    ),
    "histopathology": (
        "histopathology", "pathology", "histology", "microscopy", "hi", "gp", "gross pathology", "micro", "biopsy",
        "path",
    ),
    "a photograph": ("photograph", "photo", "ph", "clinical photo", "gross photo", "picture", "intraoperative"),
    "endoscopy": ("endoscopy", "en", "endoscopic", "colonoscopy", "bronchoscopy"),
}  # fmt: skip

# Modalities implied by each one: may be asked about with the answer yes.
ALSO: dict[str, tuple[str, ...]] = {
    "CT angiography": ("CT", "angiography"),
    "MR angiography": ("MRI", "angiography"),
    "PET-CT": ("PET", "CT"),
    "mammography": ("X-ray",),
    "fluoroscopy": ("X-ray",),
}
# Modalities compatible with each one: never asked about with the answer no. Symmetric.
MAYBE: dict[str, tuple[str, ...]] = {
    "angiography": ("X-ray", "fluoroscopy", "CT", "MRI", "CT angiography", "MR angiography"),
    "CT angiography": ("CT", "angiography", "PET-CT"),
    "MR angiography": ("MRI",),
    "PET-CT": ("PET", "CT", "nuclear medicine"),
    "PET": ("CT", "nuclear medicine", "MRI"),
    "SPECT": ("nuclear medicine", "CT"),
    "nuclear medicine": ("CT",),
    "mammography": ("X-ray", "fluoroscopy"),
    "fluoroscopy": ("X-ray", "CT", "endoscopy"),
    "endoscopy": ("ultrasound", "a photograph"),
    "histopathology": ("a photograph",),
}

_LOOKUP = {word: name for name, words in WORDS.items() for word in words}
_LOOKUP |= {name.lower().replace("-", " "): name for name in WORDS}
_LONGEST = max(word.count(" ") + 1 for word in _LOOKUP)
_RELATED = {name: {name, *ALSO.get(name, ()), *MAYBE.get(name, ())} for name in WORDS}
for _name, _others in list(_RELATED.items()):
    for _other in list(_others):
        _RELATED[_other].add(_name)
# Two modalities in one label that mean a third.
_COMBINED = {
    frozenset({"CT", "angiography"}): "CT angiography",
    frozenset({"MRI", "angiography"}): "MR angiography",
    frozenset({"PET", "CT"}): "PET-CT",
}


def modalities(label: str) -> frozenset[str]:
    """Return the modalities that a label names, as keys of WORDS; empty if it names none.

    "CT - noncontrast" -> {CT}; "MR - T2W FLAIR" -> {MRI}; "Angiography (DSA)" -> {angiography}; "PET-CT" -> {PET-CT}
    """
    words = re.sub(r"[^a-z0-9]+", " ", label.lower()).split()
    if exact := _LOOKUP.get(" ".join(words)):
        return frozenset({exact})
    # Short forms like "an", "be" or "en" are also English words: they count alone or as a prefix, "AN - aortogram".
    prefix = re.match(r"\s*([A-Za-z]{2})\s*[-:(/,]", label)
    names, k = set(), 0
    while k < len(words):
        for size in range(min(_LONGEST, len(words) - k), 0, -1):
            name = _LOOKUP.get(" ".join(words[k : k + size]))
            if name and (size > 1 or len(words[k]) > 2 or words[k] in ("ct", "mr", "t1", "t2") or (k == 0 and prefix)):
                names.add(name)
                k += size
                break
        else:
            k += 1
    for parts, combined in _COMBINED.items():
        if parts <= names:
            names = names - parts | {combined}
    return frozenset(names)


def truths(names: frozenset[str]) -> tuple[str, ...]:
    """Return all modalities X for which "Is this X?" has the answer yes."""
    return tuple(sorted({n for name in names for n in (name, *ALSO.get(name, ()))}))


def falsehoods(names: frozenset[str]) -> tuple[str, ...]:
    """Return all modalities X for which "Is this X?" certainly has the answer no."""
    excluded = set().union(*(_RELATED[name] for name in truths(names)))
    return tuple(name for name in WORDS if name not in excluded)


@dataclasses.dataclass(kw_only=True, eq=False)
class ModalityDataset(TableDataset):
    """Questions about the modality, open or yes/no. The last item of a row's value is its modalities, if any.

    Yes and no are equally frequent. Wrong modalities are drawn by their frequency in the table plus one, so that the
    name of a modality does not give the answer away.
    """

    modalities: dict[str, str] = dataclasses.field(default_factory=dict)  # label that WORDS do not cover -> a modality
    judgement: float = 0.5  # share of yes/no questions

    def names(self, row: Row, label: str) -> frozenset[str]:
        """Return the modalities that a label names. Raises RowError if it names none."""
        names = modalities(self.modalities.get(label, label))
        if not names:
            remedy = f"use one of {', '.join(WORDS)}, or map it with `modalities`"
            raise row.error(f"modality {label[:60]!r} is unknown", remedy)
        return names

    def finish(self):
        self._counts = dict.fromkeys(WORDS, 1.0)
        for *_, names in self._rows:
            for name in names or ():
                self._counts[name] += 1
        self._pools: dict[frozenset[str], tuple[tuple[str, ...], tuple[str, ...], np.ndarray]] = {}
        return []

    def ask(self, names: frozenset[str], label: str, rng: np.random.Generator) -> tuple[str, str]:
        """Draw a question and its answer: yes/no about one modality, or which modality it is."""
        if rng.random() < self.judgement:
            if names not in self._pools:
                no = falsehoods(names)
                self._pools[names] = truths(names), no, np.cumsum([self._counts[n] for n in no])
            yes, no, edges = self._pools[names]
            if no:  # if no "no" is safe, only "yes" would be asked, which gives the answer away
                answer = "yes" if rng.random() < 0.5 else "no"
                modality = pick(rng, yes) if answer == "yes" else pick_weighted(rng, no, edges)
                return prompts.draw("modality_judge", rng, modality=modality), answer
        return prompts.draw("modality_open", rng), label
