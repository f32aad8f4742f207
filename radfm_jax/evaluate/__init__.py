"""How good a model is: held-out rows of a config to the letter, and RadBench, the paper's benchmark.

exact.py       right to the letter, by teacher forcing, with exchanged scans as a control
radbench.py    five tasks, thirteen data sets -> questions with fixed wording; test studies in the training data
answering.py   questions -> answers of a checkpoint; answers of anybody, from a file
metrics.py     what an answer is worth, what many come to, intervals
scoring.py     questions and answers -> scores and tables
clinical.py    RadGraph, CheXbert and others through RadEval
published.py   the paper's Table 4
pictures.py, report.py   the pages
export.py, rating.py     the benchmark for other models; grades that people give
__main__.py    python -m radfm_jax.evaluate

docs/evaluation.md has the protocol, step by step.
"""
