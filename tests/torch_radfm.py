"""A small PyTorch RadFM of any size: the oracle of the tests.

Its state_dict has the released names for everything that takes part in an output; ``golden.is_used`` says which
entries of a released state_dict those are. It is written for clearness, runs in float32 without dropout, and is proved
against the golden cases by ``test_torch_radfm.py``.

Letters in shapes: B samples, S scans a sample, L tokens, P patches of a scan, C = vis_dim, E = hidden, V = vocab.
"""

import golden
import numpy as np
import torch
import torch.nn.functional as F
from golden import Sizes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention: q (N, T, heads*d), k and v (N, U, heads*d) -> (N, T, heads*d); head is the outer factor."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class _PreNorm(nn.Module):
    """LayerNorm, then ``fn``: (N, P, C) -> (N, P, C); the residual is added by the caller."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class _SelfAttention(nn.Module):
    """Self-attention of the vision transformer: (N, P, C) -> (N, P, C). Queries, keys and values in one matrix."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(_attend(*self.to_qkv(x).chunk(3, dim=-1), self.heads))


class _FeedForward(nn.Module):
    """MLP of the vision transformer: (N, P, C) -> (N, P, C). Position 2 of ``net`` replaces a dropout."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Identity(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Transformer(nn.Module):
    """Pre-norm blocks without a final norm: (N, P, C) -> (N, P, C)."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PreNorm(s.vis_dim, _SelfAttention(s.vis_dim, s.vit_heads, s.vit_dim_head)),
                    _PreNorm(s.vis_dim, _FeedForward(s.vis_dim, s.vit_mlp)),
                ]
            )
            for _ in range(s.vit_depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in self.layers:
            x = x + attention(x)
            x = x + mlp(x)
        return x


class _Position(nn.Module):
    """Learned positions of a grid of patches, each a third of C for height, width and depth."""

    def __init__(self, s: Sizes):
        super().__init__()
        if s.vis_dim % 3:
            raise ValueError(f"vis_dim {s.vis_dim} is not a multiple of 3")
        rows, columns, depths = s.tables
        self.row_embed = nn.Embedding(rows, s.vis_dim // 3)
        self.col_embed = nn.Embedding(columns, s.vis_dim // 3)
        self.dep_embed = nn.Embedding(depths, s.vis_dim // 3)

    def forward(self, grid: tuple[int, int, int]) -> Tensor:
        """(h, w, d) patches along the axes -> (h*w*d, C), d fastest."""
        parts = []
        for axis, (table, n) in enumerate(zip((self.row_embed, self.col_embed, self.dep_embed), grid, strict=True)):
            stride = table.num_embeddings // n
            rows = table(torch.arange(1, n + 1, device=table.weight.device) * stride - 1)
            view = [1, 1, 1, -1]
            view[axis] = n
            parts.append(rows.view(view).expand(*grid, -1))
        return torch.cat(parts, dim=-1).flatten(0, 2)


class _VisionEncoder(nn.Module):
    """3D vision transformer over the patches of single scans."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.patch = s.patch
        values = 3 * s.patch[0] * s.patch[1] * s.patch[2]
        self.to_patch_embedding = nn.Sequential(
            nn.Identity(),  # keeps the released numbering; patches are cut in forward
            nn.LayerNorm(values),
            nn.Linear(values, s.vis_dim),
            nn.LayerNorm(s.vis_dim),
        )
        self.pos_embedding = _Position(s)
        self.transformer = _Transformer(s)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W, D) -> tokens (N, P, C) and the positions added to them (P, C)."""
        n, channels, *whole = x.shape
        grid = tuple(size // step for size, step in zip(whole, self.patch, strict=True))
        cut = x.reshape(n, channels, *(k for pair in zip(grid, self.patch, strict=True) for k in pair))
        # (n, c, h, p1, w, p2, d, pf) -> (n, h, w, d, p1, p2, pf, c)
        patches = cut.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(n, grid[0] * grid[1] * grid[2], -1)
        positions = self.pos_embedding(grid)
        return self.transformer(self.to_patch_embedding(patches) + positions), positions


class _LatentAttention(nn.Module):
    """Attention of normed latents over normed tokens followed by the normed latents themselves; no biases."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """tokens (N, P, C), latents (N, latents, C) -> (N, latents, C)."""
        latents = self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([self.norm_media(tokens), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(latents), k, v, self.heads))


class _Perceiver(nn.Module):
    """Resampler: (N, P, C) -> (N, latents, C)."""

    def __init__(self, s: Sizes):
        super().__init__()
        dim, inner = s.vis_dim, s.vis_dim * s.ff_mult
        self.latents = nn.Parameter(torch.zeros(s.latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _LatentAttention(dim, s.perceiver_heads, s.perceiver_dim_head),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, inner, bias=False),
                        nn.GELU(),
                        nn.Linear(inner, dim, bias=False),
                    ),
                ]
            )
            for _ in range(s.perceiver_depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.latents.expand(tokens.shape[0], -1, -1)
        for attention, mlp in self.layers:
            x = x + attention(tokens, x)
            x = x + mlp(x)
        return self.norm(x)


class _Embedding(nn.Module):
    """Ids and scans to the embeddings of the language model; shares its text table."""

    def __init__(self, s: Sizes, weight: nn.Parameter):
        super().__init__()
        self.weight = weight
        self.figure_token_weight = nn.Parameter(torch.zeros(2, s.hidden))
        self.vision_encoder = _VisionEncoder(s)
        self.perceiver = _Perceiver(s)
        self.fc = nn.Linear(s.vis_dim, s.hidden)

    def see(self, vision: Tensor) -> dict[str, Tensor]:
        """vision (B, S, 3, H, W, D) -> vit (B*S, P, C), positions (P, C), perceiver (B, S, latents, C) and
        visual_tokens (B, S*latents, E)."""
        vit, positions = self.vision_encoder(vision.flatten(0, 1))
        perceiver = self.perceiver(vit).unflatten(0, vision.shape[:2])
        return {
            "vit": vit,
            "positions": positions,
            "perceiver": perceiver,
            "visual_tokens": self.fc(perceiver).flatten(1, 2),
        }

    def look_up(self, ids: Tensor, visual_tokens: Tensor) -> Tensor:
        """ids (B, L), visual_tokens (B, S*latents, E) -> embeddings (B, L, E)."""
        vocab, hidden = self.weight.shape
        text = F.embedding(ids.clamp(max=vocab - 1), self.weight)
        other = torch.cat([self.figure_token_weight.expand(ids.shape[0], -1, -1), visual_tokens], dim=1)
        place = (ids - vocab).clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden)
        return torch.where((ids < vocab).unsqueeze(-1), text, other.gather(1, place))


class TorchRadFM(nn.Module):
    """RadFM of any size; see the module's docstring."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        config = LlamaConfig(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.inter,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            rms_norm_eps=sizes.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="eager",
        )
        self.lang_model = LlamaForCausalLM(config)
        self.embedding_layer = _Embedding(sizes, self.lang_model.model.embed_tokens.weight)

    def llm(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """embeds (B, L, E), attention_mask (B, L) of 0 and 1 -> logits (B, L, V).

        A query sees key j when j is not after it and attention_mask[j] is 1; a masked query keeps this rule, and
        positions count from 0 whatever the mask.
        """
        batch, length, _ = embeds.shape
        seen = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril().expand(batch, -1, -1)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, :]
        additive = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device)
        additive = additive.masked_fill(~seen, torch.finfo(embeds.dtype).min)[:, None]
        positions = torch.arange(length, device=embeds.device)[None]
        return self.lang_model(inputs_embeds=embeds, attention_mask=additive, position_ids=positions).logits

    def forward(self, ids: Tensor, vision: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """ids (B, L) int64, vision (B, S, 3, H, W, D), attention_mask (B, L) or None -> dict of

        vit (B*S, P, C), positions (P, C), perceiver (B, S, latents, C), visual_tokens (B, S*latents, E),
        embeds (B, L, E), logits (B, L, V).
        """
        out = self.embedding_layer.see(vision)
        out["embeds"] = self.embedding_layer.look_up(ids, out["visual_tokens"])
        out["logits"] = self.llm(out["embeds"], attention_mask)
        return out

    @torch.no_grad()
    def greedy(self, ids: Tensor, visual_tokens: Tensor, steps: int, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Continue ids (1, L) greedily, without a mask or a cache, for at most ``steps`` tokens.

        visual_tokens (1, S*latents, E) are those of ``forward`` or ``embedding_layer.see``. Returns the new ids (n,),
        ``stop`` the last of them if it came, and the logits each was chosen by (n, V).
        """
        scores = []
        start = ids.shape[1]
        for _ in range(steps):
            scores.append(self.llm(self.embedding_layer.look_up(ids, visual_tokens))[0, -1])
            new = scores[-1].argmax()
            ids = torch.cat([ids, new.view(1, 1)], dim=1)
            if new.item() == stop:
                break
        return ids[0, start:], torch.stack(scores)


def losses(logits: Tensor, labels: Tensor, loss_reweight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, L, V), labels (B, L) with -100 for none, loss_reweight (B, L) ->

    loss_reg = sum(w ce) / sum(w), loss_hf = mean of ce over the labels there are, token_ce (B, L-1), 0 where there is
    no label. Logits at t are compared with label and weight at t+1; a weight counts only where there is a label.
    """
    target = labels[:, 1:]
    token_ce = F.cross_entropy(logits[:, :-1].transpose(1, 2), target, ignore_index=-100, reduction="none")
    valid = (target != -100).to(token_ce.dtype)
    weight = loss_reweight[:, 1:] * valid
    return (weight * token_ce).sum() / weight.sum(), token_ce.sum() / valid.sum(), token_ce


def load_arrays(model: TorchRadFM, arrays: dict[str, np.ndarray]) -> TorchRadFM:
    """Load a released state_dict of numpy arrays; missing and unexpected parameters are errors."""
    used = {key: torch.from_numpy(value.copy()) for key, value in arrays.items() if golden.is_used(key)}
    model.load_state_dict(used, strict=True)
    return model


def arrays_of(model: TorchRadFM) -> dict[str, np.ndarray]:
    """The model's state_dict as float32 numpy arrays (the tied table under both names)."""
    return {key: value.detach().numpy().astype(np.float32) for key, value in model.state_dict().items()}


def build(sizes: Sizes, salt: str = "") -> TorchRadFM:
    """A model of any size in evaluation mode, with the weights of the golden recipe under ``salt``."""
    model = TorchRadFM(sizes).eval()
    return load_arrays(model, {key: golden.tensor(key, p.shape, salt) for key, p in model.state_dict().items()})


def of_golden(name: str) -> TorchRadFM:
    """The model of golden case ``name``, in evaluation mode."""
    return load_arrays(TorchRadFM(Sizes.of_golden(golden.load(name))).eval(), golden.state_dict(name))
