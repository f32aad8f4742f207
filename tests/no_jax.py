"""Importing this module makes the import of JAX and of this project fail, as on a machine without them."""

import importlib.abc
import sys

BLOCKED = ("jax", "jaxlib", "flax", "radfm_jax", "input_pipeline")


class Blocker(importlib.abc.MetaPathFinder):
    """Refuses the modules of BLOCKED."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


sys.meta_path.insert(0, Blocker())
