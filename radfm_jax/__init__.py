"""RadFM in JAX: `load` a checkpoint, `Model.answer` questions about scans, `save` it.

Research only, not for clinical use. Data loading belongs in `input_pipeline`, which never imports this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radfm_jax.api import Model as Model
    from radfm_jax.api import load as load
    from radfm_jax.api import save as save

__version__ = "0.6.0"
__all__ = ["Model", "load", "save"]


def __getattr__(name: str):
    """Import JAX on first use only: worker processes of the input pipeline must start fast."""
    if name in __all__:
        from radfm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
