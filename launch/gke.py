"""Fill launch/gke_jobset.yaml and print the JobSet of a training run on GKE.

    python launch/gke.py --name pretrain --image REGISTRY/radfm-tpu --topology v5p:4x4x2 --claim radfm \
        -- --config=configs/pretrain.py --workdir=/shared/runs/pretrain  | kubectl apply -f -
    python launch/gke.py --name pretrain --image REGISTRY/radfm-gpu --topology gpu:32xA100-80GB --claim radfm \
        -- --config=configs/pretrain.py --workdir=/shared/runs/pretrain

The image is built from launch/docker/. CLAIM is a PersistentVolumeClaim that all pods can write to. Needs only Python.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from radfm_jax.cost.topology import Topology, parse  # noqa: E402

# Generation -> GKE's accelerator.
TPU = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
TPU_CHIPS = 4  # per machine of a multi-machine slice
# Kind -> (GKE's accelerator, file in launch/flags).
GPU = {
    "A100-40GB": ("nvidia-tesla-a100", "a100"),
    "A100-80GB": ("nvidia-a100-80gb", "a100"),
    "H100": ("nvidia-h100-80gb", "h100"),
    "H200": ("nvidia-h200-141gb", "h100"),
}
PORT = 61000
START_TIMEOUT = 1200  # seconds; pods start at different times, as each machine has to be created first
JOB = "train"  # the job's name in the template


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/gke.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the JobSet: lowercase letters, digits and dashes")
    parser.add_argument("--image", required=True)
    parser.add_argument("--topology", required=True, help="as for radfm_jax.plan: v5p:4x4x2, gpu:32xA100-80GB, ...")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim")
    parser.add_argument("--mount", default="/shared", help="mount path of the claim in the pods (default: %(default)s)")
    parser.add_argument("--spot", action="store_true", help="use spot machines, which may be preempted")
    parser.add_argument("--restarts", type=int, default=100, help="maximum restarts of all pods (default: %(default)s)")
    parser.add_argument("--grace", type=int, default=600, metavar="S", help="seconds to save in (default: %(default)s)")
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS", help="arguments of radfm_jax.train")
    args = parser.parse_args(argv)
    try:
        print(render(args, parse(args.topology)), end="")
    except ValueError as error:
        parser.error(str(error))
    return 0


def render(args: argparse.Namespace, topology: Topology) -> str:
    """Return the YAML. Raises ValueError for names and numbers that GKE would reject."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
        raise ValueError(
            f"--name {args.name!r}: at most 40 lowercase letters, digits and dashes, starting with a letter"
        )
    for flag, number in (("--restarts", args.restarts), ("--grace", args.grace)):
        if number < 0:
            raise ValueError(f"{flag} {number}: must be at least 0")
    if topology.kind == "tpu":
        kind, _, shape = topology.text.partition(":")
        selector = {"cloud.google.com/gke-tpu-accelerator": TPU[kind], "cloud.google.com/gke-tpu-topology": shape}
        resource, flags, chips = "google.com/tpu", "tpu", TPU_CHIPS
    elif topology.kind == "gpu":
        if topology.device not in GPU:
            raise ValueError(f"{topology.text}: GPUs on GKE must be one of {', '.join(GPU)}")
        accelerator, flags = GPU[topology.device]
        selector = {"cloud.google.com/gke-accelerator": accelerator}
        resource, chips = "nvidia.com/gpu", topology.chip.node
    else:
        raise ValueError(f"{topology.text}: must be a TPU slice or GPUs")
    chips = min(chips, topology.count)
    if topology.count % chips:
        raise ValueError(f"{topology.text}: {topology.count} is not a multiple of the {chips} devices per machine")
    machines = topology.count // chips
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    environment = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    if topology.kind == "gpu" and machines > 1:  # JAX finds the machines of a TPU slice by itself
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment += [
            {"name": "RADFM_COORDINATOR", "value": f"{args.name}-{JOB}-0-0.{args.name}:{PORT}"},
            {"name": "RADFM_PROCESSES", "value": str(machines)},
            {"name": "RADFM_PROCESS", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    arguments = list(args.arguments)
    if machines > 1 and not any(argument.startswith("--start-timeout") for argument in arguments):
        arguments.append(f"--start-timeout={START_TIMEOUT}")
    # 8471: libtpu's port for traffic between machines.
    ports = [{"containerPort": PORT}] + ([{"containerPort": 8471}] if topology.kind == "tpu" else [])
    values = {
        "name": args.name, "image": args.image, "claim": args.claim, "mount": args.mount, "flags": flags,
        "machines": machines, "restarts": args.restarts, "grace": 30 if args.spot else args.grace,
        # JSON is valid YAML, and quotes strings with braces, colons and quotes.
        "node_selector": json.dumps(selector), "tolerations": json.dumps(tolerations), "ports": json.dumps(ports),
        "arguments": json.dumps(arguments), "environment": json.dumps(environment),
        "limits": json.dumps({resource: chips}),
    }  # fmt: skip
    template = (Path(__file__).parent / "gke_jobset.yaml").read_text()
    body = "".join(line for line in template.splitlines(keepends=True) if not line.startswith("#"))
    return string.Template(body).substitute(values)


if __name__ == "__main__":
    raise SystemExit(main())
