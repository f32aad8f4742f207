"""`python -m radfm_jax.plan`: does a run fit, how long does it take, what does it send, without the hardware.

topology.py   what stands behind v5p:4x4x2 or gpu:32xA100-80GB: memory, peak, links, all as published
program.py    the very train step, compiled for such devices from shapes alone; kept, as it takes minutes
hlo.py        what the compiled program sends, from its text
ladder.py     remat policies and micro-batches: memory, time, traffic of each, and which to take
show.py       the table, JSON, the picture
"""
