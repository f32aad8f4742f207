# shellcheck shell=bash
# Environment for CPUs, to try a cluster launch without accelerators. Sourced.
export JAX_PLATFORMS=cpu # do not search for accelerators
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1} # devices per process
