"""Evaluation: exact match on the test rows of a config, and RadBench, the benchmark of the paper.

Running a model belongs in `inference`. docs/evaluate.md has the protocol, step by step.

exact_match.py        exact match by teacher forcing; a control run shows the scans of other samples
own_answers.py        readable answers to test rows
radbench.py           the five tasks, the thirteen data sets, a benchmark's config, a question
radbench_build.py     data sets -> questions with fixed wording
leaks.py              test studies in the training data
model_answers.py      questions -> answers of a checkpoint; answers of other models, from a file
words.py              words of an answer, as every comparison uses them
refusals.py           answers that refuse
plausibility.py       warnings about answers that a working model would not give
metrics.py            metrics of one answer and of many, confidence intervals
scoring.py            questions and answers -> scores and tables
clinical.py           RadGraph, CheXbert and others through RadEval
published.py          Table 4 of the paper
results.py            the results of all models, as tables and statements
report.py             report.json, report.md, scores.csv; report.html is in report_page.py, figures in figures.py
endpoint.py           questions -> answers of a model behind an endpoint; montage.py makes the images
export.py             questions for other models; lmms_eval.py and rexrank.py write the formats of other projects
ratings.py            grades by human raters
radbench_command.py   python -m radfm_jax.evaluate radbench; options in radbench_options.py, endpoint_command.py
"""
