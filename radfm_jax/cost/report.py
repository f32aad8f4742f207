"""A plan as a table, as JSON and as a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from input_pipeline import files
from radfm_jax.cost import estimate, methods
from radfm_jax.cost.candidates import MARGIN, Candidate, executed_flops
from radfm_jax.cost.methods import Fit
from radfm_jax.cost.topology import Topology
from radfm_jax.training.experiment import MeshConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """The ranked candidates of a config on a topology."""

    name: str  # the config
    topology: Topology
    mfu: float | None  # assumed share of the peak
    mfu_source: str  # description of where `mfu` comes from
    ranked: list[Candidate]  # best first
    best: Candidate | None  # the recommended one, or None if none fits
    plain: Candidate  # gathers the weights for every row
    sources: Mapping[str, estimate.Source] | None  # sizes of the config's data (its SIZES)
    price: float | None  # price of a device-hour
    methods: Mapping[str, Sequence[Fit]] = dataclasses.field(default_factory=dict)  # methods.table, if it was computed


def table(plan: Plan, limit: int = 12) -> Table:
    """Return the table of the best candidates, one per row."""
    result = Table(
        "", "micro-batches x rows", "remat", "GB per device", "free", "TFLOP per device", "GB sent in", "per row",
        "s per step", "rows/s", "compiled", title=f"{plan.name} on {plan.topology.text}", caption_justify="left",
        caption="GB sent in: bytes into each device per step, and per row. s per step: from full to no overlap of "
        "communication and arithmetic. plain: weights gathered for every micro-batch of one row per device.",
    )  # fmt: skip
    shown = plan.ranked[:limit]
    for candidate in shown if plan.plain in shown else [*shown, plan.plain]:
        train, margin, seconds = candidate.config.train, candidate.margin, candidate.step_seconds
        compiled = f"{candidate.program.seconds:.0f} s" if candidate.program else ""
        result.add_row(
            "take" if candidate is plan.best else "plain" if candidate is plan.plain
            else "" if candidate.fits else "too big",
            f"{train.accumulation} x {candidate.rows}  ({train.batch})",
            train.remat,
            brief(candidate.total / 1e9),
            "" if margin is None else f"{margin:.0%}",
            brief(executed_flops(candidate.config) * train.batch / plan.topology.count / 1e12, 0),
            brief(candidate.traffic / 1e9),
            brief(candidate.traffic / train.batch / 1e9, 2),
            "" if seconds is None else f"{seconds[0]:.3g} - {seconds[1]:.3g}",
            "" if seconds is None else f"{train.batch / seconds[1]:.3g} - {train.batch / seconds[0]:.3g}",
            "failed" if candidate.compile_error else compiled,
            style="bold" if candidate is plan.best else "" if candidate.fits else "dim",
        )  # fmt: skip
    return result


def methods_table(plan: Plan) -> Table:
    """Return the table of methods and row lengths."""
    lengths = [fit.config.data.text_length for fit in next(iter(plan.methods.values()))]
    train = plan.plain.config.train
    result = Table(
        "method", "state", *(f"{length:,} tokens" for length in lengths), caption_justify="left",
        title=f"GB per device on {plan.topology.text} by method and tokens per row (data.text_length)",
        caption=f"yes: {MARGIN:.0%} of the memory stays free with full remat, {train.batch:,} rows per step and the "
        f"micro-batches with the smallest memory. state: {', '.join(methods.STATE)}. docs/plan.md has the methods.",
    )  # fmt: skip
    for method, fits in plan.methods.items():
        cells = (f"{brief(fit.total / 1e9)} {'yes' if fit.fits else 'no'}" for fit in fits)
        result.add_row(method, brief(fits[0].state / 1e9), *cells, style="" if any(f.fits for f in fits) else "dim")
    return result


def smallest_table(name: str, fits: Mapping[str, Fit | None]) -> Table:
    """Return the table of methods.smallest for each method."""
    result = Table(
        "method", "smallest", "GB per device", "of", "state", "micro-batches x rows per device",
        title=f"smallest GPUs for {name}",
        caption=f"{MARGIN:.0%} of the memory stays free with full remat. state: {', '.join(methods.STATE)}.",
        caption_justify="left",
    )  # fmt: skip
    for method, fit in fits.items():
        if fit is None:
            result.add_row(method, f"more than {methods.COUNTS[-1]} GPUs")
            continue
        result.add_row(
            method, fit.topology.text, brief(fit.total / 1e9), brief((fit.topology.memory or 0) / 1e9, 0),
            brief(fit.state / 1e9), f"{fit.config.train.accumulation} x {fit.rows}",
        )  # fmt: skip
    return result


def brief(number: float, digits: int = 1) -> str:
    """Format with this many decimals, and numbers below 1 with significant digits, so that small ones are not 0."""
    return f"{number:,.{digits}f}" if number >= 1 or not number else f"{number:#.{max(digits, 2)}g}"


def lines(plan: Plan) -> list[str]:
    """Return the lines under the table: devices, the recommendation, its memory, traffic and time."""
    topology, best = plan.topology, plan.best
    memory = "" if topology.memory is None else f", {topology.memory / 1e9:.1f} GB each"
    result = [f"{topology.count} devices{memory}; {topology.bandwidth_text}"]
    mesh = estimate.abstract_mesh(plan.plain.config.mesh, topology.count)
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    unsharded = estimate.memory(plan.plain.config, estimate.abstract_mesh(MeshConfig(), 1))["parameters"]
    share = plan.plain.memory["parameters"] / unsharded
    if share > 1 / shards + 0.1:
        result.append(
            f"{share:.0%} of the parameters are on each device instead of 1/{shards}: axes that {shards} does not "
            f"divide are not sharded; a power of two divides all large ones"
        )
    result += [f"compilation failed: {c.name}: {c.compile_error}" for c in plan.ranked if c.compile_error]
    if best is None:
        return [*result, f"nothing fits with {MARGIN:.0%} of the memory left free: use more devices, mesh.tensor, or "
                f"fewer rows per step (--batch)"]  # fmt: skip
    train = best.config.train
    result.append(
        f"take: --config.train.batch={train.batch} --config.train.accumulation={train.accumulation} "
        f"--config.train.remat={train.remat}"
    )
    parts = ", ".join(f"{part} {brief(size / 1e9, 2)}" for part, size in best.memory.items())
    state = sum(best.memory[part] for part in methods.STATE)
    result.append(
        f"estimated memory: {brief(sum(best.memory.values()) / 1e9, 2)} GB ({parts}); the state is "
        f"{brief(state / 1e9, 2)} GB of it ({', '.join(methods.STATE)})"
    )
    return result + _compiled(plan) + _time(plan)


def _compiled(plan: Plan) -> list[str]:
    """Return memory and traffic of the compiled program, and its traffic relative to the plain program."""
    topology, best, result = plan.topology, plan.best, []
    if (p := best.program) is not None:
        devices = "this topology" if topology.kind == "tpu" else f"{topology.count} simulated CPU devices"
        note = "; a GPU differs: a CPU has no fused attention and multiplies in float32"
        result.append(
            f"memory, compiled for {devices}: {brief(p.peak / 1e9, 2)} GB "
            f"(state and batch {brief(p.arguments / 1e9, 2)}, temporary {brief(p.temporary / 1e9, 2)}, "
            f"program {brief(p.beside / 1e9, 2)}){note if topology.kind == 'gpu' else ''}"
        )
        kinds = ", ".join(f"{kind} {brief(size / 1e9)}" for kind, size in p.received.items() if size)
        result.append(
            f"sent, compiled: {brief(sum(p.received.values()) / 1e9)} GB into each device per step ({kinds or 'none'})"
        )
        if p.loops_unknown:
            result.append(f"  {p.loops_unknown} collectives in loops of unknown length are counted once")
    if plan.plain.traffic:
        compiled = sum(c.program is not None for c in (best, plan.plain)) if topology.kind == "tpu" else 0
        method = ("arithmetic", "one of them by arithmetic", "both compiled")[compiled]
        share = best.traffic / best.config.train.batch / (plan.plain.traffic / plan.plain.config.train.batch)
        result.append(f"sent per row: {share:.0%} of what the plain program sends ({method})")
    return result


def _time(plan: Plan) -> list[str]:
    """Return time per step, its lower bound and, if the config states the sizes of its data, epochs and cost."""
    best, count, train = plan.best, plan.topology.count, plan.best.config.train
    if best.step_seconds is None:
        return []
    fast, slow = best.step_seconds
    hidden = best.can_hide
    sending = "" if hidden is None else f", sending {slow - best.compute:.3g} s ({hidden:.0%} of it can be hidden)"
    result = [f"time: arithmetic {best.compute:.3g} s per step at {plan.mfu_source}{sending}"]
    bound = roofline(best)
    epoch = estimate.epoch(best.config, plan.sources) if plan.sources is not None else None
    per_epoch = "" if epoch is None else f", {estimate.duration(bound * epoch.rows / train.batch)} per epoch"
    result.append(
        f"roofline: {bound:.3g} s per step{per_epoch}: the longer of arithmetic at the full peak, with recomputation, "
        f"and sending"
    )

    def cost(steps: float) -> str:
        if plan.price is None:
            return ""
        low, high = (plan.price * count * steps * seconds / 3600 for seconds in (fast, slow))
        return f", cost {low:,.0f} to {high:,.0f}"

    def duration(steps: float) -> str:
        return f"{estimate.duration(steps * fast)} to {estimate.duration(steps * slow)}{cost(steps)}"

    if train.minutes:
        counts = (60 * train.minutes / seconds for seconds in (slow, fast))
        result.append(f"{train.minutes:g} minutes: {' to '.join(f'{count:,.0f}' for count in counts)} steps")
    if epoch is None:
        hours = f"{1000 * fast / 3600:.3g} to {1000 * slow / 3600:.3g} h"
        return [*result, f"{hours} for 1,000 steps on {count} devices{cost(1000)}"]
    per_row, steps, text_length = epoch.samples / epoch.rows, epoch.rows / train.batch, best.config.data.text_length
    about = estimate.about
    stage = () if train.minutes else (
        f"the stage: {about(epoch.steps)} steps, {about(epoch.steps * train.batch * per_row)} samples, "
        f"{epoch.steps * train.batch * text_length / 1e9:.3g} G tokens, {duration(epoch.steps)}",
    )  # fmt: skip
    return [
        *result,
        f"samples/s: {per_row * train.batch / slow:,.0f} to {per_row * train.batch / fast:,.0f} "
        f"({per_row:.1f} samples per row, from the sizes in the config)",
        f"an epoch: {about(epoch.samples)} samples, {epoch.rows * text_length / 1e9:.3g} G tokens, "
        f"{about(steps)} steps, {duration(steps)}",
        *stage,
    ]


def roofline(candidate: Candidate) -> float | None:
    """Return a lower bound of a step's seconds from peak FLOP/s and link speed; memory bandwidth is not considered."""
    if candidate.compute is None:
        return None
    executed = executed_flops(candidate.config) * candidate.config.train.batch / candidate.topology.count
    return max(executed / candidate.topology.peak, candidate.step_seconds[1] - candidate.compute)


def show(plan: Plan, console: Console) -> None:
    """Print the table and its lines."""
    console.print(table(plan))
    for line in lines(plan):
        console.print(line, highlight=False, soft_wrap=True)
    if plan.methods:
        console.print(methods_table(plan))


def write_json(plan: Plan, path: Path) -> None:
    """Write everything, in bytes, seconds and FLOPs."""

    def fields(candidate: Candidate) -> dict:
        train, seconds = candidate.config.train, candidate.step_seconds
        return {
            "batch": train.batch, "accumulation": train.accumulation, "rows": candidate.rows, "remat": train.remat,
            "fits": candidate.fits, "memory_total": candidate.total, "memory_by_part": candidate.memory,
            "margin": candidate.margin,
            "flops_a_device": executed_flops(candidate.config) * train.batch / plan.topology.count,
            "bytes_received": candidate.traffic, "bytes_received_arithmetic": candidate.estimated_traffic,
            "seconds_hidden": seconds and seconds[0], "seconds_not_hidden": seconds and seconds[1],
            "seconds_arithmetic": candidate.compute, "seconds_roofline": roofline(candidate),
            "can_hide": candidate.can_hide, "refused": candidate.compile_error,
            "compiled": candidate.program and dataclasses.asdict(candidate.program),
        }  # fmt: skip

    topology = plan.topology
    result = {
        "config": plan.name, "topology": topology.text, "devices": topology.count,
        "memory_of_a_device": topology.memory, "peak": topology.peak, "bandwidth": topology.bandwidth,
        "mfu": plan.mfu, "mfu_from": plan.mfu_source, "price": plan.price,
        "take": plan.best and fields(plan.best), "plain": fields(plan.plain),
        "ladder": [fields(candidate) for candidate in plan.ranked], "lines": lines(plan),
        "methods": [fit.as_dict() for fits in plan.methods.values() for fit in fits],
    }  # fmt: skip
    files.write_json(path, result)


def plot(plan: Plan, path: Path, limit: int = 14) -> None:
    """Plot each candidate's memory by part and its seconds per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = plan.ranked[:limit][::-1]
    names = [("take: " if c is plan.best else "") + c.name for c in shown]
    timed = shown[0].compute is not None
    figure, axes = pyplot.subplots(
        1, 1 + timed, figsize=(8 + 6 * timed, 2.4 + 0.36 * len(shown)), layout="constrained", sharey=True, squeeze=False
    )
    memory, legend = axes[0][0], {"loc": "upper center", "bbox_to_anchor": (0.5, -0.6 / (1 + 0.36 * len(shown)))}
    left = [0.0] * len(shown)
    for part in shown[0].memory:
        sizes = [c.memory[part] / 1e9 for c in shown]
        memory.barh(names, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for row, candidate in enumerate(shown):
        if candidate.program is not None and plan.topology.kind != "gpu":
            label = "compiled" if candidate is plan.best else None
            memory.plot(candidate.total / 1e9, row, "k|", markersize=14, label=label)
    if plan.topology.memory is not None:
        memory.axvline(plan.topology.memory / 1e9, color="red", label="memory of a device")
    memory.set_xlabel("GB per device, by arithmetic")
    memory.legend(fontsize=8, ncols=4, **legend)
    if timed:
        time = axes[0][1]
        compute = [c.compute / c.config.train.batch for c in shown]
        time.barh(names, compute, label=f"arithmetic at {plan.mfu:.0%} of the peak")
        communication = [c.communication / c.config.train.batch for c in shown]
        time.barh(names, communication, left=compute, label="communication without overlap")
        time.set_xlabel("seconds per row")
        time.legend(fontsize=8, ncols=2, **legend)
    figure.suptitle(f"{plan.name} on {plan.topology.text}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
