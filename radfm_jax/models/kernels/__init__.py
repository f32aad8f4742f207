"""Attention kernels, one module per implementation, all with the contract of `radfm_jax.models.attention.attention`.

Only `attention.py` chooses among them. Code that is not a kernel belongs in the model files.
"""
