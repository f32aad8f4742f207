"""Names and layouts of PEFT's tensors, derived from the table of the linear maps that they adapt.

    model.layers.0.self_attn.q_proj.weight         [(h k), e]   llama/blocks/query/kernel  [layers, e, h, k]
    model.layers.0.self_attn.q_proj.lora_A.weight  [r, e]       llama/blocks/query/lora_a  [layers, e, r]
    model.layers.0.self_attn.q_proj.lora_B.weight  [(h k), r]   llama/blocks/query/lora_b  [layers, r, h, k]

Phi fuses maps: the adapter of qkv_proj is that of q_proj, k_proj and v_proj at once. If the three have the same A, B
has their rows:

    A            B_q
                 B_k
                 B_v

Otherwise the rank is three times as large. A map without an adapter has zeros in both:

    A_q          B_q  0    0
    A_k          0    B_k  0
    A_v          0    0    B_v
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping

import numpy as np

from radfm_jax.convert import table
from radfm_jax.models.lora import KERNEL, A, B
from radfm_jax.models.radfm import RadFMConfig

PREFIX = "base_model.model."
LEAVES = {A: ".lora_A.weight", B: ".lora_B.weight"}
LLAMA = "llama/"
Tensors = dict[str, np.ndarray]


def linear_maps(config: RadFMConfig) -> dict[str, str]:
    """Return {module, such as model.layers.*.mlp.up_proj: linear map, such as llama/blocks/up}."""
    rules = table.decoder_rules(config.llama).items()
    return {
        name.removesuffix(".weight"): LLAMA + path.removesuffix(KERNEL)
        for name, (path, _) in rules
        if path.endswith(KERNEL)
    }


def entries(config: RadFMConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[table.Entry]:
    """Return the tensors of adapters with these shapes, {path: shape}, under the names of a family without fusion."""
    rules: table.Rules = {}
    for name, (path, layout) in table.decoder_rules(config.llama).items():
        targets = {leaf: f"{LLAMA}{path.removesuffix(KERNEL)}/{leaf}" for leaf in LEAVES}
        if path.endswith(KERNEL) and targets[A] in shapes:
            torch_axes = layout.partition(" -> ")[0]
            outputs, inputs = re.findall(r"\([^)]*\)|[a-z]", torch_axes)
            plain = lambda axes: axes.strip("()")  # noqa: E731
            layouts = {A: f"r {inputs} -> {plain(inputs)} r", B: f"{outputs} r -> r {plain(outputs)}"}
            module = name.removesuffix(".weight")
            rules |= {module + LEAVES[leaf]: (targets[leaf], layouts[leaf]) for leaf in LEAVES}
    return table.entries_of(rules, dict(shapes))


def pattern_of(name: str) -> str:
    """Return the name of a tensor with * for its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def modules_of(names: Iterable[str]) -> list[str]:
    """Return the last names of the modules of some tensors, such as q_proj, each once."""
    return list(dict.fromkeys(name.rpartition(".lora_")[0].rpartition(".")[2] for name in names))


# --- fused modules ----------------------------------------------------------------------------------------------------

# Fused module -> its parts, in the order of their rows.
PARTS: dict[str, list[str]] = {}
for _part, _fused in table.FUSED.items():
    PARTS.setdefault(_fused, []).append(_part)


def part_rows(config: RadFMConfig) -> dict[str, int]:
    """Return the number of outputs of each part of a fused module."""
    llama = config.llama
    heads = {"q_proj": llama.num_heads, "k_proj": llama.num_kv_heads, "v_proj": llama.num_kv_heads}
    return {name: n * llama.head_dim for name, n in heads.items()} | dict.fromkeys(
        PARTS["gate_up_proj"], llama.mlp_width
    )


def is_fused(names: Iterable[str]) -> bool:
    """Return whether some tensors are those of fused modules."""
    return any(module in PARTS for module in modules_of(names))


def fuse(tensors: Tensors, config: RadFMConfig) -> tuple[Tensors, dict[str, int]]:
    """Return tensors with the names of Phi, and {fused module: number of adapters that it stacks}."""
    groups: dict[str, dict[str, Tensors]] = collections.defaultdict(dict)  # fused layer -> part -> A and B
    fused: Tensors = {}
    for name, x in tensors.items():
        layer, leaf = name.rpartition(".lora_")[0], name[-len(LEAVES[A]) :]
        parent, _, part = layer.rpartition(".")
        if part in table.FUSED:
            groups[f"{parent}.{table.FUSED[part]}"].setdefault(part, {})[leaf] = x
        else:
            fused[name] = x
    shared = {
        module: all(_share_a(parts, module) for layer, parts in groups.items() if layer.endswith(f".{module}"))
        for module in modules_of(f"{layer}.lora_A" for layer in groups)
    }
    rows = part_rows(config)
    for layer, parts in groups.items():
        module = layer.rpartition(".")[2]
        a, b = (_joined if shared[module] else _stacked)(parts, PARTS[module], rows)
        fused |= {layer + LEAVES[A]: a, layer + LEAVES[B]: b}
    return fused, {module: len(PARTS[module]) for module, is_shared in shared.items() if not is_shared}


def _share_a(parts: Mapping[str, Tensors], module: str) -> bool:
    first, *others = (x[LEAVES[A]] for x in parts.values())
    return len(parts) == len(PARTS[module]) and all(np.array_equal(first, x) for x in others)


def _joined(parts, names: list[str], rows) -> tuple[np.ndarray, np.ndarray]:
    return parts[names[0]][LEAVES[A]], np.concatenate([parts[name][LEAVES[B]] for name in names])


def _stacked(parts, names: list[str], rows: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    first = next(iter(parts.values()))
    rank = len(first[LEAVES[A]])
    a = np.zeros((len(names) * rank, first[LEAVES[A]].shape[1]), first[LEAVES[A]].dtype)
    b = np.zeros((sum(rows[name] for name in names), len(names) * rank), first[LEAVES[B]].dtype)
    for name, outputs, ranks in _blocks(names, rows, rank):
        if name in parts:
            a[ranks], b[outputs, ranks] = parts[name][LEAVES[A]], parts[name][LEAVES[B]]
    return a, b


def _blocks(names: list[str], rows: Mapping[str, int], rank: int):
    """Yield each part of a fused module with its rows of B and its ranks."""
    start = 0
    for i, name in enumerate(names):
        yield name, slice(start, start + rows[name]), slice(i * rank, (i + 1) * rank)
        start += rows[name]


def split(tensors: Tensors, config: RadFMConfig, rank: int) -> tuple[Tensors, dict[str, int]]:
    """Invert `fuse`.

    Raises ValueError that lists the modules whose shapes fit neither form, or whose stacked B has other values than
    those of its blocks.
    """
    rows, plain, stacked, problems = part_rows(config), {}, {}, []
    for name, a in tensors.items():
        layer, _, leaf = name.rpartition(".lora_")
        parent, _, module = layer.rpartition(".")
        if module not in PARTS:
            plain[name] = a
            continue
        b = tensors.get(layer + LEAVES[B])
        if leaf != "A.weight" or b is None:
            if layer + LEAVES[A] not in tensors or b is None:
                problems.append(f"{layer} has only one of lora_A and lora_B")
            continue
        names = PARTS[module]
        outputs, count = sum(rows[part] for part in names), len(a) // rank
        if len(a) not in (rank, len(names) * rank) or b.shape != (outputs, len(a)):
            expected = f"lora_A ({rank}, E) and lora_B ({outputs}, {rank})"
            problems.append(f"{layer}: lora_A is {a.shape} and lora_B {b.shape}, expected {expected}")
            continue
        if count > 1:
            stacked[module] = count
        rest = b.copy()
        for part, own_rows, own in _blocks(names, rows, rank):
            own = own if count > 1 else slice(None)
            rest[own_rows, own] = 0
            plain |= {f"{parent}.{part}{LEAVES[A]}": a[own], f"{parent}.{part}{LEAVES[B]}": b[own_rows, own]}
        if rest.any():
            problems.append(f"{layer}: lora_B has values outside its {count} blocks of rank {rank}")
    if problems:
        raise ValueError("\n  ".join(["fused modules do not fit the base:", *problems]))
    return _without_zeros(plain), stacked


def _without_zeros(tensors: Tensors) -> Tensors:
    """Drop the parts of fused modules whose A and B are zero in every layer: they have no adapter."""
    used = {pattern_of(n.rpartition(".lora_")[0]) for n, x in tensors.items() if x.any()}
    is_part = lambda name: modules_of([name])[0] in table.FUSED  # noqa: E731
    return {n: x for n, x in tensors.items() if pattern_of(n.rpartition(".lora_")[0]) in used or not is_part(n)}
