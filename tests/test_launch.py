"""Scripts that launch: what they would run, what they make of exit codes, files that a cluster would take."""

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
    scripts = [
        p for place in ("launch", "tests/slurm") for p in (ROOT / place).rglob("*") if p.suffix in (".sh", ".sbatch")
    ]
    assert len(scripts) > 8
    done = run(str(Path(sys.executable).with_name("shellcheck")), "-x", *map(str, scripts))
    assert not done.returncode, done.stdout


# --- stages.sh --------------------------------------------------------------------------------------------------------


def test_stages_follow_each_other_and_go_on(tmp_path):
    """The second stage is interrupted once (75), then makes a mistake (2); called again, all go on."""
    fake = script(
        tmp_path / "fake",
        f"""echo "$@" >> {tmp_path}/calls
        case "$*" in *b.py*) if [ -e {tmp_path}/mended ]; then exit 0; fi
            if [ -e {tmp_path}/once ]; then exit 2; fi; touch {tmp_path}/once; exit 75 ;; esac""",
    )
    environment = {"TRAIN": str(fake), "STAGES": "configs/a.py configs/b.py configs/c.py:late"}
    ended = run("bash", "launch/stages.sh", "/runs", "--config.train.batch=8", **environment)
    assert ended.returncode == 2 and "b ended with 2; the same command goes on" in ended.stderr
    last = "--config.train.batch=8"
    first = [
        f"--config=configs/a.py --workdir=/runs/a {last}",
        *[f"--config=configs/b.py --workdir=/runs/b --config.checkpoint.init_from=/runs/a {last}"] * 2,
    ]
    assert (tmp_path / "calls").read_text().splitlines() == first
    (tmp_path / "mended").touch()
    (tmp_path / "calls").unlink()
    assert run("bash", "launch/stages.sh", "/runs", last, **environment).returncode == 0
    late = f"--config=configs/c.py:late --workdir=/runs/late --config.checkpoint.init_from=/runs/b {last}"
    assert (tmp_path / "calls").read_text().splitlines() == [*first[:2], late]


# --- slurm.sbatch -----------------------------------------------------------------------------------------------------


def sbatch(tmp_path, srun: str, **environment):
    """The batch script with a scheduler that only writes down what it is asked."""
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
def test_only_75_goes_back_into_the_queue(code, requeued, tmp_path):
    process, calls = sbatch(tmp_path, f"exit {code}")
    assert process.wait(30) == code, (tmp_path / "log").read_text()
    assert ("scontrol requeue 7" in calls()) == requeued
    assert calls()[0].endswith("python -m radfm_jax.train --config=x.py --workdir=w")


def test_not_for_ever(tmp_path):
    process, calls = sbatch(tmp_path, "exit 75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert process.wait(30) == 75 and len(calls()) == 1 and "not again" in (tmp_path / "log").read_text()


def test_the_batch_shell_outlives_sigterm(tmp_path):
    """Preempted, the shell gets the signal as well: it waits for the processes, and has their code."""
    process, calls = sbatch(tmp_path, f"touch {tmp_path}/begun; sleep 2; exit 75")
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75 and calls()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("tasks, seen", [("1", "0,1,2,3"), ("4", "")])
def test_one_process_a_node_has_all_gpus(tasks, seen, tmp_path):
    print_them = f'echo "$JAX_LOCAL_DEVICE_IDS" > {tmp_path}/seen'
    process, calls = sbatch(tmp_path, print_them, SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4")
    assert process.wait(30) == 0 and (tmp_path / "seen").read_text().strip() == seen
    assert "--gpu-bind=none" in calls()[0]


def test_flags_are_known_to_xla():
    """An unknown flag would abort every process at its first use of a device."""
    for name in ("a100", "h100"):
        code = f". launch/flags/{name}.sh && JAX_PLATFORMS=cpu exec {sys.executable} -c 'import jax; jax.devices()'"
        ended = run("bash", "-c", code)
        assert ended.returncode == 0, ended.stderr


# --- tpu_vm.sh --------------------------------------------------------------------------------------------------------


def test_what_tpu_vm_would_do():
    dry = ("bash", "launch/tpu_vm.sh", "--dry-run")
    created = run(*dry, "create", "radfm", "us-east5-a", "v6e-32", "--spot").stdout
    assert created == (
        "gcloud compute tpus tpu-vm create radfm --zone=us-east5-a --accelerator-type=v6e-32 "
        "--version=v2-alpha-tpuv6e --spot \n"
    )
    rates = "--config.optimizer.rates={'vit': 2.0}"
    ran = run(*dry, "run", "radfm", "us-east5-a", "--", "--config=x.py", rates).stdout.strip()
    # What the remote shell gets, after this one has taken its quotes off, and what it makes of it.
    remote = run("bash", "-c", f'set -- {ran}; printf %s "${{@: -1}}"').stdout.removeprefix("--command=")
    assert remote.startswith("cd radfm_jax && . launch/flags/tpu.sh && exec .venv/bin/python -m radfm_jax.train ")
    words = run("bash", "-c", "printf '%s\\n' " + remote.partition("radfm_jax.train ")[2]).stdout.splitlines()
    assert words == ["--config=x.py", rates]
    kept = run(*dry, "keep", "radfm", "us-east5-a", "v5p-64", "--", "--config=x.py").stdout.splitlines()
    assert kept[1].startswith("git archive ")
    assert [line.split()[4] for line in kept if line.startswith("gcloud")] == ["create", "scp", "ssh", "ssh"]
    for wrong in (("create", "a", "b", "v9-1"), ("run", "a", "b", "--config=x"), ("fly", "a", "b"), ("run", "a")):
        assert run(*dry, *wrong).returncode == 2, wrong


def test_a_dry_run_leaves_nothing(tmp_path):
    assert run("bash", "launch/tpu_vm.sh", "--dry-run", "logs", "a", "b", str(tmp_path / "logs"), "/w").returncode == 0
    assert not (tmp_path / "logs").exists()


def test_a_slice_that_is_not_ready_for_ssh_is_not_made_twice(tmp_path):
    """A stand-in for gcloud that knows one slice; the first copy to it fails."""
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
    ended = run("timeout", "30", "bash", *keep, PATH=f"{tmp_path}:{os.environ['PATH']}", RETRY="0")
    assert ended.returncode == 0, ended.stderr
    calls = [call for call in (tmp_path / "calls").read_text().split() if call != "describe"]
    assert calls == ["delete", "create", "scp", "scp", "ssh", "ssh"]


# --- GKE --------------------------------------------------------------------------------------------------------------


def strangers(given, known, where: str = "") -> list[str]:
    """What a file says that its schema does not know: `known` is what the schema read of it, and says again."""
    if isinstance(given, dict):
        assert isinstance(known, dict), where
        new = [f"{where}.{k}" for k in given if k not in known]
        return new + [s for k, v in given.items() if k in known for s in strangers(v, known[k], f"{where}.{k}")]
    if isinstance(given, list):
        return [s for i, (v, k) in enumerate(zip(given, known, strict=True)) for s in strangers(v, k, f"{where}[{i}]")]
    return [] if given == known else [where]


def published(found: dict) -> list[str]:
    """Against the published OpenAPI of jobset.x-k8s.io/v1alpha2, down to the containers of its pods: the fields that it
    does not know. A wrong type raises."""
    return strangers(found, JobsetV1alpha2JobSet.from_dict(found).to_dict())


def jobset(*arguments):
    ended = run(
        sys.executable, "launch/gke.py", "--name=pretrain", "--image=registry/radfm", "--claim=radfm", *arguments, "--",
        "--config=configs/pretrain.py", "--config.optimizer.rates={'vit': 2.0}", "--workdir=/shared/runs/pretrain",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = yaml.safe_load(ended.stdout)
    assert published(found) == []
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    return found, job, job["template"]["spec"]["containers"][0]


def test_a_jobset_of_a_tpu_slice():
    found, job, container = jobset("--topology=v5p:4x4x2", "--spot")
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
    # What is final fails the job by policy, and the JobSet with it; anything else restarts all pods.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2, 70]
    (policy,) = found["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet" and policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", policy["name"])  # the schema's own pattern
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def test_the_schema_knows_what_is_wrong():
    found, job, container = jobset("--topology=v5p:4x4x2")
    container["volumeMount"] = container.pop("volumeMounts")
    found["spec"]["network"]["enableDNSHostnamess"] = True
    job["backOffLimit"] = 0
    in_job = ".spec.replicatedJobs[0].template.spec"
    pod = f"{in_job}.template.spec.containers[0]"
    assert published(found) == [".spec.network.enableDNSHostnamess", f"{in_job}.backOffLimit", f"{pod}.volumeMount"]
    found, job, _ = jobset("--topology=v5p:4x4x2")
    job["completions"] = "8"
    with pytest.raises(ValueError, match="completions"):
        published(found)


def test_a_jobset_of_gpus():
    found, job, container = jobset("--topology=gpu:32xA100-80GB", "--restarts=5")
    assert job["completions"] == 4 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {e["name"]: e for e in container["env"]}
    # As JobSet names its pods: JOBSET-JOB-INDEX-POD.JOBSET
    assert variables["RADFM_COORDINATOR"]["value"] == "pretrain-train-0-0.pretrain:61000"
    assert variables["RADFM_PROCESSES"]["value"] == "4" and "fieldRef" in variables["RADFM_PROCESS"]["valueFrom"]
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5
    _, alone, container = jobset("--topology=gpu:1xH200")
    assert alone["completions"] == 1 and container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert len(container["env"]) == 1 and not any(a.startswith("--start-timeout") for a in container["args"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--topology=gpu:12xH100",), "machines have 8 devices, 12 is no multiple"),
        (("--topology=cpu:2",), "a TPU slice or GPUs are needed"),
        (("--topology=v6e:4x8", "--name=Pretrain"), "small letters, digits and dashes"),
        (("--topology=v6e:4x8", "--restarts=-1"), "--restarts -1: at least 0 is needed"),
    ],
)
def test_jobsets_that_gke_would_refuse(arguments, words):
    ended = run(sys.executable, "launch/gke.py", "--name=a", "--image=i", "--claim=c", *arguments, "--", "--config=x")
    assert ended.returncode == 2 and words in ended.stderr


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_script_explains_itself():
    scripts = [
        p for p in (ROOT / "launch").glob("*.sh") if p.name not in ("environment.sh", "test.sh", "quickstart.sh")
    ]
    assert {p.name for p in scripts} >= {"local.sh", "stages.sh", "tpu_vm.sh"}
    for path in (*scripts, *(ROOT / "tests" / "slurm").glob("*.sh")):
        said = run("bash", str(path), "--help")
        assert said.returncode == 0 and f"{path.name}" in said.stdout, path
