"""The five tasks of RadBench, asked about the practice data: to see the whole way of a benchmark on a laptop.

    python -m radfm_jax.evaluate radbench --config=configs/radbench_practice.py --config.limit=200 \\
        --checkpoint=runs/quickstart/finetune --out=runs/quickstart/radbench

Questions are worded as in training (test/all.jsonl). `:ROOT` for another root than practice. Figures say nothing about
RadBench itself.
"""

from ml_collections import ConfigDict

from radfm_jax.evaluate.radbench import TASKS, Benchmark


def get_config(root: str = "practice") -> ConfigDict:
    # Open diagnoses have no place in the paper's disease diagnosis.
    ids = {"diagnosis": ("*-has-*",)}
    sets = {
        f"practice_{task}": {
            "family": "jsonl", "root": root, "table": "test/all.jsonl", "task": task, "tasks": (task,),
            "ids": ids.get(task, ()), "facts": "test/labels.jsonl", "title": f"practice: {task}",
        }
        for task in TASKS
    }  # fmt: skip
    return ConfigDict(Benchmark(sets=sets, terms="open").to_dict(), convert_dict=True).lock()
