"""The data side: scans, texts and tables to packed rows, in numpy and Grain, with the tools that prepare and show data.

The model, training and everything that imports JAX or `radfm_jax` does not belong here.
"""
