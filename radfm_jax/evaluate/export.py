"""`--export DIR`: the benchmark for other models.

DIR/questions.jsonl   a question per line: id, task, dataset, prompt, references, closed, scans, slices
DIR/roots.json        data set -> directory that the paths of `scans` are relative to
DIR/slices/*.png      one 8-bit slice of each scan at full resolution, for models that read 2D images. A volume is
                      exported as its middle slice (number n // 2 + 1 of n along the third axis). The scan's
                      minimum is black and its maximum white, or the ends of its window are.
DIR/README.txt        how to answer

`slices` has an entry per scan of the question, in order: {"path" below DIR, "slice", "of"}, or {"error"}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from input_pipeline.files import atomic_write, read_json, write_json, write_json_lines, write_text
from input_pipeline.images.slices import slices
from input_pipeline.samples import Scan
from radfm_jax.evaluate.radbench import Question
from radfm_jax.evaluate.radbench_build import write_roots

README = """\
questions.jsonl has one question per line. In `prompt`, `<image-1>` marks the position of the first of `scans`. If there
is a `context`, it comes before the prompt. Models that read 2D images can use `slices`. Paths of `scans` are relative
to the directory of the data set in roots.json.

Write one answer per line to another file:

    {"id": "vqa_rad/17", "answer": "Left lower lobe."}

For yes/no questions, add "p_yes", the probability of yes relative to yes and no, if the model provides it. For a
question without an answer, write "error" instead of "answer". Score the file with

    python -m radfm_jax.evaluate radbench --config=... --answers NAME=answers.jsonl --out=scores

Do not show `references` to the model. Scans and texts are subject to the terms of their data sets.
"""


def export(
    questions: Sequence[Question], directory: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Write the questions and slices; existing slices are kept. Returns scan path -> error for failed slices."""
    (directory / "slices").mkdir(parents=True, exist_ok=True)
    all_scans = list(dict.fromkeys(scan for question in questions for scan in question.scans))
    # The slice of a scan keeps its name if the data or the export move.
    names = {
        scan: json.dumps([question.dataset, relative.path, scan.volume, scan.window, *filter(None, [scan.series])])
        for question in questions
        for scan, relative in zip(question.scans, question.relative_scans(), strict=True)
    }
    entries: dict[Scan, dict] = {}
    for number, scan in enumerate(all_scans, 1):
        entries[scan] = _write_slice(scan, names[scan], directory)
        progress(number, len(all_scans))
    lines = (q.to_dict() | {"slices": [entries[scan] for scan in q.scans]} for q in questions)
    write_json_lines(directory / "questions.jsonl", lines)
    write_roots(questions, directory)
    write_text(directory / "README.txt", README)
    return {scan.path: entry["error"] for scan, entry in entries.items() if "error" in entry}


def _write_slice(scan: Scan, key: str, directory: Path) -> dict:
    name = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    file, entry_file = directory / "slices" / f"{name}.png", directory / "slices" / f"{name}.json"
    if file.exists() and entry_file.exists():
        try:
            return read_json(entry_file, kind=dict)
        except ValueError:  # a full disk or a power failure left it incomplete: write both again
            entry_file.unlink()
    try:
        (middle,) = slices(scan)
    except ValueError as error:
        return {"error": str(error)}
    with atomic_write(file) as partial:
        middle.image.save(partial, format="PNG")
    entry = {"path": f"slices/{name}.png", "slice": middle.number, "of": middle.count}
    write_json(entry_file, entry)
    return entry
