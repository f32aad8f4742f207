"""CT-ViT in PyTorch, written from the published description: the oracle of the tests.

Parameter names are those of CT-CLIP's checkpoints. The vector quantiser is its inference form: the nearest code by
cosine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scale(nn.Module):
    """LayerNorm with a scale `gamma` and a buffer `beta` of zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class Convolution(nn.Module):
    """Depthwise 3 x 3 x 3 convolution, causal along the first axis."""

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Flat tokens of any order are read as `shape` = (scans, slabs, rows, columns), as in the released code."""
        grid = x.reshape(*shape, -1).movedim(-1, 1)
        return self.dsconv(F.pad(grid, (1, 1, 1, 1, 2, 0))).movedim(1, -1).reshape(x.shape)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.norm = Scale(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(dim_head)), nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(self.norm(x)), *self.to_kv(x).chunk(2, dim=-1))
        )
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        scores = 8 * q @ k.transpose(-1, -2)
        scores = scores if bias is None else scores + bias
        return self.to_out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class Stack(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        hidden = int(4 * (2 / 3) * dim)
        mlp = lambda: nn.Sequential(  # noqa: E731
            nn.LayerNorm(dim), nn.Linear(dim, 2 * hidden, bias=False), Gate(), nn.Identity(),
            nn.Linear(hidden, dim, bias=False),
        )  # fmt: skip
        self.layers = nn.ModuleList(
            nn.ModuleList([Convolution(dim), Attention(dim, heads, dim_head), nn.Identity(), mlp()])
            for _ in range(depth)
        )
        self.norm_out = Scale(dim)

    def forward(self, x: Tensor, shape: tuple[int, ...], bias: Tensor | None = None) -> Tensor:
        for convolution, attention, _, mlp in self.layers:
            x = x + convolution(x, shape)
            x = x + attention(x, bias)
            x = x + mlp(x)
        return self.norm_out(x)


class PositionBias(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        layer = lambda size: nn.Sequential(nn.Linear(size, dim), nn.LeakyReLU(0.1))  # noqa: E731
        self.net = nn.ModuleList([layer(2), layer(dim), nn.Linear(dim, heads)])

    def forward(self, side: int) -> Tensor:
        rows, columns = torch.arange(side * side) // side, torch.arange(side * side) % side
        distance = torch.stack([axis[:, None] - axis[None, :] for axis in (rows, columns)], dim=-1)
        distance = distance.to(self.net[2].weight.dtype)
        x = distance.sign() * (distance.abs() + 1).log()
        for layer in self.net:
            x = layer(x)
        return x.permute(2, 0, 1)


class CTViT(nn.Module):
    """Volumes [B, 1, slices, rows, columns] in [-1, 1] -> features [B, slabs, rows, columns, dim]."""

    def __init__(self, dim, codebook_size, image_size, patch_size, temporal_patch_size, spatial_depth, temporal_depth,
                 dim_head, heads):  # fmt: skip
        super().__init__()
        self.side, self.patch = image_size // patch_size, (temporal_patch_size, patch_size, patch_size)
        voxels = temporal_patch_size * patch_size**2
        self.spatial_rel_pos_bias = PositionBias(dim, heads)
        self.to_patch_emb = nn.Sequential(
            nn.Identity(), nn.LayerNorm(voxels), nn.Linear(voxels, dim), nn.LayerNorm(dim)
        )
        self.enc_spatial_transformer = Stack(dim, spatial_depth, heads, dim_head)
        self.enc_temporal_transformer = Stack(dim, temporal_depth, heads, dim_head)
        self.codes = nn.Parameter(torch.randn(1, codebook_size, dim))

    def forward(self, volumes: Tensor, quantise: bool = True) -> Tensor:
        z, y, x = self.patch
        cubes = volumes[:, 0].unfold(1, z, z).unfold(2, y, y).unfold(3, x, x).flatten(4)  # [B, T, H, W, z y x]
        tokens = self.to_patch_emb(cubes)
        b, t, h, w, dim = tokens.shape
        shape = (b, t, h, w)
        tokens = self.enc_spatial_transformer(
            tokens.reshape(b * t, h * w, dim), shape, self.spatial_rel_pos_bias(self.side)
        )
        tokens = tokens.reshape(b, t, h * w, dim).transpose(1, 2).reshape(b * h * w, t, dim)
        tokens = self.enc_temporal_transformer(tokens, shape)
        tokens = tokens.reshape(b, h, w, t, dim).permute(0, 3, 1, 2, 4)
        return self.quantise(tokens) if quantise else tokens

    def quantise(self, tokens: Tensor) -> Tensor:
        codes = F.normalize(self.codes[0], dim=-1)
        return codes[(F.normalize(tokens, dim=-1) @ codes.T).argmax(dim=-1)]

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the state_dict under the names of CT-CLIP, with some tensors that features do not depend on."""
        tensors = {f"visual_transformer.{k}": v for k, v in self.state_dict().items() if k != "codes"}
        return tensors | {
            "visual_transformer.vq._codebook.embed": self.codes,
            "visual_transformer.vq._codebook.cluster_size": torch.zeros(1, self.codes.shape[1]),
            "visual_transformer.dec_spatial_transformer.norm_out.gamma": torch.ones(3),
            "visual_transformer.to_pixels.0.weight": torch.ones(2, 2),
            "visual_transformer.enc_spatial_transformer.layers.0.1.context_norm.gamma": torch.ones(2),
            "visual_transformer.enc_spatial_transformer.layers.0.1.null_kv": torch.ones(2, 0, 4),
            "text_transformer.embeddings.word_embeddings.weight": torch.ones(2, 2),
            "temperature": torch.ones(()),
        }
