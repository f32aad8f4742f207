"""RadFM in PyTorch: a vision encoder and a bridge in front of a language model of transformers.

Letters: B rows, T tokens, S scans of the batch, N patches of all scans, Z scans of equal size, n = h w d patches of one
of them, L visual tokens per scan, D vision width, E text width, V vocabulary of the language model.

A row with a scan (L = 2 to draw it; ids from V on are not in the language model's vocabulary):

    input_ids       1  V  V+2  V+2  V+1  45  17     V starts a scan, V+1 ends it, V+2 is a visual token
    pixel_values    float32[N, voxels of a patch]   the patches of all scans, in the order in which the batch has them
    image_grid      int64[S, 3]                     (h, w, d): patches of each scan along height, width and depth

RadFMProcessor makes these inputs. Logits have V + 3 columns; the last three are the lowest number of their type.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_radfm import RadFMConfig

VERSION = "0.6.0"
Grid = tuple[int, int, int]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None):
    """Return the attention of queries [Z, T, heads * K] to keys and values [Z, U, heads * K]: [Z, T, heads * K]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)


def positions(count: int, size: int, device) -> Tensor:
    """Return the entries that `count` patches use of a table of `size` positions: they are spread over the table."""
    return torch.arange(1, count + 1, device=device) * (size // count) - 1


class VoxelNorm(nn.LayerNorm):
    """LayerNorm of the voxels of a patch, with float32 statistics for weights of any type."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.float(), self.normalized_shape, eps=self.eps).to(self.weight.dtype)
        return x * self.weight + self.bias


class PatchEmbedding(nn.Module):
    """Norm, linear map, norm."""

    def __init__(self, config):
        super().__init__()
        voxels = math.prod(config.patch) * config.channels
        self.patch_norm = VoxelNorm(voxels)
        self.projection = nn.Linear(voxels, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, voxels: Tensor) -> Tensor:
        return self.norm(self.projection(self.patch_norm(voxels)))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, bias: bool, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))


class ViT3DEmbedding(PatchEmbedding):
    """Patches [Z, n, voxels] -> [Z, n, D], plus learned positions of rows, columns and depth, a third of D each."""

    def __init__(self, config):
        super().__init__(config)
        self.planes = (config.patch[2], config.channels, *config.patch[:2])
        tables = (nn.Embedding(size, config.width // 3) for size in config.tables)
        self.row_positions, self.column_positions, self.depth_positions = tables

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        voxels = patches.unflatten(-1, self.planes).permute(0, 1, 4, 5, 2, 3).flatten(2)  # rows, columns, slices, C
        tables = (self.row_positions, self.column_positions, self.depth_positions)
        axes = (positions(n, table.num_embeddings, patches.device) for n, table in zip(grid, tables, strict=True))
        index = torch.meshgrid(*axes, indexing="ij")  # [h, w, d] each
        parts = [table(entries) for table, entries in zip(tables, index, strict=True)]
        return super().forward(voxels) + torch.cat(parts, dim=-1).flatten(0, 2)


class ViT3DBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP."""

    def __init__(self, config):
        super().__init__()
        self.heads, inner = config.num_heads, config.num_heads * config.head_dim
        self.attention_norm, self.mlp_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = Mlp(config.width, config.mlp_width, bias=True, dropout=config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        x = x + self.dropout(self.out(attend(q, k, v, self.heads)))
        return x + self.mlp(self.mlp_norm(x))


class ViT3D(nn.Module):
    """RadFM's encoder, without a final norm: [Z, n, voxels] in the order row, column, depth -> [Z, h, w, d, D]."""

    def __init__(self, config):
        super().__init__()
        self.width, self.voxels = config.width, math.prod(config.patch) * config.channels
        self.least, self.most = (1, 1, 1), tuple(config.tables)  # patches along the axes of a scan
        self.embedding = ViT3DEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(ViT3DBlock(config) for _ in range(config.num_layers))

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        x = self.dropout(self.embedding(patches, grid))
        for block in self.blocks:
            x = block(x)
        return x.unflatten(1, grid)


class SliceEncoder(nn.Module):
    """SigLIP or DINOv2 on each slice, plus positions of slices: [Z, n, voxels], depth first -> [Z, h, w, d, D]."""

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.hidden_size
        self.voxels = config.num_channels * config.patch_size**2
        self.side = side = config.image_size // config.patch_size
        self.least, self.most = (side, side, 1), (side, side, config.depth_positions)
        self.encoder = AutoModel.from_config(config)
        self.depth_positions = nn.Embedding(config.depth_positions, config.hidden_size)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        c, side = self.config, self.side
        slices = patches.float().reshape(-1, side, side, c.num_channels, c.patch_size, c.patch_size)
        slices = slices.permute(0, 3, 1, 4, 2, 5).reshape(-1, c.num_channels, c.image_size, c.image_size)
        mean, std = (slices.new_tensor(x)[:, None, None] for x in (c.image_mean, c.image_std))
        x = self.encoder(pixel_values=(slices - mean) / std).last_hidden_state[:, -side * side :]
        x = x.reshape(len(patches), -1, side, side, self.width).movedim(1, 3)
        return x + self.depth_positions(positions(grid[2], c.depth_positions, x.device))


class CTViTBlock(GradientCheckpointingLayer):
    """Depthwise convolution, attention with queries and keys of unit length, gated MLP: [Z, d, h, w, D].

    Tokens attend within a slab of slices (`spatial`), or to those at the same row and column. The convolution is
    causal along depth in the spatial stack, along rows in the other.
    """

    def __init__(self, config, spatial: bool):
        super().__init__()
        width, inner = config.width, config.num_heads * config.head_dim
        self.heads, self.spatial = config.num_heads, spatial
        self.positions = nn.Conv3d(width, width, 3, groups=width)
        self.norm = nn.LayerNorm(width, bias=False)
        self.query, self.key_value = nn.Linear(width, inner, bias=False), nn.Linear(width, 2 * inner, bias=False)
        self.query_scale, self.key_scale = (nn.Parameter(torch.ones(config.head_dim)) for _ in range(2))
        self.out = nn.Linear(inner, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        padding = (1, 1, 1, 1, 2, 0) if self.spatial else (1, 1, 2, 0, 1, 1)
        x = x + self.positions(F.pad(x.movedim(-1, 1), padding)).movedim(1, -1)
        rows = x.flatten(2, 3) if self.spatial else x.flatten(2, 3).transpose(1, 2)  # [Z, d, h w, D], [Z, h w, d, D]
        tokens = rows.flatten(0, 1)
        k, v = self.key_value(tokens).chunk(2, dim=-1)
        q, k = self.unit(self.query(self.norm(tokens)), self.query_scale), self.unit(k, self.key_scale)
        h = self.out(attend(q, k, v, self.heads, bias, scale=8.0)).reshape(rows.shape)
        x = x + (h if self.spatial else h.transpose(1, 2)).reshape(x.shape)
        value, gate = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.gelu(gate) * value)

    def unit(self, x: Tensor, scale: Tensor) -> Tensor:
        x = F.normalize(x.float().unflatten(-1, (self.heads, -1)), dim=-1)
        return (x * scale.float()).flatten(-2).to(scale.dtype)


class DistanceBias(nn.Module):
    """A learned bias of each head for every distance of two patches of a slab: [1, heads, n, n]."""

    def __init__(self, config):
        super().__init__()
        self.hidden_0, self.hidden_1 = nn.Linear(2, config.width), nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.num_heads)

    def forward(self, side: int) -> Tensor:
        device, dtype = self.out.bias.device, self.out.bias.dtype
        steps = torch.arange(1 - side, side, device=device)
        logs = steps.sign() * (steps.abs() + 1.0).log()
        x = torch.stack(torch.meshgrid(logs, logs, indexing="ij"), dim=-1).to(dtype)
        for layer in (self.hidden_0, self.hidden_1):
            x = F.leaky_relu(layer(x), 0.1)
        place = torch.arange(side * side, device=device)
        rows, columns = (a[:, None] - a[None] + side - 1 for a in (place // side, place % side))
        return self.out(x)[rows, columns].movedim(-1, 0)[None]


class CTViT(nn.Module):
    """The encoder of CT-CLIP: patches [Z, n, voxels] in the order depth, row, column -> [Z, h, w, d, D]."""

    def __init__(self, config):
        super().__init__()
        self.config, self.width, self.voxels = config, config.width, math.prod(config.patch) * config.channels
        self.side = side = config.image_size // config.patch[0]
        self.least, self.most = (side, side, 1), (side, side, config.depth)
        self.embedding, self.bias = PatchEmbedding(config), DistanceBias(config)
        self.spatial = nn.ModuleList(CTViTBlock(config, True) for _ in range(config.spatial_layers))
        self.temporal = nn.ModuleList(CTViTBlock(config, False) for _ in range(config.temporal_layers))
        self.spatial_norm, self.temporal_norm = (nn.LayerNorm(config.width, bias=False) for _ in range(2))
        self.codebook = nn.Embedding(config.codebook, config.width) if config.codebook else None

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        c, side = self.config, self.side
        x = patches.unflatten(-1, (c.patch[2], c.channels, *c.patch[:2])).transpose(2, 3).flatten(2)  # C, slices, rows
        x = self.embedding((x.float() - c.mean) / c.std).unflatten(1, (-1, side, side))
        bias = self.bias(side)
        for block in self.spatial:
            x = block(x, bias)
        x = self.spatial_norm(x)
        for block in self.temporal:
            x = block(x, None)
        x = self.temporal_norm(x).movedim(1, 3)
        return x if self.codebook is None else self.nearest(x)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the code of unit length that is nearest in direction; gradients pass as if it were x."""
        codes = F.normalize(self.codebook(torch.arange(self.config.codebook, device=x.device)).float(), dim=-1)
        index = (F.normalize(x.float(), dim=-1) @ codes.T).argmax(dim=-1)
        return x + (codes[index].to(x.dtype) - x).detach()


class PerceiverBlock(GradientCheckpointingLayer):
    """Latents attend to patch tokens and to themselves; then an MLP. No biases."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.token_norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value = nn.Linear(width, inner, bias=False), nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.mlp = Mlp(width, hidden, bias=False)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        x = self.latent_norm(latents)
        k, v = self.key_value(torch.cat([self.token_norm(tokens), x], dim=1)).chunk(2, dim=-1)
        latents = latents + self.out(attend(self.query(x), k, v, self.heads))
        return latents + self.mlp(self.mlp_norm(latents))


class Perceiver(nn.Module):
    """Patch tokens [Z, h, w, d, D] -> latents [Z, L, D]."""

    def __init__(self, width: int, bridge: dict):
        super().__init__()
        self.width = width
        self.latents = nn.Embedding(bridge["num_latents"], width)
        sizes = (bridge["num_heads"], bridge["head_dim"], bridge["mlp_factor"] * width)
        self.blocks = nn.ModuleList(PerceiverBlock(width, *sizes) for _ in range(bridge["num_layers"]))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.flatten(1, 3)
        latents = self.latents(torch.arange(self.latents.num_embeddings, device=tokens.device))
        latents = latents.expand(len(tokens), -1, -1)
        for block in self.blocks:
            latents = block(latents, tokens)
        return self.norm(latents)


class PooledMlp(nn.Module):
    """Patch tokens [Z, h, w, d, D] averaged in a grid of cells, then a linear map and GELU: [Z, L, hidden].

    Along an axis, patch i of n is in part i * m // n of m = min(n, cells), and cell a shows part a * m // cells.
    """

    def __init__(self, width: int, bridge: dict):
        super().__init__()
        self.width, self.grid = bridge["hidden"], bridge["grid"]
        self.up = nn.Linear(width, bridge["hidden"])

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float()
        for axis, count in enumerate(self.grid, 1):
            n = x.shape[axis]
            m = min(n, count)
            parts = F.one_hot(torch.arange(n, device=x.device) * m // n, m).float()  # [n, m]
            shown = (parts / parts.sum(dim=0))[:, torch.arange(count, device=x.device) * m // count]
            x = (x.movedim(axis, -1) @ shown).movedim(-1, axis)
        return F.gelu(self.up(x.flatten(1, 3).to(tokens.dtype)))


class RadFMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers questions about scans: `model.generate(**processor(text=..., images=..., return_tensors="pt"))`."""

    config_class = RadFMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules = ["ViT3D", "CTViT", "Perceiver", "PooledMlp"]
    _keys_to_ignore_on_load_missing = [r"vision\.encoder\.embeddings\.mask_token"]  # DINOv2's, which nothing reads

    def __init__(self, config: RadFMConfig):
        super().__init__(config)
        config.check_version("modeling_radfm.py", VERSION)
        self.add_vision(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, *args, output_loading_info: bool = False, **kwargs):
        """Load a folder. Raises ValueError if its tensors are not those of the model, which transformers accepts."""
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        for key, fault in ("missing_keys", "lacks {} tensors"), ("unexpected_keys", "has {} tensors that are not"):
            if names := sorted(info[key]):
                names, fault = [*names[:5], *["..."] * (len(names) > 5)], fault.format(len(names))
                raise ValueError(f"{path} {fault} of the model ({', '.join(names)}): export it again")
        return (model, info) if output_loading_info else model

    def add_vision(self, config: RadFMConfig) -> None:
        """Add all parts but the language model."""
        vision, bridge = config.vision_config, config.bridge_config
        encoders = {"vit3d": ViT3D, "ctvit": CTViT}
        self.vision = encoders.get(getattr(vision, "kind", None), SliceEncoder)(vision)
        self.bridge = {"perceiver": Perceiver, "mlp": PooledMlp}[bridge["kind"]](self.vision.width, bridge)
        self.projection = nn.Linear(self.bridge.width, config.text_config.hidden_size)
        self.image_marks = nn.Embedding(2, config.text_config.hidden_size)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Return the embeddings. Raises ValueError for another size: ids from V on are scans, so V cannot change."""
        if new_num_tokens not in (None, self.config.text_config.vocab_size):
            raise ValueError("the vocabulary cannot be resized: the ids after it are those of scans")
        return self.get_input_embeddings()

    def compute_transition_scores(self, sequences: Tensor, scores: tuple[Tensor, ...], *args, **kwargs) -> Tensor:
        """As in transformers, which needs scores of V columns."""
        size = self.config.text_config.vocab_size
        return super().compute_transition_scores(sequences, tuple(x[:, :size] for x in scores), *args, **kwargs)

    def get_image_features(self, pixel_values: Tensor, image_grid: Tensor) -> Tensor:
        """Return the visual tokens of all scans, [S * L, E]. Scans of equal size run as one batch.

        Raises:
          ValueError: patches, grids and the encoder do not fit each other.
        """
        if image_grid is None:
            raise ValueError("there are pixel_values, but no image_grid: pass that of the processor")
        grids: list[Grid] = [tuple(grid) for grid in image_grid.tolist()]
        counts = [math.prod(grid) for grid in grids]
        if pixel_values.shape != (sum(counts), self.vision.voxels):
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}, but image_grid and the vision encoder need "
                f"{(sum(counts), self.vision.voxels)}"
            )
        scans, features, vision = pixel_values.split(counts), [None] * len(grids), self.vision
        for grid in dict.fromkeys(grids):
            if not all(a <= n <= b for a, n, b in zip(vision.least, grid, vision.most, strict=True)):
                least, most = vision.least, vision.most
                raise ValueError(f"image_grid has {grid}, but the encoder reads {least} to {most} patches")
            members = [i for i, other in enumerate(grids) if other == grid]
            tokens = vision(torch.stack([scans[i] for i in members]), grid)
            for i, x in zip(members, self.projection(self.bridge(tokens)), strict=True):
                features[i] = x
        return torch.cat(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_grid: Tensor | None) -> Tensor:
        """Return the embeddings of text, marks of scans and visual tokens, [B, T, E]."""
        size, is_visual = self.config.text_config.vocab_size, input_ids == self.config.image_token_id
        text = self.get_input_embeddings()(input_ids.clamp(max=size - 1))
        marks = self.image_marks((input_ids - size).clamp(min=0).masked_fill(is_visual, 0)).to(text)
        x = torch.where((input_ids >= size)[..., None], marks, text)
        if pixel_values is None:
            if input_ids.shape[1] > 1 and is_visual.any():
                raise ValueError(
                    "input_ids have visual tokens, but there are no pixel_values: pass those of the processor"
                )
            return x
        features = self.get_image_features(pixel_values, image_grid).to(x)
        if (count := int(is_visual.sum())) != len(features):
            raise ValueError(f"input_ids have {count} visual tokens, but the scans give {len(features)}: pass theirs")
        return x.masked_scatter(is_visual[..., None], features)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None, pixel_values: Tensor | None = None, image_grid: Tensor | None = None,
        labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs,
    ):  # fmt: skip
        """Return the loss, logits [B, T, V + 3], the hidden states [B, T, E], and the cache of the language model.

        `kwargs` are those of the language model, such as its cache. Labels from V on do not count.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values, image_grid)
        elif pixel_values is not None:
            raise ValueError("pass input_ids with pixel_values, not inputs_embeds")
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        output = self.language_model.base_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.get_output_embeddings()(output.last_hidden_state[:, rows]), None
        if cap := getattr(self.config.text_config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        if labels is not None:
            size = self.config.text_config.vocab_size
            labels = labels.masked_fill(labels >= size, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        logits = F.pad(logits, (0, 3), value=torch.finfo(logits.dtype).min)
        rest = {name: value for name, value in output.items() if name != "last_hidden_state"}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        result["last_hidden_state"] = output.last_hidden_state  # from which TRL computes its losses
        return result

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None, image_grid: Tensor | None = None, **kwargs,
    ):  # fmt: skip
        """Repeat each row, with its scans, `expand_size` times: for beams and for several answers."""
        scans = None
        if pixel_values is not None and expand_size > 1:
            scans = (input_ids == self.config.image_start_token_id).sum(-1).tolist()
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if scans is not None:
            rows = image_grid.split(scans)
            patches = pixel_values.split([int(row.prod(-1).sum()) for row in rows])
            pixel_values = torch.cat([x for x in patches for _ in range(expand_size)])
            image_grid = torch.cat([x for x in rows for _ in range(expand_size)])
        if pixel_values is not None:
            kwargs |= {"pixel_values": pixel_values, "image_grid": image_grid}
        return input_ids, kwargs
