"""The lines of memory, time and steps that the docstrings of configs quote."""

from collections.abc import Mapping

from radfm_jax.cost import estimate
from radfm_jax.training.experiment import Experiment

LINK = 25e9  # bytes/s of one network adapter of 200 Gbit/s: the worst case


def summary(
    config: Experiment, devices: estimate.Hardware, sources: Mapping[str, estimate.Source] | None = None
) -> list[str]:
    """Return the lines for a config's docstring: memory, time of a step and, if sizes are known, of the run."""
    mesh = estimate.abstract_mesh(config.mesh, devices.count)
    parts, received = estimate.memory(config, mesh), estimate.traffic(config, mesh)
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    each, row = estimate.step_seconds(config, devices), estimate.amount(estimate.row_flops(config), "FLOP")
    lines = [
        f"memory: {sum(parts.values()) / 1e9:.0f} GB a device ({listed})",
        f"a step: {each:.3g} s ({row} a row x {config.train.batch} rows at {devices.basis})",
    ]
    if received:
        lines.append(f"traffic: {received / 1e9:.0f} GB a step into each device, {received / LINK:.2g} s at 25 GB/s")
    if sources is not None:
        size = estimate.epoch(config, sources)
        lines.append(
            f"steps: {estimate.about(size.steps)} for {config.train.epochs:g} x {estimate.about(size.rows)} rows of "
            f"{size.samples / size.rows:.2g} samples, {estimate.duration(size.steps * each)} of arithmetic"
        )
    return lines
