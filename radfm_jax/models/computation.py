"""Settings of the computation that the configs of all parts share."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from input_pipeline.field_rules import one_of
from radfm_jax.models.attention import NAMES
from radfm_jax.models.layers import DTYPES, REMAT_POLICIES
from radfm_jax.models.lora import LoraConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """Base of the configs of the vision encoder, the resampler and the decoder: the fields that are not sizes."""

    dtype: Annotated[str, one_of(DTYPES)] = "float32"  # of products
    param_dtype: Annotated[str, one_of(DTYPES)] = "float32"
    remat: Annotated[str, one_of(REMAT_POLICIES)] = "full"
    attention: Annotated[str, one_of(NAMES)] = "auto"
    lora: LoraConfig | None = None  # copied from `model.lora` by RadFMConfig

    def to_dict(self) -> dict:
        """Return the fields as plain values, without `lora`, which is stated once for the whole model."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "lora"}  # type: ignore[call-overload]


COMPUTE = tuple(field.name for field in dataclasses.fields(Computation))
