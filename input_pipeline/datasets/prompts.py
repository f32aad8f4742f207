"""Task templates: our wording of what a user may ask, drawn by the sample's own generator.

`prompts.json` holds groups of at least ten sentences. A group is a task and, where it matters, a body region: a spine
is never asked about the lungs. Sentences say "this study" rather than one image or several, so that they fit any number
of scans; the scans themselves are put before or after the sentence by the data set.
"""

from __future__ import annotations

import functools
import json
import pathlib
import string

import numpy as np

FILE = pathlib.Path(__file__).with_name("prompts.json")
LEAST = 10

# Each group and the one word that its sentences leave open.
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
    """Groups of sentences as read from JSON -> the same, checked.

    Raises:
      ValueError: all faults at once: a missing or unknown group, fewer than ten sentences, a repeated or blank one, an
        image mark, a placeholder that is missing, misspelt or not the group's.
    """
    problems = []
    if not isinstance(groups, dict):
        raise ValueError(f"{source}: expected an object of lists of sentences, got {type(groups).__name__}")
    for name in sorted(GROUPS.keys() - groups.keys()):
        problems.append(f"group {name} is missing")
    for name, sentences in groups.items():
        if name not in GROUPS:
            problems.append(f"group {name} is unknown (known: {', '.join(GROUPS)})")
            continue
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            problems.append(f"group {name} must be a list of sentences")
            continue
        if len({s.casefold() for s in sentences}) < max(LEAST, len(sentences)):
            problems.append(f"group {name}: {LEAST} different sentences at least, none twice; it has {len(sentences)}")
        want = [] if GROUPS[name] is None else [GROUPS[name]]
        for sentence in sentences:
            try:
                fields = [field for _, field, _, _ in string.Formatter().parse(sentence) if field is not None]
            except ValueError as error:
                problems.append(f"group {name}: {sentence!r}: {error}")
                continue
            if fields != want:
                found = ", ".join(f"{{{f}}}" for f in fields) or "none"
                problems.append(f"group {name}: {sentence!r} has {found}, wanted {{{want[0]}}} once" if want else
                                f"group {name}: {sentence!r} has {found}, wanted no placeholder")  # fmt: skip
            if sentence != sentence.strip() or not sentence or "<image" in sentence:
                problems.append(f"group {name}: {sentence!r} is blank, has outer spaces or an image mark")
    if problems:
        raise ValueError(f"{source}: " + "; ".join(problems))
    return {name: tuple(sentences) for name, sentences in groups.items()}


@functools.cache
def load() -> dict[str, tuple[str, ...]]:
    """All groups, read and checked once a process."""
    return check_prompts(json.loads(FILE.read_text(encoding="utf-8")), FILE.name)


def draw(group: str, rng: np.random.Generator, **values: str) -> str:
    """One sentence of the group, its placeholder filled: `draw("modality_judge", rng, modality="CT")`."""
    sentences = load()[group]
    sentence = sentences[int(rng.random() * len(sentences))]
    # Not str.format: a disease name may hold braces, and nothing of it may be looked up.
    for key, value in values.items():
        sentence = sentence.replace("{" + key + "}", value)
    return sentence
