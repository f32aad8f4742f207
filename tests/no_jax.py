"""Importing this module hides JAX and this project, as on a machine on which they are not installed."""

import importlib.machinery
import importlib.util
import sys

HIDDEN = ("jax", "jaxlib", "flax", "radfm_jax", "input_pipeline")


class WithoutJax(importlib.machinery.PathFinder):
    """Finds all modules but the hidden ones. Libraries that ask for JAX, such as datasets, find none."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path = [WithoutJax if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
assert all(importlib.util.find_spec(name) is None for name in HIDDEN)
