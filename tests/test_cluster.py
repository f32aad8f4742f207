"""Which process of a run this is: from flags, the environment, or a detected cluster."""

import argparse
import os

import pytest

from radfm_jax.runtime.cluster import ProcessInfo, StartError, add_arguments, process_info

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OURS = {"RADFM_COORDINATOR": "a:1", "RADFM_PROCESSES": "3", "RADFM_PROCESS": "2"}


def detect(environ, *flags):
    """Call `process_info` with an environment that JAX sees as well."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION"))]:
            patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        return process_info(parser.parse_args(flags), environ)


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
def test_process_info(environ, flags, expected):
    assert detect(environ, *flags) == expected


@pytest.mark.parametrize(
    "environ, flags, words",
    [
        (
            {},
            ("--processes", "4"),
            r"--processes .* is 4, but --coordinator .* and --process \(RADFM_PROCESS\) not set: set all three",
        ),
        ({**OURS, "RADFM_PROCESS": "3"}, (), r"RADFM_PROCESS\) must be 0 to 2 for 3 processes \(got 3\)"),
        ({**OURS, "RADFM_PROCESSES": "x"}, (), "RADFM_PROCESSES and RADFM_PROCESS must be integers"),
        ({**OURS, "RADFM_COORDINATOR": "here"}, (), r"must be HOST:PORT \(got 'here'\)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), "looks like Open MPI, but JAX does not find the coordinator: set --coord"),
    ],
)
def test_invalid_process_info(environ, flags, words):
    with pytest.raises((ValueError, StartError), match=words):
        detect(environ, *flags)
