"""Imaging modalities: what a label of a table means, and which other modality it is certainly not.

A "no" question must be true. A CT angiography is CT and angiography; a plain "PET" may have been fused with CT; so a
question about modality is only answered "no" if the two can in no way both hold.
"""

from __future__ import annotations

import re

import numpy as np

# Name in questions -> words of labels that mean it (whole words, lower case).
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

# What each of them also is, beyond doubt: may be asked about with the answer yes.
ALSO: dict[str, tuple[str, ...]] = {
    "CT angiography": ("CT", "angiography"),
    "MR angiography": ("MRI", "angiography"),
    "PET-CT": ("PET", "CT"),
    "mammography": ("X-ray",),
    "fluoroscopy": ("X-ray",),
}
# What each may also be: never asked about with the answer no. Read in both directions.
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
# Two words of one label that together mean a third.
_TOGETHER = {
    frozenset({"CT", "angiography"}): "CT angiography",
    frozenset({"MRI", "angiography"}): "MR angiography",
    frozenset({"PET", "CT"}): "PET-CT",
}


def modalities(label: str) -> frozenset[str]:
    """A label of a table -> the modalities it names, as keys of WORDS; empty if it names none.

    "CT - noncontrast" -> {CT}; "MR - T2W FLAIR" -> {MRI}; "Angiography (DSA)" -> {angiography}; "PET-CT" -> {PET-CT}
    """
    words = re.sub(r"[^a-z0-9]+", " ", label.lower()).split()
    whole = _LOOKUP.get(" ".join(words))
    if whole:
        return frozenset({whole})
    # Short forms like "an", "be" or "en" are words of English too: they count alone or as a prefix, "AN - aortogram".
    prefix = re.match(r"\s*([A-Za-z]{2})\s*[-:(/,]", label)
    found, k = [], 0
    while k < len(words):
        for size in range(min(_LONGEST, len(words) - k), 0, -1):
            name = _LOOKUP.get(" ".join(words[k : k + size]))
            if name and (size > 1 or len(words[k]) > 2 or words[k] in ("ct", "mr", "t1", "t2") or (k == 0 and prefix)):
                found.append(name)
                k += size
                break
        else:
            k += 1
    names = set(found)
    for parts, whole in _TOGETHER.items():
        if parts <= names:
            names = names - parts | {whole}
    return frozenset(names)


def truths(names: frozenset[str]) -> tuple[str, ...]:
    """All that may be asked with the answer yes."""
    return tuple(sorted({n for name in names for n in (name, *ALSO.get(name, ()))}))


def falsehoods(names: frozenset[str]) -> tuple[str, ...]:
    """All that may be asked with the answer no."""
    excluded = set().union(*(_RELATED[name] for name in truths(names)))
    return tuple(name for name in WORDS if name not in excluded)


class ModalityQuestions:
    """Draws what to ask: yes and no equally often, wrong modalities as often as a table has them (plus one each).

    Drawing them by their share keeps the name of a modality from giving the answer away.
    """

    def __init__(self, labels):
        counts = dict.fromkeys(WORDS, 1.0)
        for names in labels:
            for name in names:
                counts[name] += 1
        self._counts = counts
        self._pools: dict[frozenset[str], tuple[tuple[str, ...], tuple[str, ...], np.ndarray]] = {}

    def draw(self, names: frozenset[str], rng: np.random.Generator) -> tuple[str, str] | None:
        """(modality to ask about, "yes" or "no") for a scan of these modalities; None if nothing can be denied."""
        if names not in self._pools:
            no = falsehoods(names)
            self._pools[names] = truths(names), no, np.cumsum([self._counts[n] for n in no])
        yes, no, edges = self._pools[names]
        if not no:
            return None
        if rng.random() < 0.5:
            return yes[int(rng.random() * len(yes))], "yes"
        return no[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))], "no"
