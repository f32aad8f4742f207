"""Greedy answers by vLLM: `python vllm_child.py EXPORT CALLS.json OUT.json`, with the plugin installed.

CALLS.json has a list of {"prompt", "scans"}; OUT.json gets the tokens of each answer.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

if __name__ == "__main__":  # vLLM starts processes that import this file
    from vllm import LLM, SamplingParams

    export, calls, out = sys.argv[1:]
    options = {"trust_remote_code": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    model = LLM(export, max_num_seqs=16, **options)
    prompts = [
        {"prompt": call["prompt"], "multi_modal_data": {"image": call["scans"]}}
        for call in json.loads(Path(calls).read_text())
    ]
    answers = model.generate(prompts, SamplingParams(temperature=0, max_tokens=60))
    Path(out).write_text(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
