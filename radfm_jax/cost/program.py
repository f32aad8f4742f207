"""The train step, compiled ahead of time for devices that need not be present. No array is allocated.

libtpu (`pip install "jax[tpu]"`) compiles for TPU slices without a TPU. For GPUs and CPUs the step is compiled for as
many simulated CPU devices: shapes and shardings are the same, but a CPU multiplies bfloat16 in float32 and has no fused
attention, so memory and traffic differ from a GPU's.

Each compilation runs in a child process, because JAX's devices cannot be changed once they are initialized. Its result
is cached in the user's cache directory, under a hash of everything it depends on.
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

from input_pipeline.files import atomic_write, fingerprint, parse_json, read_json
from radfm_jax.cost import hlo
from radfm_jax.cost.topology import Topology, parse
from radfm_jax.training.experiment import Experiment

PACKAGES = ("jax", "jaxlib", "flax", "optax")
VARIABLES = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # environment variables that change the program
# Fields of the `train` group that change the program.
TRAIN_FIELDS = ("batch", "accumulation", "dtype", "remat", "weighting", "normalise", "chunk", "dropout")
# Code that determines the program, relative to the package.
SOURCES = ("models", "training", "runtime/sharding.py", "cost/estimate.py", "cost/hlo.py", "cost/program.py")
# libtpu's optimization effort, from -1 to 1; a run uses 0. Most of a compilation goes into scheduling and register
# allocation, which a plan does not read. For v5p:4x4x2 with full remat, -1 gave 1.6 % less temporary memory than 0 and
# 12 % more traffic, because more gathers are interleaved with products.
EFFORT = -1.0


class CompileError(RuntimeError):
    """The compiler failed: out of memory, or an unknown topology."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Memory and traffic of a compiled program, in bytes per device."""

    arguments: int  # state and batch
    temporary: int  # gradients, activations and all other intermediate values
    beside: int  # outputs that do not alias an argument, and the code
    received: dict[str, float]  # bytes that collectives send into a device per step, by kind
    collectives: dict[str, int]  # number of executions of each kind
    loops_unknown: int  # number of collectives in loops of unknown length, counted once
    seconds: float  # wall time of tracing and compiling
    cpu_seconds: float

    @property
    def peak(self) -> int:
        return self.arguments + self.temporary + self.beside


def compiled(config: Experiment, topology: Topology, *, again: bool = False) -> Program:
    """Compile one step of `config` on `topology`, or return the cached result unless `again` is set.

    Raises CompileError if the compiler failed, and ValueError if libtpu is missing.
    """
    cache_file = _cache_file(config, topology)
    if cache_file.is_file() and not again:
        return Program(**read_json(cache_file, kind=dict))
    job = json.dumps({"config": config.to_dict(), "topology": topology.text}, default=list)
    # The compiler does not use the TPU, so it must neither query its metadata nor wait for libtpu's lock file.
    compile_only = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **compile_only}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, "-m", "radfm_jax.cost.program"], input=job, capture_output=True, text=True, env=environment
    )
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        errors = child.stderr.strip().splitlines()
        if any("ModuleNotFoundError" in line and "libtpu" in line for line in errors) or "no libtpu" in child.stderr:
            raise ValueError(f'{topology.text} needs libtpu: pip install "jax[tpu]" for the installed jax')
        raise CompileError(errors[-1] if errors else f"the compiler exited with code {child.returncode}")
    result = parse_json(lines[-1])
    if "error" in result:
        raise CompileError(result["error"])
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cache_file, unique=True) as partial:
        partial.write_text(lines[-1])
    return Program(**result)


def is_cached(config: Experiment, topology: Topology) -> bool:
    return _cache_file(config, topology).is_file()


def _cache_file(config: Experiment, topology: Topology) -> Path:
    package, source = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in (package / name for name in SOURCES):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            source.update(file.read_bytes())
    groups = config.to_dict()
    limits = dataclasses.asdict(config.data.limits) | {"channels": config.data.channels, "storage": config.data.storage}
    train = {k: v for k, v in groups["train"].items() if k in TRAIN_FIELDS}
    # GPUs are compiled for as many simulated devices, regardless of their kind.
    devices = topology.text if topology.kind == "tpu" else f"cpu:{topology.count}"
    packages = (*PACKAGES, "libtpu") if topology.kind == "tpu" else PACKAGES
    key = [groups["model"], limits, train, groups["optimizer"], groups["mesh"], devices, source.hexdigest()]
    key += [{name: _version(name) for name in packages}, {name: os.environ.get(name, "") for name in VARIABLES}]
    return Path(platformdirs.user_cache_dir("radfm_jax")) / "plan" / f"{fingerprint(key)[:32]}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def compile_step(config: Experiment, topology: Topology):
    """Return the jax.stages.Compiled train step for the batches of `config.data`."""
    import jax

    from radfm_jax.cost import estimate
    from radfm_jax.runtime import sharding
    from radfm_jax.training import programs, train_step

    if topology.kind == "tpu":
        import libtpu  # noqa: F401  JAX's own error does not name libtpu
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.text).devices
    else:
        jax.config.update("jax_num_cpu_devices", topology.count)
        devices = jax.devices()
    mesh = sharding.make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices, devices=devices
    )
    abstract, transform, _ = train_step.abstract_state(
        config.compute, config.optimizer, mesh, reference=config.has_reference
    )
    sharding_of_batch = train_step.batch_sharding(mesh)
    batch = {name: x.update(sharding=sharding_of_batch) for name, x in estimate.abstract_batch(config).items()}
    model = with_kernels(config, "tpu" if topology.kind == "tpu" else "cpu")
    options = {"exec_time_optimization_effort": EFFORT} if topology.kind == "tpu" else None
    with jax.set_mesh(mesh):
        lowered = programs.lower_step(model, config.step, abstract, transform, batch, mesh)
        return lowered.compile(compiler_options=options)


def with_kernels(config: Experiment, platform: str):
    """Return the model config with the attention kernels that `auto` selects on `platform`."""
    import jax

    from radfm_jax.models import attention

    model, limits = config.compute, config.data.limits
    v, p, c = model.vision, model.perceiver, model.llama
    lengths = {
        "llama": (c, limits.text_length, limits.text_length, c.attention_softcap),
        "perceiver": (p, p.num_latents, limits.patch_length + p.num_latents, None),
    }
    if p.kind != "perceiver":
        del lengths["perceiver"]
    for stack in v.stacks(limits.patch_length):
        if stack.kernels:  # of at most one stack of an encoder
            lengths["vision"] = (v, stack.keys, stack.keys, None)
    parts = {}
    for name, (part, queries, keys, softcap) in lengths.items():
        q, k = (jax.ShapeDtypeStruct((1, t, part.num_heads, part.head_dim), model.llama.dtype) for t in (queries, keys))
        parts[name] = dataclasses.replace(part, attention=attention.choose(part.attention, q, k, platform, softcap))
    return dataclasses.replace(model, **parts)


def main() -> int:
    """Compile the job on standard input and print the Program, or the error, as JSON."""
    job = parse_json(sys.stdin.read())
    start = time.perf_counter()
    try:
        program = compile_step(Experiment.from_dict(job["config"]), parse(job["topology"]))
    except ModuleNotFoundError:
        raise
    except Exception as e:  # compilers raise errors of many types; the parent process reports them
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        print(json.dumps({"error": " ".join(lines)[:600]}))
        return 0
    memory, traffic = program.memory_analysis(), hlo.traffic(program.as_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    result = Program(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        beside=memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        received=traffic.bytes,
        collectives=traffic.counts,
        loops_unknown=len(traffic.unknown),
        seconds=time.perf_counter() - start,
        cpu_seconds=used.ru_utime + used.ru_stime,
    )
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
