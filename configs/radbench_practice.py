"""The five tasks of RadBench on the practice data: a complete benchmark run on a laptop.

    python -m radfm_jax.evaluate radbench --config=configs/radbench_practice.py --config.limit=200 \\
        --checkpoint=runs/quickstart/finetune --out=runs/quickstart/radbench

Questions have the wording of training (test/all.jsonl). `:ROOT` replaces `practice`. The scores are unrelated to those
of RadBench itself.
"""

from ml_collections import ConfigDict

from radfm_jax.evaluate.radbench import TASKS, Benchmark


def get_config(root: str = "practice") -> ConfigDict:
    # Disease diagnosis in the paper has yes/no questions only.
    ids = {"diagnosis": ("*-has-*",)}
    sets = {
        f"practice_{task}": {
            "family": "jsonl", "root": root, "table": "test/all.jsonl", "task": task, "tasks": (task,),
            "ids": ids.get(task, ()), "facts": "test/labels.jsonl", "title": f"practice: {task}",
        }
        for task in TASKS
    }  # fmt: skip
    return ConfigDict(Benchmark(sets=sets, terms="open").to_dict(), convert_dict=True).lock()
