"""Functions of the tasks that `radbench --lmms-eval` writes.

lmms-eval imports a copy of this file, so it needs no other module of this project.
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
TASKS = ("modality", "diagnosis", "vqa", "report", "rationale")


def doc_to_visual(doc, lmms_eval_specific_kwargs=None):
    """Return the images of a question, in order."""
    from PIL import Image

    images = []
    for path in doc["images"]:
        with Image.open(HERE / path) as image:
            images.append(image.convert("RGB"))
    return images


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """Return the prompt with each mark `<image-1>` replaced by `[image 1]`, because images come before the text."""
    return re.sub(r"<image-(\d+)>", r"[image \1]", doc["prompt"])


def process_results(doc, results):
    """Return the score of an answer, and its line in the file of answers."""
    answer = results[0].strip()
    return {
        "radbench_match": float(_matches(answer, doc["reference"], doc["choices"])),
        "radbench_answers": {"id": doc["id"], "answer": answer},
    }


def _matches(answer, reference, choices):
    words = lambda text: re.findall(r"[^\W_]+", text.casefold())  # noqa: E731
    if not choices:
        return words(answer) == words(reference)
    positions = {choice: f" {' '.join(words(answer))} ".find(f" {' '.join(words(choice))} ") for choice in choices}
    named = [choice for choice in sorted(choices, key=positions.__getitem__) if positions[choice] >= 0]
    return named[:1] == [reference]


def write_answers(task, answers):
    """Write answers_TASK.jsonl, the input of `radbench --answers`, and return the number of answers."""
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
    (HERE / f"answers_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def write_modality_answers(answers):
    """Write the answers of one task."""
    return write_answers("modality", answers)


def write_diagnosis_answers(answers):
    """Write the answers of one task."""
    return write_answers("diagnosis", answers)


def write_vqa_answers(answers):
    """Write the answers of one task."""
    return write_answers("vqa", answers)


def write_report_answers(answers):
    """Write the answers of one task."""
    return write_answers("report", answers)


def write_rationale_answers(answers):
    """Write the answers of one task."""
    return write_answers("rationale", answers)
