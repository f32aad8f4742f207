"""FLOPs, memory, time and network traffic of a run, from arithmetic or from the compiled train step.

`python -m radfm_jax.plan` is its command. Measurements of a real run belong to `training/`.
"""
