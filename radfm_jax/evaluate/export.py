"""`--export DIR`: the benchmark for other models.

DIR/questions.jsonl   a line a question: id, task, dataset, prompt, references, closed, scans, slices
DIR/slices/*.png      of every scan one slice, for models that see single pictures: all of a 2D scan, the middle slice
                      of a volume (number n // 2 + 1 of n along the third axis as it is read), 8 bits, least voxel
                      black and greatest white (or the scan's window), full resolution
DIR/README.txt        how to answer

`slices` of a question stand in the order of its scans: {"path" below DIR, "slice", "of"}, or {"error"}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from input_pipeline.images.slices import slices
from input_pipeline.samples import Scan
from radfm_jax.evaluate.radbench import Question, write_lines

README = """\
questions.jsonl has one question a line. `prompt` holds `<image-1>` where the first of `scans` stands; `context`, if it
is there, stands before it. A model that sees single pictures takes those of `slices`.

Answer each with one line of another file,

    {"id": "vqa_rad/17", "answer": "Left lower lobe."}

for yes/no questions with "p_yes", the probability of yes against no, if the model has one; for a question that it
cannot answer with "error" instead of "answer". It is scored by

    python -m radfm_jax.evaluate radbench --config=... --answers NAME=answers.jsonl --out=scores

Do not show `references` to the model. Scans and text are of the data sets they come from, and under their terms.
"""


def export(
    questions: Sequence[Question], directory: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Writes DIR; pictures that are there already stay. Returns scan -> why it has no picture."""
    pictures = directory / "slices"
    pictures.mkdir(parents=True, exist_ok=True)
    known: dict[Scan, dict] = {}
    every = list(dict.fromkeys(scan for question in questions for scan in question.scans))
    for number, scan in enumerate(every, 1):
        known[scan] = _picture(scan, directory)
        progress(number, len(every))
    write_lines(
        directory / "questions.jsonl", (q.to_dict() | {"slices": [known[scan] for scan in q.scans]} for q in questions)
    )
    (directory / "README.txt").write_text(README)
    return {scan.path: found["error"] for scan, found in known.items() if "error" in found}


def _picture(scan: Scan, directory: Path) -> dict:
    key = json.dumps([scan.path, scan.volume, scan.window]).encode()
    name = hashlib.blake2b(key, digest_size=10).hexdigest()
    file, note = directory / "slices" / f"{name}.png", directory / "slices" / f"{name}.json"
    if file.exists() and note.exists():
        return json.loads(note.read_text())
    try:
        (middle,) = slices(scan)
    except ValueError as error:
        return {"error": str(error)}
    middle.image.save(file, format="PNG")
    found = {"path": f"slices/{name}.png", "slice": middle.number, "of": middle.count}
    note.write_text(json.dumps(found))
    return found
