"""The very train step, compiled ahead of time for devices that are not here. No array is made.

TPU slices are compiled for by libtpu (`pip install "jax[tpu]"`), which needs no TPU for it. For GPUs and CPUs the
program is compiled for as many simulated devices of the CPU: the same shapes and shardings, but a CPU multiplies
bfloat16 in float32 and has no fused attention, so neither its memory nor its bytes on the network are a GPU's.

A compilation runs in a process of its own, as JAX's devices cannot be exchanged once they are there, and its result is
kept in the user's cache directory, under a hash of everything it follows from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import platformdirs

from radfm_jax.cost import hlo
from radfm_jax.cost.topology import Topology, parse
from radfm_jax.training.experiment import Experiment

PACKAGES = ("jax", "jaxlib", "flax", "optax")
# What of the environment changes what is compiled.
VARIABLES = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
# How much libtpu works on the speed of the program, from -1 to 1; 0 is what a run takes. Most of a compilation
# schedules instructions and allots registers, of which a plan reads nothing. For v5p:4x4x2, remat full, -1 gave 1.6 %
# less temporary memory than 0, and 12 % more on the network: it interleaves more products with their gathers.
EFFORT = -1.0


class CompileError(RuntimeError):
    """The compiler refused: out of memory, or a topology it does not know."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler said. Bytes are those of one device.

    Attributes:
      arguments: state and batch. temporary: gradients, activations, everything else while it runs.
      beside: results that take no argument's place, and the program itself.
      received: bytes that collectives bring into a device in a step, by kind. collectives: how often each kind runs.
      loops_unknown: collectives in loops of unknown length, counted once.
      seconds, cpu_seconds: of tracing and compiling, by the clock and of processors.
    """

    arguments: int
    temporary: int
    beside: int
    received: dict[str, float]
    collectives: dict[str, int]
    loops_unknown: int
    seconds: float
    cpu_seconds: float

    @property
    def peak(self) -> int:
        return self.arguments + self.temporary + self.beside


def compiled(config: Experiment, topology: Topology, *, again: bool = False) -> Program:
    """Of one step of `config` on `topology`, from the cache if it is there.

    Raises:
      CompileError: what the compiler said. ValueError: libtpu is missing, or rows do not divide.
    """
    kept = _kept(config, topology)
    if kept.is_file() and not again:
        return Program(**json.loads(kept.read_text()))
    job = json.dumps({"config": config.to_dict(), "topology": topology.text}, default=list)
    # A compiler needs no TPU to itself: neither another plan nor a lock file that a killed one left is in its way.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **alone}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, "-m", "radfm_jax.cost.program"], input=job, capture_output=True, text=True, env=environment
    )
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        said = child.stderr.strip().splitlines()
        if any("ModuleNotFoundError" in line and "libtpu" in line for line in said) or "no libtpu" in child.stderr:
            raise ValueError(f'{topology.text} needs libtpu: pip install "jax[tpu]" beside this jax')
        raise CompileError(said[-1] if said else f"the compiler ended with code {child.returncode}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise CompileError(found["error"])
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(lines[-1])
    partial.replace(kept)
    return Program(**found)


def is_kept(config: Experiment, topology: Topology) -> bool:
    return _kept(config, topology).is_file()


def _kept(config: Experiment, topology: Topology) -> Path:
    root = Path(__file__).resolve().parents[1]
    source = hashlib.sha256()
    names = (
        *(f"training/{name}.py" for name in ("losses", "optimizer", "train_step")),
        *("runtime/sharding.py", "cost/hlo.py", "cost/program.py"),
    )
    for path in (*(root / name for name in names), *sorted((root / "models").rglob("*.py"))):
        source.update(path.read_bytes())
    said = config.to_dict()
    limits = dataclasses.asdict(config.data.limits) | {"channels": config.data.channels, "storage": config.data.storage}
    train = {k: v for k, v in said["train"].items() if k in _TRAIN}
    # As many devices of a GPU as of another kind are the same simulated ones.
    where = topology.text if topology.kind == "tpu" else f"cpu:{topology.count}"
    versions = {name: _version(name) for name in (*PACKAGES, *(("libtpu",) if topology.kind == "tpu" else ()))}
    key = [said["model"], limits, train, said["optimizer"], said["mesh"], where, source.hexdigest(), versions]
    key.append({name: os.environ.get(name, "") for name in VARIABLES})
    name = hashlib.sha256(json.dumps(key, default=list, sort_keys=True).encode()).hexdigest()[:32]
    return Path(platformdirs.user_cache_dir("radfm_jax")) / "plan" / f"{name}.json"


_TRAIN = ("batch", "accumulation", "dtype", "remat", "weighting", "normalise", "chunk", "dropout")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


# --- in the process that compiles -------------------------------------------------------------------------------------


def compile_step(config: Experiment, topology: Topology):
    """jax.stages.Compiled of the step, for the batches that `config.data` makes."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from radfm_jax.cost import estimate
    from radfm_jax.runtime import sharding
    from radfm_jax.training import train_step

    if topology.kind == "tpu":
        import libtpu  # noqa: F401  JAX says much less plainly that it is missing
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.text).devices
    else:
        jax.config.update("jax_num_cpu_devices", topology.count)
        devices = jax.devices()
    mesh = sharding.make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices, devices=devices
    )
    abstract, transform, _ = train_step.abstract_state(config.compute, config.optimizer, mesh)
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=train_step.batch_sharding(mesh))
        for name, x in estimate.abstract_batch(config).items()
    }
    model = with_kernels(config, "tpu" if topology.kind == "tpu" else "cpu")
    with jax.set_mesh(mesh):
        step = jax.jit(
            train_step.make_train_step(model, transform, config.train.step),
            donate_argnums=0,
            out_shardings=(train_step.shardings_of(abstract), None),
        )
        options = {"exec_time_optimization_effort": EFFORT} if topology.kind == "tpu" else None
        return step.lower(abstract, batch, rate).compile(compiler_options=options)


def with_kernels(config: Experiment, platform: str):
    """The model's sizes with the attention kernels that `auto` takes on `platform`, not on this machine."""
    import jax

    from radfm_jax.models import attention

    model, limits = config.compute, config.data.limits
    v, p, c = model.vision, model.perceiver, model.llama
    lengths = {
        "llama": (c, limits.text_length, limits.text_length),
        "vision": (v, limits.patch_length, limits.patch_length),
        "perceiver": (p, p.num_latents, limits.patch_length + p.num_latents),
    }
    parts = {}
    for name, (part, queries, keys) in lengths.items():
        q, k = (jax.ShapeDtypeStruct((1, t, part.num_heads, part.head_dim), model.llama.dtype) for t in (queries, keys))
        parts[name] = dataclasses.replace(part, attention=attention.choose(part.attention, q, k, platform))
    return dataclasses.replace(model, **parts)


def main() -> int:
    job = json.loads(sys.stdin.read())
    began = time.perf_counter()
    try:
        program = compile_step(Experiment.from_dict(job["config"]), parse(job["topology"]))
    except ModuleNotFoundError:
        raise
    except Exception as e:  # of whatever a compiler raises: the caller shows it
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        print(json.dumps({"error": " ".join(lines)[:600]}))
        return 0
    memory, sent = program.memory_analysis(), hlo.traffic(program.as_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = Program(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        beside=memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        received=sent.bytes,
        collectives=sent.counts,
        loops_unknown=len(sent.unknown),
        seconds=time.perf_counter() - began,
        cpu_seconds=used.ru_utime + used.ru_stime,
    )
    print(json.dumps(dataclasses.asdict(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
