"""Disease names: synonyms, and pairs of diseases in which the presence of one does not exclude the other."""

from __future__ import annotations

import functools
import re

NORMAL = frozenset(
    {"no finding", "no findings", "normal", "healthy", "negative", "no abnormality", "no abnormalities", "no disease",
     "normal study", "normal findings", "no significant finding", "bi rads 1"}
)  # fmt: skip
ANYTHING = "any abnormality"

# Synonyms; the first name of each line is the canonical one.
_SAME = (
    "pleural effusion|effusion|pleural effusions|hydrothorax",
    "cardiomegaly|enlarged heart|heart enlargement|cardiac enlargement|enlarged cardiac silhouette",
    "infiltration|infiltrate|infiltrates|pulmonary infiltrate|lung infiltrate",
    "consolidation|lung consolidation|pulmonary consolidation|airspace consolidation",
    "edema|oedema|pulmonary edema|pulmonary oedema|lung edema|lung oedema",
    "lung opacity|opacity|pulmonary opacity|lung opacities|opacities|airspace opacity",
    "pleural thickening|thickening of the pleura",
    "tuberculosis|tb|pulmonary tuberculosis|pulmonary tb",
    "covid 19|covid|covid19|sars cov 2|covid 19 pneumonia|coronavirus disease",
    "fibrosis|pulmonary fibrosis|lung fibrosis",
    "emphysema|pulmonary emphysema",
    "copd|chronic obstructive pulmonary disease",
    "nodule|lung nodule|pulmonary nodule",
    "mass|lung mass|pulmonary mass",
    "lung tumor|lung tumour|lung cancer",
    "foreign object|foreign body|foreign objects|foreign bodies",
    "support devices|support device",
    "aortic enlargement|enlarged aorta|aortic dilatation",
    "osteophytes|osteophyte|osteophytosis|spondylophytes",
    "disc space narrowing|disk space narrowing|narrowed disc space",
    "foraminal stenosis|neural foraminal stenosis|foraminal narrowing",
    "vertebral collapse|vertebral compression|vertebral compression fracture",
    "spondylolisthesis|spondylolysthesis",
    "surgical implant|implant|implants|surgical implants",
    "suspicious calcification|calcification|calcifications|suspicious calcifications",
    "architectural distortion|distortion",
    "suspicious lymph node|lymphadenopathy|suspicious lymph nodes",
    "bronchiolitis|acute bronchiolitis",
    "broncho pneumonia|bronchopneumonia",
    "cancer|carcinoma|malignancy|malignant tumor|malignant tumour",
    "stroke|cerebral infarction|ischemic stroke|ischaemic stroke",
    "hemorrhage|haemorrhage|bleeding",
)
# general name | names that it may include. If either side is present, the other is not certainly absent, so it is never
# asked about as absent.
_INCLUDES = (
    "lung opacity|consolidation|infiltration|edema|atelectasis|pneumonia|mass|nodule|lung lesion|fibrosis|tuberculosis|"
    "covid 19|broncho pneumonia|bronchiolitis|interstitial lung disease|lung tumor|nodule mass|other opacity",
    "infiltration|consolidation|pneumonia|edema|tuberculosis|covid 19|broncho pneumonia|bronchiolitis",
    "consolidation|pneumonia|broncho pneumonia|covid 19|tuberculosis",
    "pneumonia|covid 19|broncho pneumonia|tuberculosis",
    "lung lesion|mass|nodule|nodule mass|lung tumor|tuberculosis",
    "nodule mass|mass|nodule|lung tumor",
    "lung tumor|mass|nodule|cancer",
    "interstitial lung disease|fibrosis|infiltration",
    "copd|emphysema",
    "enlarged cardiomediastinum|cardiomegaly|aortic enlargement|mediastinal shift",
    "fracture|vertebral collapse|rib fracture|clavicle fracture",
    "pleural other|pleural thickening|pleural effusion",
    "asymmetry|focal asymmetry|global asymmetry",
    "hemorrhage|hematoma|haematoma",
)
_CANONICAL = {word: line.split("|")[0] for line in _SAME for word in line.split("|")}
_RELATED: dict[str, set[str]] = {}
for _line in _INCLUDES:
    _general, *_special = _line.split("|")
    for _name in _special:
        _RELATED.setdefault(_general, set()).add(_name)
        _RELATED.setdefault(_name, set()).add(_general)
_VAGUE = frozenset({"other", "others", "abnormal", "abnormality", "any"})
_EMPTY = frozenset({"the", "of", "a", "an", "and", "in", "with", "to", "acute", "disease", "syndrome"})


@functools.lru_cache(maxsize=65536)
def canonical(disease: str) -> str:
    """Return the name in lower case, without punctuation and with synonyms folded: "Pulmonary Oedema" -> "edema"."""
    plain = " ".join(re.sub(r"[^a-z0-9]+", " ", disease.lower()).split())
    return _CANONICAL.get(plain, plain)


def is_normal(disease: str) -> bool:
    return canonical(disease) in NORMAL


@functools.lru_cache(maxsize=65536)
def words(disease: str) -> frozenset[str]:
    return frozenset(canonical(disease).split()) - _EMPTY


def is_vague(disease: str) -> bool:
    """Return whether a label is too vague for a question: "Other lesion", "abnormal"."""
    return bool(_VAGUE & set(canonical(disease).split()))


def may_coexist(a: str, b: str) -> bool:
    """Return whether b may be present if a is: b is a synonym, a part or a kind of a. Then b is not a safe "no".

    Examples: "rib fracture" and "fracture", "consolidation" and "lung opacity", "TB" and "tuberculosis".
    """
    x, y = canonical(a), canonical(b)
    if x == y or y in _RELATED.get(x, ()):
        return True
    u, v = words(a), words(b)
    return not u or not v or u <= v or v <= u


def spoken(disease: str) -> str:
    """Return a label as written in a sentence: "Pleural_Thickening" -> "pleural thickening", "COPD" -> "COPD"."""
    keep = lambda w: sum(c.isupper() for c in w) > 1 or any(c.isdigit() for c in w)  # noqa: E731
    return " ".join(w if keep(w) else w.lower() for w in disease.replace("_", " ").split())
