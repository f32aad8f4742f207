"""Several processes are one run: they find each other or say why not, compute the same, and end together."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from practice import practice

from radfm_jax.checkpoints import run_directory
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFMConfig
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.runtime import distributed
from radfm_jax.runtime.distributed import ProcessInfo, StartError, meet
from radfm_jax.training import display
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[1]
# Programs of 1, 2 and 4 processes differ in how they add up gradients over the network, by a bit of float32 or two.
# Largest difference of a loss over 16 steps that was measured: 9.5e-7, at losses of 4 to 6.
LOSS_BOUND = 1e-5
PATIENCE = 900  # seconds, for what has no limit of its own: compiling, on a machine with other things to do


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- which process is this? -------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OURS = {"RADFM_COORDINATOR": "a:1", "RADFM_PROCESSES": "3", "RADFM_PROCESS": "2"}


def place(environ, *flags):
    """distributed.place, of flags in JAX's sight of an environment."""
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION"))]:
            patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        return distributed.process_info(parser.parse_args(flags), environ)


@pytest.mark.parametrize(
    "environ, flags, expected",
    [
        ({}, (), None),
        (OURS, (), ProcessInfo("a:1", 3, 2, "the environment")),
        (OURS, ("--process", "0"), ProcessInfo("a:1", 3, 0, "flags")),
        (OURS, ("--processes", "1"), None),
        (SLURM, (), ProcessInfo("node03:61517", 2, 1, "SLURM", (0,))),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}, (), ProcessInfo("node03:61517", 2, 1, "SLURM", (0, 1))),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (), None),
        (SLURM, ("--processes", "1"), None),
        ({**SLURM, **OURS}, (), ProcessInfo("a:1", 3, 2, "the environment")),
    ],
)
def test_which_process_this_is(environ, flags, expected):
    assert place(environ, *flags) == expected


@pytest.mark.parametrize(
    "environ, flags, words",
    [
        (
            {},
            ("--processes", "4"),
            r"--processes .* is 4, but there is no --coordinator .* and no --process \(RADFM_PROC",
        ),
        ({**OURS, "RADFM_PROCESS": "3"}, (), r"RADFM_PROCESS\) is 3, of 3 processes: give 0 to 2"),
        ({**OURS, "RADFM_PROCESSES": "x"}, (), "RADFM_PROCESSES and RADFM_PROCESS must be numbers"),
        ({**OURS, "RADFM_COORDINATOR": "here"}, (), "is 'here': give HOST:PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), "looks like Open MPI, but JAX does not find the coordinator: give --coord"),
    ],
)
def test_a_place_that_cannot_be(environ, flags, words):
    with pytest.raises((ValueError, StartError), match=words):
        place(environ, *flags)


# --- all of them in one place -----------------------------------------------------------------------------------------


def gather(hellos, timeout=20.0, port=None):
    """What `meet` brings to each of [(process, processes, facts)], each in a thread: None or its exception."""
    port, found = port or free_port(), {}

    def one(number, process, processes, facts):
        try:
            found[number] = meet(ProcessInfo(f"127.0.0.1:{port}", processes, process, "flags"), facts, timeout)
        except Exception as e:
            found[number] = e

    threads = [threading.Thread(target=one, args=(n, *hello)) for n, hello in enumerate(hellos)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[n] for n in range(len(hellos))]


def test_they_meet():
    assert gather([(i, 8, {"config": {"batch": 4}}) for i in range(8)]) == [None] * 8


@pytest.mark.parametrize(
    "hellos, words",
    [
        ([(0, 4), (2, 4)], r"processes 1, 3 of 4 did not come to 127.0.0.1:\d+ within 1.5 s; there are: 0 \(.*, pid "),
        (
            [(0, 2), (1, 3)],
            r"process 1 \(.*\) was started as one of 3 processes, process 0 \(.*\) as one of 2: give all",
        ),
        ([(0, 3), (1, 3), (1, 3)], "two processes say that they are process 1 of 3: .*give each its own number"),
    ],
)
def test_who_is_missing_or_wrong_is_said_to_all(hellos, words):
    began = time.monotonic()
    for e in gather([(*hello, {}) for hello in hellos], timeout=1.5):
        with pytest.raises(StartError, match=words):
            raise e
    assert time.monotonic() - began < 10


def test_without_process_0():
    (e,) = gather([(1, 2, {})], timeout=0.5)
    with pytest.raises(StartError, match="did not reach process 0 within 0.5 s .* Was process 0 started, on 127.0.0.1"):
        raise e


def test_a_port_that_another_program_has():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for e, words in zip(
            gather([(0, 2, {}), (1, 2, {})], 0.5, port),
            ("cannot listen at port .*Another program has it, or an earlier run", "some other program has that port"),
            strict=True,
        ):
            with pytest.raises(StartError, match=words):
                raise e


def test_whoever_else_calls_is_not_heeded():
    """A port scanner's connection, and one that says something else, before and between the processes."""
    port = free_port()

    def call():
        for said in (b"", b"GET / HTTP/1.0\r\n\r\n", b'{"process": 1}\n', b"[1]\n"):
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(said)
                    break
                time.sleep(0.02)

    caller = threading.Thread(target=call)
    caller.start()
    late = threading.Timer(0.5, lambda: found.extend(gather([(1, 2, {})], port=port)))
    found: list = []
    late.start()
    assert gather([(0, 2, {})], port=port) == [None]
    late.join()
    caller.join()
    assert found == [None]


def test_what_differs_is_named_in_all():
    one = {"config": {"train": {"batch": 8, "steps": 1}}, "versions": {"jax": "1"}, "source code": "a" * 64}
    other = {"config": {"train": {"batch": 4}}, "versions": {"jax": "1"}, "source code": "b" * 64}
    for e in gather([(0, 3, one), (1, 3, other), (2, 3, one)]):
        assert isinstance(e, ValueError)
        assert str(e).splitlines() == [
            "the processes would not run the same:",
            "  config.train.batch is 8 in processes 0, 2, 4 in process 1",
            "  config.train.steps is 1 in processes 0, 2, not there in process 1",
            f'  source code is "{"a" * 11}...{"a" * 7}" in processes 0, 2, "{"b" * 11}...{"b" * 7}" in process 1',
        ]


# --- real processes ---------------------------------------------------------------------------------------------------

STEPS = 16
MODEL = RadFMConfig(
    ViTConfig(width=24, num_layers=1, num_heads=2, head_dim=8, mlp_width=16, dropout=0.1),
    PerceiverConfig(width=24, num_layers=1, num_heads=2, head_dim=8, num_latents=4),
    DecoderConfig(vocab_size=512, width=16, mlp_width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8),
)


class Processes:
    """Starts trainings through distributed_child.py."""

    def __init__(self, directory: Path):
        self.directory, self.number = directory, 0
        data = practice(
            directory,
            train=10,
            test=4,
            num_latents=4,
            text_length=128,
            vision_rows=1,
            patch_length=8,
            planes=64,
            scans=3,
        )
        experiment = Experiment(
            MODEL,
            data,
            TrainConfig(steps=STEPS, batch=4, remat="none", log_every=1, eval_every=8, eval_batches=2, chunk=64),
            OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
            checkpoint=CheckpointConfig(save_every=4, keep_last=99),
        )
        silent = dataclasses.replace(experiment, data=dataclasses.replace(data, test={}))
        for name, config in (("evaluated", experiment), ("silent", silent)):
            (directory / f"{name}.py").write_text(
                "import json\nfrom ml_collections import ConfigDict\ndef get_config():\n"
                f"    return ConfigDict(json.loads({json.dumps(config.to_dict())!r}), convert_dict=True).lock()\n"
            )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RADFM_")}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("distributed_child.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def ask(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, workdir: Path, processes: int, config="silent", *, pace=0.0) -> list[int]:
        """Four devices in so many processes; their pids."""
        port, pids = free_port(), []
        self.number += 1
        for i in range(processes):
            several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(i)]
            arguments = [f"--config={self.directory / config}.py", f"--workdir={workdir}", "--peer-timeout=5"]
            pids.append(
                self.ask(
                    arguments=arguments + several * (processes > 1),
                    devices=4 // processes,
                    pace=pace,
                    cache=str(self.directory / "cache"),
                    output=str(self.directory / f"console{self.number}.{i}"),
                )  # fmt: skip
            )
        return pids

    def end(self, pids, timeout: float) -> list[int | None]:
        """Exit codes; None for those that have not ended in time, which are killed."""
        codes: dict[int, int] = {}
        until = time.monotonic() + timeout
        while len(codes) < len(pids) and time.monotonic() < until:
            time.sleep(0.05)
            for pid in pids:
                if pid not in codes and (code := self.ask(pid=pid)) is not None:
                    codes[pid] = code
        for pid in set(pids) - set(codes):
            os.kill(pid, signal.SIGKILL)
            while self.ask(pid=pid) is None:
                time.sleep(0.05)
        return [codes.get(pid) for pid in pids]

    def console(self, process: int) -> str:
        return (self.directory / f"console{self.number}.{process}").read_text()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    found = Processes(tmp_path_factory.mktemp("distributed"))
    yield found
    found.server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def whole(processes):
    """An unbroken run of one process."""
    workdir = processes.directory / "whole"
    assert processes.end(processes.start(workdir, 1), PATIENCE) == [0], processes.console(0)
    return workdir


@pytest.fixture(scope="module")
def evaluated(processes):
    """The same, with evaluations on the way."""
    workdir = processes.directory / "evaluated"
    assert processes.end(processes.start(workdir, 1, "evaluated"), PATIENCE) == [0], processes.console(0)
    return workdir


def losses(workdir: Path) -> list[tuple]:
    """(step, what, value) in the order of metrics.jsonl."""
    return [
        (line["step"], name, line[name])
        for line in display.read(workdir)
        for name in ("train/loss", "eval/all/loss")
        if name in line
    ]


def rows(workdir: Path) -> dict[int, list]:
    """The rows of the global batch of each step: those of process 0, of process 1, ..., however many it had."""
    found: dict[int, list] = {}
    for path in sorted((workdir / "rows").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            said = json.loads(line)
            found.setdefault(said["step"], []).extend(said["rows"])
    return found


def assert_same_run(workdir: Path, whole: Path) -> None:
    assert rows(workdir) == rows(whole)
    mine, theirs = losses(workdir), losses(whole)
    assert [x[:2] for x in mine] == [x[:2] for x in theirs]
    largest = max(abs(a[2] - b[2]) for a, b in zip(mine, theirs, strict=True))
    print(f"largest difference of a loss: {largest:.2g}")
    assert largest < LOSS_BOUND


def wait_for_step(workdir: Path, step: int, processes: Processes) -> None:
    until = time.monotonic() + PATIENCE
    while not any(line["step"] >= step for line in read(workdir)):
        assert time.monotonic() < until, processes.console(0)
        time.sleep(0.05)


def read(workdir: Path) -> list[dict]:
    """display.read while somebody writes."""
    with contextlib.suppress(ValueError):
        return display.read(workdir)
    return []


def test_2_and_then_4_processes_interrupted_are_the_run_of_one(processes, whole, tmp_path):
    """One run: two processes, one of which is told to end; then four, of which the first is killed; then two, of which
    the second is stopped; then one, to the end. Each goes on from what the others saved."""
    run = tmp_path / "run"
    pids = processes.start(run, 2, pace=0.2)
    wait_for_step(run, 2, processes)
    os.kill(pids[1], signal.SIGTERM)
    assert processes.end(pids, PATIENCE) == [75, 75], processes.console(0)
    saved = run_directory.steps(run)[-1]
    assert 2 <= saved < STEPS - 4
    assert f"process 1 got SIGTERM: saved step {saved}" in processes.console(0)
    assert f"process 1 got SIGTERM: saved step {saved}" in (run / "logs" / "1.log").read_text()
    assert processes.console(1) == ""

    pids = processes.start(run, 4, pace=0.2)
    wait_for_step(run, saved + 2, processes)
    os.kill(pids[0], signal.SIGKILL)
    began = time.monotonic()
    assert processes.end(pids, 30) == [-signal.SIGKILL, 75, 75, 75], (run / "logs" / "1.log").read_text()
    print(f"killed: {time.monotonic() - began:.1f} s")
    for i in (1, 2, 3):
        log = (run / "logs" / f"{i}.log").read_text()
        assert f"parameters of step {saved} are equal in process {i}" in log
        assert "process 0 gives no sign of life (--peer-timeout 5): killed, stopped, or cut off. The run ends" in log

    logged = max(line["step"] for line in read(run))
    pids = processes.start(run, 2, pace=0.2)
    wait_for_step(run, logged + 1, processes)
    os.kill(pids[1], signal.SIGSTOP)
    assert processes.end(pids[:1], 30) == [75], processes.console(0)
    processes.end(pids[1:], 0)
    assert "process 1 gives no sign of life (--peer-timeout 5)" in (run / "logs" / "0.log").read_text()

    saved = run_directory.steps(run)[-1]
    assert processes.end(processes.start(run, 1), PATIENCE) == [0], processes.console(0)
    assert f"parameters of step {saved} are equal in process 0" in processes.console(0)
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_whole_run_of_several_processes(count, processes, evaluated, tmp_path):
    run = tmp_path / "run"
    assert processes.end(processes.start(run, count, "evaluated"), PATIENCE) == [0] * count, processes.console(0)
    assert_same_run(run, evaluated)
    assert sum(what == "eval/all/loss" for _, what, _ in losses(run)) == 2
    for i in range(count):
        assert f"step {STEPS}/{STEPS}  loss" in (run / "logs" / f"{i}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process(number, victim, processes, whole, tmp_path):
    run = tmp_path / "run"
    pids = processes.start(run, 2, pace=1.0)
    wait_for_step(run, 5, processes)
    while not run_directory.steps(run):  # step 4 is being written
        time.sleep(0.05)
    os.kill(pids[victim], number)
    began = time.monotonic()
    assert processes.end([pids[1 - victim]], 30) == [75]
    print(f"ended after {time.monotonic() - began:.1f} s")
    processes.end([pids[victim]], 0)
    log = (run / "logs" / f"{1 - victim}.log").read_text()
    assert f"process {victim} gives no sign of life (--peer-timeout 5)" in log and "most recent call first" in log
    saved = run_directory.steps(run)[-1]
    assert processes.end(processes.start(run, 4), PATIENCE) == [0] * 4
    assert f"parameters of step {saved} are equal in process 3" in (run / "logs" / "3.log").read_text()
    assert_same_run(run, whole)
