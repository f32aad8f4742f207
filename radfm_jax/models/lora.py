"""LoRA (Hu et al., 2021, arXiv:2106.09685): a frozen linear map plus a trained product of two narrow matrices.

    y = W x + scale * B A x

    llama/blocks/query/kernel  [layers, E, H, K]       W
    llama/blocks/query/lora_a  [layers, E, rank]       A, float32, random at the start
    llama/blocks/query/lora_b  [layers, rank, H, K]    B, float32, zeros at the start

`layers.Dense` computes it wherever a linear map has these parameters. This is not done with qwix, which replaces
products with named kernels inside one `apply`: here a kernel is reshaped before its product, and decoding applies
single blocks.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.field_rules import Size, above, check_fields, share
from input_pipeline.files import nearest

A, B = "lora_a", "lora_b"
KERNEL = "/kernel"
PATCHES = "vit/embedding/"  # patch embeddings have no adapters: they transform their kernel, so are no `layers.Dense`


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The group `model.lora`: which linear maps get an adapter, and its size.

    `targets` are patterns (fnmatch) of linear maps: "llama/blocks/*" are the seven of every decoder block,
    "llama/blocks/[qv]*" its queries and values, "vit/blocks/*" those of the vision encoder. Embeddings and the head
    have no adapters.
    """

    rank: Size = 16
    alpha: Annotated[float, above(0)] = 32.0  # the product is scaled by alpha / rank
    dropout: Annotated[float, share(zero=True, one=False)] = 0.0  # of the inputs of A, in training
    targets: tuple[str, ...] = ("llama/blocks/*",)
    rank_stabilised: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski, 2023, arXiv:2312.03732)

    def __post_init__(self):
        check_fields(self, "model.lora", () if self.targets else ["model.lora.targets must name a linear map"])

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def is_adapter(path: str) -> bool:
    """Return whether a parameter path is that of an adapter."""
    return path.rpartition("/")[2] in (A, B)


def check_rank(config: LoraConfig | None, shapes: Mapping[str, tuple[int, ...]], source) -> None:
    """Raise ValueError if stored adapters {path: shape} have another rank than their config, which scales them."""
    rank = 0 if config is None else config.rank
    for path, shape in shapes.items():
        if path.endswith(f"/{A}") and shape[-1] != rank:
            stated = f"the rank {rank}" if config else "no adapters"
            raise ValueError(f"{source}: {path} has the rank {shape[-1]}, but model.lora of radfm.json has {stated}")


def input_axes(names: tuple[str | None, ...]) -> range:
    """Return the contraction axes of a kernel with these logical axis names."""
    first = 1 if names[0] == "layers" else 0
    return range(first, first + (2 if names[first : first + 2] == ("heads", "head_dim") else 1))


def targets(config: LoraConfig, boxed: dict[str, nn.Partitioned]) -> list[str]:
    """Return the linear maps of {path: boxed parameter} that match. ValueError for a pattern that matches none."""
    kernels = [path for path, x in boxed.items() if path.endswith(KERNEL) and x.value.ndim > 1]
    maps = [path.removesuffix(KERNEL) for path in kernels if not path.startswith(PATCHES)]
    for pattern in config.targets:
        if not fnmatch.filter(maps, pattern):
            raise ValueError(
                f"model.lora.targets: no linear map matches {pattern!r}{nearest(pattern, maps)}; linear maps: "
                + ", ".join(maps)
            )
    return [path for path in maps if any(fnmatch.fnmatchcase(path, pattern) for pattern in config.targets)]


def adapters(config: LoraConfig, boxed: dict[str, nn.Partitioned], key: jax.Array) -> dict[str, nn.Partitioned]:
    """Return fresh adapters {path: boxed parameter} for the linear maps of {path: boxed parameter}.

    A has the deviation 1 / sqrt(3 * inputs), as in PEFT, and B is zero, so a fresh adapter changes nothing.
    """
    fresh: dict[str, nn.Partitioned] = {}
    for number, path in enumerate(targets(config, boxed)):
        kernel = boxed[path + KERNEL]
        shape, names, inputs = kernel.value.shape, tuple(kernel.names), input_axes(tuple(kernel.names))
        layers, outputs = slice(0, inputs.start), slice(inputs.stop, None)
        bound = math.prod(shape[axis] for axis in inputs) ** -0.5
        a_shape, b_shape = (*shape[: inputs.stop], config.rank), (*shape[layers], config.rank, *shape[outputs])
        a = jax.random.uniform(jax.random.fold_in(key, number), a_shape, jnp.float32, -bound, bound)
        fresh[f"{path}/{A}"] = nn.LogicallyPartitioned(a, (*names[: inputs.stop], None))
        b_names = (*names[layers], None, *names[outputs])
        fresh[f"{path}/{B}"] = nn.LogicallyPartitioned(jnp.zeros(b_shape, jnp.float32), b_names)
    return fresh


def product(x: jax.Array, a: jax.Array, b: jax.Array, scale: float, precision=None) -> jax.Array:
    """Return scale * x A B, in the dtype of x: [..., *inputs] x [*inputs, rank] x [rank, *outputs] -> [..., *outputs].

    The scale is applied to the narrow product, so neither pass reads or writes all outputs for it.
    """
    rank = a.shape[-1]
    outer = x.shape[: x.ndim - (a.ndim - 1)]
    narrow = jnp.matmul(x.reshape(math.prod(outer), -1), a.reshape(-1, rank).astype(x.dtype), precision=precision)
    wide = jnp.matmul(scale * narrow, b.reshape(rank, -1).astype(x.dtype), precision=precision)
    return wide.reshape(*outer, *b.shape[1:])


def change(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Return what an adapter adds to its kernel, scale * A B: float32[*inputs, *outputs]."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    flat = a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)
    return (np.float32(scale) * flat).reshape(*a.shape[:-1], *b.shape[1:])
