"""Fills launch/gke_jobset.yaml: the JobSet of a training run on GKE, on standard output.

    python launch/gke.py --name pretrain --image REGISTRY/radfm-tpu --topology v5p:4x4x2 --claim radfm \
        -- --config=configs/pretrain.py --workdir=/shared/runs/pretrain  | kubectl apply -f -
    python launch/gke.py --name pretrain --image REGISTRY/radfm-gpu --topology gpu:32xA100-80GB --claim radfm \
        -- --config=configs/pretrain.py --workdir=/shared/runs/pretrain

The image is that of launch/docker/; CLAIM a PersistentVolumeClaim that all pods can write to. Needs no cluster and no
package beside Python; run it from the root of the repository, or with the repository in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from radfm_jax.cost.topology import Topology, parse  # noqa: E402

# GKE's names, chips of a machine (of a slice of several machines), flags.
TPU = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
GPU = {
    "A100-40GB": ("nvidia-tesla-a100", "a100"),
    "A100-80GB": ("nvidia-a100-80gb", "a100"),
    "H100": ("nvidia-h100-80gb", "h100"),
    "H200": ("nvidia-h200-141gb", "h100"),
}
PORT = 61000
PATIENCE = 1200  # seconds: the pods do not start together, as each machine is made and pulls the image by itself
JOB = "train"  # as in the template


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/gke.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the JobSet: small letters, digits and dashes")
    parser.add_argument("--image", required=True)
    parser.add_argument("--topology", required=True, help="v5p:4x4x2, gpu:32xA100-80GB, ... as for radfm_jax.plan")
    parser.add_argument("--claim", required=True, help="a PersistentVolumeClaim")
    parser.add_argument("--mount", default="/shared", help="where it appears in the pods (%(default)s)")
    parser.add_argument("--spot", action="store_true", help="on machines that may be taken away")
    parser.add_argument("--restarts", type=int, default=100, help="of all pods together (%(default)s)")
    parser.add_argument("--grace", type=int, default=600, metavar="S", help="seconds to save in (%(default)s)")
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS", help="of radfm_jax.train")
    args = parser.parse_args(argv)
    try:
        print(render(args, parse(args.topology)), end="")
    except ValueError as error:
        parser.error(str(error))
    return 0


def render(args: argparse.Namespace, topology: Topology) -> str:
    """The YAML. Raises ValueError for names and numbers that GKE would refuse."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
        raise ValueError(f"--name {args.name!r}: small letters, digits and dashes, at most 40, beginning with a letter")
    for flag, number in (("--restarts", args.restarts), ("--grace", args.grace)):
        if number < 0:
            raise ValueError(f"{flag} {number}: at least 0 is needed")
    if topology.kind == "tpu":
        kind = topology.text.partition(":")[0]
        accelerator, chips = TPU[kind]
        selector = {"cloud.google.com/gke-tpu-accelerator": accelerator}
        selector["cloud.google.com/gke-tpu-topology"] = topology.text.partition(":")[2]
        resource, flags = "google.com/tpu", "tpu"
    elif topology.kind == "gpu":
        name = topology.text.rpartition("x")[2]
        (accelerator, flags), chips = next(of for n, of in GPU.items() if n.lower() == name.lower()), topology.chip.node
        selector = {"cloud.google.com/gke-accelerator": accelerator}
        resource = "nvidia.com/gpu"
    else:
        raise ValueError(f"{topology.text}: a TPU slice or GPUs are needed")
    chips = min(chips, topology.count)
    if topology.count % chips:
        raise ValueError(f"{topology.text}: machines have {chips} devices, {topology.count} is no multiple of them")
    machines = math.ceil(topology.count / chips)
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    environment = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    if topology.kind == "gpu" and machines > 1:  # JAX finds the machines of a TPU slice by itself
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment += [
            {"name": "RADFM_COORDINATOR", "value": f"{args.name}-{JOB}-0-0.{args.name}:{PORT}"},
            {"name": "RADFM_PROCESSES", "value": str(machines)},
            {"name": "RADFM_PROCESS", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if args.spot:
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    arguments = list(args.arguments)
    if machines > 1 and not any(argument.startswith("--start-timeout") for argument in arguments):
        arguments.append(f"--start-timeout={PATIENCE}")
    # 8471: libtpu's own port between machines.
    ports = [{"containerPort": PORT}] + ([{"containerPort": 8471}] if topology.kind == "tpu" else [])
    values = {
        "name": args.name, "image": args.image, "claim": args.claim, "mount": args.mount, "flags": flags,
        "machines": machines, "restarts": args.restarts, "grace": 30 if args.spot else args.grace,
        # JSON is YAML: strings with braces, colons and quotes stay what they are.
        "node_selector": json.dumps(selector), "tolerations": json.dumps(tolerations), "ports": json.dumps(ports),
        "arguments": json.dumps(arguments), "environment": json.dumps(environment),
        "limits": json.dumps({resource: chips}),
    }  # fmt: skip
    template = (Path(__file__).parent / "gke_jobset.yaml").read_text()
    body = "".join(line for line in template.splitlines(keepends=True) if not line.startswith("#"))
    return string.Template(body).substitute(values)


if __name__ == "__main__":
    raise SystemExit(main())
