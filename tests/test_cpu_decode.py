"""Decoding on a CPU: linear maps with their weights by rows (test_generate.py compares whole answers)."""

import flax.linen as nn
import numpy as np
import pytest

from radfm_jax.models import vit3d
from radfm_jax.models.cpu_decode import MAX_LEFT_ROWS, multiply_rows
from radfm_jax.models.layers import dense

CONFIG = vit3d.ViTConfig(width=24)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("count", [1, MAX_LEFT_ROWS, MAX_LEFT_ROWS + 1])
@pytest.mark.parametrize("axis", [-1, (-2, -1)])
def test_rows_give_the_outputs_of_the_kernel(count, axis):
    x, kernel = normal(count, 2, 3, 8), normal(24, 20, seed=1).reshape((3, 8, 5, 4) if axis != -1 else (24, 5, 4))
    x = x if axis != -1 else x.reshape(count, 2, 24)
    layer = dense((5, 4), ("heads", "head_dim", "embed"), CONFIG, axis=axis)
    expected = layer.apply({"params": {"kernel": kernel}}, x)
    rows = kernel.reshape(24, 20).T
    with nn.intercept_methods(multiply_rows):
        np.testing.assert_allclose(layer.apply({"params": {"rows": rows}}, x), expected, rtol=0, atol=1e-5)
        scaled = layer.apply({"params": {"rows": rows, "scale": np.full((5, 4), 2, np.float32)}}, x)
    np.testing.assert_allclose(scaled, 2 * expected, rtol=0, atol=2e-5)
