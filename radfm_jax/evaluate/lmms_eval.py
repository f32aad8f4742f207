"""`--lmms-eval DIR`: the questions as tasks of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

    DIR/radbench_TASK.yaml   a task per task of RadBench; the tag `radbench` selects all
    DIR/TASK.jsonl           its questions: id, prompt, images, choices, reference
    DIR/images/*.png         an image per scan (montage.py)
    DIR/utils.py             the functions of the tasks (lmms_eval_utils.py)
    DIR/README.txt           how to run them, and how to score the answers with this program

Checked with the task loader of lmms-eval 0.7.3.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from input_pipeline.files import read_json_lines, write_json_lines, write_text
from radfm_jax.evaluate import lmms_eval_utils, montage
from radfm_jax.evaluate.endpoint import CHOICES, save_montages
from radfm_jax.evaluate.radbench import TASKS, Question

YAML = """\
# {title} of RadBench, written by `radbench --lmms-eval`. lmms-eval finds the data next to this file.
task: radbench_{task}
tag: radbench
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: reference
generation_kwargs:
  max_new_tokens: 200
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: radbench_match
    aggregation: mean
    higher_is_better: true
  - metric: radbench_answers
    aggregation: !function utils.write_{task}_answers
    higher_is_better: true
metadata:
  - version: 1.0
"""
README = """\
Tasks of lmms-eval, one for each task of RadBench:

    python -m lmms_eval --include_path {directory} --tasks radbench \\
        --model MODEL --model_args pretrained=NAME --batch_size 1

`radbench_match` is a simple match in lower case. `radbench_answers` is the number of answers; it also writes them to
answers_TASK.jsonl in this folder. To compute all scores of RadBench, run

    cat answers_*.jsonl > NAME.jsonl
    python -m radfm_jax.evaluate radbench --config=... --answers NAME=NAME.jsonl --out=scores

Use the config with which this folder was written. Scans and texts are subject to the terms of their data sets.
"""


def export_task(questions: Sequence[Question], directory: Path, layout: montage.Layout) -> dict[str, str]:
    """Write the folder. Returns scan path -> error for scans without an image; their questions have fewer images."""
    failed = save_montages(questions, layout, directory / "images")
    saved: dict[str, dict[int, str]] = {}
    for entry in read_json_lines(directory / "images" / "montages.jsonl"):
        saved.setdefault(entry["id"], {})[entry["image"]] = f"images/{entry['file']}"
    for task, title in TASKS.items():
        if of_task := [q for q in questions if q.task == task]:
            write_json_lines(directory / f"{task}.jsonl", (_line(q, saved.get(q.row_id, {})) for q in of_task))
            write_text(directory / f"radbench_{task}.yaml", YAML.format(title=title, task=task))
    shutil.copyfile(lmms_eval_utils.__file__, directory / "utils.py")
    write_text(directory / "README.txt", README.format(directory=directory))
    return failed


def _line(question: Question, images: dict[int, str]) -> dict:
    choices = [CHOICES.format(", ".join(question.closed))] if question.closed else []
    prompt = " ".join(part for part in (question.context, question.prompt, *choices) if part)
    return {
        "id": question.row_id,
        "prompt": prompt,
        "images": [images[number] for number in sorted(images)],
        "choices": list(question.closed),
        "reference": question.references[0],
    }
