"""Weights between PyTorch and Orbax, in both directions: `python -m radfm_jax.convert --help`."""
