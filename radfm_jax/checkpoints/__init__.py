"""Checkpoint directories: their format, saving and restoring a training state, the run directory, int8 weights."""
