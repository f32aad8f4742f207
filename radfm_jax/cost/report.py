"""A plan as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from radfm_jax.cost import estimate
from radfm_jax.cost.ladder import MARGIN, Rung, executed
from radfm_jax.cost.topology import Topology
from radfm_jax.training.experiment import MeshConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is shown.

    Attributes:
      mfu: share of the peak that a step is assumed to reach; mfu_said: where that comes from.
      rungs: best first. best: what to take, None if nothing fits. plain: the program that gathers for every row.
      sources: sizes of the config's data (its SIZES), None if it states none. price: of a device-hour.
    """

    name: str
    topology: Topology
    mfu: float | None
    mfu_said: str
    rungs: list[Rung]
    best: Rung | None
    plain: Rung
    sources: Mapping[str, estimate.Source] | None
    price: float | None


def table(plan: Plan, limit: int = 12) -> Table:
    """The ladder: one line a rung."""
    found = Table(
        "", "micro-batches x rows", "remat", "GB a device", "free", "TFLOP a device", "GB sent in", "a row",
        "s a step", "rows/s", "compiled", title=f"{plan.name} on {plan.topology.text}", caption_justify="left",
        caption="GB sent in: into each device a step, and of it a row. s a step: all of the sending hidden behind "
        "arithmetic - none of it. plain: weights gathered for every micro-batch of one row a device.",
    )  # fmt: skip
    shown = plan.rungs[:limit]
    for rung in shown if plan.plain in shown else [*shown, plan.plain]:
        train, margin = rung.config.train, rung.margin
        seconds = rung.hidden
        style = "bold" if rung is plan.best else "" if rung.fits else "dim"
        found.add_row(
            "take" if rung is plan.best else "plain" if rung is plan.plain else "" if rung.fits else "too big",
            f"{train.accumulation} x {rung.rows}  ({train.batch})",
            train.remat,
            brief(rung.total / 1e9),
            "" if margin is None else f"{margin:.0%}",
            brief(executed(rung.config) * train.batch / plan.topology.count / 1e12, 0),
            brief(rung.sent / 1e9),
            brief(rung.sent / train.batch / 1e9, 2),
            "" if seconds is None else f"{seconds[0]:.3g} - {seconds[1]:.3g}",
            "" if seconds is None else f"{train.batch / seconds[1]:.3g} - {train.batch / seconds[0]:.3g}",
            "refused" if rung.refused else f"{rung.program.seconds:.0f} s" if rung.program else "",
            style=style,
        )
    return found


def brief(number: float, digits: int = 1) -> str:
    """With so many decimals, but never 0 for what is not: toys are planned too."""
    return f"{number:,.{digits}f}" if number >= 1 or not number else f"{number:#.{max(digits, 2)}g}"


def lines(plan: Plan) -> list[str]:
    """What the table does not say of the rung to take."""
    topology, best = plan.topology, plan.best
    memory = "" if topology.memory is None else f", {topology.memory / 1e9:.1f} GB each"
    said = [f"{topology.count} devices{memory}; {topology.said}"]
    mesh = estimate.abstract_mesh(plan.plain.config.mesh, topology.count)
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    alone = estimate.memory(plan.plain.config, estimate.abstract_mesh(MeshConfig(), 1))["parameters"]
    held = plan.plain.memory["parameters"] / alone
    if held > 1 / ways + 0.1:
        said.append(
            f"{held:.0%} of the parameters lie on each device, not 1/{ways}: what {ways} does not divide is not shared "
            f"out; a power of two divides all that is large"
        )
    said += [f"refused: {r.name}: {r.refused}" for r in plan.rungs if r.refused]
    if best is None:
        return [*said, f"nothing fits with {MARGIN:.0%} of the memory left free: more devices, mesh.tensor, or fewer "
                f"rows a step (--batch)"]  # fmt: skip
    train = best.config.train
    said.append(
        f"take: --config.train.batch={train.batch} --config.train.accumulation={train.accumulation} "
        f"--config.train.remat={train.remat}"
    )
    parts = ", ".join(f"{part} {brief(size / 1e9, 2)}" for part, size in best.memory.items())
    said.append(f"memory, arithmetic: {brief(sum(best.memory.values()) / 1e9, 2)} GB ({parts})")
    if (p := best.program) is not None:
        where = "this topology" if topology.kind == "tpu" else f"{topology.count} simulated devices of the CPU"
        note = "; a CPU has no fused attention and multiplies in float32: not a GPU's" if topology.kind == "gpu" else ""
        said.append(
            f"memory, compiled for {where}: {brief(p.peak / 1e9, 2)} GB "
            f"(state and batch {brief(p.arguments / 1e9, 2)}, temporary {brief(p.temporary / 1e9, 2)}, "
            f"program {brief(p.beside / 1e9, 2)}){note}"
        )
        sent = ", ".join(f"{kind} {brief(size / 1e9)}" for kind, size in p.received.items() if size)
        said.append(
            f"sent, compiled: {brief(sum(p.received.values()) / 1e9)} GB into each device a step ({sent or 'none'})"
        )
        if p.loops_unknown:
            said.append(f"  {p.loops_unknown} collectives in loops of unknown length are counted once")
    if plan.plain.sent:
        compiled = sum(rung.program is not None for rung in (best, plan.plain)) if topology.kind == "tpu" else 0
        share = best.sent / train.batch / (plan.plain.sent / plan.plain.config.train.batch)
        how = ("arithmetic", "one of them by arithmetic", "both compiled")[compiled]
        said.append(f"sent a row: {share:.0%} of what gathering for every micro-batch of one row sends ({how})")
    if best.hidden is None:
        return said
    hide = best.can_hide
    said.append(
        f"time: arithmetic {best.compute:.3g} s a step at {plan.mfu_said}"
        + (
            ""
            if hide is None
            else f", sending {best.hidden[1] - best.compute:.3g} s, of which {hide:.0%} can be hidden"
        )
    )
    least = roofline(best)
    epoch = ""
    if plan.sources is not None:
        epoch = f", {estimate.duration(least * estimate.epoch(best.config, plan.sources).rows / train.batch)} an epoch"
    said.append(
        f"roofline: {least:.3g} s a step{epoch}: the longer of arithmetic at the full peak, recomputing included, "
        f"and sending"
    )
    return said + _run(plan)


def roofline(rung: Rung) -> float | None:
    """Seconds of a step below which these devices and their links cannot go; their memory's speed is not looked at."""
    if rung.hidden is None:
        return None
    computing = executed(rung.config) * rung.config.train.batch / rung.topology.count / rung.topology.peak
    return max(computing, rung.hidden[1] - rung.compute)


def _run(plan: Plan) -> list[str]:
    """Epochs, samples, cost, where the config states the sizes of its data."""
    best, count = plan.best, plan.topology.count
    quick, slow = best.hidden

    def price(fast: float, slow: float) -> str:
        return "" if plan.price is None else f", cost {cost(plan, fast):,.0f} to {cost(plan, slow):,.0f}"

    if plan.sources is None:
        hours = f"{1000 * quick / 3600:.3g} to {1000 * slow / 3600:.3g} h for 1,000 steps on {count} devices"
        return [hours + price(1000 * quick, 1000 * slow)]
    whole = estimate.epoch(best.config, plan.sources)
    a_row = whole.samples / whole.rows
    train = best.config.train
    epoch = whole.rows / train.batch
    tokens = whole.rows * best.config.data.text_length
    said = [
        f"samples/s: {a_row * train.batch / slow:,.0f} to {a_row * train.batch / quick:,.0f} "
        f"({a_row:.1f} samples a row, by the sizes that the config states)",
        f"an epoch: {estimate.about(whole.samples)} samples, {tokens / 1e9:.3g} G tokens, "
        f"{estimate.about(epoch)} steps, {estimate.duration(epoch * quick)} to {estimate.duration(epoch * slow)}"
        f"{price(epoch * quick, epoch * slow)}",
        f"the stage: {estimate.about(whole.steps)} steps, {estimate.about(whole.steps * train.batch * a_row)} samples, "
        f"{whole.steps * train.batch * best.config.data.text_length / 1e9:.3g} G tokens, "
        f"{estimate.duration(whole.steps * quick)} to {estimate.duration(whole.steps * slow)}"
        f"{price(whole.steps * quick, whole.steps * slow)}",
    ]
    return said


def cost(plan: Plan, seconds: float) -> float:
    """In the currency of `price`."""
    return plan.price * plan.topology.count * seconds / 3600


def show(plan: Plan, console: Console) -> None:
    console.print(table(plan))
    for line in lines(plan):
        console.print(line, highlight=False, soft_wrap=True)


def as_dict(plan: Plan) -> dict:
    """Everything, in bytes, seconds and FLOPs."""

    def of(rung: Rung | None):
        if rung is None:
            return None
        train, seconds = rung.config.train, rung.hidden
        return {
            "batch": train.batch, "accumulation": train.accumulation, "rows": rung.rows, "remat": train.remat,
            "fits": rung.fits, "memory_total": rung.total, "memory_by_part": rung.memory, "margin": rung.margin,
            "flops_a_device": executed(rung.config) * train.batch / plan.topology.count,
            "bytes_received": rung.sent, "bytes_received_arithmetic": rung.received,
            "seconds_hidden": seconds and seconds[0], "seconds_not_hidden": seconds and seconds[1],
            "seconds_arithmetic": rung.compute, "seconds_roofline": roofline(rung),
            "can_hide": rung.can_hide, "refused": rung.refused,
            "compiled": rung.program and dataclasses.asdict(rung.program),
        }  # fmt: skip

    return {
        "config": plan.name, "topology": plan.topology.text, "devices": plan.topology.count,
        "memory_of_a_device": plan.topology.memory, "peak": plan.topology.peak, "bandwidth": plan.topology.bandwidth,
        "mfu": plan.mfu, "mfu_from": plan.mfu_said, "price": plan.price, "take": of(plan.best), "plain": of(plan.plain),
        "ladder": [of(rung) for rung in plan.rungs], "lines": lines(plan),
    }  # fmt: skip


def write_json(plan: Plan, path: Path) -> None:
    path.write_text(json.dumps(as_dict(plan), indent=1) + "\n")


def picture(plan: Plan, path: Path, limit: int = 14) -> None:
    """Memory by part of each rung against what a device has, and its seconds a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rungs = plan.rungs[:limit][::-1]
    names = [("take: " if r is plan.best else "") + r.name for r in rungs]
    timed = rungs[0].hidden is not None
    figure, axes = pyplot.subplots(
        1, 1 + timed, figsize=(8 + 6 * timed, 2.4 + 0.36 * len(rungs)), layout="constrained", sharey=True, squeeze=False
    )
    memory, below = axes[0][0], {"loc": "upper center", "bbox_to_anchor": (0.5, -0.6 / (1 + 0.36 * len(rungs)))}
    left = [0.0] * len(rungs)
    for part in rungs[0].memory:
        sizes = [r.memory[part] / 1e9 for r in rungs]
        memory.barh(names, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for at, rung in enumerate(rungs):
        if rung.program is not None and plan.topology.kind != "gpu":
            memory.plot(rung.total / 1e9, at, "k|", markersize=14, label="compiled" if rung is plan.best else None)
    if plan.topology.memory is not None:
        memory.axvline(plan.topology.memory / 1e9, color="red", label="a device")
    memory.set_xlabel("GB a device, by arithmetic")
    memory.legend(fontsize=8, ncols=4, **below)
    if timed:
        time = axes[0][1]
        compute = [r.compute / r.config.train.batch for r in rungs]
        time.barh(names, compute, label=f"arithmetic at {plan.mfu:.0%} of the peak")
        sending = [(r.hidden[1] - r.compute) / r.config.train.batch for r in rungs]
        time.barh(names, sending, left=compute, label="sending, if nothing of it is hidden")
        time.set_xlabel("seconds a row")
        time.legend(fontsize=8, ncols=2, **below)
    figure.suptitle(f"{plan.name} on {plan.topology.text}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
