"""The launch scripts: commands, exit codes, and manifests for clusters."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def test_shellcheck_finds_nothing():
    folders = (ROOT / "launch", ROOT / "tests/slurm")
    scripts = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".sh", ".sbatch")]
    assert len(scripts) > 8
    done = run(str(Path(sys.executable).with_name("shellcheck")), "-x", *map(str, scripts))
    assert not done.returncode, done.stdout


# --- stages.sh --------------------------------------------------------------------------------------------------------


def test_stages_run_in_order_and_resume(tmp_path):
    """The second stage is interrupted once (75), then fails (2); the same command resumes."""
    fake = script(
        tmp_path / "fake",
        f"""echo "$@" >> {tmp_path}/calls
        case "$*" in *b.py*) if [ -e {tmp_path}/fixed ]; then exit 0; fi
            if [ -e {tmp_path}/once ]; then exit 2; fi; touch {tmp_path}/once; exit 75 ;; esac""",
    )
    environment = {"TRAIN": str(fake), "STAGES": "configs/a.py configs/b.py configs/c.py:late"}
    done = run("bash", "launch/stages.sh", "/runs", "--config.train.batch=8", **environment)
    assert done.returncode == 2 and "b exited with code 2; run the same command to resume" in done.stderr
    last = "--config.train.batch=8"
    first = [
        f"--config=configs/a.py --workdir=/runs/a {last}",
        *[f"--config=configs/b.py --workdir=/runs/b --config.checkpoint.init_from=/runs/a {last}"] * 2,
    ]
    assert (tmp_path / "calls").read_text().splitlines() == first
    (tmp_path / "fixed").touch()
    (tmp_path / "calls").unlink()
    assert run("bash", "launch/stages.sh", "/runs", last, **environment).returncode == 0
    late = f"--config=configs/c.py:late --workdir=/runs/late --config.checkpoint.init_from=/runs/b {last}"
    assert (tmp_path / "calls").read_text().splitlines() == [*first[:2], late]


# --- slurm.sbatch -----------------------------------------------------------------------------------------------------


def sbatch(tmp_path, srun: str, **environment):
    """Start the batch script with a fake scheduler that logs its calls."""
    script(tmp_path / "srun", f'echo srun "$@" >> {tmp_path}/calls; {srun}')
    script(tmp_path / "scontrol", f'echo scontrol "$@" >> {tmp_path}/calls')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n", "PLATFORM": "a100", "PYTHON": "python", **environment,
    }  # fmt: skip
    command = ["bash", "launch/slurm.sbatch", "--config=x.py", "--workdir=w"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    return process, lambda: (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("code, requeued", [(0, False), (75, True), (2, False), (70, False), (1, False)])
def test_only_exit_code_75_requeues(code, requeued, tmp_path):
    process, calls = sbatch(tmp_path, f"exit {code}")
    assert process.wait(30) == code, (tmp_path / "log").read_text()
    assert ("scontrol requeue 7" in calls()) == requeued
    assert calls()[0].endswith("python -m radfm_jax.train --config=x.py --workdir=w")


def test_requeues_are_limited(tmp_path):
    process, calls = sbatch(tmp_path, "exit 75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert process.wait(30) == 75 and len(calls()) == 1 and "not requeued" in (tmp_path / "log").read_text()


def test_the_batch_shell_outlives_sigterm(tmp_path):
    """On preemption the shell also gets SIGTERM: it waits for the processes and returns their exit code."""
    process, calls = sbatch(tmp_path, f"touch {tmp_path}/started; sleep 2; exit 75")
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75 and calls()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("tasks, devices", [("1", "0,1,2,3"), ("4", "")])
def test_a_single_process_per_node_has_all_gpus(tasks, devices, tmp_path):
    srun = f'echo "$JAX_LOCAL_DEVICE_IDS" > {tmp_path}/devices'
    process, calls = sbatch(tmp_path, srun, SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4")
    assert process.wait(30) == 0 and (tmp_path / "devices").read_text().strip() == devices
    assert "--gpu-bind=none" in calls()[0]


def test_flags_are_known_to_xla():
    """XLA aborts a process at its first use of a device if a flag is unknown."""
    for name in ("a100", "h100"):
        code = f". launch/flags/{name}.sh && JAX_PLATFORMS=cpu exec {sys.executable} -c 'import jax; jax.devices()'"
        done = run("bash", "-c", code)
        assert done.returncode == 0, done.stderr


# --- tpu_vm.sh --------------------------------------------------------------------------------------------------------


def test_commands_of_tpu_vm():
    dry = ("bash", "launch/tpu_vm.sh", "--dry-run")
    created = run(*dry, "create", "radfm", "us-east5-a", "v6e-32", "--spot").stdout
    assert created == (
        "gcloud compute tpus tpu-vm create radfm --zone=us-east5-a --accelerator-type=v6e-32 "
        "--version=v2-alpha-tpuv6e --spot \n"
    )
    rates = "--config.optimizer.rates={'vit': 2.0}"
    ran = run(*dry, "run", "radfm", "us-east5-a", "--", "--config=x.py", rates).stdout.strip()
    # The command after the local shell's quoting, and its words in the remote shell.
    remote = run("bash", "-c", f'set -- {ran}; printf %s "${{@: -1}}"').stdout.removeprefix("--command=")
    assert remote.startswith("cd radfm_jax && . launch/flags/tpu.sh && exec .venv/bin/python -m radfm_jax.train ")
    words = run("bash", "-c", "printf '%s\\n' " + remote.partition("radfm_jax.train ")[2]).stdout.splitlines()
    assert words == ["--config=x.py", rates]
    kept = run(*dry, "keep", "radfm", "us-east5-a", "v5p-64", "--", "--config=x.py").stdout.splitlines()
    assert kept[1].startswith("git archive ")
    assert [line.split()[4] for line in kept if line.startswith("gcloud")] == ["create", "scp", "ssh", "ssh"]
    for wrong in (("create", "a", "b", "v9-1"), ("run", "a", "b", "--config=x"), ("fly", "a", "b"), ("run", "a")):
        assert run(*dry, *wrong).returncode == 2, wrong


def test_a_dry_run_writes_nothing(tmp_path):
    assert run("bash", "launch/tpu_vm.sh", "--dry-run", "logs", "a", "b", str(tmp_path / "logs"), "/w").returncode == 0
    assert not (tmp_path / "logs").exists()


def test_a_slice_that_is_not_ready_for_ssh_is_created_once(tmp_path):
    """A fake gcloud has one slice; the first copy to it fails."""
    script(
        tmp_path / "gcloud",
        f"""cd {tmp_path}; echo "$4" >>calls
        case "$4" in
          describe) [ ! -e slice ] || cat slice ;;
          delete) rm slice ;;
          create) [ ! -e slice ] && echo READY >slice ;;
          scp) [ "$(grep -c scp calls)" -gt 1 ] ;;
        esac""",
    )
    (tmp_path / "slice").write_text("PREEMPTED")
    keep = ("launch/tpu_vm.sh", "keep", "a", "b", "v5p-64", "--", "--config=x.py")
    done = run("timeout", "30", "bash", *keep, PATH=f"{tmp_path}:{os.environ['PATH']}", RETRY="0")
    assert done.returncode == 0, done.stderr
    calls = [call for call in (tmp_path / "calls").read_text().split() if call != "describe"]
    assert calls == ["delete", "create", "scp", "scp", "ssh", "ssh"]


# --- GKE --------------------------------------------------------------------------------------------------------------


def differences(value, parsed, path: str = "") -> list[str]:
    """Return the paths of fields that differ in `parsed`, which is `value` read and written by a schema."""
    if isinstance(value, dict):
        assert isinstance(parsed, dict), path
        new = [f"{path}.{k}" for k in value if k not in parsed]
        return new + [p for k, v in value.items() if k in parsed for p in differences(v, parsed[k], f"{path}.{k}")]
    if isinstance(value, list):
        pairs = zip(value, parsed, strict=True)
        return [p for i, (v, k) in enumerate(pairs) for p in differences(v, k, f"{path}[{i}]")]
    return [] if value == parsed else [path]


def unknown_fields(manifest: dict) -> list[str]:
    """Return the fields that the published OpenAPI of jobset.x-k8s.io/v1alpha2 does not have. A wrong type raises."""
    return differences(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict())


def jobset(*arguments):
    done = run(
        sys.executable, "launch/gke.py", "--name=pretrain", "--image=registry/radfm", "--claim=radfm", *arguments, "--",
        "--config=configs/pretrain.py", "--config.optimizer.rates={'vit': 2.0}", "--workdir=/shared/runs/pretrain",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    assert unknown_fields(manifest) == []
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return manifest, job, job["template"]["spec"]["containers"][0]


def test_a_jobset_of_a_tpu_slice():
    manifest, job, container = jobset("--topology=v5p:4x4x2", "--spot")
    assert job["parallelism"] == job["completions"] == 8 and job["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x2",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["args"][1] == "--config.optimizer.rates={'vit': 2.0}"
    assert container["args"][-1] == "--start-timeout=1200"
    assert '. launch/flags/tpu.sh && exec python -m radfm_jax.train "$@"' in container["command"][2]
    assert not [e for e in container["env"] if e["name"].startswith("RADFM")]
    # A final exit code fails the job by policy, and the JobSet with it; any other one restarts all pods.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2, 70]
    (policy,) = manifest["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet" and policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", policy["name"])  # the schema's own pattern
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def test_the_schema_finds_errors():
    manifest, job, container = jobset("--topology=v5p:4x4x2")
    container["volumeMount"] = container.pop("volumeMounts")
    manifest["spec"]["network"]["enableDNSHostnamess"] = True
    job["backOffLimit"] = 0
    in_job = ".spec.replicatedJobs[0].template.spec"
    pod = f"{in_job}.template.spec.containers[0]"
    assert unknown_fields(manifest) == [
        ".spec.network.enableDNSHostnamess",
        f"{in_job}.backOffLimit",
        f"{pod}.volumeMount",
    ]
    manifest, job, _ = jobset("--topology=v5p:4x4x2")
    job["completions"] = "8"
    with pytest.raises(ValueError, match="completions"):
        unknown_fields(manifest)


def test_a_jobset_of_gpus():
    manifest, job, container = jobset("--topology=gpu:32xA100-80GB", "--restarts=5")
    assert job["completions"] == 4 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {e["name"]: e for e in container["env"]}
    # As JobSet names its pods: JOBSET-JOB-INDEX-POD.JOBSET
    assert variables["RADFM_COORDINATOR"]["value"] == "pretrain-train-0-0.pretrain:61000"
    assert variables["RADFM_PROCESSES"]["value"] == "4" and "fieldRef" in variables["RADFM_PROCESS"]["valueFrom"]
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    _, alone, container = jobset("--topology=gpu:1xH200")
    assert alone["completions"] == 1 and container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert len(container["env"]) == 1 and not any(a.startswith("--start-timeout") for a in container["args"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--topology=gpu:12xH100",), "12 is not a multiple of the 8 devices per machine"),
        (("--topology=cpu:2",), "must be a TPU slice or GPUs"),
        (
            ("--topology=gpu:1xL40S-48GB",),
            "gpu:1xL40S-48GB: GPUs on GKE must be one of A100-40GB, A100-80GB, H100, H200",
        ),
        (("--topology=v6e:4x8", "--name=Pretrain"), "lowercase letters, digits and dashes"),
        (("--topology=v6e:4x8", "--restarts=-1"), "--restarts -1: must be at least 0"),
    ],
)
def test_invalid_jobsets_are_refused(arguments, words):
    done = run(sys.executable, "launch/gke.py", "--name=a", "--image=i", "--claim=c", *arguments, "--", "--config=x")
    assert done.returncode == 2 and words in done.stderr


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_script_has_help():
    scripts = [
        p for p in (ROOT / "launch").glob("*.sh") if p.name not in ("environment.sh", "test.sh", "quickstart.sh")
    ]
    assert {p.name for p in scripts} >= {"local.sh", "stages.sh", "tpu_vm.sh"}
    for path in (*scripts, *(ROOT / "tests" / "slurm").glob("*.sh")):
        result = run("bash", str(path), "--help")
        assert result.returncode == 0 and path.name in result.stdout, path
