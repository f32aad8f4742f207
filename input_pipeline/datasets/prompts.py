"""Instruction templates, drawn by the sample's own generator.

`prompts.json` has groups of at least ten sentences. A group is a task and, where it matters, a body region. Sentences
say "this study" instead of "image" or "images", so that they fit any number of scans. The data set puts the scans
before or after the sentence.
"""

from __future__ import annotations

import functools
import pathlib
import string

import numpy as np

from input_pipeline.files import read_json

FILE = pathlib.Path(__file__).with_name("prompts.json")
MIN_SENTENCES = 10

# Group -> the placeholder of its sentences.
GROUPS: dict[str, str | None] = {
    "modality_open": None,
    "modality_judge": "modality",
    "plane_open": None,
    **{f"diagnosis_open_{region}": None for region in ("cxr", "pcxr", "mammo", "spine", "general")},
    **{f"diagnosis_judge_{region}": "disease" for region in ("cxr", "pcxr", "mammo", "spine", "general")},
    **dict.fromkeys(("report_cxr", "caption_figure", "caption_single", "report", "rationale")),
    **{f"mpx_{kind}": None for kind in ("followup", "ddx", "how", "diagnosis", "findings", "exam", "discussion")},
}


def check_prompts(groups: dict, source="prompts") -> dict[str, tuple[str, ...]]:
    """Check groups of sentences as read from JSON and return them as tuples.

    Raises:
      ValueError: lists all problems: a missing or unknown group, fewer than ten sentences, a repeated or blank
        sentence, an image mark, a missing, misspelt or wrong placeholder.
    """
    if not isinstance(groups, dict):
        raise ValueError(f"{source}: expected an object of lists of sentences, got {type(groups).__name__}")
    problems = [f"group {name} is missing" for name in sorted(GROUPS.keys() - groups.keys())]
    for name, sentences in groups.items():
        if name not in GROUPS:
            problems.append(f"group {name} is unknown (known: {', '.join(GROUPS)})")
            continue
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            problems.append(f"group {name} must be a list of sentences")
            continue
        if len({s.casefold() for s in sentences}) < max(MIN_SENTENCES, len(sentences)):
            need = f"at least {MIN_SENTENCES} sentences are required, all different"
            problems.append(f"group {name}: {need}; it has {len(sentences)}")
        expected = [] if GROUPS[name] is None else [GROUPS[name]]
        for sentence in sentences:
            try:
                fields = [field for _, field, _, _ in string.Formatter().parse(sentence) if field is not None]
            except ValueError as error:
                problems.append(f"group {name}: {sentence!r}: {error}")
                continue
            if fields != expected:
                actual = ", ".join(f"{{{f}}}" for f in fields) or "none"
                need = f"{{{expected[0]}}} once" if expected else "no placeholder"
                problems.append(f"group {name}: {sentence!r} has {actual}, expected {need}")
            if sentence != sentence.strip() or not sentence or "<image" in sentence:
                problems.append(f"group {name}: {sentence!r} is blank, has outer spaces or an image mark")
    if problems:
        raise ValueError(f"{source}: " + "; ".join(problems))
    return {name: tuple(sentences) for name, sentences in groups.items()}


@functools.cache
def load() -> dict[str, tuple[str, ...]]:
    """Return all groups, read and checked once per process."""
    return check_prompts(read_json(FILE), FILE.name)


def draw(group: str, rng: np.random.Generator, **values: str) -> str:
    """Draw a sentence of a group and fill its placeholder: `draw("modality_judge", rng, modality="CT")`."""
    sentences = load()[group]
    sentence = sentences[int(rng.random() * len(sentences))]
    # Not str.format, because a disease name may contain braces.
    for key, value in values.items():
        sentence = sentence.replace("{" + key + "}", value)
    return sentence
