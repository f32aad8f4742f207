"""RadFM in JAX: `load` a checkpoint directory, ask for `logits`, `save` it. Research only, not for clinical use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radfm_jax.api import Model as Model
    from radfm_jax.api import load as load
    from radfm_jax.api import save as save

__all__ = ["Model", "load", "save"]


def __getattr__(name: str):
    """Imports JAX only when it is wanted: the input pipeline's workers must start in a moment."""
    if name in __all__:
        from radfm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
