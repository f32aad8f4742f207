"""Sizes of a model's adapters (models/lora.py), for FLOPs and memory."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
from flax.traverse_util import flatten_dict

from input_pipeline.batching.plan import RowLimits
from radfm_jax.models import lora, radfm
from radfm_jax.models.radfm import RadFMConfig


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of a linear map, or of that map in every layer of a stack."""

    path: str  # of the linear map: "llama/blocks/query"
    layers: int
    inputs: int
    rank: int
    outputs: int

    @property
    def part(self) -> str:
        return self.path.partition("/")[0]

    @property
    def numbers(self) -> int:
        """Parameters of one layer."""
        return self.rank * (self.inputs + self.outputs)

    def tokens(self, config: RadFMConfig, limits: RowLimits) -> float:
        """Return the number of vectors of a row that pass through the linear map."""
        latents, patches = limits.scans * config.num_latents, limits.vision_rows * limits.patch_length
        if self.part == "llama":
            return limits.text_length
        if self.part == "vit":
            of_stack = {stack.name: stack.tokens for stack in config.vision.stacks(limits.patch_length)}
            return patches * of_stack.get(self.path.split("/")[1], 1)
        return latents + (patches if self.path.endswith("/key_value") else 0)


@functools.lru_cache(maxsize=8)
def adapters(config: RadFMConfig) -> tuple[Adapter, ...]:
    """Return the adapters of a model."""
    if config.lora is None:
        return ()
    boxes = flatten_dict(radfm.abstract_params(config), is_leaf=lambda _, x: isinstance(x, nn.Partitioned), sep="/")
    result = []
    for path in (path.removesuffix(f"/{lora.A}") for path in boxes if path.endswith(f"/{lora.A}")):
        a, b = (boxes[f"{path}/{name}"].value for name in (lora.A, lora.B))
        layers, rank = a.shape[0] if boxes[f"{path}/{lora.A}"].names[0] == "layers" else 1, a.shape[-1]
        inputs, outputs = (math.prod(x.shape) // layers // rank for x in (a, b))
        result.append(Adapter(path, layers, inputs, rank, outputs))
    return tuple(result)


def forward(config: RadFMConfig, limits: RowLimits) -> dict[str, float]:
    """Return the FLOPs of a row's forward pass through the adapters, by part of the model that has any."""
    parts: dict[str, float] = {}
    for adapter in adapters(config):
        products = 2 * adapter.layers * adapter.numbers * adapter.tokens(config, limits)
        parts[adapter.part] = parts.get(adapter.part, 0.0) + products
    return parts
