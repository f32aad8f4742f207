"""The compiled programs of a run."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import filesize

from input_pipeline.batching.collate import collate_batch
from input_pipeline.batching.pipeline import Rows
from radfm_jax.runtime import console, host_memory
from radfm_jax.training import train_step
from radfm_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of a run. All batches have one shape, so all programs are compiled before the first step."""

    step: jax.stages.Compiled  # (state, batch, learning rate) -> (state, metrics)
    # (parameters, batch) -> sums, for DPO (parameters, batch, reference) -> sums; None without validation rows or if
    # they are evaluated by generated answers.
    evaluate: jax.stages.Compiled | None

    @classmethod
    def compile(cls, config: Experiment, abstract: dict, transform, rows: Rows, mesh: Mesh) -> Programs:
        """Compile for a state (train_step.abstract_state). Log how long it took and the memory that a step needs."""
        start = time.perf_counter()
        batch, step_config = _abstract_batch(config, rows, mesh), config.step
        with jax.set_mesh(mesh):
            compiled = lower_step(config.compute, step_config, abstract, transform, batch, mesh).compile()
            evaluate = _evaluate(config, abstract, batch) if config.data.validates else None
        host_memory.release()
        memory = compiled.memory_analysis()
        size = "memory per device unknown" if memory is None else (
            f"memory per device: {filesize.decimal(memory.argument_size_in_bytes)} state and batch, "
            f"{filesize.decimal(memory.temp_size_in_bytes)} temporary"
        )  # fmt: skip
        console.log(
            f"compiled in {time.perf_counter() - start:.0f} s; {size}; mesh {dict(mesh.shape)} over "
            f"{mesh.devices.size} {mesh.devices.flat[0].device_kind} devices, {jax.process_count()} processes"
        )
        return cls(compiled, evaluate)


def _evaluate(config: Experiment, abstract: dict, batch: dict) -> jax.stages.Compiled | None:
    params = train_step.params_of(abstract)
    if config.train.objective == "likelihood":
        return jax.jit(train_step.make_eval_step(config.compute, config.step)).lower(params, batch).compile()
    if config.train.objective == "dpo":
        step = jax.jit(train_step.make_objective_eval_step(config.compute, config.step))
        return step.lower(params, batch, train_step.reference_of(abstract)).compile()
    return None


def lower_step(model, config: train_step.StepConfig, abstract, transform, batch, mesh) -> jax.stages.Lowered:
    """Lower the train step for one shape of batches, in the context of `mesh`."""
    shardings = (train_step.shardings_of(abstract), None)
    step = jax.jit(train_step.make_train_step(model, transform, config), donate_argnums=0, out_shardings=shardings)
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return step.lower(abstract, batch, rate)


def _abstract_batch(config: Experiment, rows: Rows, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch, [A, B, ...]."""
    accumulation, sharding = config.train.accumulation, train_step.batch_sharding(mesh)
    micro_batch = config.train.batch // accumulation
    arrays = collate_batch([(rows.empty_row, None)], config.data.planes).arrays
    arrays |= dict.fromkeys(config.objective.arrays if config.objective else (), arrays["weights"])
    return {
        name: jax.ShapeDtypeStruct((accumulation, micro_batch, *x.shape[1:]), x.dtype, sharding=sharding)
        for name, x in arrays.items()
    }
