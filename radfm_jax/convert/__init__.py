"""Conversion of weights between PyTorch and Orbax, and the comparison of two checkpoints.

The checkpoint directory itself belongs to `checkpoints/`, the network to `models/`.
"""
