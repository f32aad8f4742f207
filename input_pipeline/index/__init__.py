"""Everything a config names is read once and written down: `python -m input_pipeline.prepare`.

    tables -> rows -> their scans, each read whole -> rows again, as tokens -> the index (input_pipeline/index/index.py)

Training reads the index only, so what is wrong with a file or a row is known before the first step and stands in
quarantine.jsonl, with a reason and a remedy.
"""
