"""Greedy decoding speed against transformers' `generate`, at batch 1 and 8, in float32 and with int8 weights.

    python tests/benchmarks/bench_decode.py [--layers 8] [--new 64] [--repeats 5] [--prompt 128]

The model is a LLaMA with random float32 weights, by default 8 layers, 512 wide, 32,000 words. All sides use the same
threads, prompts and number of tokens, run alternately, and must write the same tokens (except int8). A time is the
difference of two calls, with `--new` tokens and with one, so it excludes the prompt and the overhead of a call.
`copy` is the rate of copying the matrices of one token within memory, counting bytes read and written. It is the
limit of a loop that only reads them."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.convert.table import entries
from radfm_jax.inference import Generator, Prompt, Sampling
from radfm_jax.models import quantised, radfm
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.vit3d import ViTConfig

BATCHES = (1, 8)


def sizes(layers: int) -> radfm.RadFMConfig:
    """Return the sizes of a language model with that many layers; the vision parts are not run."""
    return radfm.RadFMConfig(
        ViTConfig(width=24, num_layers=1, num_heads=1, head_dim=8, mlp_width=8),
        PerceiverConfig(width=24, num_layers=1, num_heads=1, head_dim=8),
        DecoderConfig(
            width=512, mlp_width=1376, num_layers=layers, num_heads=8, num_kv_heads=8, head_dim=64, attention="xla"
        ),
    )


def random_params(config: radfm.RadFMConfig) -> dict:
    """Return random parameters with sharp queries, keys and logits, so that no two tokens are almost equally likely."""
    rng = np.random.default_rng(0)
    leaves = {}
    for path, x in flatten(nn.unbox(radfm.abstract_params(config))).items():
        values = rng.standard_normal(x.shape, np.float32)
        name = path.split("/")[-2 if path.endswith("kernel") else -1]
        gain = 1.5 if name in ("query", "key", "head") else 1.0
        inputs = config.llama.mlp_width if name == "down" else config.llama.width
        leaves[path] = 1 + 0.1 * values if path.endswith("scale") else values * np.float32(gain / inputs**0.5)
    leaves["llama/embedding"] *= np.float32(0.5 * config.llama.width**0.5)
    return unflatten({path: x.astype(np.float32) for path, x in leaves.items()})


def torch_model(config: radfm.RadFMConfig, params: dict) -> transformers.LlamaForCausalLM:
    c = config.llama
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        )
    ).eval()  # fmt: skip
    leaves = flatten(params)
    state = {
        e.name.removeprefix("lang_model."): torch.from_numpy(np.array(e.to_torch(leaves[e.path][e.index])))
        for e in entries(config)
        if e.name.startswith("lang_model.")
    }
    made.load_state_dict(state, strict=True)
    return made


class Ours:
    def __init__(self, generator: Generator, ids: np.ndarray):
        self.generator, self.prompts = generator, [Prompt(row, np.full(len(row), -1, np.int32)) for row in ids]

    def __call__(self, new: int) -> list[list[int]]:
        return [list(a.ids) for a in self.generator.answers(self.prompts, Sampling(new, stop_ids=()))]


class Theirs:
    def __init__(self, model: transformers.LlamaForCausalLM, ids: np.ndarray):
        self.model, self.ids = model, torch.from_numpy(ids.astype(np.int64))

    def __call__(self, new: int) -> list[list[int]]:
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, self.ids.shape[1] :].tolist()


def seconds(work, *args) -> float:
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: 128)")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (default: 64)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    config = sizes(args.layers)
    params = random_params(config)
    ids = np.random.default_rng(1).integers(3, config.llama.vocab_size, (max(BATCHES), args.prompt)).astype(np.int32)
    generator, model = Generator(config, jax.tree.map(jax.numpy.asarray, params)), torch_model(config, params)
    small = Generator(config, quantised.quantise_params(params, "int8"))
    sides = {f"ours, batch {b}": (b, Ours(generator, ids[:b])) for b in BATCHES}
    sides |= {f"ours in int8, batch {b}": (b, Ours(small, ids[:b])) for b in BATCHES}
    sides |= {f"transformers, batch {b}": (b, Theirs(model, ids[:b])) for b in BATCHES}
    read = sum(x.nbytes for x in jax.tree.leaves(params["llama"]["blocks"])) + params["llama"]["head"].nbytes
    source, target = np.ones(read // 4, np.float32), np.zeros(read // 4, np.float32)
    for b in BATCHES:  # compile and warm up, and compare the answers
        written, expected = (sides[f"{who}, batch {b}"][1](args.new) for who in ("ours", "transformers"))
        if written != expected:
            raise SystemExit(f"batch {b}: the two sides write different tokens")
        sides[f"ours in int8, batch {b}"][1](args.new)
        _ = [sides[f"{who}, batch {b}"][1](1) for who in ("ours", "ours in int8", "transformers")]
    rounds = []
    for _ in range(args.repeats):
        took = {name: seconds(side, args.new) - seconds(side, 1) for name, (_, side) in sides.items()}
        rounds.append({name: (args.new - 1) * b / took[name] for name, (b, _) in sides.items()})
        rounds[-1]["copy"] = 2 / seconds(np.copyto, target, source)
    table = Table(
        "", "tokens/s", "share of copy rate", title=f"medians of {args.repeats} rounds, load {os.getloadavg()[0]:.1f}"
    )
    median = lambda values: statistics.median(list(values))  # noqa: E731
    for name in rounds[0]:
        share = "" if name == "copy" else f"{median(r[name] / r['copy'] for r in rounds):.2f}"
        table.add_row(name, f"{median(r[name] for r in rounds):.1f}", share)
    console = Console()
    console.print(table)
    ratio = lambda a, b: f"{median(r[a] / r[b] for r in rounds):.2f}"  # noqa: E731
    console.print(f"ours over transformers: batch 1 {ratio('ours, batch 1', 'transformers, batch 1')}, "
                  f"batch 8 {ratio('ours, batch 8', 'transformers, batch 8')}")  # fmt: skip
    console.print(f"int8 over float32: batch 1 {ratio('ours in int8, batch 1', 'ours, batch 1')}, "
                  f"batch 8 {ratio('ours in int8, batch 8', 'ours, batch 8')}")  # fmt: skip
    console.print(f"batch 8 over batch 1: ours {ratio('ours, batch 8', 'ours, batch 1')}, transformers "
                  f"{ratio('transformers, batch 8', 'transformers, batch 1')}")  # fmt: skip


if __name__ == "__main__":
    main()
