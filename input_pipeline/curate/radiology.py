"""Whether an image is radiologic, from its caption, a modality label, or the user's classifier.

A caption that names only radiologic examinations is radiologic; one that names only other kinds of images is not. If it
names both, its parts are judged separately, and one radiologic part suffices. If it names neither, the result is None,
and the caller's policy or a classifier decides.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from input_pipeline.datasets.modalities import modalities

# Two patterns each: for the text, and for the text in lower case. re.IGNORECASE would be five times slower.
_RADIOLOGIC = (
    re.compile(
        r"\b(?=[A-Za-z])(?:(?:[HMP]?D|HR|CB|CE|NC|micro-?|PET[-/ ]?|SPECT[-/ ]?|cone[- ]beam )?CTA?|CTPA|CTs|"
        r"(?:f|cine[- ]?)?MRI|"
        r"MRIs|MRA|MRCP|MR (?:images?|imaging|angio\w+|scans?|venograph\w+|urograph\w+)|"
        r"(?:T1|T2|proton[- ]density)[- ]?(?:weighted|WI|W)\b|(?:T1|T2|DW|PD)WI|FLAIR|STIR|ADC|"
        r"(?:diffusion|susceptibility)[- ]weighted|PET|SPECT|FDG\S*|DSA|X[- ]?rays?|CXR|AXR|DEXA|DXA|IVU|IVP|HSG|VCUG|"
        r"ERCP|TTE|TEE|OPG)\b"
    ),
    re.compile(
        r"\b(?:computed|computeri[sz]ed|magnetic resonance|positron emission|single[- ]photon)\b|"
        r"tomogra\w+|\b(?!autoradio)\w*radiogra\w+|roentgen\w*|ultraso\w+|\bsonogra\w+|echogra\w+|echocardiogra\w+|"
        r"doppler|angiogra\w+|arteriogra\w+|venogra\w+|phlebogra\w+|aortogra\w+|cholangiogra\w+|pyelogra\w+|urogra\w+|"
        r"cystogra\w+|fistulogra\w+|myelogra\w+|mammogra\w+|galactogra\w+|hysterosalpingogra\w+|lymphogra\w+|"
        r"scintigra\w+|bone scans?|nuclear (?:medicine|scan)\w*|fluoroscop\w+|barium|esophagra\w+|oesophagra\w+|"
        r"plain films?|chest films?|panoramic (?:film|view)|tractogra\w+|elastogra\w+|angio-?ct|orthopantomogra\w+"
    ),
)
_OTHER = (
    re.compile(
        r"\b(?=[A-Za-z])(?:H&E|HE stain\w*|PAS|SEM|TEM|qPCR|RT-PCR|PCR|"
        r"(?:ECG|EKG)(?! (?:leads?|electrodes?|wires?|gat\w+|trigger\w*))|EEG|EMG|OCT|ROC|Kaplan)\b"
    ),
    re.compile(
        r"histo(?:log|patholog|chem)\w+|patholog\w{1,20} (?:section|specimen|examination|finding|image)\w*|"
        r"microscop\w+|photomicrogra\w+|micrograph\w*|h(?:a)?ematoxylin|\beosin\b|immuno(?:histochem|stain|fluoresc|blot)\w+|staining|"
        r"original magnification|magnification|biops\w+|cytolog\w+|smear|gross (?:specimen|appearance|pathology)|"
        r"macroscop\w+|intra-?operative (?:view|photo\w*|image|finding|picture)s?|photogra\w+|"
        r"clinical (?:picture|appearance|photo)\w*|endoscop\w*\b(?!\s+ultraso)|colonoscop\w+|gastroscop\w+|"
        r"bronchoscop\w+|laparoscop\w+|arthroscop\w+|cystoscop\w+|dermoscop\w+|"
        r"fundus(?= (?:photo|exam|image|auto|fluor|of the (?:\w+ )?eye))|(?:ocular|optic|retinal) fundus|fundoscop\w+|"
        r"slit[- ]lamp|optical coherence|electro(?:cardio|encephalo|myo)gra\w+|flow ?chart|flow diagram|diagram|"
        r"schematic|scheme|drawing|illustration|pedigree|sequencing|chromatogra\w+|western blot|gel electrophoresis|"
        r"electrophoresis|\bplots?\b|histogram|bar (?:chart|graph)|\bgraphs?\b|"
        # Excludes the curve of a spine or a tube.
        r"(?<!lumbar )(?<!thoracic )(?<!scoliotic )(?<!spinal )\bcurves?\b(?! (?:(?:super|infer|poster|anter)iorly|"
        r"medially|laterally|up|down|back|around|over|into|to the)\b)|forest plot|box ?plot|time ?line|"
        r"surgical (?:specimen|field|view)|resected (?:specimen|tumou?r)|autopsy|necropsy|karyotyp\w+"
    ),
)
_SAME_LETTERS = str.maketrans("İıſK", "iisk")  # as for re.IGNORECASE
# "CT-guided biopsy: section", "before CT", "status post bronchoscopy" do not describe the image itself.
_ASIDE = re.compile(
    r"\b\w+[- ]guid(?:ed|ance)\b|\b(?:after|before|prior to|preceding|previous|following)\s+(?:the\s+)?(?:\w+\s+)?"
    r"(?:CT|MRI|PET|ultrasound|angiography|biopsy|scan)\b|\b(?:s/p|status[- ]post|history of|post)\s+"
    r"(?:[\w/-]+\s+){0,3}?(?:biops\w+|\w+oscopy)\b",
    re.IGNORECASE,
)
_PART = re.compile(r"(?<=[.;])\s+|(?=\([A-Za-z](?:\s*[-–,]\s*[A-Za-z])*\))")
NOT_RADIOLOGIC = frozenset({"histopathology", "a photograph", "endoscopy"})


# Path of an image -> probability that it is radiologic.
Classifier = Callable[[str], float]


def by_caption(text: str) -> bool | None:
    """Return whether a caption or a sentence describes a radiologic image; None if it is undecided."""
    text = _ASIDE.sub(" ", text)
    yes, no = _first(_RADIOLOGIC, text), _first(_OTHER, text)
    if (yes is None) != (no is None):
        return no is None
    if yes is None:
        return None
    # The caption names both kinds. One part that names only radiologic examinations suffices.
    parts = [tuple(_first(kind, part) is not None for kind in (_RADIOLOGIC, _OTHER)) for part in _PART.split(text)]
    if (True, False) in parts:
        return True
    if (False, True) not in parts and len(parts) > 1:
        return None
    return yes < no


def _first(kind: tuple[re.Pattern, re.Pattern], text: str) -> int | None:
    """Return the first position where a text names a kind of image, or None."""
    texts = (text, (text if text.isascii() else text.translate(_SAME_LETTERS)).lower())
    matches = (pattern.search(form) for pattern, form in zip(kind, texts, strict=True))
    return min((match.start() for match in matches if match), default=None)


def by_label(label: str) -> bool | None:
    """Return whether a modality label is radiologic ("CT - noncontrast"); None if it names no modality."""
    names = modalities(label)
    return None if not names else bool(names - NOT_RADIOLOGIC)


def open_classifier(name: str) -> Classifier:
    """Import and return the classifier `package.module:function`. Raises ValueError."""
    module, _, attribute = name.partition(":")
    try:
        classifier = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"classifier {name!r} cannot be imported: {error} (write package.module:function)") from None
    if not callable(classifier):
        raise ValueError(f"classifier {name!r} is not a function")
    return classifier
