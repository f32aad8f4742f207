"""What the model, the data pipeline and `plan` know of a vision encoder."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from radfm_jax.models.computation import Computation


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack of equal transformer blocks, for counts of FLOPs and bytes."""

    name: str  # of its parameters, below `vit/`
    layers: int
    width: int
    heads: int
    inner: int  # all channels of the queries
    hidden: int  # outputs of the MLP's first product
    down: int  # inputs of the MLP's second product: `hidden`, or half of it with a gate
    keys: int  # that a query sees
    tokens: float = 1.0  # tokens per patch: above 1 with class and register tokens
    kernels: bool = True  # whether one of attention.KERNELS can compute its attention


class EncoderConfig(Computation, abc.ABC):
    """Base of the encoders' configs: dataclasses with `kind`, `width`, `patch` (h, w, d), `channels` and `tables`.

    `tables` are the numbers of learned row, column and depth positions.
    """

    width: Any
    patch: Any
    channels: Any
    tables: Any
    patch_order = "columns"  # or any other one of planes.ORDERS

    @property
    def slab(self) -> int:
        """Number of patches that the encoder reads as one aligned block of a vision row; 1: any scan fits."""
        return 1

    def scan_shape(self, patches: int) -> tuple[int, int, int]:
        """Return (H, W, D) of a scan with `patches` patches along each axis, or 1 where there are fewer positions."""
        h, w, d = (p * (patches if n >= patches else 1) for p, n in zip(self.patch, self.tables, strict=True))
        return h, w, d

    @property
    @abc.abstractmethod
    def data_fields(self) -> dict[str, Any]:
        """Values that fields of `data` must have for this encoder."""

    @property
    def patch_size(self) -> int:
        """Voxels of a patch, channels included: 12288 for RadFM's."""
        h, w, d = self.patch
        return h * w * d * self.channels

    def patch_flops(self, channels: int | None = None) -> float:
        """Return the FLOPs per patch outside the stacks. `channels` are those of the planes (`data.channels`)."""
        return 2 * math.prod(self.patch) * (channels or self.channels) * self.width

    @abc.abstractmethod
    def stacks(self, patch_length: int) -> tuple[Stack, ...]:
        """Return the stacks of blocks for vision rows of `patch_length` patches."""


class FixedSideConfig(EncoderConfig):
    """Base for encoders of slices, or slabs of slices, that all have the side `image_size`."""

    image_size: Any
    patch_order = "slabs"

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch[0]

    @property
    def slab(self) -> int:
        """N, the patches of a slab."""
        return self.side**2

    @property
    def data_fields(self) -> dict[str, Any]:
        sizes = {"size_2d": self.image_size, "size_3d": self.image_size}
        return {"patch": self.patch, "position_tables": self.tables, "patch_order": self.patch_order, **sizes}

    def scan_shape(self, patches: int) -> tuple[int, int, int]:
        return self.image_size, self.image_size, self.patch[2] * (patches if self.tables[2] >= patches else 1)

    def side_problems(self) -> Iterator[str]:
        """Yield why a slice cannot be cut into patches."""
        if self.patch[0] != self.patch[1] or self.patch[0] < 1 or self.image_size % self.patch[0]:
            size = f"model.vision.image_size {self.image_size}"
            yield f"{size} must be a multiple of the side of the square model.vision.patch (got {self.patch})"
