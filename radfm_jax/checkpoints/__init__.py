"""Checkpoint directories: their format, saving and restoring a training state, the run directory, int8 weights.

Conversion from and to other formats is in `radfm_jax.convert`; when to save is decided in `radfm_jax.training`.
"""
