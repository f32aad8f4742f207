"""This network with the weights of a PyTorch state_dict, and its gradients under PyTorch's names."""

import functools

import golden
import jax
import numpy as np

from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.convert.table import entries
from radfm_jax.models.decoder import DecoderConfig, head_logits
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFM, RadFMConfig
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.training.losses import radfm_loss


def config_of(sizes: golden.Sizes, **compute) -> RadFMConfig:
    """Return the RadFMConfig of golden sizes; `compute` is passed to `with_compute`."""
    return RadFMConfig(
        ViTConfig(
            width=sizes.vis_dim,
            num_layers=sizes.vit_depth,
            num_heads=sizes.vit_heads,
            head_dim=sizes.vit_dim_head,
            mlp_width=sizes.vit_mlp,
            patch=sizes.patch,
            tables=sizes.tables,
        ),
        PerceiverConfig(
            width=sizes.vis_dim,
            num_latents=sizes.latents,
            num_layers=sizes.perceiver_depth,
            num_heads=sizes.perceiver_heads,
            head_dim=sizes.perceiver_dim_head,
            mlp_factor=sizes.ff_mult,
        ),
        DecoderConfig(
            vocab_size=sizes.vocab,
            width=sizes.hidden,
            mlp_width=sizes.inter,
            num_layers=sizes.layers,
            num_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads or sizes.heads,
            head_dim=sizes.hidden // sizes.heads,
            rope_theta=sizes.rope_theta,
            norm_eps=sizes.rms_eps,
        ),
    ).with_compute(**compute)


def params_of(config: RadFMConfig, arrays: dict[str, np.ndarray]) -> dict:
    """Convert a state_dict of arrays to parameters. A missing name is an error; unused names are ignored."""
    leaves: dict = {}
    for e in entries(config):
        tensor = arrays[e.name]
        assert tensor.shape == e.torch_shape, (e.name, tensor.shape, e.torch_shape)
        leaves.setdefault(e.path, []).append(e.to_ours(tensor))
        stacked = e.layer is not None
        assert (len(leaves[e.path]) == e.layer + 1) if stacked else (len(leaves[e.path]) == 1), e.name
    stacks = {e.path for e in entries(config) if e.layer is not None}
    return unflatten({path: np.stack(v) if path in stacks else v[0] for path, v in leaves.items()})


def under_torch_names(config: RadFMConfig, tree: dict) -> dict[str, np.ndarray]:
    """Convert parameters or their gradients to arrays by PyTorch name, in PyTorch's layout."""
    leaves = flatten(jax.tree.map(np.asarray, tree))
    return {e.name: e.to_torch(leaves[e.path][e.index]) for e in entries(config)}


def targets_of(labels: np.ndarray, loss_reweight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's labels (-100: none) -> targets int32[B, T] and weights float32[B, T] at the position that predicts.

    labels         -100 -100   17    9    2 -100
    loss_reweight     1    1    3    1    1    0
    targets           0   17    9    2    0    0      the label one further on; the last position predicts nothing
    weights           0    3    1    1    0    0      1 for every label if no loss_reweight is given
    """
    ahead = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)
    valid = ahead != -100
    if loss_reweight is None:
        weights = valid.astype(np.float32)
    else:
        weights = np.concatenate([loss_reweight[:, 1:], np.zeros_like(loss_reweight[:, :1])], axis=1) * valid
    return np.where(valid, ahead, 0).astype(np.int32), weights.astype(np.float32)


def recipe_params(config: RadFMConfig, salt: str = "") -> dict:
    """Return parameters of any size by the recipe of the golden cases, with sharp attention and predictions."""
    return params_of(config, {e.name: golden.tensor(e.name, e.torch_shape, salt) for e in entries(config)})


class WithHidden:
    """A model whose `out` includes the hidden states, so one forward pass gives logits and losses."""

    def __init__(self, model: RadFM):
        self.model, self.config = model, model.config

    def apply(self, *args, **kwargs):
        hidden, out = self.model.apply(*args, **kwargs)
        return hidden, {**out, "hidden": hidden}


def loss_and_gradients(config: RadFMConfig):
    """Return (params, batch, dropout key or None) -> ((mean loss, out with logits), gradients)."""
    model = WithHidden(RadFM(config))

    def mean_loss(params, batch, key=None):
        rngs = None if key is None else {"dropout": key}
        total, weight, out = radfm_loss(model, params, batch, chunk=64, rngs=rngs)
        return total / weight, {**out, "logits": head_logits(out["hidden"], params["llama"]["head"], "float32")}

    return jax.value_and_grad(mean_loss, has_aux=True)


@functools.cache
def step(config: RadFMConfig):
    """Return `loss_and_gradients`, compiled once per batch shape."""
    return jax.jit(loss_and_gradients(config))
