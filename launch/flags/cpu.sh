# shellcheck shell=bash
# Environment of a CPU machine: to try a cluster's launch without accelerators. Sourced.
export JAX_PLATFORMS=cpu # or JAX would look for accelerators first
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1} # devices a process
